"""Where the program's weights go: the target protocol, what it is handed, and the CPU interpreter's target in host memory.

The builder (host/program.py) is the same for every device. It hands each matrix to a `WeightTarget` as a `MatrixSource`, which
reads rows on demand straight from the memory-mapped checkpoint, in the order Op.weight wants (QKV concatenated, gate and up
interleaved), so a target never needs the whole model twice.
Called by host/program.py. Test: pytest tests/null/test_checkpoint_weights.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from blinkimp.ring_abi import DType, OpKind

GATE_UP_GROUP_ROWS: Final = 8  # rows of gate, then of up, in turn (kOpGateUp)
ALIGN_BYTES: Final = 64  # a cache line, and a vector register of the CPU interpreter
READ_BYTES: Final = 16 << 20  # bytes converted at a time

Weights = NDArray[Any]  # float32, or uint16 that holds bf16 bits


class Tensor(Protocol):
    """One stored tensor, read on demand: host/checkpoint.py and host/dummy_weights.py make them."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, begin: int, end: int, dtype: DType) -> Weights:
        """Rows [begin, end) of the first axis, in dtype (bf16 as uint16)."""

    def read_into(self, begin: int, places: Sequence[Weights], dtype: DType) -> None:
        """Rows from `begin` on into places, one after the other: contiguous blocks of rows of dtype. Several threads may call it."""

    def view(self, dtype: DType) -> Weights | None:
        """The whole tensor without a copy, if it is stored in dtype."""


@dataclass(frozen=True)
class MatrixSource:
    """A weight matrix [out_features, in_features] of an op, assembled from stored tensors row by row."""

    name: str
    kind: OpKind
    layer: int
    dtype: DType
    parts: tuple[Tensor, ...]
    interleaved: bool = False  # two parts, in turns of GATE_UP_GROUP_ROWS rows; else parts one after the other

    @property
    def out_features(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1]

    @property
    def num_bytes(self) -> int:
        return self.out_features * self.in_features * item_bytes(self.dtype)

    def read_rows(self, begin: int, end: int) -> Weights:
        """Rows [begin, end) as [end - begin, in_features], float32 or bf16 bits in uint16."""
        rows = np.empty((end - begin, self.in_features), np.uint16 if self.dtype == DType.BF16 else np.float32)
        self.read_into(begin, rows)
        return rows

    def read_into(self, begin: int, rows: Weights) -> None:
        """Rows from `begin` on into [num_rows, in_features], contiguous. Several threads may call it."""
        for part, (part_begin, places) in zip(self.parts, self._places(begin, rows), strict=True):
            if places:
                part.read_into(part_begin, places, self.dtype)

    def view(self) -> Weights | None:
        """The matrix without a copy, where it is one stored tensor of this dtype."""
        return self.parts[0].view(self.dtype) if len(self.parts) == 1 else None

    def _places(self, begin: int, rows: Weights) -> list[tuple[int, list[Weights]]]:
        """For each part: its first row, and where its rows from there on go."""
        end = begin + len(rows)
        found: list[tuple[int, list[Weights]]] = []
        part_begin = 0
        for part_idx, part in enumerate(self.parts):
            first = 0
            places: list[Weights] = []
            for matrix_begin, part_row, num_rows in self._runs(part_idx, part, part_begin, begin, end):
                low, high = max(begin, matrix_begin), min(end, matrix_begin + num_rows)
                if low < high:
                    first = first if places else part_row + low - matrix_begin
                    places.append(rows[low - begin : high - begin])
            found.append((first, places))
            part_begin += part.shape[0]
        return found

    def _runs(
        self, part_idx: int, part: Tensor, part_begin: int, begin: int, end: int
    ) -> Iterator[tuple[int, int, int]]:
        """(row of the matrix, row of the part, number of rows) where a part's rows lie, around [begin, end)."""
        if not self.interleaved:
            yield part_begin, 0, part.shape[0]
            return
        group, num_parts = GATE_UP_GROUP_ROWS, len(self.parts)
        for group_idx in range(begin // (num_parts * group), -(-end // (num_parts * group))):
            yield (group_idx * num_parts + part_idx) * group, group_idx * group, group


@dataclass(frozen=True)
class PlacedMatrix:
    """What the op needs to know about a placed matrix: the members weight, weight_layout, tile_rows, num_tiles of Op."""

    address: int
    layout: int = 0
    tile_rows: int = 0
    num_tiles: int = 0


class WeightTarget(Protocol):
    """A device's memory. It keeps what it placed alive until it is itself dropped."""

    def place_matrix(self, source: MatrixSource) -> PlacedMatrix:
        """Copies (or packs, or maps) the matrix. kind EMBED must stay row-major: layout 0. A tied LM head comes as a second
        call with the same parts and kind LM_HEAD."""

    def place_f32(self, name: str, values: NDArray[np.float32]) -> int:
        """Copies a vector or table; returns its address."""


def item_bytes(dtype: DType) -> int:
    return 2 if dtype == DType.BF16 else 4


def aligned_empty(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """An uninitialised array whose data start at a multiple of ALIGN_BYTES."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.empty(num_bytes + ALIGN_BYTES, np.uint8)
    offset = -buffer.ctypes.data % ALIGN_BYTES
    array: NDArray[Any] = buffer[offset : offset + num_bytes].view(dtype).reshape(tuple(shape))
    return array


class HostTarget:
    """Row-major weights in host memory. Matrices of at least `map_bytes` that are stored as needed stay in the mapped file:
    they are read at the speed of memory anyway, while small ones live in cache, where alignment counts."""

    def __init__(self, map_bytes: int = 16 << 20) -> None:
        self._map_bytes = map_bytes
        self._placed: dict[tuple[tuple[str, ...], bool, DType], PlacedMatrix] = {}
        self._keepalive: list[NDArray[Any]] = []
        self.num_bytes = 0  # copied to memory of this process
        self.mapped_bytes = 0  # left in the mapped checkpoint

    def place_matrix(self, source: MatrixSource) -> PlacedMatrix:
        key = (tuple(part.name for part in source.parts), source.interleaved, source.dtype)
        if key not in self._placed:  # a tied LM head shares the embedding's memory
            self._placed[key] = PlacedMatrix(self._keep(self._map(source)))
        return self._placed[key]

    def place_f32(self, name: str, values: NDArray[np.float32]) -> int:
        copy = aligned_empty(values.shape, np.float32)
        copy[...] = values
        self.num_bytes += copy.nbytes
        return self._keep(copy)

    def _keep(self, array: NDArray[Any]) -> int:
        self._keepalive.append(array)
        return int(array.ctypes.data)

    def _map(self, source: MatrixSource) -> Weights:
        view = source.view() if source.num_bytes >= self._map_bytes else None
        if view is not None:
            self.mapped_bytes += view.nbytes
            return view
        dtype = np.uint16 if source.dtype == DType.BF16 else np.float32
        matrix = aligned_empty((source.out_features, source.in_features), dtype)
        rows = max(16, READ_BYTES // max(1, source.in_features * matrix.itemsize) // 16 * 16)
        for begin in range(0, source.out_features, rows):
            end = min(begin + rows, source.out_features)
            source.read_into(begin, matrix[begin:end])
        self.num_bytes += matrix.nbytes
        return matrix
