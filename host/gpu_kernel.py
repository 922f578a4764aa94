"""Which persistent kernel a model needs: compile-time constants and launch geometry, the twin of device/persistent_kernel.cu.

The kernel is compiled for the model's head dimension and for the tile widths that fill this GPU's SMs with its matrices.
Called by host/gpu_device.py, `blinkimp compile` and tests/compile/test_kernels.py. Test: pytest tests/null/test_gpu_kernel.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blinkimp.host.gpu_weights import choose_tile_rows
from blinkimp.host.model_config import ModelConfig
from blinkimp.ring_abi import OpKind

KERNEL_SOURCE: Final = "persistent_kernel.cu"
KERNEL_NAME: Final = "persistent_kernel"
PACK_SOURCE: Final = "pack_weights.cu"
WORKER_THREADS: Final = 384
# kSharedMemoryBytes of device/worker_memory.cuh, which asserts it; a test compares the two.
SHARED_MEMORY_BYTES: Final = 232_080


@dataclass(frozen=True)
class KernelShape:
    """The macros of device/worker.cuh."""

    head_dim: int
    qkv_tile_rows: int
    gate_up_tile_rows: int

    def defines(self) -> dict[str, str]:
        return {
            "BK_HEAD_DIM": str(self.head_dim),
            "BK_QKV_TILE_ROWS": str(self.qkv_tile_rows),
            "BK_GATE_UP_TILE_ROWS": str(self.gate_up_tile_rows),
        }


def kernel_shape(config: ModelConfig, num_workers: int) -> KernelShape:
    """The constants for a model on a GPU with num_workers worker SMs; the same widths as GpuTarget packs."""
    qkv_rows = config.query_features + 2 * config.kv_features
    qkv = choose_tile_rows(OpKind.QKV, qkv_rows, num_workers, config.head_dim if config.qk_norm else 0)
    gate_up = choose_tile_rows(OpKind.GATE_UP, 2 * config.intermediate, num_workers)
    return KernelShape(config.head_dim, qkv, gate_up)
