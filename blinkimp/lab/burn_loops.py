"""Native loops that stress one thing each, without the GIL: arithmetic, memory streaming, cache thrash, TLB thrash, syscalls.

Each function runs for some milliseconds and returns how many units of work it did; blinkimp/lab/burner.py calls it over and over, a thread each.
    arithmetic  fused multiply-adds in registers          FLOPs
    stream      copies from memory to memory              bytes
    llc         a random walk over a buffer of the last-level cache's size     loads
    tlb         mprotect, a touch of every page, munmap   pages mapped: page walks, and shootdowns in all threads of the process
    syscall     getppid and small reads                   calls
Test: pytest tests/host/test_lab_burners.py
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

STREAM_BYTES: Final = 64 << 20  # each of two buffers of a thread, at most: beyond its share of any cache
STREAM_TOTAL_BYTES: Final = (
    1 << 30
)  # of one of the two, over all threads: many threads take less each, still beyond any cache
TLB_PAGES: Final = 512
READ_BYTES: Final = 64

_libc: Final = ctypes.CDLL(None)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_mprotect = _libc.mprotect
_mprotect.restype = ctypes.c_int
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_munmap = _libc.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_getppid = _libc.getppid
_getppid.restype = ctypes.c_int
_getppid.argtypes = []
_read = _libc.read
_read.restype = ctypes.c_ssize_t
_read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_memset = _libc.memset
_memset.restype = ctypes.c_void_p
_memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

_PAGE: Final = mmap.PAGESIZE
_READ_ONLY, _READ_WRITE = int(mmap.PROT_READ), int(mmap.PROT_READ | mmap.PROT_WRITE)
_PRIVATE: Final = int(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@njit(nogil=True, cache=False)
def arithmetic(num_rounds: int) -> int:
    a, b, c, d = 1.0, 1.1, 1.2, 1.3
    for _ in range(num_rounds):
        a = a * 0.999999 + 1e-6
        b = b * 0.999998 + 2e-6
        c = c * 0.999997 + 3e-6
        d = d * 0.999996 + 4e-6
    return num_rounds * 8 + (1 if a + b + c + d == 0.0 else 0)


@njit(nogil=True, cache=False)
def stream(source: NDArray[np.float64], destination: NDArray[np.float64]) -> int:
    for i in range(source.size):
        destination[i] = source[i] * 0.5
    return 2 * source.nbytes


@njit(nogil=True, cache=False)
def llc(links: NDArray[np.int64], start: int, num_loads: int) -> int:
    """Each load's address is the one before it: latency, not bandwidth."""
    at = start
    for _ in range(num_loads):
        at = links[at]
    return at


@njit(nogil=True, cache=False)
def tlb(num_rounds: int) -> int:
    num_bytes = TLB_PAGES * _PAGE
    for _ in range(num_rounds):
        address = _mmap(0, num_bytes, _READ_WRITE, _PRIVATE, -1, 0)
        if address is None:
            return -1
        _memset(address, 1, num_bytes)
        _mprotect(address, num_bytes, _READ_ONLY)
        _munmap(address, num_bytes)
    return num_rounds * TLB_PAGES


@njit(nogil=True, cache=False)
def syscall(num_rounds: int, zero_fd: int, buffer: int) -> int:
    for _ in range(num_rounds):
        _getppid()
        _read(zero_fd, buffer, READ_BYTES)
    return 2 * num_rounds


def random_cycle(num_bytes: int, seed: int) -> NDArray[np.int64]:
    """A buffer in which following the links visits every cache line once, in random order."""
    num_lines = max(2, num_bytes // 64)
    order = np.random.default_rng(seed).permutation(num_lines).astype(np.int64) * 8
    links = np.zeros(num_lines * 8, np.int64)
    links[order] = np.roll(order, -1)
    return links


def last_level_cache_bytes() -> int:
    """Of the first CPU; 32 MiB where the kernel does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit: dict[str, int] = {"K": 1 << 10, "M": 1 << 20}
        sizes.append(int(text[:-1]) * unit[text[-1]] if text[-1:] in unit else int(text))
    return max(sizes, default=32 << 20)


class Work:
    """One thread's share of a kind: step() does some milliseconds of it and returns the units done."""

    def __init__(self, kind: str, thread_idx: int, num_threads: int) -> None:
        self._kind = kind
        self._state: Any = None
        if kind == "stream":
            num_bytes = min(STREAM_BYTES, STREAM_TOTAL_BYTES // num_threads)
            self._state = np.ones(num_bytes // 8), np.zeros(num_bytes // 8)
        elif kind == "llc":
            # Together the threads want twice the cache.
            self._state = random_cycle(max(1 << 20, 2 * last_level_cache_bytes() // num_threads), thread_idx)
            self._at = 0
        elif kind == "syscall":
            self._state = os.open("/dev/zero", os.O_RDONLY), ctypes.create_string_buffer(READ_BYTES)

    def step(self) -> int:
        match self._kind:
            case "arithmetic":
                return int(arithmetic(5_000_000))
            case "stream":
                return int(stream(*self._state))
            case "llc":
                self._at = int(llc(self._state, self._at, 200_000))
                return 200_000
            case "tlb":
                return int(tlb(20))
            case "syscall":
                zero_fd, buffer = self._state
                return int(syscall(50_000, zero_fd, ctypes.addressof(buffer)))
        raise ValueError(f"kind of loop: got {self._kind!r}, expected one of {', '.join(LOOPS)}")

    def close(self) -> None:
        if self._kind == "syscall":
            os.close(self._state[0])


LOOPS: Final = ("arithmetic", "stream", "llc", "tlb", "syscall")
