"""Memory of this process that stands for a device's, zeroed; and the counts of EngineParams.

Called by host/emulated_process.py (the emulated device) and host/cpu_orchestrator.py (a director in the host).
Test: pytest tests/null/test_host_memory.py tests/host/test_engine.py
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Final

import numpy as np

from blinkimp.host.memory_plan import EngineSizes

ALIGN_BYTES: Final = 64
MOST_TABLE_BYTES: Final = 16 << 20


class DeviceMemory:
    """Zeroed memory, kept until this object goes.

    Tables are touched here: a device that grew for minutes, until each entry of them had been used, would look as if it leaked, and its steps
    would pay for the page faults. Larger things, KV pages most of all, are handed out by the operating system page by page, as they are used.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray[Any, Any]] = []

    def allocate(self, num_bytes: int) -> int:
        array = np.zeros(num_bytes + ALIGN_BYTES, dtype=np.uint8)
        if num_bytes <= MOST_TABLE_BYTES:
            array.fill(0)
        self._arrays.append(array)
        return -(-int(array.ctypes.data) // ALIGN_BYTES) * ALIGN_BYTES

    def keep(self, array: np.ndarray[Any, Any]) -> int:
        self._arrays.append(array)
        return int(array.ctypes.data)


def fill_sizes(params: np.ndarray[Any, Any], sizes: EngineSizes, dims: np.ndarray[Any, Any], num_threads: int) -> None:
    """The counts of EngineParams."""
    for name, value in dataclasses.asdict(sizes).items():
        params[name] = value
    params["dims"] = dims
    params["num_workers"] = num_threads or len(os.sched_getaffinity(0))
