"""Which constraint lies in which slot of a queue pair, and which requests on the ring use it.

Called by nic_shim/engine_link.py and nic_shim/ring_requests.py. Test: pytest tests/host/test_constraints.py

Invariants
I1  A slot that a request on the ring names is not loaded with anything else.
I2  A slot counts as loaded only when its last piece was committed; the ring is first in, first out, so what is submitted after that
    finds the whole.
"""

from __future__ import annotations

from collections import OrderedDict

from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort


class ConstraintSlots:
    """The slots of one attached queue pair."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[bytes, int] = OrderedDict()  # key -> slot, least recently used first
        self._num_users: dict[int, int] = {}  # by slot
        self._slot_of: dict[int, int] = {}  # by ring id
        self._loading: tuple[bytes, int, int] | None = None  # key, slot, offset to go on from
        self.num_loads = 0

    def reset(self) -> None:
        """A new epoch, or a new engine: nothing is loaded, nothing runs."""
        self.__init__()  # type: ignore[misc]  # all of it goes

    def is_blocked(self, port: QueuePairPort, constraint: LoadedConstraint) -> bool:
        """Every slot is in use by other constraints."""
        return constraint.key not in self._loaded and self._loading is None and self._free_slot(port) is None

    def try_load(self, port: QueuePairPort, constraint: LoadedConstraint) -> tuple[PortStatus, int]:
        """Brings the constraint into a slot: OK and the slot, or why not now. Not to be called while is_blocked()."""
        slot = self._loaded.get(constraint.key)
        if slot is not None:
            self._loaded.move_to_end(constraint.key)
            return PortStatus.OK, slot
        if self._loading is None or self._loading[0] != constraint.key:
            slot = self._loading[1] if self._loading is not None else self._free_slot(port)
            if slot is None:
                return PortStatus.RING_FULL, 0
            for key in [key for key, used in self._loaded.items() if used == slot]:
                del self._loaded[key]
            self._loading = (constraint.key, slot, 0)
        key, slot, offset = self._loading
        status, offset = port.try_load_constraint(slot, constraint.table.data, offset)
        if status != PortStatus.OK:
            self._loading = (key, slot, offset)
            return status, slot
        self._loading = None
        self._loaded[key] = slot
        self.num_loads += 1
        return status, slot

    def _free_slot(self, port: QueuePairPort) -> int | None:
        """A slot that was never used, else the least recently used one that nobody uses now."""
        used = set(self._loaded.values())
        for slot in range(port.num_constraint_slots):
            if slot not in used:
                return slot
        for slot in self._loaded.values():
            if not self._num_users.get(slot):
                return slot
        return None

    def hold(self, ring_id: int, slot: int) -> None:
        self._slot_of[ring_id] = slot
        self._num_users[slot] = self._num_users.get(slot, 0) + 1

    def release(self, ring_id: int) -> bool:
        """The request has left the ring. True if a slot may have become free."""
        slot = self._slot_of.pop(ring_id, None)
        if slot is None:
            return False
        self._num_users[slot] -= 1
        return self._num_users[slot] == 0
