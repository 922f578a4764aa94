"""Whom a crash is held against, and for how long. Test: pytest tests/null/test_crash_suspects.py"""

from __future__ import annotations

import random
from typing import Any

import pytest

from blinkimp.nic_shim.crash_suspects import CLEAR_TOKENS, MAX_CRASHES, MAX_CRASHES_ALONE, CrashSuspects
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Sampling, Submit


def make_request(request_id: int) -> LiveRequest:
    return LiveRequest(Submit(request_id, [1, 2, 3], Sampling(max_tokens=1000)), None)


def say(request: LiveRequest, num_tokens: int) -> None:
    request.output_ids.extend([7] * num_tokens)


def test_request_that_is_alone_in_two_crashes_is_guilty() -> None:
    suspects, request = CrashSuspects(), make_request(1)
    assert suspects.note_crash([request], 1) == []
    assert not suspects.hold(request), "one crash proves nothing"
    say(request, CLEAR_TOKENS - 1)
    assert suspects.note_crash([request], 1) == [request]
    assert request.num_crashes == MAX_CRASHES_ALONE


def test_request_that_gets_further_each_time_is_never_guilty() -> None:
    suspects, request = CrashSuspects(), make_request(1)
    for _ in range(10):
        assert suspects.note_crash([request], 1) == []
        assert not suspects.hold(request)
        say(request, CLEAR_TOKENS)


def test_request_beside_those_of_another_ingress_is_not_alone() -> None:
    suspects, request = CrashSuspects(), make_request(1)
    for _ in range(MAX_CRASHES - 1):
        assert suspects.note_crash([request], 5) == []
    assert suspects.note_crash([request], 5) == [request]


def test_suspects_run_one_at_a_time_until_they_are_clear() -> None:
    suspects, requests = CrashSuspects(), [make_request(i) for i in range(3)]
    innocent = make_request(9)
    for _ in range(2):
        assert suspects.note_crash(requests, 3) == []
    assert [suspects.hold(one) for one in [*requests, innocent]] == [False, True, True, False]
    assert len(suspects) == 2 and suspects.next() is None, "the first one is on probation"
    say(requests[0], CLEAR_TOKENS)
    assert suspects.next() is requests[1] and not suspects.hold(requests[1])
    assert suspects.next() is None
    requests[1].finish(3)
    assert suspects.next() is requests[2] and not suspects.hold(requests[2])
    assert len(suspects) == 0


def test_cancelled_suspect_waits_no_more() -> None:
    suspects, requests = CrashSuspects(), [make_request(i) for i in range(3)]
    for _ in range(2):
        suspects.note_crash(requests, 3)
    for one in requests:
        suspects.hold(one)
    suspects.remove(requests[1])
    requests[0].finish(4)
    assert suspects.next() is requests[2]
    assert suspects.release() == []


@pytest.mark.parametrize("seed", range(20))
def test_one_bad_request_among_many_is_the_only_one_that_fails(seed: int) -> None:
    """A model of an ingress: each life runs all that may run until the bad request's step; nobody else may ever fail."""
    rng = random.Random(seed)
    suspects = CrashSuspects()
    waiting: list[LiveRequest] = [make_request(i) for i in range(rng.randint(1, 12))]
    bad, bad_position = rng.choice(waiting), rng.randint(0, 40)
    on_ring: list[LiveRequest] = []
    failed: list[LiveRequest] = []
    num_crashes = 0
    for _ in range(10_000):
        if (one := suspects.next()) is not None:
            waiting.insert(0, one)
        held: list[Any] = [request for request in waiting if request.num_crashes and suspects.hold(request)]
        on_ring += [request for request in waiting if request not in held]
        waiting = []
        if bad in on_ring and len(bad.output_ids) == bad_position:
            num_crashes += 1
            guilty = suspects.note_crash(on_ring, len(on_ring))
            failed += guilty
            waiting, on_ring = [request for request in on_ring if request not in guilty], []
            continue
        for request in on_ring:
            say(request, 1)
            if len(request.output_ids) == 60:
                request.finish(3)
        on_ring = [request for request in on_ring if request.end is None]
        if not on_ring and not len(suspects) and not waiting:
            break
    assert failed == [bad] and num_crashes <= MAX_CRASHES
    assert not on_ring and not waiting and not len(suspects), "everybody else has finished"
