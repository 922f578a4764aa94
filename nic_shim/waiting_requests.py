"""The requests of one ingress that are not on the ring: who is next, who waits for a constraint slot, whose time is up.

Called by nic_shim/engine_link.py. Test: pytest tests/null/test_waiting_requests.py

Problem   Thousands may wait here, and the ingress looks at them each turn of its loop.
Rule      One list in order, and one moment before which no deadline passes. Taking a request out of the list, or putting one in, moves
          pointers: some 2 us of 4,096.

Invariants
W1  A request is here once: ready, or blocked. `_turns` has both; `_ready` is in the order of their turns.
W2  What was on the ring of a former epoch is first, in the order of its submission; then what found a place in the queue pair's share when it
    came, in order of arrival: the director orders those by priority. The others go by level of priority and arrival as there
    (device/SCHEDULING.md): waiting for AGING_NS is worth one level, so nobody starves; equal ones are first come, first served.
W3  No deadline of a request here is before `_earliest_deadline_ns`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Final

from blinkimp.nic_shim.live_request import NO_DEADLINE, LiveRequest

NUM_LEVELS: Final = 16  # as device/waiting.cuh: priorities from -8 to 7; those beyond count as the nearest
# As the director is launched: it learns of `blinkimp tune --aging-ms`, an ingress does not.
AGING_NS: Final = 1_000_000_000
_FIRST: Final = -1  # before every turn by level and arrival


class WaitingRequests:
    """In order of their turns; blocked ones keep theirs."""

    def __init__(self) -> None:
        # The first number is level and arrival, the second tells those of an equal first one apart.
        self._turns: dict[LiveRequest, tuple[int, int]] = {}
        self._ready: list[LiveRequest] = []
        self._blocked: dict[LiveRequest, None] = {}
        self._num_added = 0
        self._earliest_deadline_ns = NO_DEADLINE

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[LiveRequest]:
        """Ready ones in order, then the blocked."""
        yield from self._ready
        yield from self._blocked

    # ---- In and out ------------------------------------------------------------------------------------------------
    def add(self, request: LiveRequest, *, has_place: bool) -> None:
        """Behind its equals. has_place: there is room for it and for all that wait already."""
        level = min(max(request.priority + NUM_LEVELS // 2, 0), NUM_LEVELS - 1)
        self._num_added += 1
        self._insert(request, (_FIRST if has_place else level * AGING_NS + request.received_ns, self._num_added))

    def put_first(self, request: LiveRequest) -> None:
        """Before all that wait."""
        self._num_added += 1
        self._insert(request, (_FIRST, -self._num_added))

    def _insert(self, request: LiveRequest, turn: tuple[int, int]) -> None:
        assert request not in self._turns, f"W1: request {request.client_id} waits already"
        self._turns[request] = turn
        insort(self._ready, request, key=self._turns.__getitem__)
        self._earliest_deadline_ns = min(self._earliest_deadline_ns, request.deadline_ns)

    def remove(self, request: LiveRequest) -> bool:
        """False where it is not here."""
        turn = self._turns.get(request)
        if turn is None:
            return False
        if request in self._blocked:
            del self._blocked[request]
        else:
            del self._ready[bisect_left(self._ready, turn, key=self._turns.__getitem__)]
        del self._turns[request]
        return True

    def clear(self) -> None:
        self._turns.clear()
        self._ready.clear()
        self._blocked.clear()

    # ---- Whose turn it is ------------------------------------------------------------------------------------------
    @property
    def first(self) -> LiveRequest | None:
        """The next one to submit; None where all are blocked."""
        return self._ready[0] if self._ready else None

    def take_first(self) -> None:
        """It goes to the ring, or elsewhere."""
        del self._turns[self._ready.pop(0)]

    def block_first(self) -> None:
        """It waits for a constraint slot, and lets others pass until unblock()."""
        self._blocked[self._ready.pop(0)] = None

    def unblock(self) -> None:
        if self._blocked:
            self._ready.extend(self._blocked)
            self._ready.sort(key=self._turns.__getitem__)
            self._blocked.clear()

    # ---- Deadlines -------------------------------------------------------------------------------------------------
    def take_overdue(self, now_ns: int) -> list[LiveRequest]:
        """Those whose time is up; they wait no more. Nearly free while no deadline has passed."""
        if now_ns <= self._earliest_deadline_ns:
            return []
        overdue = [request for request in self if now_ns > request.deadline_ns]
        for request in overdue:
            self.remove(request)
        self._earliest_deadline_ns = min((request.deadline_ns for request in self), default=NO_DEADLINE)
        return overdue
