"""The trace: what the device writes about requests and steps, and what a reader makes of it. Run: pytest tests/host/test_trace.py"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import EngineNotFoundError, Region, open_trace
from blinkimp.host.trace_memory import TraceGeometry
from blinkimp.host.trace_reader import TraceReader, events_of, high_half, low_half
from blinkimp.ring_abi import FinishReason, TraceKind
from tests.host.director_rig import EOS_ID, Rig, Shape, plain_sampler
from tests.host.engine_support import PortClient, make_tiny_checkpoint, running_engine, wait_for
from tests.support import PATIENCE_S

RING = abi.LEAST_TRACE_EVENTS


def reader_of(rig: Rig) -> TraceReader:
    return TraceReader(cast(Region, rig.trace), from_start=True)


def turn(rig: Rig, source: random.Random) -> None:
    """One step, planned ahead or not."""
    rig.poll()
    if rig.in_flight or rig.plan():
        planned, waits = rig.plan_ahead() if source.random() < 0.8 else ([], False)
        rig.run_workers(sampler)
        if planned and not waits:
            rig.start_next()
        rig.commit(sampler)
    rig.publish()


def sampler(request_id: int, output_idx: int) -> int:
    return EOS_ID if (request_id + output_idx) % 23 == 22 else plain_sampler(request_id, output_idx)


def kinds_of(events: NDArray[np.void], request_id: int) -> list[TraceKind]:
    return [TraceKind(int(event["kind"])) for event in events if int(event["request_id"]) == request_id]


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_the_life_of_a_request(kind: str) -> None:
    rig = Rig(Shape(trace_events=RING, prefill_chunk_tokens=32), kind)
    rig.attach_all()
    assert rig.ingresses[0].submit(7, list(range(1, 51)), 3)
    for _ in range(8):
        turn(rig, random.Random(1))
    events = reader_of(rig).read()
    assert kinds_of(events, 7) == [
        TraceKind.POLLED, TraceKind.QUEUED, TraceKind.ADMITTED, TraceKind.CHUNK, TraceKind.CHUNK, TraceKind.TOKEN,
        TraceKind.TOKEN, TraceKind.TOKEN, TraceKind.FINISHED,
    ]  # fmt: skip
    queued = events_of(events, TraceKind.QUEUED)
    assert (int(low_half(queued["argument"])[0]), int(high_half(queued["argument"])[0])) == (50, 3)
    chunks = events_of(events, TraceKind.CHUNK)
    assert low_half(chunks["argument"]).tolist() == [0, 32] and high_half(chunks["argument"]).tolist() == [32, 18]
    tokens = events_of(events, TraceKind.TOKEN)
    assert low_half(tokens["argument"]).tolist() == [0, 1, 2]
    assert high_half(tokens["argument"]).tolist() == [sampler(7, i) for i in range(3)]
    finished = events_of(events, TraceKind.FINISHED)
    assert (
        int(low_half(finished["argument"])[0]) == FinishReason.LENGTH and int(high_half(finished["argument"])[0]) == 3
    )
    commits = events_of(events, TraceKind.COMMIT)
    assert commits["step"].tolist() == [0, 1, 2, 3] and high_half(commits["argument"]).tolist() == [0, 1, 1, 1]
    assert (np.diff(tokens["time_ns"].astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_events_add_up_to_the_counters(kind: str) -> None:
    """Preemptions, stalls, cancels, dropped ingresses: whatever the status counts, the trace has."""
    source = random.Random(3)
    shape = Shape(num_queue_pairs=2, max_batch=6, num_pages=9, num_completions=16, max_context=256, trace_events=RING)
    rig = Rig(shape, kind)
    rig.attach_all()
    next_id = 1
    for turn_idx in range(900):
        for ingress in rig.ingresses:
            if (
                ingress.is_attached
                and source.random() < 0.3
                and ingress.submit(next_id, [3] * source.randrange(1, 90), source.randrange(1, 60))
            ):
                next_id += 1
            if ingress.is_attached and source.random() < 0.03 and ingress.num_free_entries() > 0:
                ingress.write_entry(abi.SUBMISSION_CANCEL, max(1, next_id - 3))
            if source.random() < (0.9 if ingress is rig.ingresses[0] else 0.2):
                ingress.read()
        turn(rig, source)
        if turn_idx == 100:
            rig.ingresses[1].detach()
    rig.check()
    rig.publish()
    events = reader_of(rig).read()
    counts = Counter(TraceKind(kind) for kind in events["kind"].tolist())
    for kind_of_event, name in (
        (TraceKind.QUEUED, "requests_accepted"), (TraceKind.TOKEN, "output_tokens"), (TraceKind.PREEMPTED, "preemptions"),
        (TraceKind.STALLED, "credit_stalls"), (TraceKind.COMMIT, "step"),
    ):  # fmt: skip
        assert counts[kind_of_event] == rig.engine_status(name), name
    assert counts[TraceKind.PREEMPTED] > 0 and counts[TraceKind.STALLED] > 0
    for reason in (FinishReason.EOS, FinishReason.LENGTH):
        ended = low_half(events_of(events, TraceKind.FINISHED)["argument"]) == int(reason)
        assert int(ended.sum()) - rig.engine_status(f"finished_{reason.name.lower()}") in (0, 1), (
            "said at once, counted a step later"
        )
    for request_id in range(1, next_id):
        kinds = kinds_of(events, request_id)
        kinds = [entry for entry in kinds if entry != TraceKind.POLLED]  # CANCELs name it too
        if kinds:
            assert kinds[0] == TraceKind.QUEUED and kinds.count(TraceKind.FINISHED) <= 1
            assert TraceKind.FINISHED not in kinds[:-1], (request_id, kinds)


def test_a_slow_reader_knows_what_it_lost() -> None:
    rig = Rig(
        Shape(
            max_batch=256, num_requests=256, max_requests_per_queue_pair=256, max_step_tokens=1024, num_pages=1100, max_context=512,
            num_submissions=256, num_completions=1024, arena_bytes=131072, trace_events=RING,
        )
    )  # fmt: skip
    rig.attach_all()
    for request_id in range(1, 257):
        assert rig.ingresses[0].submit(request_id, [5] * 3, 400, (), {"ignore_eos": 1})
    slow, quick = reader_of(rig), reader_of(rig)
    num_quick = 0
    for _ in range(330):
        rig.poll()
        rig.plan()
        rig.commit(plain_sampler)
        rig.publish()
        rig.ingresses[0].read()
        num_quick += len(quick.read())
    assert quick.num_lost == 0
    num_events = int(rig.trace.view(abi.TRACE_LINE, abi.TRACE_HEADER.itemsize)["producer_pos"][0])
    assert num_quick == num_events > RING
    events = slow.read()
    assert len(events) == RING - abi.MAX_TRACE_BURST and slow.num_lost == num_events - len(events)
    assert (np.diff(events_of(events, TraceKind.COMMIT)["step"].astype(np.int64)) == 1).all()


def test_trace_of_a_running_engine(tmp_path: Path) -> None:
    """Through shared memory, from another process: requests, steps, op times."""
    make_tiny_checkpoint(tmp_path)
    options: dict[str, Any] = {"trace_events": RING, "trace_op_period": 4, "num_threads": 2}
    with running_engine(tmp_path, **options) as engine, TraceReader(open_trace(engine.config.engine_name)) as reader:
        with PortClient(engine.config.engine_name, 0) as client:
            expected = [client.generate([1, 2, 3 + i], 20).tokens for i in range(3)]
        events = reader.read()

        def has_it_all() -> bool:
            nonlocal events
            events = np.concatenate([events, reader.read()])
            counts = Counter(events["kind"].tolist())
            num_steps = counts[TraceKind.STEP_START]
            return (
                counts[TraceKind.FINISHED] == len(expected)
                and counts[TraceKind.STEP_END] == num_steps
                and counts[TraceKind.OP_TIMES] == -(-num_steps // 4)
            )

        wait_for(has_it_all, PATIENCE_S, "the events of three requests and their steps")
        tokens = high_half(events_of(events, TraceKind.TOKEN)["argument"]).tolist()
        assert tokens == [token for stream in expected for token in stream]
        starts, ends = events_of(events, TraceKind.STEP_START), events_of(events, TraceKind.STEP_END)
        assert starts["step"].tolist() == ends["step"].tolist() == list(range(len(starts)))
        assert (starts["time_ns"] <= ends["time_ns"]).all()
        sampled = events_of(events, TraceKind.OP_TIMES)
        assert sampled["step"].tolist() == list(range(0, len(starts), 4))
        times = reader.op_times(sampled[-1])
        assert times.shape == (reader.header["num_ops"], 2, 2) and (times > 0).all()
        begins, dones = times[..., 0], times[..., 1]
        assert (begins <= dones).all() and (dones[:-1] <= begins[1:]).all(), "ops of a worker follow each other"
        # The start is stamped by the thread that hands the plan over, when it has done so: another may have begun by then. None begins
        # before the step before has ended, and none ends after its own step.
        step = int(sampled[-1]["step"])
        assert (times >= int(ends["time_ns"][step - 1])).all() and (times <= int(ends["time_ns"][step])).all()
        with pytest.raises(ValueError, match="expected OP_TIMES"):
            reader.op_times(starts[0])


def test_an_engine_without_a_trace_has_none(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    with (
        running_engine(tmp_path) as engine,
        pytest.raises(EngineNotFoundError, match="trace_events"),
    ):
        open_trace(engine.config.engine_name)


def test_bad_sizes_are_refused() -> None:
    for num_events in (1, 65535, 65537, 100_000):
        with pytest.raises(ValueError, match="expected 0"):
            TraceGeometry(num_events)
    with pytest.raises(ValueError, match="num_op_slots"):
        TraceGeometry(RING, op_period=3)
