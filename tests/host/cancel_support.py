"""How soon the director lets go of requests that nobody wants any more, read from the trace in steps.

Used by tests/host/test_http_cancel.py and test_zmq_cancel.py.
"""

from __future__ import annotations

from blinkimp import ring_abi as abi
from blinkimp.host.trace_reader import TraceReader, events_of

TRACE_EVENTS = 1 << 18
# The step in flight when a cancel is taken, and the one behind it where its plan had already been started: L3 of request_life.cuh.
MOST_STEPS = 1


def assert_let_go_at_the_next_commit(trace: TraceReader, num_cancelled: int) -> None:
    """Every request whose cancel the director took ended, with its pages, at the commit that came next."""
    events = trace.read()
    assert trace.num_lost == 0, "the ring of events is too small for this test"
    polled: dict[int, list[int]] = {}
    for event in events_of(events, abi.TraceKind.POLLED):
        polled.setdefault(int(event["request_id"]), []).append(int(event["step"]))
    num_seen = 0
    for event in events_of(events, abi.TraceKind.FINISHED):
        steps = polled[int(event["request_id"])]
        if len(steps) == 1:  # it ended by itself
            continue
        assert 0 <= int(event["step"]) - steps[1] <= MOST_STEPS, (event, steps)
        num_seen += 1
    assert num_seen >= num_cancelled
