"""How an idle director looks for the next submission (device/idle.cuh), and when it says it saw it. Run: pytest tests/host/test_idle.py"""

from __future__ import annotations

import threading
import time
from typing import cast

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region
from blinkimp.host.trace_reader import TraceReader, events_of
from blinkimp.ring_abi import TraceKind
from tests.host.director_rig import Rig, Shape, plain_sampler

KINDS = pytest.mark.parametrize("kind", ["single", "lanes"])
NEVER_NS = 3_600_000_000_000  # a wait of so long that the test's own timeout would be first
BRIEF_NS = 2_000_000


def idle_rig(kind: str, **shape: int) -> Rig:
    rig = Rig(Shape(trace_events=abi.LEAST_TRACE_EVENTS, **shape), kind)
    rig.attach_all()
    return rig


def polled_ns(rig: Rig) -> dict[int, int]:
    """By request id, of everything that was taken so far."""
    events = events_of(TraceReader(cast(Region, rig.trace), from_start=True).read(), TraceKind.POLLED)
    return dict(zip(events["request_id"].tolist(), events["time_ns"].tolist(), strict=True))


@KINDS
def test_a_submission_ends_the_wait_and_is_stamped_by_its_sight(kind: str) -> None:
    rig = idle_rig(kind)
    committed_ns = 0

    def ping() -> None:
        nonlocal committed_ns
        time.sleep(0.01)
        committed_ns = time.monotonic_ns()
        rig.ingresses[0].write_entry(abi.SUBMISSION_PING, 5)

    pinging = threading.Thread(target=ping)
    pinging.start()
    rig.wait(NEVER_NS)
    seen_ns = time.monotonic_ns()
    pinging.join()
    assert rig.queue_pair(0).submission_consumer_pos == 0, "Z1: a look takes nothing"
    rig.step(plain_sampler)
    assert committed_ns <= polled_ns(rig)[5] <= seen_ns
    assert [entry.kind for entry in rig.ingresses[0].read()] == [abi.COMPLETION_PONG]


def test_any_queue_pair_ends_the_wait() -> None:
    rig = idle_rig("lanes", num_queue_pairs=4)
    for ingress in reversed(rig.ingresses):
        ingress.write_entry(abi.SUBMISSION_PING, 40 + rig.ingresses.index(ingress))
        rig.wait(NEVER_NS)
        rig.step(plain_sampler)
    assert sorted(polled_ns(rig)) == [40, 41, 42, 43]


@KINDS
def test_a_wait_for_nothing_ends_when_it_was_told_to(kind: str) -> None:
    rig = idle_rig(kind)
    begin_ns = time.monotonic_ns()
    rig.wait(BRIEF_NS)
    assert time.monotonic_ns() - begin_ns >= BRIEF_NS
    rig.ingresses[0].write_entry(abi.SUBMISSION_PING, 1)
    rig.step(plain_sampler)
    begin_ns = time.monotonic_ns()
    rig.wait(BRIEF_NS)
    assert time.monotonic_ns() - begin_ns >= BRIEF_NS, "an entry that was taken is not the next one"


@KINDS
def test_each_lap_is_looked_at_by_its_own_parity(kind: str) -> None:
    rig = idle_rig(kind, num_submissions=2)
    for request_id in range(1, 8):
        rig.wait(BRIEF_NS)
        rig.ingresses[0].write_entry(abi.SUBMISSION_PING, request_id)
        rig.wait(NEVER_NS)
        rig.step(plain_sampler)
        rig.ingresses[0].read()
    moments = polled_ns(rig)
    assert sorted(moments) == list(range(1, 8)) and sorted(moments.values()) == list(moments.values())


@KINDS
def test_what_was_left_in_the_ring_is_polled_for(kind: str) -> None:
    """Z2: two PONGs fill the ring, so a third ping waits for the ingress to read; no commit word tells that it did."""
    rig = idle_rig(kind, num_completions=2)
    ingress = rig.ingresses[0]
    for request_id in (1, 2, 3):
        ingress.write_entry(abi.SUBMISSION_PING, request_id)
    rig.step(plain_sampler)
    first_ns = time.monotonic_ns()
    assert rig.queue_pair(0).has_entry
    rig.wait(NEVER_NS)
    assert len(ingress.read()) == 2
    rig.step(plain_sampler)
    assert polled_ns(rig)[3] <= first_ns, "the stamp is that of the first look"


@KINDS
def test_a_finish_without_credit_is_polled_for(kind: str) -> None:
    """Z2: with the ACK, two tokens and the PONG the ring is full when the request is cancelled."""
    rig = idle_rig(kind, num_completions=4)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1], 30)
    for _ in range(6):
        rig.step(plain_sampler)
    ingress.write_entry(abi.SUBMISSION_PING, 9)
    rig.step(plain_sampler)
    ingress.write_entry(abi.SUBMISSION_CANCEL, 1)
    rig.step(plain_sampler)
    rig.step(plain_sampler)
    assert rig.engine_status("num_finishing") == 1 and rig.engine_status("num_running") == 0
    rig.wait(NEVER_NS)
    ingress.read()
    rig.step(plain_sampler)
    assert [entry.kind for entry in ingress.read()] == [abi.COMPLETION_FINISH]


@KINDS
def test_nobody_attached_is_polled_for(kind: str) -> None:
    """Z2: a first attach shows in no commit word; nor is an entry of the ingress before looked at."""
    rig = idle_rig(kind)
    ingress = rig.ingresses[0]
    ingress.detach()
    ingress.write_entry(abi.SUBMISSION_PING, 1)
    rig.poll()
    rig.wait(NEVER_NS)
    rig.attach_all()
    rig.wait(BRIEF_NS)
    assert polled_ns(rig) == {}


@KINDS
def test_a_sight_is_forgotten_with_its_ingress(kind: str) -> None:
    """Seen, but passed over by the attach that came before the poll: the next one's moment is its own."""
    rig = idle_rig(kind)
    ingress = rig.ingresses[0]
    ingress.write_entry(abi.SUBMISSION_PING, 1)
    rig.wait(NEVER_NS)
    rig.attach_all()
    begin_ns = time.monotonic_ns()
    ingress.write_entry(abi.SUBMISSION_PING, 2)
    rig.step(plain_sampler)
    moments = polled_ns(rig)
    assert list(moments) == [2] and moments[2] >= begin_ns


def test_fewer_lanes_than_queue_pairs_poll() -> None:
    rig = idle_rig("single", num_queue_pairs=2)
    rig.ingresses[1].write_entry(abi.SUBMISSION_PING, 1)
    rig.wait(NEVER_NS)
    rig.step(plain_sampler)
    assert list(polled_ns(rig)) == [1]
