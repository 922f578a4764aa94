"""A recording of a running engine: what is in the file, that the clocks' error is a bound, and what becomes of one that was cut off.

Run: pytest tests/host/test_trace_recorder.py
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.host.engine_view import look
from blinkimp.host.shared_memory import EngineNotFoundError
from blinkimp.host.trace_reader import events_of, high_half, low_half
from blinkimp.ring_abi import LEAST_TRACE_EVENTS, TraceKind
from blinkimp.trace.clock import is_ping
from blinkimp.trace.errors import TraceError
from blinkimp.trace.file import EVENTS_OFFSET, FILE_HEADER, Metadata, TraceFile
from blinkimp.trace.recorder import LAST_PINGS, Recorder
from tests.host.engine_support import PortClient, make_tiny_checkpoint, running_engine, wait_for
from tests.support import PATIENCE_S

OP_PERIOD = 32  # steps


@contextmanager
def recording(recorder: Recorder) -> Iterator[Callable[[], Metadata]]:
    """Runs on a thread until what is yielded is called, which gives its metadata."""
    stop = threading.Event()
    found: list[Metadata] = []
    thread = threading.Thread(target=lambda: found.append(recorder.run(10 * PATIENCE_S, should_stop=stop.is_set)))
    thread.start()

    def end() -> Metadata:
        stop.set()
        thread.join(PATIENCE_S)
        assert found, "the recorder did not end"
        return found[0]

    try:
        yield end
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def test_a_recording_has_it_all(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    # Op times of no more steps than the engine keeps: a recorder that comes late loses none.
    options: dict[str, Any] = {"trace_events": LEAST_TRACE_EVENTS, "trace_op_period": OP_PERIOD, "num_threads": 2}
    path = tmp_path / "run.trace"
    with running_engine(tmp_path, **options, num_completions=64) as engine:
        name = engine.config.engine_name
        with Recorder(name, path) as recorder, PortClient(name, 0) as client, recording(recorder) as end:
            assert recorder.has_pings
            expected = [client.generate([1, 2, 3 + i], 20).tokens for i in range(8)]
            last = client.submit([4, 5], 80)  # more than the ring holds: it runs until it is read

            def batch_was_seen() -> bool:
                samples = list(recorder._last_samples.items())
                return any(place[0] == TraceKind.BATCH and value & 0xFFFFFFFF == 1 for place, value in samples)

            wait_for(batch_was_seen, PATIENCE_S, "the recorder has seen one run")
            client.wait_all(PATIENCE_S)
            expected.append(client.streams[last].tokens)
            wait_for(lambda: engine.status()["num_running"] == 0, PATIENCE_S, "the engine is idle")
            metadata = end()
    trace = TraceFile(path)
    events = trace.events
    assert trace.is_complete and metadata.ended_by == "interrupt" and len(events) == recorder.writer.num_events
    assert (trace.metadata.lost.device, trace.metadata.lost.ingress) == (0, 0)
    tokens = high_half(events_of(events, TraceKind.TOKEN)["argument"]).tolist()
    assert tokens == [token for stream in expected for token in stream]
    assert trace.metadata.num_pings > LAST_PINGS
    # The emulated device has the host's clock: the truth is an offset of 0.
    answered = is_ping(events_of(events, TraceKind.FIRST_DRAINED)["request_id"])
    assert answered.sum() > 0 and trace.clock.is_known
    device_ns = events_of(events, TraceKind.POLLED)["time_ns"]
    assert np.abs(trace.clock.to_host(device_ns) - device_ns.astype(np.int64)).max() <= trace.clock.error_ns + 1
    # Samples: the batch was seen running and, at the end, empty; the pages with it.
    batch = events_of(events, TraceKind.BATCH)
    assert low_half(batch["argument"]).max() == 1 and low_half(batch["argument"])[-1] == 0
    assert len(events_of(events, TraceKind.PAGES)) and len(events_of(events, TraceKind.RINGS)) >= 2
    # Op times of every so many steps, with names.
    info = trace.metadata.engine
    assert info.engine_name == name and info.config["trace_op_period"] == OP_PERIOD and info.model["num_layers"] == 2
    assert len(info.op_names) == 13 and trace.op_kinds()[:3] == ["embed", "qkv", "attention"]
    sampled = events_of(events, TraceKind.OP_TIMES)["step"].tolist()
    assert trace.op_samples["step"].tolist() == sampled and len(sampled) >= (8 * 20 + 80) // OP_PERIOD - 1
    times = trace.op_samples["times"]
    assert times.shape[1:] == (13, 2, 2) and (times[..., 0] <= times[..., 1]).all() and (times > 0).all()
    assert (times.max(axis=(1, 2, 3)) <= trace.op_samples["time_ns"]).all()


def test_a_recording_that_was_cut_off_can_be_read(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    path = tmp_path / "cut.trace"
    with running_engine(tmp_path, trace_events=LEAST_TRACE_EVENTS) as engine:
        name = engine.config.engine_name
        with Recorder(name, path) as recorder, PortClient(name, 0) as client, recording(recorder) as end:
            client.generate([1, 2, 3], 20)
            end()
        whole = TraceFile(path)
    num_bytes = EVENTS_OFFSET + 32 * len(whole.events)
    content = bytearray(path.read_bytes()[: num_bytes + 7])  # half an event more
    content[FILE_HEADER.fields["is_complete"][1]] = 0  # type: ignore[index]
    path.write_bytes(content)
    cut = TraceFile(path)
    assert not cut.is_complete and "cut off" in cut.metadata.ended_by
    assert cut.events.tobytes() == whole.events.tobytes()
    assert cut.clock.record == whole.clock.record


def test_the_end_of_the_engine_ends_the_recording(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    path = tmp_path / "end.trace"
    with running_engine(tmp_path, trace_events=LEAST_TRACE_EVENTS) as engine:
        recorder = Recorder(engine.config.engine_name, path, pings=False)
        with PortClient(engine.config.engine_name, 1) as client:
            client.generate([4, 5], 3)
        name = engine.config.engine_name
    with recorder:
        assert recorder.run(PATIENCE_S).ended_by == "the engine has ended"
    trace = TraceFile(path)
    assert len(events_of(trace.events, TraceKind.TOKEN)) == 3
    assert not trace.clock.is_known, "neither pings nor an ingress that traces"
    # One that was started anew has the old names, and other regions.
    with running_engine(tmp_path, trace_events=LEAST_TRACE_EVENTS, engine_name=name):
        recorder = Recorder(name, path, pings=False)
    with running_engine(tmp_path, engine_name=name), recorder:
        assert recorder.run(PATIENCE_S).ended_by == "the engine was started anew"


def test_two_recorders_do_not_mistake_each_others_pings(tmp_path: Path) -> None:
    """Both see all POLLED events of the device; the bounds of each must be of its own answers, and hold."""
    make_tiny_checkpoint(tmp_path)
    paths = [tmp_path / "a.trace", tmp_path / "b.trace"]
    with running_engine(tmp_path, trace_events=LEAST_TRACE_EVENTS, num_queue_pairs=3) as engine:
        name = engine.config.engine_name
        with Recorder(name, paths[0]) as first, Recorder(name, paths[1]) as second, PortClient(name, 0) as client:
            assert first.has_pings and second.has_pings
            with recording(first) as end_first, recording(second) as end_second:
                for idx in range(4):
                    client.generate([1, 2, 3 + idx], 20)
                end_first(), end_second()
    for path in paths:
        trace = TraceFile(path)
        device_ns = events_of(trace.events, TraceKind.POLLED)["time_ns"]
        assert trace.clock.is_known and trace.clock.record.slack_ns == 0
        assert np.abs(trace.clock.to_host(device_ns) - device_ns.astype(np.int64)).max() <= trace.clock.error_ns + 1


def test_an_engine_without_a_trace_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    with (
        running_engine(tmp_path) as engine,
        pytest.raises(EngineNotFoundError, match="--trace-events"),
    ):
        Recorder(engine.config.engine_name, tmp_path / "none.trace")
    assert not (tmp_path / "none.trace").exists()


def test_recorder_that_cannot_write_leaves_its_queue_pair_free(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    with running_engine(tmp_path, trace_events=LEAST_TRACE_EVENTS) as engine:
        name = engine.config.engine_name
        with pytest.raises(TraceError, match="cannot be written"):
            Recorder(name, tmp_path / "no-such-folder" / "run.trace")
        assert not any(pair.owner_pid for pair in look(name).queue_pairs)
