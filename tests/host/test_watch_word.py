"""host/watch_word.py: what another thread writes is seen, in order, with its time. Run: pytest tests/host/test_watch_word.py"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from blinkimp.host.shared_region import Region
from blinkimp.host.watch_word import STATUS_DEVICE_NS, watch_word


@pytest.fixture
def region() -> Iterator[Region]:
    with Region("words", mmap.mmap(-1, 4096), writable=True) as region:
        yield region


def test_changes_are_seen_in_order_with_their_times(region: Region) -> None:
    word = np.frombuffer(region.buffer, np.uint64, 1, STATUS_DEVICE_NS)
    done = threading.Event()

    def write() -> None:
        value = 0
        while not done.wait(0.001):
            value += 1
            word[0] = value

    writer = threading.Thread(target=write)
    begin_ns = time.monotonic_ns()
    writer.start()
    values, seen_ns = watch_word(region, STATUS_DEVICE_NS, num_changes=5, timeout_s=60)
    done.set()
    writer.join()
    assert len(values) == len(seen_ns) == 5
    assert (np.diff(values) > 0).all() and (np.diff(seen_ns) > 0).all()
    assert begin_ns < seen_ns[0] and seen_ns[-1] < time.monotonic_ns()


def test_a_word_that_stays_ends_with_the_timeout(region: Region) -> None:
    values, seen_ns = watch_word(region, STATUS_DEVICE_NS, num_changes=3, timeout_s=0.01)
    assert len(values) == len(seen_ns) == 0


@pytest.mark.parametrize("offset", [4, -8, 4096])
def test_a_place_without_a_word_is_refused(region: Region, offset: int) -> None:
    with pytest.raises(ValueError, match="expected that of a 64-bit word within 4096 bytes"):
        watch_word(region, offset, num_changes=1, timeout_s=0.01)
