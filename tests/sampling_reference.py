"""Sampling in float64 numpy with sorting: what device/sampling.cuh must agree with, and rows of logits that are hard on it.

Used by tests/host/test_sampling.py and tests/gpu/test_sampling_gpu.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from blinkimp import ring_abi

Logits = np.ndarray[Any, np.dtype[np.float32]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def packed(self) -> np.ndarray[Any, Any]:
        record = np.zeros(1, dtype=ring_abi.SAMPLING_PARAMS)
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            record[name] = getattr(self, name)
        return record


def greedy_token(logits: Logits) -> int:
    values = np.where(np.isnan(logits), -np.inf, logits)
    return int(np.argmax(values))


def logprob(logits: Logits, token: int) -> float:
    values = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    best = values.max()
    return float(values[token] - best - np.log(np.exp(values - best).sum()))


def token_probabilities(logits: Logits, params: Params, slack: float = 0.0) -> Floats:
    """Exact probabilities of the tokens that temperature, min_p, top_k and top_p leave (temperature > 0).

    slack widens (> 0) or narrows (< 0) the thresholds of min_p and top_p relative to their value: a token may differ between
    float64 and the device only when it lies inside that band.
    """
    values = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    weights = np.exp((values - values.max()) / float(np.float32(params.temperature)))
    min_weight = float(np.float32(params.min_p)) * (1 - slack)
    weights[weights < max(min_weight, 2.0**-44)] = 0
    order = np.lexsort((np.arange(values.size), -values))
    if params.top_k:
        weights[order[params.top_k :]] = 0
    if params.top_p < 1:
        running = np.cumsum(weights[order])
        target = float(np.float32(params.top_p)) * running[-1] * (1 + slack)
        num_kept = int(np.searchsorted(running, target)) + 1
        weights[order[num_kept:]] = 0
    return weights / weights.sum()


def result_of(record: np.ndarray[Any, Any]) -> tuple[int, float]:
    return int(record["token"][0]), float(record["logprob"][0])


class NativeSampler:
    """The native library's entry points of device/emu/sampling_api.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, u32 = ctypes.c_void_p, ctypes.c_uint
        library.bk_sample_row.argtypes = [pointer, u32, pointer, u32, pointer]
        library.bk_sample_row.restype = None
        library.bk_sample_row_lanes.argtypes = [pointer, u32, pointer, u32, u32, pointer]
        library.bk_sample_row_lanes.restype = ctypes.c_int
        library.bk_philox4x32_10.argtypes = [pointer, ctypes.c_ulonglong]
        library.bk_philox4x32_10.restype = None
        for function in (library.bk_exp2_neg_q44, library.bk_log2_q32):
            function.argtypes = [pointer, pointer, u32]
            function.restype = None
        self.library = library

    def sample(self, logits: Logits, params: Params, output_idx: int = 0, num_lanes: int = 0) -> tuple[int, float]:
        """num_lanes 0: the single-lane path of the emulated device; else that many threads."""
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        packed, result = params.packed(), np.zeros(1, dtype=ring_abi.SAMPLE_RESULT)
        head = (logits.ctypes.data, logits.size, packed.ctypes.data, output_idx)
        if num_lanes:
            error = self.library.bk_sample_row_lanes(*head, num_lanes, result.ctypes.data)
            assert error == 0, f"bk_sample_row_lanes: errno {error}"
        else:
            self.library.bk_sample_row(*head, result.ctypes.data)
        return result_of(result)

    def draw(self, logits: Logits, params: Params, num_draws: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens at output positions 0 .. num_draws - 1."""
        packed, results = params.packed(), np.zeros(num_draws, dtype=ring_abi.SAMPLE_RESULT)
        for i in range(num_draws):
            address = results.ctypes.data + i * results.itemsize
            self.library.bk_sample_row(logits.ctypes.data, logits.size, packed.ctypes.data, i, address)
        return results["token"].astype(np.int64)


def hard_rows(seed: int) -> dict[str, Logits]:
    """Rows that break samplers: name -> logits."""
    rng = np.random.default_rng(seed)

    def normal(size: int, scale: float = 3.0) -> Logits:
        return (rng.standard_normal(size) * scale).astype(np.float32)

    with_nan = normal(1001)
    with_nan[rng.integers(0, 1001, 50)] = np.nan
    with_infinity = normal(999)
    with_infinity[rng.integers(0, 999, 500)] = -np.inf
    coarse = np.round(normal(5003, 1.0) * 4).astype(np.float32) / np.float32(4)  # many equal logits
    one_left = np.full(4099, -np.inf, dtype=np.float32)
    one_left[4097] = -3.5
    zeros = np.zeros(777, dtype=np.float32)
    zeros[1::2] = -0.0
    return {
        "normal": normal(4096),
        "odd_size": normal(32003),
        "one": normal(1),
        "two": normal(2),
        "five": normal(5),
        "nan": with_nan,
        "minus_infinity": with_infinity,
        "coarse": coarse,
        "one_left": one_left,
        "signed_zeros": zeros,
        "all_equal": np.full(2049, 1.25, dtype=np.float32),
        "wide": normal(3001, 1e6),
        "narrow": np.float32(10) + normal(3001, 1e-6),
        "large": normal(129_283),
    }


HARD_PARAMS = [
    Params(temperature=0.0),
    Params(),
    Params(temperature=0.7, top_k=50, top_p=0.9, seed=11),
    Params(top_k=1, seed=12),
    Params(top_k=10_000_000, seed=13),
    Params(top_p=1e-6, seed=14),
    Params(top_p=0.999, seed=15),
    Params(min_p=1.0, seed=16),
    Params(min_p=0.05, top_p=0.8, seed=17),
    Params(temperature=100.0, top_k=700, seed=2**64 - 1),
    Params(temperature=1e-30, seed=18),
    Params(temperature=1e30, top_p=0.5, seed=19),
    Params(temperature=1.5, top_k=3, min_p=0.1, top_p=0.6, seed=20),
]
