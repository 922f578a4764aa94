"""device/attention.cuh on the GPU: against float64, and against itself in other chunkings, batches and grids, to the last bit.

Inputs are fresh in each run; the seed is printed on failure. Indices and barriers are also tested without a GPU:
tests/host/test_attention_simt.py.
Run: pytest -m gpu tests/gpu/test_attention.py
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention_reference import (
    Array,
    RunStep,
    Shape,
    Share,
    Step,
    check_chunking,
    check_grids,
    check_spans,
    check_step,
    decode_rows,
    make_step,
    random_sequence,
)
from tests.gpu.gpu_harness import KernelRunner, compile_kernel

NUM_CTAS = 131  # the worker's: one SM is the director's
SHARED_BYTES = {64: 4 * 8192 + 128 * 128, 128: 4 * 16384 + 128 * 256}  # kWideSharedBytes
SHARED_BYTES[64] = max(SHARED_BYTES[64], 8 * 8192 + 16 * 72 * 4)  # kNarrowSharedBytes


@pytest.fixture
def run(runner: KernelRunner) -> RunStep:
    def run_step(step: Step, num_ctas: int) -> Array:
        head_dim, num_slots = step.shape.head_dim, max(step.num_slots, 1)
        arrays = {
            "seqs": runner.array(step.seqs),
            "page_tables": runner.array(step.page_tables),
            "query": runner.array(step.query),
            "kv": runner.array(step.kv),
            "part_outputs": runner.poisoned((num_slots, step.shape.num_heads, head_dim), np.float32),
            "part_softmax": runner.poisoned((num_slots, step.shape.num_heads, 2), np.float32),
        }
        output = runner.poisoned(step.query.shape, np.uint16)
        arrivals = runner.zeros((1,), np.uint32)
        args = step.args(num_ctas, {name: array.address for name, array in arrays.items()})
        kernel = compile_kernel("attention_test.cu", [f"-DHEAD_DIM={head_dim}"])
        shared_bytes = SHARED_BYTES[head_dim]
        runner.run(kernel, "attention_test", num_ctas, 384, [args, output, arrivals], shared_bytes, cooperative=True)
        result = output.numpy()
        runner.free(*arrays.values(), output, arrivals)
        return result

    return run_step


SHAPES = [
    Shape(num_heads, num_kv_heads, head_dim)
    for num_heads, num_kv_heads in [(4, 4), (6, 2), (8, 2), (16, 2)]  # 1, 3, 4 and 8 query heads per kv head
    for head_dim in (64, 128)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_rows(run: RunStep, rng: np.random.Generator, shape: Shape) -> None:
    contexts = [1, 2, 63, 64, 65, 255, 256, 257, 1000, 2049, *rng.integers(1, 3000, 20)]
    check_spans(run, rng, shape, decode_rows(contexts), NUM_CTAS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_chunks(run: RunStep, rng: np.random.Generator, shape: Shape) -> None:
    spans = [(0, 2), (0, 64), (60, 70), (0, 513), (255, 300), (1000, 1257), (3, 4)]
    check_spans(run, rng, shape, spans, NUM_CTAS)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 300, 1024])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sliding_window(run: RunStep, rng: np.random.Generator, window: int, head_dim: int) -> None:
    spans = [(0, 40), (1500, 1501), (1400, 1530), (63, 64), (64, 65), (0, 700)]
    check_spans(run, rng, Shape(8, 2, head_dim, window), spans, NUM_CTAS)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("begin", "end"), [(32_767, 32_768), (32_700, 32_768)])
def test_context_of_32k(run: RunStep, rng: np.random.Generator, head_dim: int, begin: int, end: int) -> None:
    check_spans(run, rng, Shape(4, 1, head_dim), [(begin, end)], NUM_CTAS, sharpness=3.0)


def test_batch_of_256_and_prefill(run: RunStep, rng: np.random.Generator) -> None:
    shape = Shape(8, 2, 128)
    shares = []
    for i in range(256):
        end = int(rng.integers(1, 700))
        sequence = random_sequence(rng, shape, end, 2.0)
        shares.append(Share(sequence, int(rng.integers(0, end)) if i % 40 == 0 else end - 1, end))
    for num_slots in (0, 100, 1024):
        check_step(run, make_step(rng, shape, shares, num_slots), NUM_CTAS)


def test_scores_far_apart(run: RunStep, rng: np.random.Generator) -> None:
    """Maxima that grow by hundreds from page to page: rescaling under- and overflows unless it is done relative to them."""
    shape = Shape(4, 2, 64)
    sequence = random_sequence(rng, shape, 600, 60.0)
    step = make_step(rng, shape, [Share(sequence, 599, 600), Share(sequence, 100, 600)])
    check_step(run, step, NUM_CTAS)


@pytest.mark.parametrize("shape", [*SHAPES, Shape(8, 2, 128, 500), Shape(6, 2, 64, 90)], ids=str)
def test_chunking_and_batch_do_not_change_a_bit(run: RunStep, rng: np.random.Generator, shape: Shape) -> None:
    chunkings = [[1, 255, 1, 1, 842], [64] * 17 + [12], [511, 513, 76], [1] * 40 + [1060]]
    check_chunking(run, rng, shape, 1100, chunkings, NUM_CTAS)


def test_number_of_ctas_does_not_change_a_bit(run: RunStep, rng: np.random.Generator) -> None:
    check_grids(run, rng, Shape(8, 2, 128), [(2599, 2600), (3, 400), (9, 10)], [1, 2, 13, 131, 131, 132])
