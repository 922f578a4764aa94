"""What waits in an ingress: whose turn is next, and whose time is up. Test: pytest tests/null/test_waiting_requests.py"""

from __future__ import annotations

import random
from typing import Any

from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.waiting_requests import AGING_NS, NUM_LEVELS, WaitingRequests
from blinkimp.protocol import Submit
from tests.support import ROOT


def make_request(request_id: int, *, at_ns: int = 0, **fields: Any) -> LiveRequest:
    request = LiveRequest(Submit(request_id, [1], **fields), None)
    request.received_ns = at_ns
    return request


def taken(waiting: WaitingRequests) -> list[int]:
    """All that are ready, in order."""
    ids = []
    while (request := waiting.first) is not None:
        ids.append(request.client_id)
        waiting.take_first()
    return ids


def filled(*requests: LiveRequest) -> WaitingRequests:
    waiting = WaitingRequests()
    for request in requests:
        waiting.add(request, has_place=False)
    return waiting


def test_lower_priorities_are_first_and_equal_ones_in_order() -> None:
    priorities = {1: 3, 2: 0, 3: -5, 4: 0, 5: 3, 6: -5, 7: 1 << 30, 8: -1 << 31}
    waiting = filled(*(make_request(one, priority=priority) for one, priority in priorities.items()))
    assert taken(waiting) == [8, 3, 6, 2, 4, 1, 5, 7], "W2"
    assert len(waiting) == 0


def test_nobody_starves() -> None:
    """W2: what has waited for an aging period a level goes before whatever has just arrived."""
    lowest = make_request(1, priority=1 << 30)
    others = [make_request(2 + i, priority=-1 << 30, at_ns=i * AGING_NS) for i in range(2 * NUM_LEVELS)]
    ids = taken(filled(*others, lowest))
    assert ids.index(1) == NUM_LEVELS


def test_levels_and_aging_are_those_of_the_director() -> None:
    assert f"kNumLevels = {NUM_LEVELS};" in (ROOT / "device" / "director_state.cuh").read_text()
    limits = (ROOT / "device" / "limits.cuh").read_text().replace("'", "")
    assert f"kDefaultAgingNs = {AGING_NS};" in limits


def test_what_is_put_first_is_first_whatever_its_priority() -> None:
    waiting = filled(make_request(1, priority=-8))
    for request_id in (2, 3):
        waiting.put_first(make_request(request_id, priority=7))
    assert taken(waiting) == [3, 2, 1]


def test_what_has_a_place_goes_in_order_of_arrival() -> None:
    """W2: it does not compete for one, and the director will order it."""
    waiting = filled(make_request(9, priority=-8))
    for request_id, priority in ((1, 5), (2, -5), (3, 0)):
        waiting.add(make_request(request_id, priority=priority), has_place=True)
    waiting.put_first(make_request(0))
    assert taken(waiting) == [0, 1, 2, 3, 9]


def test_blocked_requests_are_passed_and_keep_their_turn() -> None:
    waiting = filled(*(make_request(one) for one in range(4)))
    waiting.block_first()
    waiting.take_first()
    waiting.block_first()
    assert [one.client_id for one in waiting] == [3, 0, 2] and len(waiting) == 3
    assert waiting.first is not None and waiting.first.client_id == 3
    waiting.unblock()
    assert taken(waiting) == [0, 2, 3]


def test_random_operations_agree_with_a_sorted_list() -> None:
    """W1, W2."""
    rng = random.Random(5)
    for _ in range(30):
        waiting, ready, blocked, gone = WaitingRequests(), [], [], []
        for number in range(300):
            choice = rng.random()
            if choice < 0.5:
                request = make_request(number, at_ns=number, priority=rng.randint(-9, 9))
                waiting.add(request, has_place=False)
                ready.append(request)
            elif choice < 0.6 and ready:
                waiting.block_first()
                blocked.append(ready.pop(0))
            elif choice < 0.7 and ready:
                waiting.take_first()
                gone.append(ready.pop(0))
            elif choice < 0.9 and ready + blocked:
                request = rng.choice(ready + blocked)
                assert waiting.remove(request)
                (ready if request in ready else blocked).remove(request)
                gone.append(request)
            elif choice > 0.95:
                waiting.unblock()
                ready += blocked
                blocked.clear()
            ready.sort(key=lambda one: min(max(one.priority, -8), 7) * AGING_NS + one.received_ns)
            assert list(waiting) == ready + blocked and len(waiting) == len(ready + blocked)
            assert not any(waiting.remove(request) for request in gone[-3:])
        waiting.clear()
        assert (len(waiting), waiting.first, list(waiting)) == (0, None, [])


def test_overdue_ones_are_taken_from_wherever_they_wait() -> None:
    """W3, also where the earliest deadline is that of one that has gone, or of one that came last."""
    waiting = filled(make_request(9), *(make_request(seconds, timeout_s=seconds) for seconds in (4, 2, 3, 1, 6)))
    waiting.take_first()
    waiting.block_first()

    def overdue(seconds: float) -> list[int]:
        return [request.client_id for request in waiting.take_overdue(int(seconds * 1e9))]

    assert overdue(1) == [] and overdue(1.1) == [1] and overdue(1.1) == []
    assert overdue(4.5) == [2, 3, 4] and [request.client_id for request in waiting] == [6]
    waiting.put_first(make_request(5, timeout_s=5))
    assert overdue(4.9) == [] and overdue(1e9) == [5, 6] and len(waiting) == 0
