"""The alignment of two clocks: the error it states is a bound, whatever the latencies. Run: pytest tests/null/test_trace_clock.py"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import TraceKind
from blinkimp.trace.clock import PING_BIT, UNKNOWN_NS, Bounds, Clock, ClockRecord, align, bounds_of

HOST_ZERO = 5_000_000_000_000
OFFSET = 1_700_000_000_000_000_123  # a wall clock's nanoseconds: beyond what a float holds


def device_of(host_ns: NDArray[np.int64], drift: float, wobble_ns: float = 0.0) -> NDArray[np.int64]:
    since = (host_ns - HOST_ZERO).astype(np.float64)
    return host_ns + OFFSET + np.rint(since * drift + wobble_ns * np.sin(since / 40e9)).astype(np.int64)


def round_trips(seed: int, seconds: float, num: int, drift: float, wobble_ns: float = 0.0) -> Bounds:
    """Pings with latencies of 1 us and more, each way for itself."""
    random = np.random.default_rng(seed)
    sent = HOST_ZERO + np.sort(random.integers(0, int(seconds * 1e9), num))
    there, back = (1000 + random.exponential(30_000, (2, num))).astype(np.int64)
    stamped = device_of(sent + there, drift, wobble_ns)
    return Bounds(stamped, stamped - sent, stamped, stamped - (sent + there + back))


@pytest.mark.parametrize(
    ("seconds", "num", "drift", "wobble_ns"),
    [
        (5.0, 40, 0.0, 0.0),
        (60.0, 600, 37e-6, 0.0),
        (60.0, 600, -90e-6, 0.0),
        (120.0, 1200, 12e-6, 20_000.0),
        (0.1, 3, 5e-5, 0.0),
    ],
)
def test_the_error_is_a_bound(seconds: float, num: int, drift: float, wobble_ns: float) -> None:
    for seed in range(5):
        bounds = round_trips(seed, seconds, num, drift, wobble_ns)
        clock = align(bounds)
        host = np.linspace(0, seconds * 1e9, 1000).astype(np.int64) + HOST_ZERO
        device = device_of(host, drift, wobble_ns)
        inside = (device >= bounds.upper_at.min()) & (device <= bounds.upper_at.max())
        wrong = np.abs(clock.to_host(device[inside]) - host[inside])
        assert wrong.max() <= clock.error_ns + 2, "rounding to whole nanoseconds apart"
        if num >= 40:
            assert clock.error_ns < 20_000, (
                "a ten-thousandth of the latencies' spread would be suspicious, their mean is useless"
            )


def test_more_pings_never_loosen_the_bound() -> None:
    bounds = round_trips(3, 8.0, 400, 2e-5)
    few = Bounds(bounds.upper_at[::8], bounds.upper[::8], bounds.lower_at[::8], bounds.lower[::8])
    assert align(bounds).error_ns <= align(few).error_ns


def test_a_clock_that_jumps_widens_the_bound_and_says_so() -> None:
    bounds = round_trips(1, 8.0, 200, 0.0)
    late = bounds.upper_at > np.median(bounds.upper_at)
    jumped = Bounds(bounds.upper_at, bounds.upper + 500_000 * late, bounds.lower_at, bounds.lower + 500_000 * late)
    clock = align(jumped)
    assert clock.record.slack_ns > 0 and clock.error_ns > 0


def test_without_a_round_trip_nothing_is_known() -> None:
    nothing = np.zeros(0, np.int64)
    for bounds in (Bounds(nothing, nothing, nothing, nothing), Bounds(np.array([5]), np.array([1]), nothing, nothing)):
        clock = align(bounds)
        assert not clock.is_known and clock.error_ns == UNKNOWN_NS
        assert clock.to_host(np.array([7], np.uint64)).tolist() == [7]


def test_no_time_stays_no_time() -> None:
    clock = Clock(ClockRecord(100, [(1000, 0.25, 3.0), (2000, 1.75, 4.0)]))
    assert clock.to_host(np.array([0, 1000, 2000, 5000], np.uint64)).tolist() == [0, 900, 1898, 4898]
    assert clock.error_ns == 4.0


def test_bounds_come_from_requests_and_pings() -> None:
    ping = int(PING_BIT) | 1
    rows = [
        (100, TraceKind.CLAIMED, 7, 0), (1150, TraceKind.POLLED, 7, 0), (1300, TraceKind.TOKEN, 7, 55 << 32),
        (1400, TraceKind.TOKEN, 7, 1 | 56 << 32), (340, TraceKind.FIRST_DRAINED, 7, 0),
        (1510, TraceKind.POLLED, ping, 500), (530, TraceKind.FIRST_DRAINED, ping, 0), (90, TraceKind.CLAIMED, 8, 0),
    ]  # fmt: skip
    events = np.zeros(len(rows), abi.TRACE_EVENT)
    for event, (time_ns, kind, request_id, argument) in zip(events, rows, strict=True):
        event["time_ns"], event["kind"], event["request_id"], event["argument"] = (
            time_ns,
            int(kind),
            request_id,
            argument,
        )
    bounds = bounds_of(events)
    assert bounds.upper.tolist() == [1050, 1010] and bounds.lower.tolist() == [960, 980]
    clock = align(bounds)
    assert 980 <= clock.to_host(np.array([2000], np.uint64))[0] <= 1020
