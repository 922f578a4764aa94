"""An ingress's tie to the engine, turn by turn: how much it puts on the ring, and what it does for those that wait.

The director is scripted and takes a turn when the test says so; the last test has a real one.
Run: pytest tests/host/test_engine_link.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.nic_shim import engine_watch
from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.constraint_table import ConstraintTable
from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.queue_pair import WaitEvent
from blinkimp.protocol import Error, Finish, Sampling, Submit
from tests.fake_director import FakeDirector, FakeQueuePair
from tests.host.engine_support import running_engine
from tests.http_support import EMBEDDED
from tests.ingress_support import engine_name, wait_until
from tests.support import PATIENCE_S

ONE_SLOT: dict[str, Any] = {"num_constraint_slots": 1, "constraint_slot_bytes": 4096}


def make_request(request_id: int, *, num_prompt_tokens: int = 3, max_tokens: int = 300, **fields: Any) -> LiveRequest:
    prompt = list(range(5, 5 + num_prompt_tokens))
    request = LiveRequest(Submit(request_id, prompt, Sampling(max_tokens=max_tokens, ignore_eos=True), **fields), None)
    request.prompt_ids = np.array(prompt, np.uint32)
    return request


def how_it_ended(request: LiveRequest) -> str | None:
    if isinstance(request.end, Error):
        return request.end.code
    return request.end.reason if isinstance(request.end, Finish) else None


@dataclass
class Linked:
    """A link and its director, whose model stands still."""

    link: EngineLink
    director: FakeDirector
    requests: list[LiveRequest] = field(default_factory=list)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """The engine stands still, and is found to."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_watch, "HEARTBEAT_TIMEOUT_S", -1.0)
            self.link.keep_attached()
            yield
        self.director.turn()
        self.link.keep_attached()

    @property
    def queue_pair(self) -> FakeQueuePair:
        return self.director.queue_pairs[0]

    def submit(self, num: int, *, constraint: str = "", **fields: Any) -> list[LiveRequest]:
        new = [make_request(len(self.requests) + i, **fields) for i in range(num)]
        self.requests += new
        for request in new:
            if constraint:
                request.constraint = LoadedConstraint(constraint.encode(), ConstraintTable(bytes(100), 2, 1, 1))
            self.link.submit(request)
        return new

    def turn(self) -> None:
        """One of the ingress's loop, with one of the director in between."""
        self.link.pump()
        self.director.turn()
        self.link.poll()
        self.link.keep_attached()

    def turn_until(self, condition: Callable[[], bool], what: str) -> None:
        def turn() -> bool:
            self.turn()
            return condition()

        wait_until(turn, what)

    def on_ring(self) -> list[int]:
        """Requests that the director has, in the order in which it took them; none lies in the ring."""
        assert self.queue_pair._next_submission() is None, "what it cannot take holds up the cancels behind it (I2)"
        ids = {request.ring_id: request.client_id for request in self.requests}
        return [ids[ring_id] for ring_id in self.queue_pair.running]


@contextmanager
def linked(**director_options: Any) -> Iterator[Linked]:
    with FakeDirector(engine_name(), **director_options) as director:
        link = EngineLink(director.regions.engine_name, 0, eos_ids=(), loss_timeout_s=PATIENCE_S)
        try:
            link.attach(PATIENCE_S)
            director.stop()
            director.paused = True
            yield Linked(link, director)
        finally:
            link.close()


# ---- The queue pair's share of the request table ---------------------------------------------------------------------
def test_no_more_is_on_the_ring_than_the_director_takes() -> None:
    with linked(max_requests=2) as it:
        requests = it.submit(4)
        it.turn()
        assert it.on_ring() == [0, 1] and it.link.num_live == 4
        it.link.cancel(requests[3])
        assert how_it_ended(requests[3]) == "cancelled", "what waits here needs no engine to end"
        it.link.cancel(requests[0])
        it.turn()
        assert how_it_ended(requests[0]) == "cancelled", "no submission stood before the cancel"
        assert it.link.wait(0, -1) == WaitEvent.COMPLETION, "who waits does not wait for the loop's sleep too"
        it.turn()
        assert it.on_ring() == [1, 2]
        assert it.link.wait(0, -1) == WaitEvent(0)


def test_what_comes_behind_its_deadline_ends_at_once() -> None:
    with linked() as it:
        (late,) = it.submit(1, timeout_s=1e-9)
        assert how_it_ended(late) == "timeout" and it.link.num_live == 0
        it.turn()
        assert it.on_ring() == []


def test_lower_priorities_go_first_when_there_is_room_again() -> None:
    with linked(max_requests=1) as it:
        (first,) = it.submit(1, priority=5)
        it.turn()
        it.submit(2)
        it.submit(1, priority=-1)
        for expected, running in zip([3, 1, 2], [first, it.requests[3], it.requests[1]], strict=True):
            it.link.cancel(running)
            it.turn()
            it.turn()
            assert it.on_ring() == [expected]


def test_order_of_arrival_is_kept_where_there_is_room_for_all() -> None:
    with linked(max_requests=3) as it:
        for priority in (0, -1, 1, -1):
            it.submit(1, priority=priority)
        it.turn()
        assert it.on_ring() == [0, 1, 2]


def test_rejected_requests_make_room() -> None:
    with linked(max_requests=1, max_context=20) as it:
        bad = it.submit(3, max_tokens=30)
        (good,) = it.submit(1, max_tokens=10)
        for _ in range(4):
            it.turn()
        assert [how_it_ended(one) for one in bad] == ["prompt_too_long"] * 3
        assert it.on_ring() == [good.client_id]


def test_what_was_on_the_ring_goes_first_after_a_drop() -> None:
    with linked(max_requests=2) as it:
        it.submit(2, priority=3)
        it.turn()
        it.submit(2)
        it.queue_pair.drop()
        it.turn_until(lambda: bool(it.queue_pair.running), "the link is attached again")
        assert it.on_ring() == [0, 1]


def test_engine_that_drains_is_asked_for_its_rejections() -> None:
    with linked(max_requests=1) as it:
        it.submit(2)
        it.turn()
        it.director.status["state"] = abi.ENGINE_DRAINING
        it.link.pump()
        assert it.queue_pair._next_submission() is not None, "a director that drains takes none, and says so of each"


def test_engine_that_does_not_say_its_share_gets_all() -> None:
    with linked() as it:
        it.submit(9)
        it.turn()
        assert it.on_ring() == list(range(9))


# ---- Deadlines -------------------------------------------------------------------------------------------------------
def test_deadline_of_what_waits_for_a_place_is_kept() -> None:
    with linked(max_requests=1) as it:
        it.submit(1)
        patient, late = it.submit(1)[0], it.submit(1, timeout_s=0.05)[0]
        it.turn_until(lambda: late.end is not None, "its time is up")
        assert how_it_ended(late) == "timeout" and patient.end is None
        assert it.on_ring() == [0] and it.link.num_live == 2


def test_deadline_of_what_waits_for_a_constraint_slot_is_kept() -> None:
    with linked(**ONE_SLOT) as it:
        (running,) = it.submit(1, constraint="a")
        (late,) = it.submit(1, constraint="b", timeout_s=0.05)
        it.submit(1, constraint="b")
        it.turn_until(lambda: late.end is not None, "its time is up")
        assert how_it_ended(late) == "timeout" and it.on_ring() == [0]
        it.link.cancel(running)
        it.turn_until(lambda: it.on_ring() == [2], "the slot is free for who waits still")


# ---- An engine that only stood still ---------------------------------------------------------------------------------
def test_engine_that_comes_back_is_told_of_what_was_given_up() -> None:
    with linked(**ONE_SLOT, max_requests=1) as it:
        (given_up,) = it.submit(1, constraint="a")
        it.turn()
        assert it.on_ring() == [0]
        it.link.loss_timeout_s = 0.0
        with it.stalled():

            def is_given_up() -> bool:
                it.link.keep_attached()
                return given_up.end is not None

            wait_until(is_given_up, "it is given up")
            assert how_it_ended(given_up) == "engine_lost" and it.link.num_live == 0
            assert not it.link.has_work, "an ingress that drains does not wait for it"
        (other,) = it.submit(1, constraint="b")
        it.turn()
        it.turn()
        assert it.on_ring() == [1], "its place in the table and its constraint slot are free"
        assert it.link.counters.stray_completions == 0, "R1, R2"
        it.link.cancel(other)
        it.turn()
        assert how_it_ended(other) == "cancelled" and not it.link.has_work


def test_rejection_of_what_was_given_up_is_its_end() -> None:
    with linked(**ONE_SLOT, max_requests=1, max_context=20) as it:
        (rejected,) = it.submit(1, constraint="a", max_tokens=30)
        it.link.pump()
        with it.stalled():
            it.link.cancel(rejected)
            assert how_it_ended(rejected) == "cancelled"
        it.link.pump()
        it.turn()
        assert not it.link.has_work, "R2: nothing more is said of it"
        it.submit(1, constraint="b", max_tokens=10)
        it.turn()
        assert it.on_ring() == [1], "its place in the table and its constraint slot are free"


def test_cancels_and_deadlines_are_kept_beyond_the_share_of_a_real_engine() -> None:
    with running_engine(EMBEDDED, num_queue_pairs=1, num_requests=2, max_batch=2) as engine:
        link = EngineLink(engine.config.engine_name, 0, eos_ids=(), loss_timeout_s=PATIENCE_S)

        def turn_until(condition: Callable[[], bool], what: str) -> None:
            def turn() -> bool:
                link.pump()
                link.poll()
                link.keep_attached()
                link.wait(0.002, -1)
                return condition()

            wait_until(turn, what)

        try:
            link.attach(PATIENCE_S)
            assert link.port.max_requests == 2
            running = [make_request(i, max_tokens=1900) for i in range(2)]
            for request in running:
                link.submit(request)
            turn_until(lambda: all(request.output_ids for request in running), "both run")
            last = make_request(3, max_tokens=4)
            link.submit(last)
            turn_until(lambda: True, "it would be on the ring by now")
            late = make_request(4, max_tokens=4, timeout_s=0.1)
            link.submit(late)
            turn_until(lambda: late.end is not None, "its time is up")
            assert how_it_ended(late) == "timeout" and not any(request.end for request in running)
            link.cancel(running[0])
            turn_until(lambda: last.end is not None, "its turn comes")
            assert how_it_ended(running[0]) == "cancelled" and running[1].end is None
            assert how_it_ended(last) == "length"
        finally:
            link.close()
