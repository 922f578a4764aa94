"""The persistent kernel's workers on emulated Hopper CTAs (simt90/): a model's weights packed as for a GPU, steps run one behind the other.

    workers = EmulatedWorkers(folder, tmp_path, num_workers=3)           # 17 steps of up to 133 rows: 4 s
    steps = [workers.plan([Request(tokens, 0, request_idx=0)]), ...]      # step_runner.Request
    logits, sampled = workers.run_steps(steps, seed=1)                    # [steps, max_batch, vocab] f32, [steps, max_batch]
Used by tests/host/test_worker_sm90_simt.py.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.gpu_kernel import kernel_shape
from blinkimp.host.gpu_memory import allocate_engine
from blinkimp.host.gpu_weights import GpuTarget
from blinkimp.host.memory_plan import EngineSizes
from blinkimp.host.program import load_model
from blinkimp.host.step_costs import Matrix
from tests.gpu.step_runner import StepRunner
from tests.support import ROOT

SIMT90 = ROOT / "tests" / "host" / "simt90"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", *WARNINGS]
ALIGNMENT = 256


def build(source: Path, library: Path, defines: dict[str, str], device: Path) -> ctypes.CDLL:
    folders = [f"-I{folder}" for folder in (SIMT90, ROOT / "tests" / "host" / "simt", device)]
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    command = ["g++", *FLAGS, *macros, *folders, "-o", str(library), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    return ctypes.CDLL(str(library))


class EmulatedContext:
    """What GpuTarget and allocate_engine() want of a GpuContext, in host memory. Fresh memory is poison."""

    def __init__(self, pack: ctypes.CDLL) -> None:
        self._pack = pack
        self._memory: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, num_bytes: int, what: str, *, zero: bool = False) -> int:
        memory = np.full(num_bytes + 2 * ALIGNMENT, 0 if zero else 0xFF, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % ALIGNMENT
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        del self._memory[address]

    def view(self, address: int, dtype: Any, count: int) -> NDArray[Any]:
        return np.frombuffer((ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address), dtype)

    def fill(self, address: int, value: int, num_bytes: int) -> None:
        ctypes.memset(address, value, num_bytes)

    def upload(self, address: int, values: NDArray[Any]) -> None:
        contiguous = np.ascontiguousarray(values)
        ctypes.memmove(address, contiguous.ctypes.data, contiguous.nbytes)

    def start_upload(self, address: int, values: NDArray[Any], stream: Any) -> None:
        self.upload(address, values)

    def load_kernel(self, cubin: bytes, name: str, shared_memory_bytes: int = 0) -> str:
        return name

    def launch(
        self, function: str, num_blocks: int, num_threads: int, arguments: Sequence[Any], *, stream: Any = None
    ) -> None:
        assert function == "pack_weights"
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._pack.bk_pack_weights(num_blocks, num_threads, addresses)

    def register_host(self, address: int, num_bytes: int) -> int:
        return address

    def unregister_host(self, address: int) -> None: ...
    def create_event(self) -> None: ...
    def record_event(self, event: Any, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def destroy_event(self, event: Any) -> None: ...
    def create_stream(self) -> None: ...
    def synchronize(self, stream: Any = None) -> None: ...


class EmulatedWorkers(StepRunner):
    """StepRunner's plans and pages, on emulated CTAs. device: the folder of the sources."""

    def __init__(
        self, folder: Path, build_folder: Path, num_workers: int, *, device: Path = ROOT / "device",
        max_step_tokens: int = 384, max_batch: int = 16,
    ) -> None:  # fmt: skip
        self.config = read_model_config(folder)
        self.num_workers = num_workers
        self.shape = kernel_shape(self.config, num_workers)
        context = EmulatedContext(build(SIMT90 / "pack_weights_cpu.cpp", build_folder / "pack.so", {}, device))
        self.context: Any = context
        self._library = build(
            SIMT90 / "worker_sm90_simt.cpp", build_folder / "workers.so", self.shape.defines(), device
        )
        target = GpuTarget(self.context, self.config, b"", num_workers)
        self.model = load_model(folder, target, compute="bf16")
        target.finish()
        max_context = self.config.max_positions
        self.sizes = EngineSizes(
            num_queue_pairs=0, num_requests=max_batch, max_requests_per_queue_pair=max_batch, max_batch=max_batch,
            max_step_tokens=max_step_tokens, prefill_chunk_tokens=max_step_tokens, max_context=max_context,
            max_pages_per_request=-(-max_context // abi.PAGE_TOKENS), num_pages=512,
        )  # fmt: skip
        self.params = allocate_engine(self.context, self.config, self.sizes, self.model.dims, self.model.ops)
        self.params["num_workers"] = num_workers
        self.params["spin_budget_ns"] = 2_000_000_000
        self.params["engine_page"] = context.allocate(abi.ENGINE_PAGE.itemsize, "engine page", zero=True)
        self.page_tables = np.zeros((max_batch, self.sizes.max_pages_per_request), np.uint32)
        self.free_pages = list(np.random.default_rng(1).permutation(self.sizes.num_pages))
        self.num_pages_of, self.num_shared_of = np.zeros(max_batch, int), np.zeros(max_batch, int)

    def close(self) -> None: ...

    def wide_time_ns(self, matrix: Matrix, rows: int, num_workers: int) -> int:
        """What the rule of gemm_wide_tiling.cuh expects."""
        params, op = np.zeros(1, abi.ENGINE_PARAMS), np.zeros(1, abi.OP)
        params["num_workers"] = num_workers
        op["in_features"], op["out_features"] = matrix.in_features, matrix.out_features
        op["tile_rows"], op["num_tiles"] = matrix.tile_rows, -(-matrix.out_features // matrix.tile_rows)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (params, op))
        return int(self._library.bk_wide_time_ns(*pointers, rows))

    def run_steps(
        self, plans: Sequence[NDArray[np.uint8]], seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
        """One launch; the next step begins when the last worker has arrived. seed: of the order in which warps, CTAs and copies go on."""
        self.context.upload(int(self.params["page_tables"][0]), self.page_tables)
        logits = np.full((len(plans), self.sizes.max_batch, self.config.vocab), np.nan, np.float32)
        sampled = np.zeros((len(plans), self.sizes.max_batch), np.uint32)
        steps = np.ascontiguousarray(np.stack(plans))
        self._library.bk_worker_sm90_simt(
            ctypes.c_void_p(self.params.ctypes.data), ctypes.c_void_p(steps.ctypes.data), len(plans), seed,
            ctypes.c_void_p(logits.ctypes.data), ctypes.c_void_p(sampled.ctypes.data),
        )  # fmt: skip
        return logits, sampled
