"""A recording of an engine on the GPU: its clock aligned with the host's, ops of every SM, and the exports.

Run: pytest -m gpu tests/gpu/test_trace_gpu.py -rP     (prints the alignment's error and the figures)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.trace_reader import events_of, high_half
from blinkimp.ring_abi import TraceKind
from blinkimp.trace.clock import is_ping
from blinkimp.trace.figures import figures_of
from blinkimp.trace.file import TraceFile
from blinkimp.trace.perfetto import export_perfetto
from blinkimp.trace.recorder import Recorder
from tests.host.engine_support import PortClient, running_engine
from tests.host.test_trace_recorder import recording
from tests.null.test_trace_exports import check_format, exported

pytestmark = pytest.mark.gpu

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def recorded(
    tiny: Path, device_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TraceFile, list[list[int]]]:
    path = tmp_path_factory.mktemp("trace") / "gpu.trace"
    options = {"trace_events": abi.LEAST_TRACE_EVENTS, "trace_op_period": 8, **device_options}
    with running_engine(tiny, **options) as engine:
        name = engine.config.engine_name
        with Recorder(name, path) as recorder, PortClient(name, 0) as client, recording(recorder) as end:
            assert recorder.has_pings
            told = [client.generate([1, 2, 3 + idx], NUM_TOKENS).tokens for idx in range(6)]
            end()
    return TraceFile(path), told


def test_tokens_of_the_trace_are_those_that_were_told(recorded: tuple[TraceFile, list[list[int]]]) -> None:
    trace, told = recorded
    tokens = high_half(events_of(trace.events, TraceKind.TOKEN)["argument"]).tolist()
    assert tokens == [token for stream in told for token in stream]


def test_the_gpus_clock_is_aligned_within_the_stated_error(recorded: tuple[TraceFile, list[list[int]]]) -> None:
    """Each ping was taken between its sending and the sight of its answer: converted, too, within the error."""
    trace, _ = recorded
    assert trace.clock.is_known
    polled = events_of(trace.events, TraceKind.POLLED)
    pings = polled[is_ping(polled["request_id"])]
    answered = events_of(trace.events, TraceKind.FIRST_DRAINED)
    seen_at = dict(zip(answered["request_id"].tolist(), answered["time_ns"].astype(np.int64).tolist(), strict=True))
    host_ns = trace.clock.to_host(pings["time_ns"])
    error_ns = trace.clock.error_ns + 1
    for ping, at_ns in zip(pings, host_ns.tolist(), strict=True):
        assert int(ping["argument"]) - error_ns <= at_ns
        if int(ping["request_id"]) in seen_at:
            assert at_ns <= seen_at[int(ping["request_id"])] + error_ns
    print(
        f"aligned within {trace.clock.error_ns / 1e3:.2f} us by {len(pings)} pings; slack {trace.clock.record.slack_ns:g} ns"
    )


def test_every_op_has_times_of_sms(recorded: tuple[TraceFile, list[list[int]]]) -> None:
    trace, _ = recorded
    assert len(trace.op_samples) >= 6 * NUM_TOKENS // 8 - 2 and trace.metadata.lost.op_samples == 0
    times = trace.op_samples["times"].astype(np.int64)
    ran = (times > 0).all(-1)
    assert ran.any(-1).all(), "each op of each sampled step ran on some SM"
    assert (times[..., 0] <= times[..., 1])[ran].all()
    figures = figures_of(trace)
    total = sum(own["ms_a_step"] for own in figures["ops"]["by_kind"].values())
    assert total == pytest.approx(figures["ops"]["ms_a_step"], rel=1e-3) and total > 0
    print(json.dumps({"ops": figures["ops"], "steps": figures["steps"]}, indent=1))


def test_the_perfetto_file_is_well_formed(recorded: tuple[TraceFile, list[list[int]]], tmp_path: Path) -> None:
    trace, told = recorded
    export_perfetto(trace, tmp_path / "gpu.json.gz")
    document = exported(tmp_path / "gpu.json.gz")
    check_format(document)
    assert sum(event["pid"] == 3 and event["name"] == "token" for event in document["traceEvents"]) == sum(
        map(len, told)
    )
