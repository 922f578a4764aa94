"""One request's life, event by event.

    for moment in timeline(trace, request_id): ...

Called by blinkimp/cli/trace.py. Test: pytest tests/null/test_trace_figures.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blinkimp.ring_abi import FinishReason, TraceKind
from blinkimp.trace.errors import TraceError
from blinkimp.trace.figures import lives_of
from blinkimp.trace.file import TraceFile
from blinkimp.trace.scan import scan


@dataclass(frozen=True)
class Moment:
    at_ms: float  # since the first event of the request
    since_ms: float  # since the one before
    source: str
    what: str
    detail: str
    step: int | None


def detail_of(kind: TraceKind, argument: int) -> str:
    """What an event's argument says (device/trace_abi.h)."""
    low, high = argument & 0xFFFFFFFF, argument >> 32
    match kind:
        case TraceKind.QUEUED | TraceKind.RECEIVED:
            return f"{low} prompt tokens, {high} output tokens at most"
        case TraceKind.ADMITTED:
            return f"{low} tokens from the prefix cache, {high} pages"
        case TraceKind.CHUNK:
            return f"prompt rows {low} to {low + high}"
        case TraceKind.TOKEN:
            return f"output {low}: token {high}"
        case TraceKind.PREEMPTED:
            return f"{low} tokens to compute again"
        case TraceKind.FINISHED:
            names = {int(reason): reason.name.lower() for reason in FinishReason}
            return f"{names.get(low, low)}, {high} output tokens"
        case TraceKind.CLAIMED:
            return "again, after a loss" if low else ""
        case TraceKind.FINISH_DRAINED:
            return "an error" if low else ""
        case TraceKind.ENDED | TraceKind.STREAMED:
            return f"{argument} output tokens"
    return ""


def timeline(trace: TraceFile, request_id: int) -> list[Moment]:
    """Raises TraceError where the trace has nothing of it."""
    own = trace.events[np.ascontiguousarray(trace.events["request_id"]) == np.uint64(request_id)]
    if not len(own) or request_id == 0:
        raise TraceError(
            f"{trace.path}: has no event of request {request_id:#x}; expected an id of this trace; `--slowest 5` shows some"
        )
    is_device = own["kind"] < int(TraceKind.RECEIVED)
    times = np.where(is_device, trace.clock.to_host(own["time_ns"]), own["time_ns"].astype(np.int64))
    order = np.argsort(times, kind="stable")
    moments: list[Moment] = []
    begin = before = int(times[order[0]])
    for idx in order.tolist():
        event, now = own[idx], int(times[idx])
        kind = TraceKind(int(event["kind"]))
        source = "director" if is_device[idx] else f"ingress {int(event['queue_pair_idx'])}"
        step = int(event["step"]) if is_device[idx] else None
        detail = detail_of(kind, int(event["argument"]))
        what = kind.name.lower().replace("_", " ")
        moments.append(Moment((now - begin) / 1e6, (now - before) / 1e6, source, what, detail, step))
        before = now
    return moments


def longest(trace: TraceFile, num: int) -> list[int]:
    """Ids of the requests that took longest, from received (or queued) to ended (or finished)."""
    at = (lives := lives_of(scan(trace.events), trace.clock)).at
    begin = np.where(np.isfinite(at["received"]), at["received"], at["queued"])
    end = np.where(np.isfinite(at["ended"]), at["ended"], at["finished"])
    spans = end - begin
    known = np.nonzero(np.isfinite(spans))[0]
    order = known[np.argsort(-spans[known], kind="stable")]
    return [int(request_id) for request_id in lives.table["id"][order[:num]]]
