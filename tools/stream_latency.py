"""From an engine's trace and a client's arrivals to the latency that everything in between adds, token by token.

The trace says when the director committed each token of each request (by ring id), the client when each event of its requests came. A
request's first tokens are its name in both: the null program draws them by the seed, of thousands of tokens, so no two requests of a run
begin alike, but for one that was submitted again, to an engine that had dropped its ingress: neither counts. Both clocks are CLOCK_MONOTONIC.
Used by tools/bench_streams.py. Test: pytest tests/null/test_stream_latency.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.trace_reader import events_of, high_half, low_half
from blinkimp.ring_abi import TraceKind

QUANTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


class TokenTimes:
    """When each token was committed, for requests whose first token is in the events."""

    def __init__(self, events: NDArray[np.void], num_key_tokens: int) -> None:
        tokens = events_of(events, TraceKind.TOKEN)
        ids, positions = tokens["request_id"].astype(np.uint64), low_half(tokens["argument"]).astype(np.int64)
        order = np.lexsort((positions, ids))
        self._ids, self._positions = ids[order], positions[order]
        self._times, self._values = tokens["time_ns"][order].astype(np.int64), high_half(tokens["argument"])[order]
        begins = np.flatnonzero(np.append(True, self._ids[1:] != self._ids[:-1])) if len(order) else np.zeros(0, int)
        ends = np.append(begins[1:], len(order))
        self._span_of: dict[tuple[int, ...], tuple[int, int]] = {}
        alike: set[tuple[int, ...]] = set()
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            is_whole = self._positions[begin] == 0 and self._positions[end - 1] == end - 1 - begin
            if not is_whole or end - begin < num_key_tokens:
                continue  # it began before the trace did, or events of it were lost
            key = tuple(self._values[begin : begin + num_key_tokens].tolist())
            if key in self._span_of:
                alike.add(key)
            self._span_of[key] = begin, end
        for key in alike:
            del self._span_of[key]

    def of(self, key: tuple[int, ...]) -> NDArray[np.int64] | None:
        """ns of each token of the request that begins with these."""
        span = self._span_of.get(key)
        return None if span is None else self._times[span[0] : span[1]]


def added_latencies_ns(
    times: TokenTimes, arrivals: Mapping[str, NDArray[Any]], begin_ns: int, end_ns: int
) -> NDArray[np.int64]:
    """Of every token of sampled requests that was committed in [begin_ns, end_ns) and has arrived."""
    found: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    ends = np.cumsum(arrivals["num_arrivals"])
    for idx, key in enumerate(arrivals["keys"].tolist()):
        committed = times.of(tuple(key))
        if committed is None:
            continue
        part = slice(int(ends[idx] - arrivals["num_arrivals"][idx]), int(ends[idx]))
        arrived: NDArray[np.int64] = np.repeat(arrivals["arrivals_ns"][part], arrivals["counts"][part])
        num = min(len(arrived), len(committed))
        is_meant = (committed[:num] >= begin_ns) & (committed[:num] < end_ns)
        found.append((arrived[:num] - committed[:num])[is_meant])
    return np.concatenate(found)


def quantiles_ms(latencies_ns: NDArray[np.int64]) -> dict[str, float]:
    if not len(latencies_ns):
        return {}
    values = np.percentile(latencies_ns, list(QUANTILES.values())) / 1e6
    return {name: round(float(value), 3) for name, value in zip(QUANTILES, values, strict=True)}
