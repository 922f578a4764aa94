"""The test kernel of device/gemm_wide.cuh (tests/gpu/kernels/gemm_wide_test.cu) on emulated CTAs: what GPU tests launch works before a GPU sees it.

Bits and every tiling: tests/gpu/test_gemm_wide.py. Run: pytest tests/host/test_gemm_wide_simt.py
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.bf16 import f32_from_bf16
from tests.gpu.gemm_wide_runner import ROW_TILE, PlacedWeights, pack_tiles, random_bits
from tests.host.emulated_gpu import SIMT90, build
from tests.support import ROOT

NUM_WORKERS = 3


@pytest.mark.parametrize(
    ("tile_rows", "columns", "stack", "is_paced"),
    [
        (32, 192, 0, False),
        (32, 1216, 0, False),
        (112, 192, 0, False),
        (48, 1216, 2, False),
        (48, 1280, 2, False),
        (32, 1216, 4, False),
        (48, 1216, 4, True),
        (32, 1280, 8, True),
    ],
)
def test_products_of_two_ops(tmp_path: Path, tile_rows: int, columns: int, stack: int, is_paced: bool) -> None:
    """Rows of one to three tiles; the second op has a ragged last item. 32: items of 64 rows, of which a warpgroup has nothing, among them, and
    inputs in the weight ring. 1,216 columns are 19 slices: both rings go round, and an item's last unit is not full. With a stack, items of 128 rows
    and 96 or 128 weight rows: units of two stages, with a lent one behind. Paced: workers keep in step, and make up for the paces of ragged items and
    of rounds that have none for them."""
    tiling = {"BK_WIDE_TOKENS": "128", "BK_WIDE_STACK": str(stack)} if stack else {}
    pace = {"BK_PACED_ROWS": "65"} if is_paced else {}
    library = build(
        SIMT90 / "gemm_wide_simt.cpp",
        tmp_path / "wide.so",
        {"TILE_ROWS": str(tile_rows)} | tiling | pace,
        ROOT / "device",
    )
    rng = np.random.default_rng(tile_rows)
    weights = [random_bits(rng, tile_rows * 4, columns), random_bits(rng, tile_rows * 5 - 16, columns)]
    packed = [pack_tiles(bits, tile_rows) for bits in weights]
    placed = [
        PlacedWeights(tiles.ctypes.data, columns, len(bits), tile_rows)
        for tiles, bits in zip(packed, weights, strict=True)
    ]
    ops = np.array([op.op() for op in placed], abi.OP)
    grid_words = np.zeros(abi.GRID_WORDS_BYTES // 4, np.uint32)
    params = np.zeros(1, abi.ENGINE_PARAMS)
    params["ops"], params["num_ops"], params["num_workers"] = ops.ctypes.data, len(ops), NUM_WORKERS
    params["grid_words"], params["spin_budget_ns"] = grid_words.ctypes.data, 1_000_000_000
    for num_rows in (65, 128, 190):
        bits = random_bits(rng, num_rows, columns)
        inputs = pack_tiles(bits, ROW_TILE)
        output = np.full((num_rows, len(weights[1])), np.nan, np.float32)
        times = np.zeros(len(ops) + 1, np.uint64)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (inputs, output, times)]
        library.bk_gemm_wide_simt(ctypes.c_void_p(params.ctypes.data), num_rows, *pointers, num_rows)
        expected = f32_from_bf16(bits).astype(np.float64) @ f32_from_bf16(weights[1]).astype(np.float64).T
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-3)
        num_items = [-(-num_rows // 128) * -(-op.num_tiles // stack) for op in placed] if is_paced else []
        num_rounds = sum(-(-items // NUM_WORKERS) for items in num_items)
        assert grid_words[abi.GRID_WORD_PACES] == NUM_WORKERS * num_rounds * (columns // 64 // 4)
