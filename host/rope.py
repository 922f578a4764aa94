"""Rotary embedding tables: [num_positions, head_dim / 2] pairs of f32 (cos, sin), as Op.rope wants them.

The inverse frequencies and the angles are rounded to fp32 where the public reference implementation (`transformers`) rounds them:
at position 32,768 one ulp of an angle is 4e-3 rad, so exact angles would differ visibly from what the models were trained with.
Called by host/program.py. Test: pytest tests/null/test_checkpoint_rope.py
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """[head_dim / 2] f32: radians per position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    if rope.rope_type == "linear":
        return (frequencies / np.float32(rope.factor)).astype(np.float32)
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies.astype(np.float32)


def _llama3(frequencies: NDArray[np.float32], rope: RopeConfig) -> NDArray[np.float32]:
    """Long wavelengths are stretched by factor, short ones kept, those between interpolated."""
    wavelengths = np.float32(2 * math.pi) / frequencies
    longest_kept = np.float32(rope.original_max_positions / rope.high_freq_factor)
    shortest_stretched = np.float32(rope.original_max_positions / rope.low_freq_factor)
    stretched = frequencies / np.float32(rope.factor)
    turns = np.float32(rope.original_max_positions) / wavelengths
    smooth = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    blended = (np.float32(1) - smooth) * frequencies / np.float32(rope.factor) + smooth * frequencies
    result = np.where(wavelengths > shortest_stretched, stretched, blended)
    return np.where(wavelengths < longest_kept, frequencies, result).astype(np.float32)


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> NDArray[np.float32]:
    """[num_positions, head_dim / 2, 2] f32: (cos, sin) of each position and pair."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = (positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]).astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
