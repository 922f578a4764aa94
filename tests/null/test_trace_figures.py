"""Figures and differences of traces whose every duration is known. Run: pytest tests/null/test_trace_figures.py"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.ring_abi import TraceKind
from blinkimp.trace.clock import ClockRecord
from blinkimp.trace.diff import Comparison, Moved, compare
from blinkimp.trace.figures import PHASES, figures_of, samples_of
from blinkimp.trace.file import Metadata, TraceFile, TraceFileWriter, make_events
from blinkimp.trace.scan import scan
from blinkimp.trace.synthetic import OFFSET_NS, Shape, make_trace
from blinkimp.trace.timeline import longest, timeline
from blinkimp.trace.tokens import token_streams

SHAPE = Shape(batch=4, output_tokens=10)
CLOCK = ClockRecord(OFFSET_NS, [(OFFSET_NS, 0.0, 500.0), (OFFSET_NS + 10**12, 0.0, 500.0)])
OPS = ["embed", "layer.0.qkv", "layer.1.qkv", "lm_head"]


def make_file(
    path: Path, shape: Shape = SHAPE, op_ns: tuple[int, ...] = (100, 300, 300, 200), **more: Any
) -> TraceFile:
    metadata = Metadata(clock=CLOCK, **more)
    metadata.engine.op_names = OPS
    with TraceFileWriter(path, num_ops=len(OPS), num_workers=2, begin_ns=1_000_000_000) as writer:
        writer.append(make_trace(2000, shape))
        for step in range(3):
            done = OFFSET_NS + 10**9 + step * shape.step_ns + np.cumsum(op_ns)
            begin = done - op_ns
            # The second worker needs half as long.
            times = np.stack([np.stack([begin, done], 1), np.stack([begin, begin + np.array(op_ns) // 2], 1)], 1)
            writer.append_op_sample(step, 5000, times.astype(np.uint64))
        samples = [
            (1_000_000_000 + second * 10**9, int(TraceKind.RINGS), 1, 0, 0, second | 2 * second << 32)
            for second in range(5)
        ]
        writer.append(make_events(samples))
        writer.finish(metadata, 6_000_000_000)
    return TraceFile(path)


def test_every_figure_of_a_known_trace(tmp_path: Path) -> None:
    figures = figures_of(make_file(tmp_path / "a.trace"))
    requests, steps = figures["requests"], figures["steps"]
    ingress_ms, step_ms, gap_ms = SHAPE.ingress_ns / 1e6, SHAPE.step_ns / 1e6, SHAPE.gap_ns / 1e6
    expected = {
        "ingress": ingress_ms, "commit": ingress_ms, "ring": ingress_ms, "queue": SHAPE.queue_ns / 1e6 + 0.001,
        "prefill": 2 * step_ms - gap_ms, "decode": 9 * step_ms, "drain": ingress_ms, "hand-over": ingress_ms,
    }  # fmt: skip
    assert list(requests["phases_ms"]) == list(PHASES) == list(expected)
    for name, value in expected.items():
        assert requests["phases_ms"][name]["mean"] == pytest.approx(value, abs=1e-5), name
    assert requests["whole_ms"]["p50"] == pytest.approx(sum(expected.values()), abs=1e-5)
    assert requests["tpot_ms"]["p99"] == pytest.approx(step_ms) and requests["itl_ms"]["p50"] == pytest.approx(
        step_ms, rel=0.06
    )
    assert requests["by_reason"] == {"length": requests["num"]} and requests["chunks"]["mean"] == 2
    assert steps["step_ms"]["mean"] == pytest.approx(step_ms - gap_ms) and steps["gap_us"]["p50"] == pytest.approx(
        gap_ms * 1e3
    )
    assert set(steps["by_class"]) == {"decode 3-4", "with prompts 3-4"}
    assert steps["tokens"] == requests["num"] * 10
    assert figures["trace"]["clock_error_us"] == 0.5
    ops = figures["ops"]
    assert ops["num_samples"] == 3 and ops["ms_a_step"] == pytest.approx(900e-6)
    assert ops["by_kind"]["qkv"] == {
        "ms_a_step": 600e-6,
        "share": pytest.approx(2 / 3, abs=1e-4),
        "worker_ms": 450e-6,
        "num_ops": 2,
    }
    rings = figures["occupancy"]["qp1 completions"]
    assert rings["mean"] == 4 and rings["max"] == 8 and rings["series"][0] == 0 and rings["series"][-1] == 8


def test_gaps_count_only_where_somebody_waits(tmp_path: Path) -> None:
    """All requests of a wave end with its last step: the time to the next wave is no gap of the director's."""
    figures = figures_of(make_file(tmp_path / "a.trace"))
    num_waves = figures["requests"]["num"] // SHAPE.batch
    assert figures["steps"]["gap_us"]["n"] == figures["steps"]["num"] - num_waves


def row(rows: list[Moved], name: str) -> Moved:
    return next(one for one in rows if one.name.strip() == name)


def differ(tmp_path: Path, shape: Shape, op_ns: tuple[int, ...] = (100, 300, 300, 200)) -> Comparison:
    return compare(make_file(tmp_path / "a.trace"), make_file(tmp_path / "b.trace", shape, op_ns))


def check_sums(found: Comparison) -> None:
    for rows in (found.requests, found.steps, found.ops):
        assert sum(one.change_ms for one in rows[:-1]) == pytest.approx(rows[-1].change_ms, abs=1e-9)


def test_a_longer_queue_is_blamed_on_the_queue(tmp_path: Path) -> None:
    found = differ(tmp_path, replace(SHAPE, queue_ns=SHAPE.queue_ns + 3_000_000))
    check_sums(found)
    assert row(found.requests, "queue").change_ms == pytest.approx(3.0) and row(
        found.requests, "queue"
    ).share == pytest.approx(1)
    assert found.steps[-1].change_ms == 0 and found.ops[-1].change_ms == 0 and found.same_tokens
    assert row(found.figures, "TTFT p50").change_ms == pytest.approx(3.0)


def test_slower_ops_and_steps_are_blamed_on_them(tmp_path: Path) -> None:
    found = differ(tmp_path, replace(SHAPE, step_ns=SHAPE.step_ns + 500_000), (100, 300, 900, 200))
    check_sums(found)
    assert row(found.ops, "qkv").change_ms == pytest.approx(600e-6) and row(found.ops, "qkv").share == pytest.approx(1)
    assert found.steps[-1].change_ms == pytest.approx(0.5)
    assert row(found.requests, "decode").change_ms == pytest.approx(4.5) and row(
        found.requests, "prefill"
    ).change_ms == pytest.approx(1.0)


def test_another_mix_of_steps_is_told_from_slower_steps(tmp_path: Path) -> None:
    found = differ(tmp_path, replace(SHAPE, batch=8))
    check_sums(found)
    assert {one.name for one in found.steps} >= {"decode 3-4", "decode 5-8", "a step"}
    assert found.same_tokens is None, "not as many requests"


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    first, second = make_file(tmp_path / "a.trace"), make_file(tmp_path / "b.trace")
    first.metadata.engine.config, second.metadata.engine.config = {"max_batch": 64}, {"max_batch": 32}
    assert compare(first, second).remarks == ["max_batch: 64 -> 32"]


def test_traces_without_an_ingress_are_compared_by_the_device_alone(tmp_path: Path) -> None:
    traces = [make_file(tmp_path / "a.trace"), make_file(tmp_path / "b.trace", replace(SHAPE, queue_ns=9_000_000))]
    for trace in traces:
        trace.events = trace.events[trace.events["kind"] < int(TraceKind.RECEIVED)]
    found = compare(*traces)
    assert [one.name for one in found.requests] == ["queue", "prefill", "decode", "a request's life"]
    assert found.requests[0].change_ms == pytest.approx(4.0) and "ingress" in found.remarks[0]


def test_token_streams_are_by_request() -> None:
    events = make_events(
        [(1, int(TraceKind.TOKEN), 0, 0, 9, 70 << 32), (2, int(TraceKind.TOKEN), 0, 0, 4, 50 << 32), (3, int(TraceKind.TOKEN), 0, 1, 9, 1 | 71 << 32)]
    )  # fmt: skip
    assert token_streams(events) == {9: np.array([70, 71], np.uint32).tobytes(), 4: np.array([50], np.uint32).tobytes()}
    assert token_streams(make_events([])) == {}


def test_a_timeline_has_every_event_of_a_request_in_order(tmp_path: Path) -> None:
    trace = make_file(tmp_path / "a.trace")
    (request_id,) = longest(trace, 1)
    moments = timeline(trace, request_id)
    assert [moment.what for moment in moments[:6]] == [
        "received",
        "claimed",
        "committed",
        "polled",
        "queued",
        "admitted",
    ]
    assert moments[-1].what == "ended" and sum(moment.what == "token" for moment in moments) == 10
    assert all(late.at_ms >= early.at_ms for early, late in itertools.pairwise(moments))
    assert moments[0].at_ms == 0 and "300 prompt tokens" in moments[0].detail


def test_samples_are_by_queue_pair(tmp_path: Path) -> None:
    samples = samples_of(scan(make_file(tmp_path / "a.trace").events).samples)
    assert set(samples) == {"qp1 submissions", "qp1 completions"}
    assert samples["qp1 submissions"][1].tolist() == [0, 1, 2, 3, 4]
