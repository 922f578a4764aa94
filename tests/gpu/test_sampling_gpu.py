"""device/sampling.cuh on the GPU against the CPU, which tests/host/test_sampling.py holds against float64: equal to the last bit.

Run: pytest -m gpu tests/gpu/test_sampling_gpu.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blinkimp import native, ring_abi
from tests.gpu.gpu_harness import DeviceArray, KernelRunner, compile_kernel
from tests.sampling_reference import (
    HARD_PARAMS,
    LOGIT_EDITS,
    Edits,
    Logits,
    NativeSampler,
    Params,
    hard_rows,
    random_edits,
)

ROWS = hard_rows(seed=int(np.random.SeedSequence().entropy) % 2**32)  # fresh each run: the CPU is the reference

SHARED_BYTES = 64 << 10  # of SampleScratch, the worker's scratch


@pytest.fixture(scope="module")
def sampler() -> NativeSampler:
    return NativeSampler(native.load())


def device_edits(runner: KernelRunner, edits: Edits, vocab: int) -> tuple[np.ndarray, list[DeviceArray]]:
    """[1] LOGIT_EDITS with addresses of device memory, and the arrays that they are of."""
    record, arrays = edits.packed(), []

    def put(values: np.ndarray) -> int:
        arrays.append(runner.array(values))
        return arrays[-1].address

    if edits.bias:
        record["bias"] = put(np.array(list(edits.bias), dtype=ring_abi.LOGIT_BIAS))
    if edits.banned:
        record["stop_ids"] = put(np.array(edits.banned, dtype=np.uint32))
        record["eos_ids"] = record["stop_ids"] + 4 * record["num_banned_stop_ids"]
    if edits.counts is not None:
        record["counts"] = put(np.ascontiguousarray(edits.counts))
    if edits.table is not None:
        assert edits.state < edits.table.num_states and edits.table.vocab_size == vocab
        record["class_of_token"] = put(edits.table.class_of_token)
        record["next_state"] = put(np.ascontiguousarray(edits.table.next_states[edits.state]))
    return record, arrays


def sample_on_gpu(
    runner: KernelRunner,
    rows: Logits,
    vocab: int,
    params: list[Params],
    output_idx: list[int],
    num_blocks: int,
    edits: list[Edits] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Results [num_rows] and top logprobs [num_rows, MAX_TOP_LOGPROBS]."""
    packed_edits = np.zeros(len(params), dtype=LOGIT_EDITS)
    edit_arrays: list[DeviceArray] = []
    known: dict[int, np.ndarray] = {}
    for i, one in enumerate(edits or []):
        if id(one) not in known:
            known[id(one)], arrays = device_edits(runner, one, vocab)
            edit_arrays += arrays
        packed_edits[i] = known[id(one)][0]
    arrays = [
        runner.array(rows),
        runner.array(packed_edits),
        runner.array(np.concatenate([one.packed() for one in params])),
        runner.array(np.array(output_idx, dtype=np.uint32)),
        runner.poisoned((len(params),), ring_abi.SAMPLE_RESULT),
        runner.poisoned((len(params), ring_abi.MAX_TOP_LOGPROBS), ring_abi.SAMPLE_RESULT),
    ]
    logits, device_edit_records, packed, positions, results, top = arrays
    arguments = [logits, len(params), rows.shape[1], vocab, device_edit_records, packed, positions, results, top]
    runner.run(compile_kernel("sampling_test.cu"), "sampling_test", num_blocks, 288, arguments, SHARED_BYTES)
    found = results.numpy(), top.numpy()
    runner.free(*arrays, *edit_arrays)
    return found


def check_row(
    sampler: NativeSampler,
    logits: Logits,
    one: Params,
    output_idx: int,
    edits: Edits | None,
    found: np.ndarray,
    top: np.ndarray,
) -> None:
    expected = sampler.sample_with_top(logits, one, output_idx, edits=edits)
    got_top = [(int(entry["token"]), float(entry["logprob"])) for entry in top[: one.num_top_logprobs]]
    assert (int(found["token"]), float(found["logprob"]), got_top) == expected, f"{one}, {edits}, output {output_idx}"


@pytest.mark.parametrize("name", ROWS)
def test_gpu_equals_cpu_to_the_last_bit(runner: KernelRunner, sampler: NativeSampler, name: str) -> None:
    logits = ROWS[name]
    params = [replace(one, seed=(one.seed + repeat) % 2**64) for one in HARD_PARAMS for repeat in range(4)]
    rows = np.ascontiguousarray(np.broadcast_to(logits, (len(params), logits.size)))
    results, top = sample_on_gpu(runner, rows, logits.size, params, list(range(len(params))), num_blocks=20)
    for i, one in enumerate(params):
        check_row(sampler, logits, one, i, None, results[i], top[i])


@pytest.mark.parametrize("name", ["normal", "odd_size", "nan", "minus_infinity", "coarse", "large"])
def test_gpu_edits_equal_cpu_to_the_last_bit(runner: KernelRunner, sampler: NativeSampler, name: str) -> None:
    logits = ROWS[name]
    rng = np.random.default_rng()
    edits = [random_edits(rng, logits.size) for _ in range(12)]
    cases = [
        (replace(one, seed=(one.seed + i) % 2**64, num_top_logprobs=(0, 1, 20)[i % 3]), edit)
        for i, edit in enumerate(edits)
        for one in HARD_PARAMS
    ]
    rows = np.ascontiguousarray(np.broadcast_to(logits, (len(cases), logits.size)))
    params = [one for one, _ in cases]
    results, top = sample_on_gpu(
        runner, rows, logits.size, params, list(range(len(cases))), num_blocks=64, edits=[edit for _, edit in cases]
    )
    for i, (one, edit) in enumerate(cases):
        check_row(sampler, logits, one, i, edit, results[i], top[i])


def test_grid_size_and_row_stride_do_not_matter(runner: KernelRunner) -> None:
    rng = np.random.default_rng()
    vocab, num_rows = 32_001, 40
    tight = (rng.standard_normal((num_rows, vocab)) * 3).astype(np.float32)
    padded = np.full((num_rows, 32_064), 1e9, dtype=np.float32)  # what stands behind a row must not be read
    padded[:, :vocab] = tight
    params = [HARD_PARAMS[i % len(HARD_PARAMS)] for i in range(num_rows)]
    output_idx = [int(position) for position in rng.integers(0, 1000, num_rows)]
    one_cta, _ = sample_on_gpu(runner, tight, vocab, params, output_idx, 1)
    many_ctas, _ = sample_on_gpu(runner, padded, vocab, params, output_idx, 132)
    assert one_cta.tobytes() == many_ctas.tobytes()
