"""The requests of one ingress that are on the ring: what the director holds, or may hold, of this queue pair.

Called by nic_shim/engine_link.py. Test: pytest tests/null/test_ring_requests.py

Invariants
R1  Each submission has a ring id of its own, never used again. A completion whose ring id is neither live nor abandoned belongs to a former
    life.
R2  A request that ended here (by a stop string, or as the engine did not answer) before it ended in the engine is abandoned. The director
    is told as soon as it answers, and FINISH or REJECT takes the id out: until then it counts, and its constraint slot is in use.
"""

from __future__ import annotations

import secrets
from collections import deque

from blinkimp.nic_shim.constraint_slots import ConstraintSlots
from blinkimp.nic_shim.live_request import LiveRequest


class RingRequests:
    """By ring id; len() is what the director holds at most."""

    def __init__(self) -> None:
        self.live: dict[int, LiveRequest] = {}
        self.slots = ConstraintSlots()
        # Not from 1: completions of a process that had this queue pair before must not look like ours (R1).
        self.next_id = secrets.randbits(62) | 1
        self._abandoned: set[int] = set()
        self._cancels: deque[int] = deque()

    def __len__(self) -> int:
        return len(self.live) + len(self._abandoned)

    def enter(self, request: LiveRequest, slot: int | None) -> None:
        """It was committed under next_id; slot: its constraint's."""
        request.ring_id = self.next_id
        self.live[request.ring_id] = request
        if slot is not None:
            self.slots.hold(request.ring_id, slot)
        self.next_id += 1

    def leave(self, ring_id: int) -> bool:
        """The engine is done with it. True if a constraint slot may have become free."""
        self.live.pop(ring_id, None)
        self._abandoned.discard(ring_id)
        return self.slots.release(ring_id)

    def clear(self) -> list[LiveRequest]:
        """A new epoch: the ring is empty. Returns what was live, in the order of its submission."""
        requests = [self.live[ring_id] for ring_id in sorted(self.live)]
        for request in requests:
            request.ring_id = 0
        self.live.clear()
        self._abandoned.clear()
        self._cancels.clear()
        self.slots.reset()
        return requests

    # ---- Cancels ---------------------------------------------------------------------------------------------------
    def cancel(self, request: LiveRequest) -> None:
        """Its FINISH will end it."""
        self._cancels.append(request.ring_id)

    def abandon(self, request: LiveRequest) -> None:
        """It ends here and now (R2)."""
        del self.live[request.ring_id]
        self._abandoned.add(request.ring_id)
        self._cancels.append(request.ring_id)

    def is_abandoned(self, ring_id: int) -> bool:
        return ring_id in self._abandoned

    @property
    def has_cancels(self) -> bool:
        """Whether a cancel is to be written, or an abandoned request to be heard of."""
        return bool(self._cancels or self._abandoned)

    @property
    def first_cancel(self) -> int | None:
        """The ring id whose cancel is to be written next; those that have ended need none."""
        while self._cancels and self._cancels[0] not in self.live and self._cancels[0] not in self._abandoned:
            self._cancels.popleft()
        return self._cancels[0] if self._cancels else None

    def take_first_cancel(self) -> None:
        """It was written."""
        self._cancels.popleft()
