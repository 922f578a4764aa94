"""The GPU's WeightTarget: matrices packed into the tiles that the weight producer streams, vectors in the order the epilogues read.

Layout and row order are those of device/gemm.cuh and device/packed_order.cuh: [tile][k / 64][tile_rows][64] bf16, 128-byte swizzle; the two
rows of a q or k head that rotate together are neighbours, those of O and down stand so that a thread's products are four columns side by side. Threads read rows into pinned staging buffers (host/weight_stream.py); from there the copy
engine brings them to the GPU, which packs them, while the threads read on.
Called by host/gpu_device.py. Test: pytest -m gpu tests/gpu/test_gemm.py; speed: python tools/bench_load.py
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.gpu_driver import GpuContext
from blinkimp.host.model_config import ModelConfig, refusal
from blinkimp.host.weight_stream import WeightStream
from blinkimp.host.weights import MatrixSource, PlacedMatrix, Weights
from blinkimp.ring_abi import DType, OpKind

# Tile widths to choose from, per kind; the kernel is compiled for the chosen ones (host/gpu_kernel.py). 32 for PROJECT: a tile is one group
# of the sums of squares.
TILE_ROWS: Final = {
    OpKind.QKV: (48, 64, 128),
    OpKind.PROJECT: (32,),
    OpKind.GATE_UP: (48, 64, 112),
    OpKind.LM_HEAD: (112,),
}
HEAD_DIMS: Final = (64, 128)
SLICE_COLUMNS: Final = 64
PACK_THREADS: Final = 256
NUM_STAGING_BUFFERS: Final = 4
STAGING_BYTES: Final = 32 << 20  # of one buffer


def choose_tile_rows(kind: OpKind, out_features: int, num_workers: int, head_rows: int = 0) -> int:
    """The width for which the busiest SM has the fewest rows; the widest of equals. head_rows: the only width allowed (per-head norms), or 0."""
    widths = (head_rows,) if head_rows else TILE_ROWS[kind]

    def busiest_rows(width: int) -> int:
        num_tiles = -(-out_features // width)
        return -(-num_tiles // num_workers) * width

    return min(widths, key=lambda width: (busiest_rows(width), -width))


def rotated_order(head_dim: int) -> NDArray[np.int64]:
    """[head_dim] source row of each packed row of a q or k head: 0, h, 1, h + 1, ... with h = head_dim / 2."""
    return np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)


def grouped_order(num_rows: int) -> NDArray[np.int64]:
    """[num_rows] source row of each packed row of O or down: of every 16, 0, 1, 4, 5, 8, 9, 12, 13, then 2, 3, 6, 7 and so on (packed_order.cuh)."""
    in_group = np.arange(16).reshape(4, 2, 2).transpose(1, 0, 2).reshape(-1)
    return (np.arange(0, num_rows, 16)[:, None] + in_group).reshape(-1)


class PinnedBuffer:
    """Staging memory that the copy engine reads; implements weight_stream.Buffer."""

    def __init__(self, context: GpuContext) -> None:
        self._context = context
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
        context.register_host(self.memory.ctypes.data, STAGING_BYTES)
        self._copied = context.create_event()

    def wait(self) -> None:
        self._context.wait_event(self._copied)

    def start_upload(self, address: int, values: NDArray[Any], stream: Any) -> None:
        """values: a part of `memory`."""
        self._context.start_upload(address, values, stream)
        self._context.record_event(self._copied, stream)

    def close(self) -> None:
        self._context.destroy_event(self._copied)
        self._context.unregister_host(self.memory.ctypes.data)


class GpuTarget:
    """Device memory of one GPU; what it places lives as long as the context. Placed matrices are there once finish() has returned."""

    def __init__(self, context: GpuContext, config: ModelConfig, pack_cubin: bytes, num_workers: int) -> None:
        for name, got in (
            ("hidden_size", config.hidden),
            ("intermediate_size", config.intermediate),
            ("query features", config.query_features),
        ):
            if got % SLICE_COLUMNS:
                raise refusal(f"{name} on the GPU", got, f"a multiple of {SLICE_COLUMNS}", "use device=emulated")
        if config.head_dim not in HEAD_DIMS:
            raise refusal("head_dim on the GPU", config.head_dim, f"one of {HEAD_DIMS}", "use device=emulated")
        self._context, self._config, self._num_workers = context, config, num_workers
        self._pack = context.load_kernel(pack_cubin, "pack_weights")
        self._stream = (
            context.create_stream()
        )  # apart from the context's: the synchronous calls of place_f32() do not wait for it
        # One suffices: copies into it and packing out of it take turns in the stream, and packing costs a tenth of the copy.
        self._staging = context.allocate(STAGING_BYTES, "staging of weights")
        self._buffers = [PinnedBuffer(context) for _ in range(NUM_STAGING_BUFFERS)]
        self._reader = WeightStream(self._buffers)
        self.num_bytes = 0

    def finish(self) -> None:
        """Returns when every matrix is in place; gives the staging memory back."""
        self._reader.finish()
        self._context.synchronize(self._stream)
        self.close()

    def close(self) -> None:
        """Ends the reading threads and gives the staging memory back, also where a load was refused half way. Idempotent."""
        self._reader.close()
        buffers, self._buffers = self._buffers, []
        for buffer in buffers:
            buffer.wait()
            buffer.close()
        if buffers:
            self._context.free(self._staging)

    def place_matrix(self, source: MatrixSource) -> PlacedMatrix:
        if source.dtype != DType.BF16:
            raise refusal("compute dtype on the GPU", source.dtype.name, "bf16", "leave compute_dtype at auto or bf16")
        return self._place_rows(source) if source.kind == OpKind.EMBED else self._place_tiles(source)

    def place_f32(self, name: str, values: NDArray[np.float32]) -> int:
        config = self._config
        if name.endswith((".qkv.bias", ".q_norm.weight", ".k_norm.weight")):
            num_rotated = config.query_features + config.kv_features if name.endswith(".qkv.bias") else config.head_dim
            values = values.copy()
            heads = values[:num_rotated].reshape(-1, config.head_dim)
            values[:num_rotated] = heads[:, rotated_order(config.head_dim)].reshape(-1)
        address = self._context.allocate(values.nbytes, name)
        self._context.upload(address, values)
        self.num_bytes += values.nbytes
        return address

    def _place_rows(self, source: MatrixSource) -> PlacedMatrix:
        address = self._context.allocate(source.num_bytes, source.name)

        def upload(buffer: PinnedBuffer, begin: int, rows: Weights) -> None:
            buffer.start_upload(address + begin * source.in_features * 2, rows, self._stream)

        self._reader.add(source, upload)
        self.num_bytes += source.num_bytes
        return PlacedMatrix(address)

    def _place_tiles(self, source: MatrixSource) -> PlacedMatrix:
        config = self._config
        is_qkv = source.kind == OpKind.QKV
        head_rows = config.head_dim if is_qkv and config.qk_norm else 0
        tile_rows = choose_tile_rows(source.kind, source.out_features, self._num_workers, head_rows)
        num_tiles = -(-source.out_features // tile_rows)
        num_bytes = num_tiles * tile_rows * source.in_features * 2
        address = self._context.allocate(num_bytes, source.name)
        if num_tiles * tile_rows != source.out_features:
            self._context.fill(address, 0, num_bytes)  # rows past out_features are zero
        num_rotated = config.query_features + config.kv_features if is_qkv else 0
        is_grouped = source.kind == OpKind.PROJECT
        self._reader.add(source, functools.partial(self._pack_rows, address, tile_rows, num_rotated, is_grouped))
        self.num_bytes += num_bytes
        return PlacedMatrix(address, 1, tile_rows, num_tiles)

    def _pack_rows(
        self, address: int, tile_rows: int, num_rotated: int, is_grouped: bool, buffer: PinnedBuffer, begin: int,
        rows: Weights,
    ) -> None:  # fmt: skip
        buffer.start_upload(self._staging, rows, self._stream)
        num_chunks = rows.size // 8
        arguments: list[Any] = [ctypes.c_uint64(self._staging), ctypes.c_uint64(address)]
        numbers = (begin, len(rows), rows.shape[1], tile_rows, num_rotated, self._config.head_dim, is_grouped)
        arguments += [ctypes.c_uint32(number) for number in numbers]
        num_blocks = -(-num_chunks // PACK_THREADS)
        self._context.launch(self._pack, num_blocks, PACK_THREADS, arguments, stream=self._stream)
