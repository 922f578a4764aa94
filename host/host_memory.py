"""Memory of this process that stands for a device's: zeroed, and the operating system's until it is touched; and the counts of EngineParams.

Called by host/emulated_process.py (the emulated device) and host/cpu_orchestrator.py (a director in the host).
Test: pytest tests/host/test_engine.py
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Final

import numpy as np

from blinkimp.host.memory_plan import EngineSizes

ALIGN_BYTES: Final = 64


class DeviceMemory:
    """Zeroed memory that the operating system hands out page by page, as it is touched; kept until this object goes."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray[Any, Any]] = []

    def allocate(self, num_bytes: int) -> int:
        array = np.zeros(num_bytes + ALIGN_BYTES, dtype=np.uint8)
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
