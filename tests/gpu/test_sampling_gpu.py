"""device/sampling.cuh on the GPU against the CPU, which tests/host/test_sampling.py holds against float64: equal to the last bit.

Run: pytest -m gpu tests/gpu/test_sampling_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from blinkimp import native, ring_abi
from tests.gpu.gpu_harness import KernelRunner, compile_kernel
from tests.sampling_reference import HARD_PARAMS, Logits, NativeSampler, Params, hard_rows

ROWS = hard_rows(seed=int(np.random.SeedSequence().entropy) % 2**32)  # fresh each run: the CPU is the reference


@pytest.fixture(scope="module")
def runner() -> Iterator[KernelRunner]:
    with KernelRunner() as kernel_runner:
        yield kernel_runner


@pytest.fixture(scope="module")
def sampler() -> NativeSampler:
    return NativeSampler(native.load())


def sample_on_gpu(
    runner: KernelRunner, rows: Logits, vocab: int, params: list[Params], output_idx: list[int], num_blocks: int
) -> np.ndarray:
    arrays = [
        runner.array(rows),
        runner.array(np.concatenate([one.packed() for one in params])),
        runner.array(np.array(output_idx, dtype=np.uint32)),
        runner.poisoned((len(params),), ring_abi.SAMPLE_RESULT),
    ]
    logits, packed, positions, results = arrays
    arguments = [logits, len(params), rows.shape[1], vocab, packed, positions, results]
    runner.run(compile_kernel("sampling_test.cu"), "sampling_test", num_blocks, 288, arguments)
    host_results = results.numpy()
    runner.free(*arrays)
    return host_results


@pytest.mark.parametrize("name", ROWS)
def test_gpu_equals_cpu_to_the_last_bit(runner: KernelRunner, sampler: NativeSampler, name: str) -> None:
    logits = ROWS[name]
    params = [replace(one, seed=(one.seed + repeat) % 2**64) for one in HARD_PARAMS for repeat in range(4)]
    rows = np.ascontiguousarray(np.broadcast_to(logits, (len(params), logits.size)))
    results = sample_on_gpu(runner, rows, logits.size, params, list(range(len(params))), num_blocks=20)
    for i, one in enumerate(params):
        expected = sampler.sample(logits, one, i)
        got = (int(results["token"][i]), float(results["logprob"][i]))
        assert got == expected, f"{name}, {one}, output {i}"


def test_grid_size_and_row_stride_do_not_matter(runner: KernelRunner) -> None:
    rng = np.random.default_rng()
    vocab, num_rows = 32_001, 40
    tight = (rng.standard_normal((num_rows, vocab)) * 3).astype(np.float32)
    padded = np.full((num_rows, 32_064), 1e9, dtype=np.float32)  # what stands behind a row must not be read
    padded[:, :vocab] = tight
    params = [HARD_PARAMS[i % len(HARD_PARAMS)] for i in range(num_rows)]
    output_idx = [int(position) for position in rng.integers(0, 1000, num_rows)]
    one_cta = sample_on_gpu(runner, tight, vocab, params, output_idx, 1)
    many_ctas = sample_on_gpu(runner, padded, vocab, params, output_idx, 132)
    assert one_cta.tobytes() == many_ctas.tobytes()
