"""What an ingress writes about its requests, against a director in Python: kinds, order, and that nothing stays behind.

Run: pytest tests/host/test_ingress_trace.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp.client import Client
from blinkimp.host.shared_memory import SHM_DIR, open_ingress_trace
from blinkimp.host.trace_memory import TraceGeometry
from blinkimp.host.trace_reader import TraceReader, events_of, high_half, low_half
from blinkimp.nic_shim.ingress_trace import open_ingress_trace_writer
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Submit
from blinkimp.ring_abi import LEAST_TRACE_EVENTS, TraceKind
from blinkimp.trace.arrivals import collect_arrivals
from tests.fake_director import FakeDirector
from tests.http_support import MODEL, scripted
from tests.ingress_support import Served, engine_name, serve, wait_until
from tests.support import PATIENCE_S

LIFE = [
    TraceKind.RECEIVED, TraceKind.CLAIMED, TraceKind.COMMITTED, TraceKind.FIRST_DRAINED, TraceKind.STREAMED,
    TraceKind.FINISH_DRAINED, TraceKind.ENDED,
]  # fmt: skip


def traced(folder: Path, **options: Any) -> Any:
    return serve(folder, trace=TraceGeometry(LEAST_TRACE_EVENTS), **options)


def reader_of(served: Served) -> TraceReader:
    return TraceReader(open_ingress_trace(served.director.regions.engine_name, 0), from_start=True)


def wait_until_forgotten(served: Served) -> None:
    writer = served.ingress.link.trace
    assert writer is not None
    wait_until(lambda: writer.num_watched == 0, "every request was handed over")


def lives(events: NDArray[np.void]) -> list[list[TraceKind]]:
    """The kinds of each request's events, in the order of their first."""
    found: dict[int, list[TraceKind]] = {}
    for event in events[events["kind"] != int(TraceKind.DRAINED)]:
        found.setdefault(int(event["request_id"]), []).append(TraceKind(int(event["kind"])))
    return list(found.values())


def test_the_life_of_a_request_at_an_ingress(tmp_path: Path) -> None:
    with traced(tmp_path) as served, reader_of(served) as reader:
        began_ns = time.monotonic_ns()
        with Client(served.endpoint, timeout_s=PATIENCE_S) as client:
            for _ in range(3):
                assert client.generate([5, 6, 7], max_tokens=9, ignore_eos=True).finish.num_output_tokens == 9
        wait_until_forgotten(served)
        events = reader.read()
        assert [sorted(kinds) for kinds in lives(events)] == [sorted(LIFE)] * 3
        received = events_of(events, TraceKind.RECEIVED)
        assert low_half(received["argument"]).tolist() == [3] * 3
        assert high_half(received["argument"]).tolist() == [9] * 3
        assert events_of(events, TraceKind.ENDED)["argument"].tolist() == [9] * 3
        assert (events["queue_pair_idx"] == 0).all()
        assert began_ns <= int(events["time_ns"].min()) and int(events["time_ns"].max()) <= time.monotonic_ns()
        for request_id in set(received["request_id"].tolist()):
            own = events[events["request_id"] == request_id]
            assert (np.diff(own["time_ns"].astype(np.int64)) >= 0).all()


def test_a_cancelled_request_says_so_and_is_forgotten(tmp_path: Path) -> None:
    with traced(tmp_path) as served, reader_of(served) as reader:
        served.director.paused = True
        served.director.num_allowed_steps = 1
        with Client(served.endpoint, timeout_s=PATIENCE_S) as client:
            stream = client.submit([5, 6], max_tokens=50, ignore_eos=True)
            assert len(next(iter(stream)).token_ids) == 1
            stream.cancel()
            for _ in stream:
                pass
            assert stream.finish is not None and stream.finish.reason == "cancelled"
        wait_until_forgotten(served)
        (kinds,) = lives(reader.read())
        assert sorted(kinds) == sorted([*LIFE, TraceKind.CANCEL_ASKED])
        assert kinds.index(TraceKind.CANCEL_ASKED) < kinds.index(TraceKind.FINISH_DRAINED)


def test_a_resubmitted_request_goes_on_under_its_new_id(tmp_path: Path) -> None:
    """The director drops the ingress in the middle: the second life is CLAIMED again, and not RECEIVED."""
    with traced(tmp_path) as served, reader_of(served) as reader:
        served.director.paused = True
        served.director.num_allowed_steps = 2
        with Client(served.endpoint, timeout_s=PATIENCE_S) as client:
            stream = client.submit([5, 6], max_tokens=20, ignore_eos=True)
            num_tokens = 0
            while num_tokens < 2:
                num_tokens += len(next(stream).token_ids)
            served.director.queue_pairs[0].drop()
            wait_until(lambda: served.ingress.link.counters.resubmissions == 1, "the request is submitted again")
            served.director.paused = False
            assert sum(len(chunk.token_ids) for chunk in stream) == 18
        wait_until_forgotten(served)
        events = reader.read()
        assert events_of(events, TraceKind.CLAIMED)["argument"].tolist() == [0, 1]
        assert len(events_of(events, TraceKind.RECEIVED)) == len(events_of(events, TraceKind.ENDED)) == 1
        ids = events_of(events, TraceKind.COMMITTED)["request_id"].tolist()
        assert ids[1] == ids[0] + 1 and events_of(events, TraceKind.ENDED)["request_id"].tolist() == ids[1:]


def test_an_http_ingress_writes_the_same(tmp_path: Path) -> None:
    """And, where it is told to, what it was asked."""
    captured = tmp_path / "captured"
    trace = TraceGeometry(LEAST_TRACE_EVENTS)
    with scripted(tmp_path, "--capture-arrivals", str(captured), trace=trace) as served:
        name = served.director.regions.engine_name
        with TraceReader(open_ingress_trace(name, 0), from_start=True) as reader:
            body = {
                "model": MODEL,
                "prompt": [5, 6, 7],
                "max_tokens": 4,
                "temperature": 0.5,
                "ignore_eos": True,
                "seed": 11,
            }
            assert served.http.post("/v1/completions", body).status == 200
            events: list[NDArray[np.void]] = []

            def has_ended() -> bool:
                events.append(reader.read())
                return any(len(events_of(part, TraceKind.ENDED)) for part in events)

            wait_until(has_ended, "the request was handed over")
    (kinds,) = lives(np.concatenate(events))
    assert sorted(kinds) == sorted(LIFE)
    (arrival,) = collect_arrivals([captured])
    assert (arrival.prompt_ids, arrival.sampling.seed, arrival.sampling.temperature) == ([5, 6, 7], 11, 0.5)
    assert arrival.outcome is not None and arrival.outcome.num_output_tokens == 4


def test_without_a_trace_nothing_is_written(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        assert served.ingress.link.trace is None
        assert not list(SHM_DIR.glob(f"blinkimp.{served.director.regions.engine_name}.trace*"))
        with Client(served.endpoint, timeout_s=PATIENCE_S) as client:
            assert client.generate([5], max_tokens=2, ignore_eos=True).finish.num_output_tokens == 2


def test_a_second_ingress_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    """As after a crash: the ring keeps its position, so that a reader misses nothing."""
    with FakeDirector(engine_name(), num_queue_pairs=2, trace=TraceGeometry(LEAST_TRACE_EVENTS)) as director:
        name = director.regions.engine_name
        with TraceReader(open_ingress_trace(name, 1), from_start=True) as reader:
            for num_unfinished in (7, 8):
                writer = open_ingress_trace_writer(name, 1)
                assert writer is not None
                writer.drained([LiveRequest(Submit(1, [5]), None)], num_unfinished)
                writer.close()
            events = reader.read()
        assert events["kind"].tolist() == [int(TraceKind.DRAINED)] * 2
        assert low_half(events["argument"]).tolist() == [1, 1] and high_half(events["argument"]).tolist() == [7, 8]
        assert events["queue_pair_idx"].tolist() == [1, 1]
