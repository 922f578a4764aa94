"""Memory that stands for a device's: zeroed, aligned, and its tables there from the start.

Run: pytest tests/null/test_host_memory.py
"""

from __future__ import annotations

import ctypes
import mmap
import resource

import numpy as np

from blinkimp.host.host_memory import ALIGN_BYTES, MOST_TABLE_BYTES, DeviceMemory


def faults_of_writing(address: int, num_bytes: int) -> int:
    """Pages that the operating system had not handed out before."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for offset in range(0, num_bytes, mmap.PAGESIZE):
        ctypes.memset(address + offset, 1, 1)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_memory_is_zeroed_and_aligned() -> None:
    memory = DeviceMemory()
    for num_bytes in (1, 4096, 100_001):
        address = memory.allocate(num_bytes)
        assert address % ALIGN_BYTES == 0
        assert not np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address)).any()


def test_a_tables_pages_are_there_before_their_first_use() -> None:
    num_bytes = 1 << 20  # too small for a huge page, which is one fault
    memory = DeviceMemory()
    assert faults_of_writing(memory.allocate(num_bytes), num_bytes) < num_bytes // mmap.PAGESIZE // 8


def test_what_is_larger_costs_what_is_used_of_it() -> None:
    memory, num_bytes = DeviceMemory(), 64 * MOST_TABLE_BYTES
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    memory.allocate(num_bytes)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < num_bytes // mmap.PAGESIZE // 8
