"""device/sampling.cuh on the CPU: allowed sets, frequencies, determinism for any number of lanes, hard rows.

Run: pytest tests/host/test_sampling.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from blinkimp import native
from tests.sampling_reference import (
    HARD_PARAMS,
    NativeSampler,
    Params,
    greedy_token,
    hard_rows,
    logprob,
    token_probabilities,
)

ROWS = hard_rows(seed=5)


@pytest.fixture(scope="module")
def sampler() -> NativeSampler:
    return NativeSampler(native.load())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # published with Random123 (kat_vectors, philox4x32 with 10 rounds)
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(sampler: NativeSampler, counter: list[int], key: int, expected: list[int]) -> None:
    words = np.array(counter, dtype=np.uint32)
    sampler.library.bk_philox4x32_10(words.ctypes.data, key)
    assert [hex(word) for word in words] == [hex(word) for word in expected]


def test_weight_error_is_as_documented(sampler: NativeSampler) -> None:
    rng = np.random.default_rng(1)
    distances = np.concatenate([[0.0], rng.uniform(0, 45, 200_000), rng.uniform(0, 1e-6, 1000)]).astype(np.float32)
    weights = np.zeros(distances.size, dtype=np.uint64)
    sampler.library.bk_exp2_neg_q44(distances.ctypes.data, weights.ctypes.data, distances.size)
    exact = np.exp2(44 - distances.astype(np.float64))
    assert weights[0] == 2**44
    error = np.abs(weights.astype(np.float64) - exact)
    assert (error <= exact * 2.0**-29 + 1).all(), f"largest relative error {(error / exact)[distances < 10].max():.2e}"
    beyond = np.array([45.0, 63.9, 64.0, 1e30, np.inf, np.nan], dtype=np.float32)
    sampler.library.bk_exp2_neg_q44(beyond.ctypes.data, weights.ctypes.data, beyond.size)
    assert not weights[: beyond.size].any()


def test_log2_error_is_as_documented(sampler: NativeSampler) -> None:
    rng = np.random.default_rng(2)
    values = np.exp2(rng.uniform(44, 62.9, 20_000)).astype(np.uint64)
    values[:3] = [2**44, 2**44 + 1, 2**62]
    logs = np.zeros(values.size, dtype=np.uint64)
    sampler.library.bk_log2_q32(values.ctypes.data, logs.ctypes.data, values.size)
    exact = (np.log2(values.astype(np.float64)) - 44) * 2.0**32
    assert np.abs(logs.astype(np.float64) - exact).max() <= 2


@pytest.mark.parametrize("name", ROWS)
def test_greedy_takes_first_of_the_largest(sampler: NativeSampler, name: str) -> None:
    token, device_logprob = sampler.sample(ROWS[name], Params(temperature=0.0, top_k=3, top_p=0.1, seed=9))
    assert token == greedy_token(ROWS[name])
    assert device_logprob == pytest.approx(logprob(ROWS[name], token), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("params", HARD_PARAMS[1:], ids=str)
def test_token_is_in_the_allowed_set(sampler: NativeSampler, name: str, params: Params) -> None:
    logits = ROWS[name]
    allowed = token_probabilities(logits, params, slack=2e-6)
    for output_idx in range(3 if logits.size > 10_000 else 20):
        token, device_logprob = sampler.sample(logits, params, output_idx)
        assert allowed[token] > 0, f"token {token} (logit {logits[token]}) at output {output_idx} is not allowed"
        assert device_logprob == pytest.approx(logprob(logits, token), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("num_ties", [5, 300])
def test_top_k_keeps_exactly_k_among_equals(sampler: NativeSampler, num_ties: int) -> None:
    logits = np.full(601, -1.0, dtype=np.float32)
    high = np.arange(3, 3 + 2 * num_ties, 2) if num_ties < 299 else np.arange(1, 601, 2)
    logits[high] = 2.0
    tokens = sampler.draw(logits, Params(top_k=4, seed=3), 400)
    assert set(tokens) == set(high[:4])


def test_top_p_keeps_lowest_indices_among_equals(sampler: NativeSampler) -> None:
    logits = np.zeros(1000, dtype=np.float32)
    tokens = sampler.draw(logits, Params(top_p=0.0035, seed=3), 400)
    assert set(tokens) == {0, 1, 2, 3}
    tokens = sampler.draw(logits, Params(top_k=100, top_p=0.03, seed=3), 200)
    assert set(tokens) == {0, 1, 2}


def test_every_allowed_token_is_reached(sampler: NativeSampler) -> None:
    """A threshold one too high would pass the allowed-set test; this one fails then."""
    rng = np.random.default_rng(8)
    logits = rng.permutation(np.linspace(0, 1, 997)).astype(np.float32)
    params = Params(top_k=40, top_p=0.9, min_p=0.2, seed=4)
    expected = np.flatnonzero(token_probabilities(logits, params))
    assert 30 < expected.size < 40
    assert set(sampler.draw(logits, params, 3000)) == set(expected)


def chi_square_z(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Standard-normal score of Pearson's statistic (Wilson-Hilferty); rare tokens are pooled to an expected count of 8."""
    assert not counts[probabilities == 0].any()
    order = np.argsort(-probabilities, kind="stable")
    expected = np.cumsum(probabilities[order]) * counts.sum()
    cell = np.floor(expected / 8)
    cell[probabilities[order] * counts.sum() >= 8] = -1 - np.flatnonzero(probabilities[order] * counts.sum() >= 8)
    _, cell = np.unique(cell, return_inverse=True)
    pooled_expected = np.bincount(cell, weights=probabilities[order] * counts.sum())
    pooled_counts = np.bincount(cell, weights=counts[order])
    kept = pooled_expected > 4
    degrees = int(kept.sum()) - 1
    assert degrees >= 2
    statistic = float(((pooled_counts - pooled_expected)[kept] ** 2 / pooled_expected[kept]).sum())
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


@pytest.mark.parametrize(
    "params",
    [
        Params(seed=101),
        Params(temperature=0.5, seed=102),
        Params(temperature=3.0, seed=103),
        Params(top_k=7, seed=104),
        Params(top_p=0.8, seed=105),
        Params(min_p=0.05, seed=106),
        Params(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=107),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [53, 3001])
def test_frequencies_match_exact_probabilities(sampler: NativeSampler, params: Params, vocab: int) -> None:
    logits = (np.random.default_rng(vocab + 1).standard_normal(vocab) * 1.2).astype(np.float32)
    tokens = sampler.draw(logits, params, 20_000 if vocab < 100 else 4_000)
    counts = np.bincount(tokens, minlength=vocab)
    z = chi_square_z(counts, token_probabilities(logits, params))
    assert -3.5 < z < 3.5, f"frequencies are off: z = {z:.1f}"  # p = 5e-4; the seeds are fixed


def test_seeds_and_positions_are_independent_draws(sampler: NativeSampler) -> None:
    """Joint frequencies of neighbouring positions and of neighbouring seeds are products."""
    logits = np.log(np.array([1, 2, 3, 4], dtype=np.float32))
    probabilities = token_probabilities(logits, Params())
    tokens = sampler.draw(logits, Params(seed=77), 20_000)
    pairs = np.bincount(tokens[0::2] * 4 + tokens[1::2], minlength=16)
    assert abs(chi_square_z(pairs, np.outer(probabilities, probabilities).ravel())) < 3.5
    by_seed = [sampler.sample(logits, Params(seed=seed), 3)[0] for seed in range(8000)]
    pairs = np.bincount(np.array(by_seed[0::2]) * 4 + np.array(by_seed[1::2]), minlength=16)
    assert abs(chi_square_z(pairs, np.outer(probabilities, probabilities).ravel())) < 3.5


@pytest.mark.parametrize("num_lanes", [2, 7, 33])
def test_number_of_lanes_does_not_change_a_bit(sampler: NativeSampler, num_lanes: int) -> None:
    for name, logits in ROWS.items():
        if logits.size > 40_000 and num_lanes > 2:
            continue
        for params in HARD_PARAMS:
            one = sampler.sample(logits, params, 6)
            assert sampler.sample(logits, params, 6, num_lanes) == one, f"{name}, {params}, {num_lanes} lanes"


def test_full_group_of_256_lanes(sampler: NativeSampler) -> None:
    params = Params(temperature=0.8, top_k=100, top_p=0.95, seed=21)
    assert sampler.sample(ROWS["normal"], params, 1, 256) == sampler.sample(ROWS["normal"], params, 1)


def test_row_alignment_does_not_change_a_bit(sampler: NativeSampler) -> None:
    storage = np.zeros(4100, dtype=np.float32)
    results = set()
    for shift in range(4):
        row = storage[shift : shift + 4096]
        row[:] = ROWS["normal"]
        results.add(sampler.sample(row, Params(top_p=0.9, seed=5), 2))
    assert len(results) == 1


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_finite_logit(sampler: NativeSampler, value: float, temperature: float) -> None:
    logits = np.full(100, value, dtype=np.float32)
    assert sampler.sample(logits, Params(temperature=temperature)) == (0, -math.inf)


def test_plus_infinity_is_the_largest_number(sampler: NativeSampler) -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[[40, 60]] = np.inf
    assert sampler.sample(logits, Params(temperature=0.0)) == (40, pytest.approx(-math.log(2), abs=1e-6))
    assert set(sampler.draw(logits, Params(seed=1), 60)) == {40, 60}
