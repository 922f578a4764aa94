"""Runs device/gemm_wide.cuh on the GPU (kernels/gemm_wide_test.cu): packs weights and inputs, launches, reads sums and times.

    with WideRunner() as runner:
        ops = [runner.place(weights)]                     float32 [out, in] -> packed bf16 on the GPU
        result = runner.multiply(kernel, ops, inputs)     float32 [rows, in] -> (sums of the last op, ns of each op)
Used by tests/gpu/test_gemm_wide.py and tools/bench_gemm_wide.py.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.bf16 import bf16_from_f32
from blinkimp.host.gpu_kernel import SHARED_MEMORY_BYTES, WORKER_THREADS
from tests.gpu.gpu_harness import CompiledKernel, DeviceArray, KernelRunner, compile_kernel

SPIN_BUDGET_NS = 2_000_000_000
ROW_TILE = 64


def compile_wide(tile_rows: int, *, tokens: int = 0, stack: int = 0, options: tuple[str, ...] = ()) -> CompiledKernel:
    """tokens and stack force a tiling of gemm_wide_tiling.cuh; 0: its rule decides."""
    forced = [f"-DBK_WIDE_TOKENS={tokens}", f"-DBK_WIDE_STACK={stack}"] if tokens else []
    return compile_kernel("gemm_wide_test.cu", [f"-DTILE_ROWS={tile_rows}", *forced, *options])


def pack_tiles(values: NDArray[np.uint16], tile_rows: int) -> NDArray[np.uint16]:
    """[rows, columns] bits -> [tile][column / 64][tile_rows][64], 16-byte chunks exchanged by the 128-byte swizzle; rows past the end are zero."""
    rows, columns = values.shape
    num_tiles = -(-rows // tile_rows)
    padded = np.zeros((num_tiles * tile_rows, columns), np.uint16)
    padded[:rows] = values
    tiles = padded.reshape(num_tiles, tile_rows, columns // 64, 8, 8).transpose(0, 2, 1, 3, 4)
    chunks = np.arange(8)[None, :] ^ (np.arange(tile_rows)[:, None] % 8)  # [row, place] -> chunk
    return np.ascontiguousarray(tiles[:, :, np.arange(tile_rows)[:, None], chunks])


@dataclass(frozen=True)
class PlacedWeights:
    """A packed weight matrix on the GPU."""

    address: int
    in_features: int
    out_features: int
    tile_rows: int

    @property
    def num_tiles(self) -> int:
        return -(-self.out_features // self.tile_rows)

    def op(self) -> Any:
        """One record of abi.OP."""
        op = np.zeros(1, abi.OP)
        op["weight"], op["in_features"], op["out_features"] = self.address, self.in_features, self.out_features
        op["tile_rows"], op["num_tiles"], op["weight_layout"] = self.tile_rows, self.num_tiles, 1
        return op[0]


class WideRunner(KernelRunner):
    """A GPU context with what a worker's waits and faults need."""

    def __init__(self) -> None:
        super().__init__()
        self.num_workers = self.num_multiprocessors - 1
        self.params = np.zeros(1, abi.ENGINE_PARAMS)
        self.params["spin_budget_ns"] = SPIN_BUDGET_NS
        self.page = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)  # where a fault would be recorded
        self.params["engine_page"] = self.context.register_host(self.page.ctypes.data, self.page.nbytes)
        self.params["director_state"] = self.zeros((abi.DIRECTOR_STATE_BYTES,), np.uint8).address
        self.grid_words = self.zeros((abi.GRID_WORDS_BYTES // 4,), np.uint32)
        self.params["grid_words"] = self.grid_words.address

    def __enter__(self) -> WideRunner:
        return self

    def place(self, bits: NDArray[np.uint16], tile_rows: int) -> PlacedWeights:
        packed = self.array(pack_tiles(bits, tile_rows))
        return PlacedWeights(packed.address, bits.shape[1], bits.shape[0], tile_rows)

    def launch(
        self, kernel: CompiledKernel, ops: list[PlacedWeights], inputs: DeviceArray, num_rows: int, output: DeviceArray,
        num_workers: int | None = None,
    ) -> NDArray[np.uint64]:  # fmt: skip
        """One launch that runs all ops on the same input; ns of each op between its grid barriers."""
        params = self.params.copy()
        params["num_workers"] = num_workers or self.num_workers
        op_array = self.array(np.array([op.op() for op in ops], abi.OP))
        params["ops"], params["num_ops"] = op_array.address, len(ops)
        times = self.zeros((len(ops) + 1,), np.uint64)
        self.grid_words.set(np.zeros(self.grid_words.shape, np.uint32))
        try:
            self.run(
                kernel, "gemm_wide_test", int(params["num_workers"][0]), WORKER_THREADS,
                [params, num_rows, inputs, output, times], SHARED_MEMORY_BYTES, cooperative=True,
            )  # fmt: skip
        except Exception as error:
            fault = self.page[: abi.ENGINE_PAGE.itemsize].view(abi.ENGINE_PAGE)[0]["fault"]
            record = dict(zip(abi.FAULT_RECORD.names or (), fault.tolist(), strict=True))
            raise AssertionError(f"{error}; fault record {record}") from error
        elapsed = np.diff(times.numpy())
        self.free(op_array, times)
        return elapsed

    def multiply(
        self, kernel: CompiledKernel, ops: list[PlacedWeights], bits: NDArray[np.uint16], num_workers: int | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """[rows, out] of the last op; every op before runs too, so that the rings are somewhere."""
        inputs = self.array(pack_tiles(bits, ROW_TILE))
        output = self.poisoned((len(bits), max(op.out_features for op in ops)), np.float32)
        self.launch(kernel, ops, inputs, len(bits), output, num_workers)
        columns = ops[-1].out_features
        sums = output.numpy().reshape(-1)[: len(bits) * columns].reshape(len(bits), columns)
        self.free(inputs, output)
        return sums

    def chain(self, kernel: CompiledKernel, op: PlacedWeights, bits: NDArray[np.uint16]) -> NDArray[np.float32]:
        """The sums by definition: gemm_chain of the same source."""
        inputs = self.array(pack_tiles(bits, ROW_TILE))
        output = self.poisoned((len(bits), op.out_features), np.float32)
        num_blocks = op.num_tiles * -(-len(bits) // ROW_TILE)
        arguments = [np.array([op.address], np.uint64), inputs, output, len(bits), op.in_features // 64]
        self.run(kernel, "gemm_chain", num_blocks, 128, [*arguments, op.num_tiles, op.out_features])
        sums = output.numpy()
        self.free(inputs, output)
        return sums


def random_bits(rng: np.random.Generator, rows: int, columns: int, scale: float = 1.0) -> NDArray[np.uint16]:
    return bf16_from_f32(scale * rng.standard_normal((rows, columns), dtype=np.float32))
