"""When a word that the device writes changes: its values, and when the host saw each of them first.

    values, seen_ns = watch_word(page, offset, num_changes=1, timeout_s=0.01)

Spins natively, without the GIL, so a sight is some tens of nanoseconds late. With StatusLines.device_ns the two bound how far the device's clock is
from the host's, from one side: device_ns was stamped before it was seen. Called by tools/director_gap.py. Test: pytest tests/host/test_watch_word.py
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp import native
from blinkimp import ring_abi as abi
from blinkimp.host.shared_region import Region


def _offset(record: np.dtype[Any], name: str) -> int:
    assert record.fields is not None
    return int(record.fields[name][1])


STATUS_DEVICE_NS: Final = _offset(abi.ENGINE_PAGE, "status") + _offset(abi.STATUS_LINES, "device_ns")  # of the page


@functools.cache
def _function() -> Any:
    function = native.load().bk_watch_word
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    function.restype, function.argtypes = ctypes.c_uint32, [pointer, ctypes.c_uint32, u64, pointer, pointer]
    return function


def watch_word(
    region: Region, offset: int, *, num_changes: int, timeout_s: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[n] each, n <= num_changes: fewer where the timeout was first. offset: of a 64-bit word, in bytes."""
    if offset % 8 or not 0 <= offset <= region.region_bytes - 8:
        raise ValueError(
            f"{region.name}: got offset {offset}, expected that of a 64-bit word within {region.region_bytes} bytes"
        )
    values, seen_ns = np.zeros(num_changes, np.int64), np.zeros(num_changes, np.int64)
    num_seen = _function()(
        region.address + offset, num_changes, int(timeout_s * 1e9), values.ctypes.data, seen_ns.ctypes.data
    )
    return values[:num_seen], seen_ns[:num_seen]
