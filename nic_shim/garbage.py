"""When Python's cyclic garbage collector looks through an ingress's objects: by the clock, not by their number.

By default each 700 new objects start a look at the young ones. The few lists of a token reach that several times in a turn of some hundred
streams, although nothing on a token's way makes cycles; it was a third of the time under load. What a request's end leaves in cycles (tasks,
exceptions, coroutines) is found by a look COLLECT_PERIOD_S apart at what is younger than the last one, some milliseconds, and by every third
one at everything, some tens of milliseconds with 512 streams: so memory stays flat at any rate.
Called by nic_shim/zmq_ingress.py and nic_shim/engine_thread.py. Test: pytest tests/host/test_memory_growth.py tests/null/test_garbage.py
"""

from __future__ import annotations

import gc
import time
from typing import Final

COLLECT_PERIOD_S: Final = 10.0
FULL_LOOK_PERIOD: Final = 3  # looks
YOUNG_OBJECTS: Final = 50_000  # new ones that start a look before that: a flood of requests


def calm_collector() -> None:
    """At the start. What is here now stays: collections need not walk it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 5, 10)


class Collector:
    """One for each process, looked at in each turn of its loop."""

    def __init__(self) -> None:
        self.num_looks = 0
        self._next_at = time.monotonic() + COLLECT_PERIOD_S

    def look(self, now: float) -> None:
        if now >= self._next_at:
            self._next_at = now + COLLECT_PERIOD_S
            self.num_looks += 1
            gc.collect(2 if self.num_looks % FULL_LOOK_PERIOD == 0 else 1)
