"""How often Python's cyclic garbage collector looks through an ingress's objects.

By default each 700 new objects start a collection, which a token's few lists reach many times a second; and after gc.freeze() the objects of
some hundred streams are "a quarter more" again and again, so that most of them are walked over each time: a third of the time under load.
Nothing on a token's way makes cycles; those of a request's end (exceptions, tasks) can wait.
Called by nic_shim/zmq_ingress.py and nic_shim/http_ingress.py at their start. Test: pytest tests/host/test_memory_growth.py
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 10_000  # new ones, less those that went, between two looks at the young
# Looks at the young between two at the middle generation, and so on for the oldest. More looks would let what a request's end leaves in cycles
# pile up: with 50 it was some megabytes.
YOUNG_LOOKS: Final = 5
MIDDLE_LOOKS: Final = 10


def calm_collector() -> None:
    """Also: what is here now stays; collections need not walk it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_LOOKS, MIDDLE_LOOKS)
