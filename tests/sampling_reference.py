"""Sampling in float64 numpy with sorting: what device/sampling.cuh must agree with, and rows of logits that are hard on it.

Used by tests/host/test_sampling.py and tests/gpu/test_sampling_gpu.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from blinkimp import ring_abi
from blinkimp.nic_shim.constraint_table import ConstraintTable, build_constraint_table

Logits = np.ndarray[Any, np.dtype[np.float32]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    num_top_logprobs: int = 0

    def packed(self) -> np.ndarray[Any, Any]:
        record = np.zeros(1, dtype=ring_abi.SAMPLING_PARAMS)
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "num_top_logprobs"):
            record[name] = getattr(self, name)
        return record


# LogitEdits of device/logit_edits.cuh.
LOGIT_EDITS = np.dtype(
    [
        *((name, "<u8") for name in ("bias", "stop_ids", "eos_ids", "counts", "class_of_token", "next_state")),
        *(
            (name, "<u4")
            for name in ("num_bias", "num_banned_stop_ids", "num_banned_eos_ids", "num_classes", "num_states")
        ),
        *((name, "<f4") for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")),
    ]
)
PROMPT_BIT = 0x8000  # kCountPromptBit


@dataclass(frozen=True)
class Edits:
    """What a request changes at its logits, as the sampling op is told it."""

    bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()  # stop ids while min_tokens holds
    counts: np.ndarray[Any, np.dtype[np.uint16]] | None = None  # [vocab]
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    table: ConstraintTable | None = None
    state: int = 0

    def packed(self) -> np.ndarray[Any, Any]:
        """[1] LOGIT_EDITS; the arrays it points to live as long as the record's metadata, which keeps them."""
        bias = np.array(list(self.bias), dtype=ring_abi.LOGIT_BIAS)
        banned = np.array(self.banned, dtype=np.uint32)
        counts = None if self.counts is None else np.ascontiguousarray(self.counts)
        arrays = [bias, banned, counts]
        record = np.zeros(1, dtype=LOGIT_EDITS).view(KeptArrays)
        record["bias"], record["num_bias"] = bias.ctypes.data, len(bias)
        num_stop_ids = min(len(banned), ring_abi.MAX_STOP_IDS)  # the rest stands for the model's EOS ids
        record["stop_ids"], record["num_banned_stop_ids"] = banned.ctypes.data, num_stop_ids
        record["eos_ids"] = banned.ctypes.data + 4 * num_stop_ids
        record["num_banned_eos_ids"] = len(banned) - num_stop_ids
        if counts is not None:
            record["counts"] = counts.ctypes.data
        if self.table is not None:
            classes, rows = self.table.class_of_token, self.table.next_states
            row = np.ascontiguousarray(rows[self.state]) if self.state < len(rows) else np.zeros(1, dtype=np.uint16)
            arrays += [classes, row]
            record["class_of_token"], record["next_state"] = classes.ctypes.data, row.ctypes.data
            record["num_classes"] = self.table.num_classes if self.state < len(rows) else 0
            record["num_states"] = self.table.num_states
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            record[name] = getattr(self, name)
        record.kept = arrays
        return record


class KeptArrays(np.ndarray):  # type: ignore[type-arg]
    """A record with addresses in it, and the arrays that they are of."""

    kept: list[Any]


def edited_logits(logits: Logits, edits: Edits) -> Logits:
    """The logits to choose by, in float32 steps as the device rounds them; NaN is -inf, +inf the largest number."""
    largest = np.float32(3.402823466e38)
    values = np.minimum(np.where(np.isnan(logits), np.float32(-np.inf), logits), largest).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for token, bias in reversed(edits.bias):
            values[token] += np.float32(bias)
        values[list(edits.banned)] = -np.inf
        if edits.counts is not None:
            seen = edits.counts != 0
            outputs = (edits.counts & 0x7FFF).astype(np.float32)
            penalty = np.float32(edits.repetition_penalty)
            scaled = np.where(values > 0, values / penalty, values * penalty).astype(np.float32)
            values = np.where(seen, scaled, values).astype(np.float32)
            counted = outputs > 0
            lowered = values - np.float32(edits.frequency_penalty) * outputs - np.float32(edits.presence_penalty)
            values = np.where(counted, lowered, values).astype(np.float32)
        if edits.table is not None:
            allowed = edits.table.allowed_tokens(edits.state) if edits.state < edits.table.num_states else []
            masked = np.full_like(values, -np.inf)
            masked[allowed] = values[allowed]
            values = masked
        values = np.minimum(np.where(np.isnan(values), np.float32(-np.inf), values), largest).astype(np.float32)
    return values


def top_tokens(logits: Logits, num_top: int) -> list[int]:
    """The first tokens in the order (logit falling, id rising), those without a finite logit left out."""
    values = np.minimum(np.where(np.isnan(logits), -np.inf, logits), np.float32(3.402823466e38)) + np.float32(0)
    order = np.lexsort((np.arange(values.size), -values))
    return [int(token) for token in order[:num_top] if values[token] > -np.inf]


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


def best_of_tiles(logits: np.ndarray[Any, Any], tile_columns: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """[rows, tiles] best_code() of device/sampling_window.cuh: ordered key, then the complement of the id."""
    num_rows, vocab = logits.shape
    num_tiles = -(-vocab // tile_columns)
    padded = np.full((num_rows, num_tiles * tile_columns), -np.inf, np.float32)
    values = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    padded[:, :vocab] = np.minimum(values, np.float32(3.402823466e38)) + np.float32(0)
    tiles = padded.reshape(num_rows, num_tiles, tile_columns)
    place = tiles.argmax(axis=2)  # the first of equals
    bits = np.take_along_axis(tiles, place[:, :, None], axis=2)[:, :, 0].copy().view(np.uint32)
    keys = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(0x80000000)).astype(np.uint64)
    ids = (place + np.arange(num_tiles) * tile_columns).astype(np.uint64)
    return np.ascontiguousarray(keys << np.uint64(32) | (np.uint64(0xFFFFFFFF) - ids))


def result_of(record: np.ndarray[Any, Any]) -> tuple[int, float]:
    return int(record["token"][0]), float(record["logprob"][0])


class NativeSampler:
    """The native library's entry points of device/emu/sampling_api.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, u32 = ctypes.c_void_p, ctypes.c_uint
        for function in (library.bk_sample_row, library.bk_sample_row_radix):
            function.argtypes = [pointer, u32, pointer, pointer, u32, pointer, pointer]
            function.restype = None
        library.bk_sample_row_lanes.argtypes = [
            pointer,
            u32,
            pointer,
            pointer,
            u32,
            u32,
            pointer,
            u32,
            pointer,
            pointer,
        ]
        library.bk_sample_row_lanes.restype = ctypes.c_int
        library.bk_philox4x32_10.argtypes = [pointer, ctypes.c_ulonglong]
        library.bk_philox4x32_10.restype = None
        for function in (library.bk_exp2_neg_q44, library.bk_log2_q32):
            function.argtypes = [pointer, pointer, u32]
            function.restype = None
        self.library = library

    def sample_with_top(
        self,
        logits: Logits,
        params: Params,
        output_idx: int = 0,
        *,
        num_lanes: int = 0,
        edits: Edits | None = None,
        by_radix: bool = False,
        tile_columns: int = 0,
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """Token, logprob and the top logprobs. num_lanes 0: the single lane of the emulated device; else that many threads.

        tile_columns: with num_lanes, the best tokens of tiles so wide are given, as the LM head leaves them.
        """
        assert num_lanes or not tile_columns, "tiles go with lanes"
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        packed, result = params.packed(), np.zeros(1, dtype=ring_abi.SAMPLE_RESULT)
        top = np.zeros(max(params.num_top_logprobs, 1), dtype=ring_abi.SAMPLE_RESULT)
        packed_edits = edits.packed() if edits is not None else None
        edits_address = packed_edits.ctypes.data if packed_edits is not None else None
        head = (logits.ctypes.data, logits.size, edits_address, packed.ctypes.data, output_idx)
        tail = (result.ctypes.data, top.ctypes.data)
        if num_lanes:
            tiles = best_of_tiles(logits[None], tile_columns)[0] if tile_columns else np.zeros(0, np.uint64)
            tiles_address = tiles.ctypes.data if tile_columns else None
            error = self.library.bk_sample_row_lanes(*head, num_lanes, tiles_address, tiles.size, *tail)
            assert error == 0, f"bk_sample_row_lanes: errno {error}"
        elif by_radix:
            self.library.bk_sample_row_radix(*head, *tail)
        else:
            self.library.bk_sample_row(*head, *tail)
        alternatives = [(int(one["token"]), float(one["logprob"])) for one in top[: params.num_top_logprobs]]
        return (*result_of(result), alternatives)

    def sample(
        self, logits: Logits, params: Params, output_idx: int = 0, num_lanes: int = 0, edits: Edits | None = None
    ) -> tuple[int, float]:
        return self.sample_with_top(logits, params, output_idx, num_lanes=num_lanes, edits=edits)[:2]

    def draw(
        self, logits: Logits, params: Params, num_draws: int, edits: Edits | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens at output positions 0 .. num_draws - 1."""
        packed, results = params.packed(), np.zeros(num_draws, dtype=ring_abi.SAMPLE_RESULT)
        packed_edits = edits.packed() if edits is not None else None
        edits_address = packed_edits.ctypes.data if packed_edits is not None else None
        for i in range(num_draws):
            address = results.ctypes.data + i * results.itemsize
            self.library.bk_sample_row(
                logits.ctypes.data, logits.size, edits_address, packed.ctypes.data, i, address, None
            )
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


def language_row(rng: np.random.Generator, vocab: int) -> Logits:
    """Like a language model's: a bulk, and some that stand out."""
    logits = (rng.standard_normal(vocab) * 2.5).astype(np.float32)
    peaks = rng.integers(0, vocab, 60)
    logits[peaks] = rng.uniform(8, 16, peaks.size).astype(np.float32)
    return logits


def random_edits(rng: np.random.Generator, vocab: int) -> Edits:
    """Any of the edits, alone or together, on some of the ids."""
    bias: tuple[tuple[int, float], ...] = ()
    if rng.random() < 0.6:
        ids = rng.choice(vocab, size=min(vocab, int(rng.choice([1, 3, 40, 512]))), replace=rng.random() < 0.3)
        bias = tuple((int(token), float(np.float32(rng.normal() * 5))) for token in ids)
    banned = (
        tuple(int(token) for token in rng.integers(0, vocab, int(rng.integers(0, 24)))) if rng.random() < 0.5 else ()
    )
    counts = None
    if rng.random() < 0.7:
        counts = np.zeros(vocab, dtype=np.uint16)
        seen = rng.integers(0, vocab, max(1, vocab // 8))
        counts[seen] = rng.integers(0, 6, seen.size).astype(np.uint16)
        counts[rng.integers(0, vocab, max(1, vocab // 8))] |= np.uint16(PROMPT_BIT)
    table, state = None, 0
    if rng.random() < 0.5 and vocab > 4:
        allowed = [np.unique(rng.integers(0, vocab, int(rng.integers(1, vocab)))) for _ in range(3)]
        rows = [(tokens, rng.integers(0, 3, tokens.size)) for tokens in allowed]
        table, state = build_constraint_table(vocab, rows, max_bytes=1 << 24), int(rng.integers(0, 3))
    return Edits(
        bias=bias,
        banned=banned,
        counts=counts,
        repetition_penalty=float(np.float32(rng.choice([1.0, 1.3, 0.7]))),
        presence_penalty=float(np.float32(rng.choice([0.0, 0.5, -1.5]))),
        frequency_penalty=float(np.float32(rng.choice([0.0, 0.25, -0.1]))),
        table=table,
        state=state,
    )


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
