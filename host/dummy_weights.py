"""Weights made by a seeded generator instead of read from a checkpoint, for benchmarks of a shape (`load_format="dummy"`).

All tensors are cut from one pool of normal numbers, each from an offset of its own, so that an 8-billion-parameter model is
made at the speed of a copy. The pool's length is a prime, so rows of a matrix do not repeat. Norm gains are 1.
Called by host/program.py. Test: pytest tests/null/test_checkpoint_weights.py
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32
from blinkimp.host.weights import Weights
from blinkimp.ring_abi import DType

POOL_ELEMENTS: Final = 4_194_301  # a prime
WEIGHT_STD: Final = 0.02  # what the supported families are initialised with


@dataclass(frozen=True)
class DummyTensor:
    """A tensor whose flat element i is pool[(offset + i) mod POOL_ELEMENTS]; a norm's gain is 1."""

    name: str
    shape: tuple[int, ...]
    offset: int
    pools: dict[DType, Weights]

    def read_rows(self, begin: int, end: int, dtype: DType) -> Weights:
        shape = (end - begin, *self.shape[1:])
        rows: Weights = np.empty(shape, self.pools[dtype].dtype)
        self.read_into(begin, [rows], dtype)
        return rows

    def read_into(self, begin: int, places: Sequence[Weights], dtype: DType) -> None:
        if self.name.endswith("norm.weight"):
            ones: NDArray[np.float32] = np.ones(1, np.float32)
            for place in places:
                place[...] = bf16_from_f32(ones)[0] if dtype == DType.BF16 else ones[0]
            return
        pool = self.pools[dtype]
        row_elements = int(np.prod(self.shape[1:], dtype=np.int64))
        source = (self.offset + begin * row_elements) % POOL_ELEMENTS
        for place in places:
            out, filled = place.reshape(-1), 0  # a view: places are contiguous
            while filled < len(out):
                num = min(POOL_ELEMENTS - source, len(out) - filled)
                out[filled : filled + num] = pool[source : source + num]
                filled, source = filled + num, (source + num) % POOL_ELEMENTS

    def view(self, dtype: DType) -> Weights | None:
        return None


class DummyWeights:
    """Provides every tensor the builder asks for, in the shape it asks for."""

    compute_dtype = DType.BF16

    def __init__(self, seed: int) -> None:
        pool = np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, np.float32) * np.float32(WEIGHT_STD)
        self._pools: dict[DType, Weights] = {DType.F32: pool, DType.BF16: bf16_from_f32(pool)}

    def tensor(self, name: str, shape: tuple[int, ...]) -> DummyTensor:
        return DummyTensor(name, shape, zlib.crc32(name.encode()) % POOL_ELEMENTS, self._pools)

    def finish(self) -> None:
        """Nothing can be left over."""
