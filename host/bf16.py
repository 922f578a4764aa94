"""bf16 in numpy, which has no such type: uint16 arrays that hold the upper half of an fp32.

Called by host/checkpoint.py, host/dummy_weights.py. Test: pytest tests/null/test_checkpoint_weights.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def f32_from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def bf16_from_f32(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)).astype(
        np.uint16
    )
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    # The addition could carry a NaN into infinity or zero: keep its upper half, quiet.
    quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return np.where(is_nan, quiet, rounded)
