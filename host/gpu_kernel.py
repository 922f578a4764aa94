"""Which persistent kernel a model needs on a GPU: source, compile-time constants and launch geometry.

Two kernels run the same program under the same director: `hopper` (device/persistent_kernel.cu: wgmma, bulk copies) on compute capability
9.0, `portable` (device/portable/portable_kernel.cu: mma.sync, cp.async) on everything from 8.0 on. Each is compiled for the model's head dimension
and for the tile widths that fill this GPU's SMs with its matrices.
Called by host/gpu_device.py, `blinkimp compile` and tests/compile/test_kernels.py. Test: pytest tests/null/test_gpu_kernel.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from blinkimp.host.compile import DEFAULT_ARCH
from blinkimp.host.gpu_weights import choose_tile_rows
from blinkimp.host.model_config import ModelConfig
from blinkimp.ring_abi import OpKind

KernelKind = Literal["hopper", "portable"]
KernelChoice = Literal["auto", "hopper", "portable"]

KERNEL_SOURCE: Final = "persistent_kernel.cu"
PORTABLE_SOURCE: Final = "portable/portable_kernel.cu"
KERNEL_NAME: Final = "persistent_kernel"  # of both
PACK_SOURCE: Final = "pack_weights.cu"
STEP_SOURCE: Final = "step_kernel.cu"  # where the host schedules: before each step
BEGIN_STEP_NAME: Final = "begin_step"
WORKER_THREADS: Final = 384
PORTABLE_THREADS: Final = 256  # kComputeThreads of device/portable/gemm.cuh
# kSharedMemoryBytes of device/worker_memory.cuh, which asserts it; a test compares the two.
SHARED_MEMORY_BYTES: Final = 232_208
SHARED_BESIDE_SCRATCH_BYTES: Final = 1024  # WorkerShared of device/portable/worker.cuh, which asserts that it fits

HOPPER: Final = (9, 0)
LEAST_CAPABILITY: Final = (8, 0)  # mma.sync of bf16, cp.async
# Shared memory that one CTA may have, in KiB, by compute capability (CUDA programming guide); all others have the smallest at least.
SHARED_MEMORY_KIB: Final = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
LEAST_SHARED_MEMORY_KIB: Final = 99
SCRATCH_STEP_BYTES: Final = 32 << 10


class KernelChoiceError(RuntimeError):
    """No kernel runs on this GPU, or not the one asked for."""


@dataclass(frozen=True)
class KernelShape:
    """One kernel of one model: what is compiled, and how it is launched."""

    head_dim: int
    qkv_tile_rows: int
    gate_up_tile_rows: int
    kind: KernelKind = "hopper"
    scratch_bytes: int = 0  # portable: shared memory that the ops share

    @property
    def source(self) -> str:
        return KERNEL_SOURCE if self.kind == "hopper" else PORTABLE_SOURCE

    @property
    def num_threads(self) -> int:
        return WORKER_THREADS if self.kind == "hopper" else PORTABLE_THREADS

    @property
    def shared_memory_bytes(self) -> int:
        return SHARED_MEMORY_BYTES if self.kind == "hopper" else self.scratch_bytes + SHARED_BESIDE_SCRATCH_BYTES

    def defines(self) -> dict[str, str]:
        """The macros of device/worker.cuh and device/portable/worker.cuh."""
        defines = {
            "BK_HEAD_DIM": str(self.head_dim),
            "BK_QKV_TILE_ROWS": str(self.qkv_tile_rows),
            "BK_GATE_UP_TILE_ROWS": str(self.gate_up_tile_rows),
        }
        return defines if self.kind == "hopper" else defines | {"BK_SCRATCH_BYTES": str(self.scratch_bytes)}


def capability_of(arch: str) -> tuple[int, int]:
    """sm_90a -> (9, 0). Raises KernelChoiceError."""
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", arch)
    if found is None:
        raise KernelChoiceError(
            f"architecture: got {arch!r}, expected a name such as sm_80, sm_89 or sm_90a; see --arch"
        )
    return int(found[1]), int(found[2])


def choose_kernel(choice: KernelChoice, capability: tuple[int, int], gpu_name: str) -> KernelKind:
    """The kernel for a GPU. Raises KernelChoiceError, naming the GPU."""
    has = f"{gpu_name} has compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        raise KernelChoiceError(f"{has}, expected 8.0 or newer (Ampere); use device=emulated")
    if choice == "hopper" and capability != HOPPER:
        raise KernelChoiceError(f"{has}, but kernel=hopper needs 9.0 (wgmma); use kernel=auto or kernel=portable")
    if choice == "auto":
        return "hopper" if capability == HOPPER else "portable"
    return choice


def scratch_bytes(capability: tuple[int, int]) -> int:
    """What the ops of the portable kernel share, as much as the architecture has."""
    limit_bytes = SHARED_MEMORY_KIB.get(capability, LEAST_SHARED_MEMORY_KIB) << 10
    return (limit_bytes - SHARED_BESIDE_SCRATCH_BYTES) // SCRATCH_STEP_BYTES * SCRATCH_STEP_BYTES


def kernel_shape(
    config: ModelConfig, num_workers: int, kind: KernelKind = "hopper", arch: str = DEFAULT_ARCH
) -> KernelShape:
    """The kernel for a model on a GPU with num_workers worker SMs; the same widths as GpuTarget packs."""
    qkv_rows = config.query_features + 2 * config.kv_features
    qkv = choose_tile_rows(OpKind.QKV, qkv_rows, num_workers, config.head_dim if config.qk_norm else 0)
    gate_up = choose_tile_rows(OpKind.GATE_UP, 2 * config.intermediate, num_workers)
    scratch = 0 if kind == "hopper" else scratch_bytes(capability_of(arch))
    return KernelShape(config.head_dim, qkv, gate_up, kind, scratch)
