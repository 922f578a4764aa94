"""How often Python's cyclic garbage collector looks through an ingress's objects.

By default each 700 new objects start a collection, which a token's few lists reach many times a second; and after gc.freeze() the objects of
some hundred streams are "a quarter more" again and again, so that most of them are walked over each time: a third of the time under load.
Nothing on a token's way makes cycles; those of a request's end (exceptions, tasks) can wait.
Called by nic_shim/zmq_ingress.py and nic_shim/http_ingress.py at their start. Test: pytest tests/host/test_memory_growth.py
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 20_000  # new ones, less those that went, between two looks at the young
YOUNG_LOOKS: Final = 50  # between two looks at the middle generation
MIDDLE_LOOKS: Final = 20  # between two looks at all that is not frozen


def calm_collector() -> None:
    """Also: what is here now stays; collections need not walk it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_LOOKS, MIDDLE_LOOKS)
