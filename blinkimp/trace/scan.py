"""One pass over all events: a row for each request, a row for each step, counts, and a histogram of the times between tokens.

    table = scan(trace.events)
    table.requests["admitted"], table.steps["start"]      # raw times: device clock or the ingress's, 0 = did not happen

Events are cut into as many pieces as there are CPUs; each piece is scanned by a native loop without the GIL, into tables of its own, which
are then merged: a request that goes over a cut has its sums added and its first and last times joined. Rate: tools/bench_trace.py.
Called by blinkimp/trace/{figures,timeline,diff,perfetto}.py. Test: pytest tests/null/test_trace_scan.py

Invariants
S1  The result does not depend on the number of pieces.
S2  Events of one source stand in their order; sources may be shuffled against each other.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import TraceKind

# Of a request's row, in order. Times are raw; the first ten are of the ingress.
REQUEST_FIELDS: Final = (
    *("id", "queue_pair"),
    *("received", "claimed", "committed", "first_drained", "streamed", "finish_drained", "ended", "cancel_asked"),
    *("polled", "queued", "admitted", "first_chunk", "last_chunk", "first_token", "last_token", "finished"),
    *("prompt_tokens", "max_tokens", "cached_tokens", "num_chunks", "chunk_rows", "num_tokens"),
    *(
        "num_stalls",
        "num_preemptions",
        "lost_tokens",
        "reason",
        "output_tokens",
        "longest_gap_ns",
        "is_error",
        "is_again",
    ),
)
HOST_TIMES: Final = REQUEST_FIELDS[2:10]
DEVICE_TIMES: Final = REQUEST_FIELDS[10:18]
STEP_FIELDS: Final = ("start", "end", "commit", "num_rows", "num_seqs", "num_sampled", "num_ended", "num_tokens")
_FIRST: Final = [REQUEST_FIELDS.index(name) for name in (*HOST_TIMES, *DEVICE_TIMES) if not name.startswith("last_")]
_LAST: Final = [REQUEST_FIELDS.index(name) for name in ("last_chunk", "last_token", "reason", "output_tokens")]
_KEPT: Final = [
    REQUEST_FIELDS.index(name) for name in ("queue_pair", "prompt_tokens", "max_tokens", "is_error", "is_again")
]
_SUMS: Final = [
    REQUEST_FIELDS.index(name)
    for name in ("num_chunks", "chunk_rows", "num_tokens", "num_stalls", "num_preemptions", "lost_tokens")
]
_ADMITTED, _CACHED = REQUEST_FIELDS.index("admitted"), REQUEST_FIELDS.index("cached_tokens")
_GAP: Final = REQUEST_FIELDS.index("longest_gap_ns")

NUM_KINDS: Final = 128
SUB_BUCKETS: Final = 16  # of each power of two: a quantile is within 6 %
NUM_BUCKETS: Final = 64 * SUB_BUCKETS
FIRST_REQUESTS: Final = 4096  # rows that a table begins with; it grows
MIN_PIECE: Final = 1 << 16
MAX_STEPS_A_STEP_EVENT: Final = (
    64  # step numbers that are missing because their events were lost; beyond, the trace mixes two engines
)


@dataclass(frozen=True)
class ScanTable:
    requests: NDArray[np.void]  # REQUEST_FIELDS, i8 each, in order of the first event
    steps: NDArray[np.void]  # STEP_FIELDS; one row a step number, zeros where the trace has none of it
    first_step: int
    kind_counts: NDArray[np.int64]  # [NUM_KINDS]
    samples: NDArray[np.void]  # TRACE_EVENT: those of a recorder (RINGS, BATCH, PAGES), copied
    gap_histogram: NDArray[np.int64]  # [NUM_BUCKETS] of ns between a request's tokens

    def count(self, kind: TraceKind) -> int:
        return int(self.kind_counts[int(kind)])


# ---- Native loops --------------------------------------------------------------------------------------------------------
def _native(function: Any) -> Any:
    """Compiled at the first call; kept on disk where there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written to
        return njit(nogil=True)(function)


@_native
def _survey(words, begin, end, base, counts):  # type: ignore[no-untyped-def]
    """Counts kinds; returns the least and the largest step number of step events, relative to `base`, modulo 2^32."""
    least, most = np.int64(1 << 62), np.int64(-(1 << 62))
    for i in range(begin, end):
        word = words[i, 1]
        kind = word & np.uint64(0xFFFF)
        counts[kind & np.uint64(127)] += 1
        if kind <= np.uint64(3):
            step = np.int64(np.int32(np.uint32(word >> np.uint64(32)) - base))
            least, most = min(least, step), max(most, step)
    return least, most


@_native
def _bucket(value):  # type: ignore[no-untyped-def]
    """Of a duration: the power of two, and SUB_BUCKETS parts of it."""
    if value < 16:
        return max(value, 0)
    exponent = 4
    rest = value >> 5
    while rest:
        rest >>= 1
        exponent += 1
    return (exponent - 3) * 16 + ((value >> (exponent - 4)) & 15)


@_native
def _place(keys, slots, key):  # type: ignore[no-untyped-def]
    """The position of `key` in the open table, or of the free place where it belongs."""
    mask = np.uint64(len(keys) - 1)
    position = (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20) & mask
    while slots[position] >= 0 and keys[position] != key:
        position = (position + np.uint64(1)) & mask
    return position


@_native
def _rehash(rows, num_rows, keys, slots):  # type: ignore[no-untyped-def]
    for i in range(num_rows):
        key = np.uint64(rows[i, 0])
        position = _place(keys, slots, key)
        keys[position], slots[position] = key, i


@_native
def _scan(words, begin, end, base, first_step, keys, slots, rows, num_rows, steps, gaps, samples):  # type: ignore[no-untyped-def]
    """Fills rows and steps. Returns where it stopped, for lack of rows, and how many it has."""
    low_mask = np.uint64(0xFFFFFFFF)
    most_rows = min(len(rows), len(keys) // 2)
    for i in range(begin, end):
        word = words[i, 1]
        kind = np.int64(word & np.uint64(0xFFFF))
        time_ns = np.int64(words[i, 0])
        argument = words[i, 3]
        low, high = np.int64(argument & low_mask), np.int64(argument >> np.uint64(32))
        if kind <= 3:  # STEP_START, STEP_END, COMMIT
            step = np.int64(np.int32(np.uint32(word >> np.uint64(32)) - base)) - first_step
            if 0 <= step < len(steps) and kind >= 1:
                steps[step, kind - 1] = time_ns
                if kind == 1:
                    steps[step, 3], steps[step, 4], steps[step, 5] = low, high & 0xFFFF, high >> 16
                elif kind == 3:
                    steps[step, 6], steps[step, 7] = low, high
            continue
        if 12 <= kind <= 14 or kind >= 72:  # of no request
            if kind >= 96:
                samples[samples[0]] = i  # [0]: where the next one goes
                samples[0] += 1
            continue
        key = words[i, 2]
        if key >> np.uint64(63):  # a recorder's ping
            continue
        position = _place(keys, slots, key)
        slot = slots[position]
        if slot < 0:
            if num_rows == most_rows:
                return i, num_rows
            slot = num_rows
            num_rows += 1
            keys[position], slots[position] = key, slot
            rows[slot, 0] = np.int64(key)
            rows[slot, 1] = np.int64(word >> np.uint64(16) & np.uint64(0xFFFF))
        # rows[slot] alone would count a reference, which costs as much as the rest of an event.
        if kind == 8:  # TOKEN
            if rows[slot, 16]:
                gap = time_ns - rows[slot, 16]
                gaps[_bucket(gap)] += 1
                rows[slot, 29] = max(rows[slot, 29], gap)
            else:
                rows[slot, 15] = time_ns
            rows[slot, 16] = time_ns
            rows[slot, 23] += 1
        elif kind == 7:  # CHUNK
            if not rows[slot, 13]:
                rows[slot, 13] = time_ns
            rows[slot, 14] = time_ns
            rows[slot, 21] += 1
            rows[slot, 22] += high
        elif kind == 9:  # STALLED
            rows[slot, 24] += 1
        elif kind == 4:  # POLLED; a CANCEL's is later
            if not rows[slot, 10]:
                rows[slot, 10] = time_ns
        elif kind == 5:  # QUEUED
            rows[slot, 11], rows[slot, 18], rows[slot, 19] = time_ns, low, high
        elif kind == 6:  # ADMITTED; again after a preemption
            if not rows[slot, 12]:
                rows[slot, 12], rows[slot, 20] = time_ns, low
        elif kind == 10:  # PREEMPTED
            rows[slot, 25] += 1
            rows[slot, 26] += low
        elif kind == 11:  # FINISHED
            rows[slot, 17], rows[slot, 27], rows[slot, 28] = time_ns, low, high
        elif kind == 64:  # RECEIVED
            rows[slot, 2], rows[slot, 18], rows[slot, 19] = time_ns, low, high
        elif kind == 65:  # CLAIMED
            rows[slot, 3], rows[slot, 31] = time_ns, low
        elif kind == 71:  # CANCEL_ASKED
            rows[slot, 9] = time_ns
        elif 66 <= kind <= 70:  # COMMITTED to ENDED
            rows[slot, kind - 62] = time_ns
            if kind == 69:
                rows[slot, 30] = low
    return end, num_rows


# ---- Pieces --------------------------------------------------------------------------------------------------------------
@dataclass
class _Piece:
    rows: NDArray[np.int64]
    gaps: NDArray[np.int64]
    samples: NDArray[np.int64]  # indices of events


def _scan_piece(
    words: NDArray[np.uint64], begin: int, end: int, base: Any, first_step: int, steps: Any, num_samples: int
) -> _Piece:
    rows = np.zeros((FIRST_REQUESTS, len(REQUEST_FIELDS)), np.int64)
    keys, slots = np.zeros(4 * FIRST_REQUESTS, np.uint64), np.full(4 * FIRST_REQUESTS, -1, np.int32)
    gaps = np.zeros(NUM_BUCKETS, np.int64)
    samples = np.zeros(num_samples + 1, np.int64)
    samples[0] = 1
    position, num_rows = begin, 0
    while True:
        position, num_rows = _scan(
            words, position, end, base, first_step, keys, slots, rows, num_rows, steps, gaps, samples
        )
        if position == end:
            return _Piece(rows[:num_rows], gaps, samples[1:])
        rows = np.concatenate([rows, np.zeros_like(rows)])
        keys, slots = np.zeros(4 * len(rows), np.uint64), np.full(4 * len(rows), -1, np.int32)
        _rehash(rows, num_rows, keys, slots)


def _merge(first: _Piece, second: _Piece) -> _Piece:
    """`second` is of later events."""
    ids, at_first, at_second = np.intersect1d(first.rows[:, 0], second.rows[:, 0], return_indices=True)
    gaps = first.gaps + second.gaps
    if len(ids):
        early, late = first.rows[at_first], second.rows[at_second]
        joined = early.copy()
        for column in (*_FIRST, *_KEPT):
            joined[:, column] = np.where(early[:, column] != 0, early[:, column], late[:, column])
        for column in _LAST:
            joined[:, column] = np.where(late[:, column] != 0, late[:, column], early[:, column])
        was_admitted = early[:, _ADMITTED] != 0  # else the cache was asked in the later piece
        joined[:, _CACHED] = np.where(was_admitted, early[:, _CACHED], late[:, _CACHED])
        for column in _SUMS:
            joined[:, column] += late[:, column]
        last, following = early[:, REQUEST_FIELDS.index("last_token")], late[:, REQUEST_FIELDS.index("first_token")]
        between = np.where((last != 0) & (following != 0), following - last, -1)
        joined[:, _GAP] = np.maximum(np.maximum(early[:, _GAP], late[:, _GAP]), between)
        for gap in between[between >= 0].tolist():
            gaps[_bucket(gap)] += 1
        first.rows[at_first] = joined
    only_second = np.ones(len(second.rows), bool)
    only_second[at_second] = False
    samples = np.concatenate([first.samples, second.samples])
    return _Piece(np.concatenate([first.rows, second.rows[only_second]]), gaps, samples)


def scan(events: NDArray[np.void], num_pieces: int | None = None) -> ScanTable:
    """num_pieces: of all CPUs that this process may use, unless given."""
    words = np.asarray(events).view(np.uint64).reshape(-1, 4)
    if num_pieces is None:
        num_pieces = min(len(os.sched_getaffinity(0)), max(1, len(words) // MIN_PIECE))
    edges = [len(words) * idx // num_pieces for idx in range(num_pieces + 1)]
    ranges = list(itertools.pairwise(edges))
    counts = np.zeros((num_pieces, NUM_KINDS), np.int64)
    base = _first_step_of(words)
    with ThreadPoolExecutor(num_pieces) as pool:
        spans = list(
            pool.map(lambda idx: _survey(words, ranges[idx][0], ranges[idx][1], base, counts[idx]), range(num_pieces))
        )
        kind_counts = counts.sum(0)
        first_step, num_steps = _step_range(spans, int(kind_counts[1:4].sum()))
        steps = np.zeros((num_steps, len(STEP_FIELDS)), np.int64)
        num_samples = counts[:, int(TraceKind.RINGS) :].sum(1).tolist()
        pieces = list(
            pool.map(
                lambda idx: _scan_piece(words, *ranges[idx], base, first_step, steps, num_samples[idx]),
                range(num_pieces),
            )
        )
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = _merge(merged, piece)
    # A row with nothing but POLLED is of somebody's ping, or of a cancel that came too late.
    others = [idx for idx, name in enumerate(REQUEST_FIELDS) if name not in ("id", "queue_pair", "polled")]
    rows = merged.rows[merged.rows[:, others].any(axis=1)]
    return ScanTable(
        _as_records(rows, REQUEST_FIELDS),
        _as_records(steps, STEP_FIELDS),
        (int(base) + first_step) & 0xFFFFFFFF,
        kind_counts,
        np.array(events[merged.samples]),
        merged.gaps,
    )


def _first_step_of(words: NDArray[np.uint64]) -> Any:
    """Step number of the first step event, to which others are relative: numbers are 32 bits wide and wrap."""
    for begin in range(0, len(words), MIN_PIECE):
        second = words[begin : begin + MIN_PIECE, 1]
        found = second[((second & np.uint64(0xFFFF)) <= 3)]
        if len(found):
            return np.uint32(found[0] >> np.uint64(32))
    return np.uint32(0)


def _step_range(spans: list[tuple[int, int]], num_step_events: int) -> tuple[int, int]:
    least, most = min(span[0] for span in spans), max(span[1] for span in spans)
    if least > most:
        return 0, 0
    # An engine that was started anew counts from 0 again: then only what is near the first step is told apart.
    return least, min(most - least + 1, MAX_STEPS_A_STEP_EVENT * max(num_step_events, 1024))


def _as_records(rows: NDArray[np.int64], fields: tuple[str, ...]) -> NDArray[np.void]:
    dtype = np.dtype([(name, np.int64) for name in fields])
    records: NDArray[np.void] = np.ascontiguousarray(rows).view(dtype).reshape(-1)
    return records


def bucket_value_ns(bucket: int) -> float:
    """The middle of a bucket of gap_histogram."""
    if bucket < SUB_BUCKETS:
        return float(bucket)
    exponent, part = bucket // SUB_BUCKETS + 3, bucket % SUB_BUCKETS
    return float((SUB_BUCKETS + part + 0.5) * 2.0 ** (exponent - 4))


assert abi.TRACE_EVENT.itemsize == 32 and REQUEST_FIELDS.index("is_again") == 31
