"""The pass over a trace: rows of requests and steps are what the events say, however the trace is cut. Run: pytest tests/null/test_trace_scan.py"""

from __future__ import annotations

import numpy as np
import pytest

from blinkimp.ring_abi import FinishReason, TraceKind
from blinkimp.trace.clock import PING_BIT
from blinkimp.trace.file import make_events
from blinkimp.trace.scan import bucket_value_ns, scan
from blinkimp.trace.synthetic import FIRST_ID, OFFSET_NS, Shape, make_trace

SHAPE = Shape(batch=8, output_tokens=20)


def test_rows_are_what_the_events_say() -> None:
    table = scan(make_trace(2000, SHAPE), 1)
    requests, steps = table.requests, table.steps
    assert len(requests) == table.count(TraceKind.QUEUED) and len(requests) % 8 == 0 and len(requests) >= 16
    assert set(requests["id"].tolist()) == {FIRST_ID + idx for idx in range(len(requests))}
    assert (requests["num_tokens"] == 20).all() and (requests["num_chunks"] == 2).all()
    assert (requests["chunk_rows"] == 300).all() and (requests["prompt_tokens"] == 300).all()
    assert (requests["queued"] - requests["polled"] == 1000).all()
    assert (requests["admitted"] - requests["queued"] == SHAPE.queue_ns).all()
    assert (requests["claimed"] - requests["received"] == SHAPE.ingress_ns).all()
    assert (requests["polled"] - OFFSET_NS - requests["committed"] == SHAPE.ingress_ns).all()
    assert (requests["longest_gap_ns"] == SHAPE.step_ns).all()
    assert (requests["last_token"] - requests["first_token"] == 19 * SHAPE.step_ns).all()
    assert (requests["reason"] == FinishReason.LENGTH).all() and (requests["output_tokens"] == 20).all()
    assert (steps["end"] - steps["start"] == SHAPE.step_ns - SHAPE.gap_ns).all()
    assert (steps["start"][1:] - steps["end"][:-1] == SHAPE.gap_ns).all()
    assert (steps["num_seqs"] == 8).all() and steps["num_rows"][:3].tolist() == [8 * 150, 8 * 150, 8]
    assert steps["num_tokens"].sum() == requests["num_tokens"].sum() == table.count(TraceKind.TOKEN)
    (buckets,) = np.nonzero(table.gap_histogram)
    assert len(buckets) == 1 and bucket_value_ns(int(buckets[0])) == pytest.approx(SHAPE.step_ns, rel=0.05)


@pytest.mark.parametrize("num_pieces", [1, 2])
def test_stalls_preemptions_and_cancels_are_counted(num_pieces: int) -> None:
    rows = [
        (10, TraceKind.RECEIVED, 40 | 9 << 32), (20, TraceKind.QUEUED, 40 | 9 << 32), (30, TraceKind.ADMITTED, 16 | 1 << 32),
        (40, TraceKind.CHUNK, 16 | 24 << 32), (50, TraceKind.TOKEN, 0), (60, TraceKind.STALLED, 0), (70, TraceKind.STALLED, 0),
        (80, TraceKind.PREEMPTED, 41), (90, TraceKind.ADMITTED, 32 | 1 << 32), (100, TraceKind.CHUNK, 32 | 9 << 32),
        (110, TraceKind.TOKEN, 1), (120, TraceKind.CANCEL_ASKED, 0), (125, TraceKind.POLLED, 0),
        (130, TraceKind.FINISHED, int(FinishReason.CANCELLED) | 2 << 32), (140, TraceKind.FINISH_DRAINED, 0), (150, TraceKind.ENDED, 2),
    ]  # fmt: skip
    events = make_events([(time_ns, int(kind), 3, 0, 77, argument) for time_ns, kind, argument in rows])
    (row,) = scan(events, num_pieces).requests
    expected = {
        "id": 77, "queue_pair": 3, "num_stalls": 2, "num_preemptions": 1, "lost_tokens": 41, "cached_tokens": 16, "num_chunks": 2,
        "chunk_rows": 33, "num_tokens": 2, "first_token": 50, "last_token": 110, "longest_gap_ns": 60, "admitted": 30, "cancel_asked": 120,
        "reason": int(FinishReason.CANCELLED), "output_tokens": 2, "finish_drained": 140, "ended": 150, "is_error": 0,
    }  # fmt: skip
    assert {name: int(row[name]) for name in expected} == expected


@pytest.mark.parametrize("num_pieces", [2, 3, 7])
def test_the_number_of_pieces_does_not_matter(num_pieces: int) -> None:
    events = make_trace(3000, SHAPE)
    whole, cut = scan(events, 1), scan(events, num_pieces)
    order, other = np.argsort(whole.requests["id"]), np.argsort(cut.requests["id"])
    assert whole.requests[order].tobytes() == cut.requests[other].tobytes()
    assert whole.steps.tobytes() == cut.steps.tobytes() and whole.first_step == cut.first_step
    assert (whole.gap_histogram == cut.gap_histogram).all() and (whole.kind_counts == cut.kind_counts).all()


def test_tables_grow() -> None:
    """More requests than a table begins with, in one piece."""
    num = 20_000
    events = make_events([(idx + 1, int(TraceKind.QUEUED), 0, 0, idx * 7919, 5 | 6 << 32) for idx in range(num)])
    table = scan(events, 1)
    assert len(table.requests) == num and (table.requests["prompt_tokens"] == 5).all()


def test_step_numbers_wrap() -> None:
    events = make_trace(1000, SHAPE, first_step=2**32 - 5)
    table = scan(events, 1)
    assert table.first_step == 2**32 - 5 and (table.steps["start"] > 0).all()
    assert (np.diff(table.steps["start"]) == SHAPE.step_ns).all()


def test_pings_and_samples_are_no_requests() -> None:
    events = make_events(
        [(5, int(TraceKind.POLLED), 1, 0, int(PING_BIT) | 3, 9), (6, int(TraceKind.RINGS), 1, 0, 0, 4), (7, int(TraceKind.DRAINED), 1, 0, 0, 4)]
    )  # fmt: skip
    doctor = make_events([(5, int(TraceKind.POLLED), 1, 0, 12, 9)])
    assert len(scan(doctor, 1).requests) == 0
    table = scan(events, 1)
    assert len(table.requests) == 0 and len(table.steps) == 0 and table.count(TraceKind.RINGS) == 1
    assert table.samples.tobytes() == events[1:2].tobytes()


def test_an_empty_trace() -> None:
    table = scan(make_events([]))
    assert len(table.requests) == len(table.steps) == 0
