"""An ingress's collector: by the clock, and whatever stands in cycles goes.

Run: pytest tests/null/test_garbage.py
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator

import pytest

from blinkimp.nic_shim.garbage import COLLECT_PERIOD_S, FULL_LOOK_PERIOD, Collector


@pytest.fixture(autouse=True)
def no_collector_but_the_one_under_test() -> Iterator[None]:
    """Python's own looks come by the number of new objects, which is not for a test to know."""
    gc.disable()
    yield
    gc.enable()


class Knot:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.own = self


def test_cycles_go_when_their_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blinkimp.nic_shim.garbage.time.monotonic", lambda: 100.0)
    collector = Collector()
    knot = weakref.ref(Knot())
    collector.look(100.0 + COLLECT_PERIOD_S - 0.1)
    assert collector.num_looks == 0
    collector.look(100.0 + COLLECT_PERIOD_S)
    assert collector.num_looks == 1 and knot() is None
    collector.look(100.0 + COLLECT_PERIOD_S + 0.1)
    assert collector.num_looks == 1


def test_what_has_grown_old_goes_with_the_full_looks() -> None:
    collector = Collector()
    held = Knot()
    knot = weakref.ref(held)
    gc.collect()  # it survives, and is young no more
    del held
    for num_periods in range(1, FULL_LOOK_PERIOD):
        collector.look(time.monotonic() + num_periods * 2 * COLLECT_PERIOD_S)
        assert collector.num_looks == num_periods and knot() is not None
    collector.look(time.monotonic() + FULL_LOOK_PERIOD * 2 * COLLECT_PERIOD_S)
    assert knot() is None
