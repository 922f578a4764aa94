"""Rotary tables against the formulas in float64. Run: pytest tests/null/test_checkpoint_rope.py"""

from __future__ import annotations

import math

import numpy as np
import pytest

from blinkimp.host.model_config import RopeConfig
from blinkimp.host.rope import inverse_frequencies, rope_table

LLAMA3 = RopeConfig(
    "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def exact_frequency(rope: RopeConfig, head_dim: int, pair: int) -> float:
    frequency = rope.theta ** (-2 * pair / head_dim)
    if rope.rope_type == "linear":
        return frequency / rope.factor
    if rope.rope_type == "llama3":
        wavelength = 2 * math.pi / frequency
        if wavelength < rope.original_max_positions / rope.high_freq_factor:
            return frequency
        if wavelength > rope.original_max_positions / rope.low_freq_factor:
            return frequency / rope.factor
        turns = rope.original_max_positions / wavelength
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency
    return frequency


@pytest.mark.parametrize("rope", [RopeConfig("default", 10000.0), RopeConfig("linear", 10000.0, factor=4.0), LLAMA3])
@pytest.mark.parametrize("head_dim", [2, 18, 64, 128])
def test_frequencies(rope: RopeConfig, head_dim: int) -> None:
    got = inverse_frequencies(rope, head_dim)
    exact = np.array([exact_frequency(rope, head_dim, pair) for pair in range(head_dim // 2)])
    assert got.dtype == np.float32 and got.shape == (head_dim // 2,)
    assert np.abs(got / exact - 1).max() < 4e-7


def test_llama3_has_all_three_ranges() -> None:
    """Else the test above would not see the interpolation."""
    ratio = inverse_frequencies(LLAMA3, 128) / inverse_frequencies(RopeConfig("default", 500000.0), 128)
    assert (ratio == 1).any() and (ratio == 1 / 8).any() and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_table_is_cosine_and_sine_of_the_rounded_angle() -> None:
    table = rope_table(LLAMA3, 64, 20000)
    assert table.shape == (20000, 32, 2) and table.dtype == np.float32
    frequencies = inverse_frequencies(LLAMA3, 64)
    for position in (0, 1, 777, 19999):
        angles = (np.float32(position) * frequencies).astype(
            np.float64
        )  # one fp32 rounding, as the models were trained with
        assert np.abs(table[position, :, 0] - np.cos(angles)).max() < 6e-8
        assert np.abs(table[position, :, 1] - np.sin(angles)).max() < 6e-8
