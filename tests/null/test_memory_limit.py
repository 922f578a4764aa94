"""An ingress that is too large ends, and the looks at its size, twenty a second for as long as it lives, cost no memory themselves.

Run: pytest tests/null/test_memory_limit.py
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator

import pytest

from blinkimp.nic_shim.memory_limit import MemoryLimit
from tests.support import blocks_kept_by

MB = 1 << 20


@pytest.fixture
def limit() -> Iterator[MemoryLimit]:
    found = MemoryLimit(1 << 50)
    yield found
    found.close()


def test_each_look_sees_what_is_resident_now(limit: MemoryLimit) -> None:
    before = limit.resident_bytes()
    assert MB < before < 1 << 40
    with mmap.mmap(-1, 64 * MB) as held:  # of its own: an allocator may give what earlier tests have left resident
        held.write(b"x" * len(held))
        assert limit.resident_bytes() - before > 32 * MB


def test_a_process_beyond_its_limit_is_told(limit: MemoryLimit) -> None:
    limit.check()
    limit.max_bytes = 1
    with pytest.raises(MemoryError, match="expected at most 1; it ends, to be started anew"):
        limit.check()


def test_a_look_keeps_no_memory_and_no_descriptor(limit: MemoryLimit) -> None:
    gc.collect()  # what an earlier test has left open
    num_open = len(os.listdir("/proc/self/fd"))
    assert blocks_kept_by(limit.check, 1000) < 100
    assert len(os.listdir("/proc/self/fd")) < num_open + 100
