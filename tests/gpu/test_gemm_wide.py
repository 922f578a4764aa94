"""device/gemm_wide.cuh: every tiling against float64 and, to the last bit, against the chain of products that defines an output.

Inputs are fresh in each run; the seed is printed on failure. Outputs are poisoned, so a missing element is NaN.
Run: pytest -m gpu tests/gpu/test_gemm_wide.py
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp.host.bf16 import f32_from_bf16
from tests.gpu.gemm_wide_runner import WideRunner, compile_wide, random_bits

NUM_ROWS = (65, 100, 128, 129, 200, 257, 515, 2100)  # 2100: two groups of 16 row tiles, the second one ragged
TILE_ROWS = (32, 48, 64, 112, 128)
FORCED = {  # (tokens, stack) that the kernel is compiled for
    32: [(128, 8), (128, 4), (128, 2), (64, 2)],
    48: [(128, 4), (128, 2), (64, 2)],
    64: [(128, 4), (128, 2), (128, 1), (64, 2)],
    112: [(128, 2)],
    128: [(128, 2), (128, 1)],
}

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runner() -> Iterator[WideRunner]:
    with WideRunner() as wide_runner:
        yield wide_runner


def product(weights: NDArray[np.uint16], inputs: NDArray[np.uint16]) -> NDArray[np.float64]:
    return f32_from_bf16(inputs).astype(np.float64) @ f32_from_bf16(weights).astype(np.float64).T


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_chosen_tiling(runner: WideRunner, rng: np.random.Generator, tile_rows: int, num_rows: int) -> None:
    """Three ops in a row, of odd slice counts and ragged last items, so that rings are left and entered at odd stages."""
    kernel = compile_wide(tile_rows)
    shapes = [(tile_rows * 6 - 8, 192), (tile_rows * 121 + 8, 320), (tile_rows * 5, 1088)]
    weights = [random_bits(rng, *shape) for shape in shapes]
    ops = [runner.place(bits, tile_rows) for bits in weights]
    for last in range(3):
        inputs = random_bits(rng, num_rows, shapes[last][1])
        # Earlier ops read the same input buffer, which is long enough for none but their own columns: so they come with as many.
        same = [op for op in ops[:last] if op.in_features <= shapes[last][1]] + [ops[last]]
        expected = runner.chain(kernel, ops[last], inputs)
        got = runner.multiply(kernel, same, inputs)
        np.testing.assert_array_equal(got, expected)
        assert relative_error(got, product(weights[last], inputs)) < 1e-5  # fp32 accumulation


@pytest.mark.parametrize(
    ("tile_rows", "tokens", "stack"), [(rows, *forced) for rows in FORCED for forced in FORCED[rows]]
)
def test_every_tiling(runner: WideRunner, rng: np.random.Generator, tile_rows: int, tokens: int, stack: int) -> None:
    kernel = compile_wide(tile_rows, tokens=tokens, stack=stack)
    weights = random_bits(rng, tile_rows * 41 - 16, 704)
    op = runner.place(weights, tile_rows)
    for num_rows in (65, 193, 640):
        inputs = random_bits(rng, num_rows, 704)
        got = runner.multiply(kernel, [op, op], inputs)
        np.testing.assert_array_equal(got, runner.chain(kernel, op, inputs))
        assert relative_error(got, product(weights, inputs)) < 1e-5


@pytest.mark.parametrize("num_rows", [300, 1100])  # 1,100: the workers keep in step (gemm_pace.cuh)
def test_number_of_workers_does_not_change_a_bit(runner: WideRunner, rng: np.random.Generator, num_rows: int) -> None:
    kernel = compile_wide(48)
    op = runner.place(random_bits(rng, 48 * 20, 512), 48)
    inputs = random_bits(rng, num_rows, 512)
    sums = [runner.multiply(kernel, [op, op], inputs, num_workers) for num_workers in (runner.num_workers, 2, 3, 37)]
    for other in sums[1:]:
        np.testing.assert_array_equal(other, sums[0])


def test_a_full_layer(runner: WideRunner, rng: np.random.Generator) -> None:
    """The shapes of Llama-3-8B at 1,024 rows, against the definition."""
    for tile_rows, out_features, in_features in (
        (48, 6144, 4096),
        (32, 4096, 4096),
        (112, 28672, 4096),
        (32, 4096, 14336),
    ):
        kernel = compile_wide(tile_rows)
        op = runner.place(random_bits(rng, out_features, in_features, 0.02), tile_rows)
        inputs = random_bits(rng, 1024, in_features)
        got = runner.multiply(kernel, [op, op], inputs)
        np.testing.assert_array_equal(got, runner.chain(kernel, op, inputs))
