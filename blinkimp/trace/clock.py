"""How far the device's clock is from the host's, and how well that is known.

    clock = align(bounds_of(events))              # from events alone, whoever recorded them
    host_ns = clock.to_host(events["time_ns"])    # of device events; error_ns() says how wrong that may be

Problem   The device stamps with a clock of its own: another zero, another rate. Nobody can read both clocks at one moment.
Rule      Cause comes before effect. What the host wrote at h and the device had seen by d: offset = d - h at most (upper bound). What the device
          stamped d and the host had read by h: offset = d - h at least (lower bound). Pings through the rings and every request give both. Within
          a stretch of SEGMENT_NS the offset is taken to be a straight line (two oscillators); of all lines that break no bound, the lowest and
          the highest value at each end of the stretch are the interval in which the offset lies there. Its middle is used, half its width is
          the error: not an estimate, but a bound, as far as the clocks run straight for ten seconds.
Hazard    Offsets reach 1e18 ns, where a float knows 256 ns: they are int64 from base_offset_ns, floats only in between.
Called by blinkimp/trace/{file,recorder}.py. Test: pytest tests/null/test_trace_clock.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from blinkimp.ring_abi import TraceKind

SEGMENT_NS: Final = 10_000_000_000
BINS_A_SEGMENT: Final = 128  # of each bin the tightest bound is kept
MAX_DRIFT: Final = 1e-3  # a crystal is within 1e-4; the host's clock may be slewed by 5e-4
CHUNK_EVENTS: Final = 1 << 22
UNKNOWN_NS: Final = float("inf")


class ClockRecord(msgspec.Struct):
    """As it stands in a trace's metadata."""

    base_offset_ns: int = 0
    knots: list[tuple[int, float, float]] = []  # device time, offset - base_offset_ns, error; straight lines in between
    num_upper: int = 0  # bounds that were used
    num_lower: int = 0
    slack_ns: float = 0.0  # by so much the bounds had to be widened, because the clocks did not run straight


@dataclass(frozen=True)
class Bounds:
    """Of the offset device - host, each at a device time. [n] int64 each."""

    upper_at: NDArray[np.int64]
    upper: NDArray[np.int64]
    lower_at: NDArray[np.int64]
    lower: NDArray[np.int64]


class Clock:
    """Turns device times into host times."""

    def __init__(self, record: ClockRecord) -> None:
        self.record = record
        knots = np.array([knot[1:] for knot in record.knots], np.float64).reshape(-1, 2)
        self._at = np.array([knot[0] for knot in record.knots], np.int64)
        self._residual, self._error = knots[:, 0], knots[:, 1]

    @property
    def is_known(self) -> bool:
        return len(self._at) > 0

    @property
    def error_ns(self) -> float:
        """The largest error of the whole trace; infinite where nothing is known."""
        return float(self._error.max()) if self.is_known else UNKNOWN_NS

    def error_at(self, device_ns: NDArray[Any]) -> NDArray[np.float64]:
        """[n] ns by which to_host() may be wrong at these times; infinite where nothing is known."""
        if not self.is_known:
            return np.full(len(device_ns), UNKNOWN_NS)
        at = (device_ns.astype(np.int64) - self._at[0]).astype(np.float64)
        errors: NDArray[np.float64] = np.interp(at, (self._at - self._at[0]).astype(float), self._error)
        return errors

    def to_host(self, device_ns: NDArray[Any]) -> NDArray[np.int64]:
        """0, which stands for no time, stays 0. Where nothing is known the times are returned as they are."""
        times = device_ns.astype(np.int64)
        if not self.is_known:
            return times
        # Relative to the first knot, so that floats are exact to less than a nanosecond for a day.
        residual = np.interp(
            (times - self._at[0]).astype(np.float64), (self._at - self._at[0]).astype(float), self._residual
        )
        host = times - self.record.base_offset_ns - np.rint(residual).astype(np.int64)
        return np.where(times == 0, 0, host)


# ---- Bounds from events --------------------------------------------------------------------------------------------------
def bounds_of(events: NDArray[np.void]) -> Bounds:
    """CLAIMED before POLLED; a first TOKEN, or a ping's POLLED, before FIRST_DRAINED. A ping has its time of writing as its argument."""
    kinds = [TraceKind.CLAIMED, TraceKind.POLLED, TraceKind.TOKEN, TraceKind.FIRST_DRAINED]
    found: dict[TraceKind, list[NDArray[np.void]]] = {kind: [] for kind in kinds}
    for begin in range(0, len(events), CHUNK_EVENTS):
        chunk = events[begin : begin + CHUNK_EVENTS]
        column = np.ascontiguousarray(chunk["kind"])
        for kind in kinds:
            some = chunk[column == int(kind)]
            found[kind].append(
                some[(some["argument"] & np.uint64(0xFFFFFFFF)) == 0] if kind == TraceKind.TOKEN else some
            )
    claimed, polled, tokens, drained = (np.concatenate(found[kind]) if found[kind] else events[:0] for kind in kinds)
    pings = polled[is_ping(polled["request_id"])]
    upper = _pairs(claimed, polled), (pings["argument"].astype(np.int64), pings["time_ns"].astype(np.int64))
    lower = _pairs(drained, tokens), _pairs(drained, pings)
    upper_host, upper_at = (np.concatenate(parts) for parts in zip(*upper, strict=True))
    lower_host, lower_at = (np.concatenate(parts) for parts in zip(*lower, strict=True))
    return Bounds(upper_at, upper_at - upper_host, lower_at, lower_at - lower_host)


PING_BIT: Final = np.uint64(1 << 63)  # request ids of an ingress have 62 bits


def is_ping(request_ids: NDArray[Any]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (request_ids & PING_BIT) != 0
    return found


def _pairs(host: NDArray[np.void], device: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Times of the events of equal request_id."""
    _, first, second = np.intersect1d(host["request_id"], device["request_id"], return_indices=True)
    return host["time_ns"][first].astype(np.int64), device["time_ns"][second].astype(np.int64)


# ---- Alignment -----------------------------------------------------------------------------------------------------------
def align(bounds: Bounds) -> Clock:
    if not len(bounds.upper) or not len(bounds.lower):
        return Clock(ClockRecord())
    base = int(np.median(bounds.upper))
    begin = int(min(bounds.upper_at.min(), bounds.lower_at.min()))
    end = max(int(max(bounds.upper_at.max(), bounds.lower_at.max())), begin + 1)
    num_segments = max(1, min(1024, round((end - begin) / SEGMENT_NS)))
    edges = np.linspace(0.0, float(end - begin), num_segments + 1)
    upper = _tightest(bounds.upper_at - begin, bounds.upper - base, edges, 1.0)
    lower = _tightest(bounds.lower_at - begin, bounds.lower - base, edges, -1.0)
    low, high = np.full(num_segments + 1, -np.inf), np.full(num_segments + 1, np.inf)
    slack_ns, num_bounds = 0.0, [0, 0]
    for idx in range(num_segments):
        inside = [points[(points[:, 0] >= edges[idx]) & (points[:, 0] <= edges[idx + 1])] for points in (upper, lower)]
        if not len(inside[0]) or not len(inside[1]):
            continue  # the neighbours' knots reach over the gap
        num_bounds[0], num_bounds[1] = num_bounds[0] + len(inside[0]), num_bounds[1] + len(inside[1])
        ends, slack = _extremes(inside[0], inside[1], edges[idx : idx + 2])
        slack_ns = max(slack_ns, slack)
        for edge, (least, most) in zip((idx, idx + 1), ends, strict=True):
            both = max(low[edge], least), min(high[edge], most)
            # Two stretches that contradict each other: whatever either allows.
            low[edge], high[edge] = both if both[0] <= both[1] else (min(low[edge], least), max(high[edge], most))
    known = np.isfinite(low) & np.isfinite(high)
    knots = [
        (begin + round(at), float(least + most) / 2, float(most - least) / 2)
        for at, least, most in zip(edges[known], low[known], high[known], strict=True)
    ]
    return Clock(ClockRecord(base, knots, num_bounds[0], num_bounds[1], slack_ns))


def _tightest(
    at: NDArray[np.int64], value: NDArray[np.int64], edges: NDArray[np.float64], sign: float
) -> NDArray[np.float64]:
    """[n, 2] (time, bound), ascending: of each bin of time the lowest upper bound (sign 1), or the highest lower one (-1)."""
    num_bins = BINS_A_SEGMENT * (len(edges) - 1)
    bins = np.minimum((at / edges[-1] * num_bins).astype(np.int64), num_bins - 1)
    order = np.lexsort((sign * value, bins))
    firsts = order[np.unique(bins[order], return_index=True)[1]]
    points = np.stack([at[firsts].astype(np.float64), value[firsts].astype(np.float64)], 1)
    ordered: NDArray[np.float64] = points[np.argsort(points[:, 0], kind="stable")]
    return ordered


def _hull(points: NDArray[np.float64], sign: float) -> NDArray[np.float64]:
    """The lower convex hull of (time, bound), or the upper one (sign -1): the other points bind no line."""
    kept: list[NDArray[np.float64]] = []
    for point in points:
        while len(kept) > 1:
            (x0, y0), (x1, y1) = kept[-2], kept[-1]
            if sign * ((x1 - x0) * (point[1] - y0) - (point[0] - x0) * (y1 - y0)) > 0:
                break
            kept.pop()
        kept.append(point)
    return np.array(kept)


def _extremes(
    upper: NDArray[np.float64], lower: NDArray[np.float64], ends: NDArray[np.float64]
) -> tuple[list[tuple[float, float]], float]:
    """The least and the most that a line between the bounds may be at both ends; and the slack that was needed for there to be one."""
    slack = 0.0
    while True:
        widening = np.array([0.0, slack])
        above, below = _hull(upper + widening, 1.0), _hull(lower - widening, -1.0)
        values = _feasible(above, below, ends)
        if len(values):
            return [(float(column.min()), float(column.max())) for column in values.T], slack
        slack = max(2 * slack, 1.0)


def _feasible(above: NDArray[np.float64], below: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 2] values at both ends of every corner of the set of lines below `above` and above `below`, not steeper than MAX_DRIFT. The lowest
    and highest value at a time are at corners; a corner is a line through two points, or through one at the steepest slope."""
    points = np.concatenate([above, below])
    first, second = np.triu_indices(len(points), 1)
    run = points[second, 0] - points[first, 0]
    apart = run != 0
    slopes = (points[second, 1] - points[first, 1])[apart] / run[apart]
    anchors = points[first[apart]]
    steepest = np.array([-MAX_DRIFT, MAX_DRIFT])
    slopes = np.concatenate([slopes, np.repeat(steepest, len(points))])
    anchors = np.concatenate([anchors, points, points])
    constants = anchors[:, 1] - slopes * anchors[:, 0]
    tolerance = 1e-3  # of a nanosecond: the lines go through points that bind them
    fits = np.abs(slopes) <= MAX_DRIFT * (1 + 1e-9)
    for points, sign in ((above, 1.0), (below, -1.0)):
        lines = constants[:, None] + slopes[:, None] * points[None, :, 0]
        fits &= (sign * (lines - points[None, :, 1]) <= tolerance).all(1)
    values: NDArray[np.float64] = constants[fits, None] + slopes[fits, None] * ends[None, :]
    return values
