"""Latencies from a trace and a client's arrivals, on events written by hand.

Run: pytest tests/null/test_stream_latency.py
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from blinkimp.ring_abi import TRACE_EVENT, TraceKind
from tests.support import load_tool

MS = 1_000_000


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("stream_latency")


def events_of(requests: dict[int, list[int]], first_position: int = 0) -> Any:
    """Token k of each request is committed at (10 + k) ms; events of the requests interleave."""
    rows = [
        ((10 + k) * MS, int(TraceKind.TOKEN), request_id, (first_position + k) | token << 32)
        for k in range(max(map(len, requests.values())))
        for request_id, tokens in requests.items()
        if k < len(tokens)
        for token in [tokens[k]]
    ]
    events = np.zeros(len(rows) + 1, TRACE_EVENT)
    events["kind"][-1] = int(TraceKind.COMMIT)  # is none of ours
    for name, column in zip(("time_ns", "kind", "request_id", "argument"), zip(*rows, strict=True), strict=True):
        events[name][:-1] = column
    return events


def arrivals_of(*requests: tuple[list[int], list[tuple[int, int]]]) -> dict[str, Any]:
    """Of each request: its key, and (ms, tokens) of each event."""
    return {
        "keys": np.array([key for key, _ in requests], np.uint32),
        "num_arrivals": np.array([len(events) for _, events in requests]),
        "arrivals_ns": np.array([ms * MS for _, events in requests for ms, _ in events]),
        "counts": np.array([count for _, events in requests for _, count in events]),
    }


def test_each_token_is_late_by_its_own_event(tool: ModuleType) -> None:
    times = tool.TokenTimes(events_of({7: [1, 2, 3, 4], 2**64 - 1: [1, 2, 9, 4]}), 3)
    arrivals = arrivals_of(([1, 2, 9], [(11, 1), (14, 3)]), ([1, 2, 3], [(13, 4)]))
    got = tool.added_latencies_ns(times, arrivals, 0, 10**12)
    assert (got / MS).tolist() == [1, 3, 2, 1, 3, 2, 1, 0]


def test_only_tokens_committed_in_the_window_count(tool: ModuleType) -> None:
    times = tool.TokenTimes(events_of({7: [1, 2, 3, 4]}), 2)
    arrivals = arrivals_of(([1, 2], [(20, 3)]))  # the fourth has not come
    assert (tool.added_latencies_ns(times, arrivals, 11 * MS, 13 * MS) / MS).tolist() == [9, 8]
    assert (tool.added_latencies_ns(times, arrivals, 0, 10**12) / MS).tolist() == [10, 9, 8]


def test_requests_that_began_before_the_trace_are_left_out(tool: ModuleType) -> None:
    times = tool.TokenTimes(events_of({7: [1, 2, 3, 4]}, first_position=5), 2)
    assert times.of((1, 2)) is None
    assert len(tool.added_latencies_ns(times, arrivals_of(([1, 2], [(20, 3)])), 0, 10**12)) == 0


def test_requests_with_lost_events_are_left_out(tool: ModuleType) -> None:
    events = events_of({7: [1, 2, 3, 4], 8: [5, 6, 7, 8]})
    times = tool.TokenTimes(events[events["argument"] != (2 | 3 << 32)], 2)
    assert times.of((1, 2)) is None and times.of((5, 6)) is not None


def test_requests_that_begin_alike_are_left_out(tool: ModuleType) -> None:
    times = tool.TokenTimes(events_of({7: [1, 2, 3], 8: [1, 2, 4], 9: [5, 6], 10: [1, 2]}), 2)
    assert times.of((1, 2)) is None and times.of((5, 6)) is not None


def test_quantiles(tool: ModuleType) -> None:
    got = tool.quantiles_ms(np.arange(0, 1001) * MS)
    assert got == {"p50": 500.0, "p90": 900.0, "p99": 990.0, "p99.9": 999.0, "max": 1000.0}
    assert tool.quantiles_ms(np.zeros(0, np.int64)) == {}
