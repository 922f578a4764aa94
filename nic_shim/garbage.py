"""When Python's cyclic garbage collector looks through an ingress's objects: by the clock, not by their number.

By default each 700 new objects start a look at the young ones. The few lists of a token reach that several times in a turn of some hundred
streams; it was a third of the time under load. A request leaves no cycles (tests/null/test_request_cycles.py), and what was here at the start
is frozen. So looks are a safeguard, for what libraries or a path that no test takes may leave: COLLECT_PERIOD_S apart at what is younger than
the last look, 1 to 3 ms with 512 HTTP streams, and every FULL_LOOK_PERIOD-th time, each five minutes, at everything: 8 to 25 ms there (150
objects a stream), 0.3 ms with 512 ZeroMQ streams.
Called by nic_shim/zmq_ingress.py and nic_shim/engine_thread.py. Test: pytest tests/host/test_memory_growth.py tests/null/test_garbage.py
"""

from __future__ import annotations

import gc
import time
from typing import Final

COLLECT_PERIOD_S: Final = 10.0
FULL_LOOK_PERIOD: Final = 30  # looks
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
