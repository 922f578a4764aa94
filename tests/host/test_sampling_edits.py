"""Bias, bans, penalties, constraints and top logprobs on the CPU, against plain numpy; windows against radix descents; any number of lanes.

Run: pytest tests/host/test_sampling_edits.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from blinkimp import native, ring_abi
from blinkimp.nic_shim.constraint_table import build_constraint_table
from tests.sampling_reference import (
    HARD_PARAMS,
    PROMPT_BIT,
    Edits,
    NativeSampler,
    Params,
    edited_logits,
    greedy_token,
    hard_rows,
    language_row,
    logprob,
    random_edits,
    token_probabilities,
    top_tokens,
)

ROWS = hard_rows(seed=6)
SMALL_ROWS = [name for name in ROWS if ROWS[name].size < 10_000]
NO_TOKEN = (0, 1.0)  # no_token() of device/sampling.cuh


@pytest.fixture(scope="module")
def sampler() -> NativeSampler:
    return NativeSampler(native.load())


def counts_of(vocab: int, prompt: list[int], outputs: list[int]) -> np.ndarray:
    counts = np.zeros(vocab, dtype=np.uint16)
    for token in outputs:
        counts[token] += 1
    counts[prompt] |= np.uint16(PROMPT_BIT)
    return counts


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (Edits(), 2),
        (Edits(bias=((0, 2.5),)), 0),
        (Edits(bias=((2, -0.6),)), 1),
        (Edits(bias=((2, -2.0), (2, 2.0))), 2),
        (Edits(banned=(2,)), 1),
        (Edits(banned=(2,), bias=((2, 1e30),)), 1),
        (Edits(counts=counts_of(5, [2], []), repetition_penalty=1.5), 1),
        (Edits(counts=counts_of(5, [2], []), repetition_penalty=0.5), 2),
        (Edits(counts=counts_of(5, [2], []), presence_penalty=2.0, frequency_penalty=2.0), 2),
        (Edits(counts=counts_of(5, [], [2]), presence_penalty=0.6), 1),
        (Edits(counts=counts_of(5, [], [2, 2, 2]), frequency_penalty=0.2), 1),
        (Edits(counts=counts_of(5, [], [2]), frequency_penalty=0.2), 2),
    ],
    ids=str,
)
def test_each_edit_does_what_its_name_says(sampler: NativeSampler, edits: Edits, expected: int) -> None:
    logits = np.array([1.0, 2.5, 3.0, -1.0, -2.0], dtype=np.float32)
    token, device_logprob = sampler.sample(logits, Params(temperature=0.0), edits=edits)
    assert token == expected
    assert device_logprob == pytest.approx(logprob(logits, token), rel=2e-6), "logprobs are those of the model's logits"


def test_repetition_penalty_multiplies_negative_logits(sampler: NativeSampler) -> None:
    logits = np.array([-1.0, -1.5], dtype=np.float32)
    edits = Edits(counts=counts_of(2, [0], []), repetition_penalty=2.0)
    assert sampler.sample(logits, Params(temperature=0.0), edits=edits)[0] == 1


@pytest.mark.parametrize("name", ROWS)
def test_greedy_over_random_edits(sampler: NativeSampler, name: str) -> None:
    logits = ROWS[name]
    rng = np.random.default_rng(len(name))
    for _ in range(4 if logits.size > 10_000 else 30):
        edits = random_edits(rng, logits.size)
        values = edited_logits(logits, edits)
        token, device_logprob = sampler.sample(logits, Params(temperature=0.0), edits=edits)
        if not (values > -np.inf).any():
            assert (token, device_logprob) == NO_TOKEN
            continue
        assert token == greedy_token(values), edits
        if logits[token] > -np.inf:
            assert device_logprob == pytest.approx(logprob(logits, token), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("name", ROWS)
def test_sampled_token_is_allowed_by_edits_and_filters(sampler: NativeSampler, name: str) -> None:
    logits = ROWS[name]
    rng = np.random.default_rng(len(name) + 100)
    for _ in range(2 if logits.size > 10_000 else 8):
        edits = random_edits(rng, logits.size)
        values = edited_logits(logits, edits)
        for params in HARD_PARAMS[1:]:
            token, device_logprob = sampler.sample(logits, params, 3, edits=edits)
            if not (values > -np.inf).any():
                assert (token, device_logprob) == NO_TOKEN
                continue
            assert token_probabilities(values, params, slack=2e-6)[token] > 0, f"{params} {edits}"


@pytest.mark.parametrize("name", ROWS)
def test_windows_and_radix_descents_agree(sampler: NativeSampler, name: str) -> None:
    logits = ROWS[name]
    rng = np.random.default_rng(len(name) + 200)
    for i in range(1 if logits.size > 10_000 else 6):
        edits = random_edits(rng, logits.size) if i % 2 else None
        for params in HARD_PARAMS[1:]:
            for output_idx in range(3):
                window = sampler.sample_with_top(logits, params, output_idx, edits=edits)
                radix = sampler.sample_with_top(logits, params, output_idx, edits=edits, by_radix=True)
                assert window == radix, f"{params} {edits}"


@pytest.mark.parametrize("num_lanes", [2, 5, 64])
def test_number_of_lanes_does_not_change_a_bit(sampler: NativeSampler, num_lanes: int) -> None:
    rng = np.random.default_rng(num_lanes)
    for name in SMALL_ROWS:
        for _ in range(2):
            edits = random_edits(rng, ROWS[name].size)
            for params in rng.choice(np.array(HARD_PARAMS, dtype=object), 3):
                wanted = replace(params, num_top_logprobs=int(rng.integers(0, 21)))
                one = sampler.sample_with_top(ROWS[name], wanted, 6, edits=edits)
                many = sampler.sample_with_top(ROWS[name], wanted, 6, edits=edits, num_lanes=num_lanes)
                assert one == many, f"{name}, {wanted}, {edits}"


@pytest.mark.parametrize("tile_columns", [1, 7, 112])
def test_tiles_of_the_lm_head_do_not_change_a_bit(sampler: NativeSampler, tile_columns: int) -> None:
    """What is gathered near the best token follows from the tiles; what is chosen of it must not."""
    rng = np.random.default_rng(tile_columns)
    rows = {name: ROWS[name] for name in SMALL_ROWS} | {"language": language_row(rng, 8192)}
    for name, logits in rows.items():
        for edits in (None, random_edits(rng, logits.size)):
            for params in [*rng.choice(np.array(HARD_PARAMS, dtype=object), 4), Params(0.8, 50, 0.95, 0.01, seed=8)]:
                wanted = replace(params, num_top_logprobs=int(rng.choice([0, 5, 20])))
                one = sampler.sample_with_top(logits, wanted, 2, edits=edits)
                many = sampler.sample_with_top(logits, wanted, 2, edits=edits, num_lanes=5, tile_columns=tile_columns)
                assert one == many, f"{name}, {wanted}, {edits}"


@pytest.mark.parametrize("num_ties", [40, 2048, 2049, 6000])
def test_ties_at_the_cut_do_not_change_a_bit(sampler: NativeSampler, num_ties: int) -> None:
    """As many tokens at one logit as a window holds, and more: by the near tokens, by bins, by descents."""
    rng = np.random.default_rng(num_ties)
    logits = language_row(rng, 8192)
    logits[rng.permutation(8192)[:num_ties]] = 17.0
    for edits in (None, Edits(bias=((5, 3.0), (6, -40.0)), banned=(int(logits.argmax()),))):
        for params in (Params(0.8, top_k=30, seed=1), Params(0.8, top_p=0.5, seed=2), Params(0.0, num_top_logprobs=20)):
            one = sampler.sample_with_top(logits, params, edits=edits)
            assert one == sampler.sample_with_top(logits, params, edits=edits, by_radix=True)
            assert one == sampler.sample_with_top(logits, params, edits=edits, num_lanes=3, tile_columns=112)


def test_full_group_of_256_lanes(sampler: NativeSampler) -> None:
    edits = random_edits(np.random.default_rng(9), ROWS["normal"].size)
    for params in (HARD_PARAMS[2], Params(seed=4), Params(top_p=0.9, num_top_logprobs=20)):
        one = sampler.sample_with_top(ROWS["normal"], params, 1, edits=edits)
        assert sampler.sample_with_top(ROWS["normal"], params, 1, edits=edits, num_lanes=256) == one


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_top_logprobs_are_the_model_s_first_tokens(sampler: NativeSampler, name: str, num_top: int) -> None:
    logits = ROWS[name]
    edits = random_edits(np.random.default_rng(num_top), logits.size)
    for params in (Params(temperature=0.0, num_top_logprobs=num_top), Params(seed=3, num_top_logprobs=num_top)):
        *_, top = sampler.sample_with_top(logits, params, edits=edits)
        expected = top_tokens(logits, num_top)
        assert [token for token, _ in top[: len(expected)]] == expected
        assert top[len(expected) :] == [(0, -math.inf)] * (num_top - len(expected))
        for token, device_logprob in top[: len(expected)]:
            assert device_logprob == pytest.approx(logprob(logits, token), rel=2e-6, abs=2e-6)


def test_sampled_frequencies_follow_the_edits(sampler: NativeSampler) -> None:
    rng = np.random.default_rng(12)
    logits = rng.standard_normal(40).astype(np.float32)
    edits = Edits(
        bias=((3, 1.0), (7, -1.0)),
        counts=counts_of(40, [1, 2, 3], [4, 4, 5]),
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.3,
    )
    tokens = sampler.draw(logits, Params(temperature=0.8, seed=5), 20_000, edits)
    expected = token_probabilities(edited_logits(logits, edits), Params(temperature=0.8))
    error = np.abs(np.bincount(tokens, minlength=40) / 20_000 - expected)
    assert (error < 4.5 * np.sqrt(expected / 20_000) + 1e-4).all()


def test_constraint_allows_what_its_state_allows(sampler: NativeSampler) -> None:
    vocab = 3001
    logits = ROWS["narrow"]
    table = build_constraint_table(
        vocab, [{5: 1, 2999: 0}, {17: 0}, dict.fromkeys(range(0, vocab, 3), 0)], max_bytes=1 << 20
    )
    for state, allowed in enumerate([{5, 2999}, {17}, set(range(0, vocab, 3))]):
        drawn = set(sampler.draw(logits, Params(seed=state), 300, Edits(table=table, state=state)).tolist())
        assert drawn <= allowed and len(drawn) == min(len(allowed), len(drawn))
        assert len(allowed) > 2 or drawn == allowed
    assert sampler.sample(logits, Params(seed=1), edits=Edits(table=table, state=3)) == NO_TOKEN
    assert sampler.sample(logits, Params(temperature=0.0), edits=Edits(table=table, state=0xFFFF)) == NO_TOKEN
    assert sampler.sample(logits, Params(), edits=Edits(table=table, state=1, banned=(17,))) == NO_TOKEN


def test_constraint_of_random_bytes_gives_a_token_or_none(sampler: NativeSampler) -> None:
    """Classes and states are not trusted: the sanitizer runs of this file see every access."""
    rng = np.random.default_rng(44)
    logits = ROWS["normal"]
    for _ in range(300):
        num_classes, num_states = int(rng.integers(1, 9)), int(rng.integers(1, 70_000))
        classes = rng.integers(0, rng.choice([num_classes, 65536]), logits.size).astype(np.uint16)
        row = rng.integers(0, 65536, num_classes).astype(np.uint16)
        record = Edits().packed()
        record["class_of_token"], record["next_state"] = classes.ctypes.data, row.ctypes.data
        record["num_classes"], record["num_states"] = num_classes, num_states
        result, params = np.zeros(1, ring_abi.SAMPLE_RESULT), Params(seed=5, top_k=int(rng.integers(0, 50))).packed()
        sampler.library.bk_sample_row(
            logits.ctypes.data, logits.size, record.ctypes.data, params.ctypes.data, 0, result.ctypes.data, None
        )
        inside = classes < num_classes
        allowed = inside & (row[np.where(inside, classes, 0)] < num_states)
        token = int(result["token"][0])
        assert allowed[token] if allowed.any() else float(result["logprob"][0]) == 1.0
