"""device/portable/gemm.cuh, the GPU's code, on emulated warps (tests/host/simt): indices, fragments, swizzles, the ring, barriers.

The arithmetic of the tensor cores themselves is only known on a GPU: tests/gpu/test_portable_gpu.py.
Run: pytest tests/host/test_portable_gemm_simt.py
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from tests.host.simt_support import SIMT, build_simt

ARGS = np.dtype(
    [
        ("weights", np.uint64),
        ("input", np.uint64),
        ("input_rows", np.uint64),
        ("num_rows", np.uint32),
        ("num_slices", np.uint32),
        ("num_tiles", np.uint32),
        ("reserved0", np.uint32),
    ]
)
# (TILE_ROWS, ROWS, TILES): what device/portable/worker.cuh instantiates.
SHAPES = [
    (tile_rows, rows, tiles)
    for tile_rows in (32, 48, 64, 112, 128)
    for rows, tiles in ((16, 1), (64, 1), (128, 1), (128, 128 // tile_rows))
    if (rows, tiles) != (128, 1) or tile_rows in (32, 112)
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build_simt(SIMT / "gemm_simt.cpp", tmp_path_factory.mktemp("simt"), "-O1")
    loaded.bk_gemm_simt.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_uint] * 6,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
    ]
    loaded.bk_gemm_simt.restype = ctypes.c_longlong
    return loaded


def pack(weights: NDArray[np.uint16], tile_rows: int) -> NDArray[np.uint16]:
    """[tile][k / 64][tile_rows][64] with the chunks of a row exchanged: device/pack_weights.cu, in numpy."""
    num_rows, num_columns = weights.shape
    num_tiles = -(-num_rows // tile_rows)
    padded = np.zeros((num_tiles * tile_rows, num_columns), np.uint16)
    padded[:num_rows] = weights
    chunks = padded.reshape(num_tiles, tile_rows, num_columns // 64, 8, 8).transpose(0, 2, 1, 3, 4)
    order = np.arange(8)[None, :] ^ (np.arange(tile_rows)[:, None] % 8)  # [row, place] -> chunk
    packed = np.take_along_axis(chunks, np.broadcast_to(order[None, None, :, :, None], chunks.shape), axis=3)
    return np.ascontiguousarray(packed)


class Product:
    """One random product, run on emulated warps at a given item shape."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rng: np.random.Generator,
        num_rows: int,
        out_features: int,
        num_slices: int,
        gathered: bool = False,
    ) -> None:
        self.library, self.rng, self.num_rows, self.out_features, self.num_slices = (
            library,
            rng,
            num_rows,
            out_features,
            num_slices,
        )
        columns = num_slices * 64
        num_inputs = num_rows + 5 if gathered else num_rows
        self.input = bf16_from_f32(rng.standard_normal((num_inputs, columns), np.float32))
        self.weights = bf16_from_f32(rng.standard_normal((out_features, columns), np.float32))
        self.input_rows = rng.permutation(num_inputs)[:num_rows].astype(np.uint32) if gathered else None

    def expected(self) -> NDArray[np.float64]:
        rows = np.arange(self.num_rows) if self.input_rows is None else self.input_rows
        product: NDArray[np.float64] = (
            f32_from_bf16(self.input).astype(np.float64)[rows] @ f32_from_bf16(self.weights).astype(np.float64).T
        )
        return product

    def run(self, tile_rows: int, rows: int, tiles: int, is_large: bool, num_ctas: int) -> NDArray[np.float32]:
        packed = pack(self.weights, tile_rows)
        args = np.zeros(1, ARGS)
        args["weights"], args["input"] = packed.ctypes.data, self.input.ctypes.data
        args["input_rows"] = 0 if self.input_rows is None else self.input_rows.ctypes.data
        args["num_rows"], args["num_slices"], args["num_tiles"] = self.num_rows, self.num_slices, len(packed)
        product = np.zeros((self.num_rows, self.out_features), np.float32)
        num_prepared = np.zeros(-(-self.num_rows // rows), np.uint32)
        seed = int(self.rng.integers(1 << 31))
        conflicts = self.library.bk_gemm_simt(
            args.ctypes.data,
            tile_rows,
            rows,
            tiles,
            int(is_large),
            num_ctas,
            self.out_features,
            product.ctypes.data,
            num_prepared.ctypes.data,
            seed,
        )
        assert conflicts == 0, f"ldmatrix had {conflicts} bank conflicts, or the shape is not compiled (-1)"
        assert num_prepared.min() >= 1, "a row group was never prepared for its epilogue"
        return product


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_large", [False, True], ids=["99KB", "227KB"])
def test_product_of_every_item_shape(library: ctypes.CDLL, shape: tuple[int, int, int], is_large: bool) -> None:
    """Ragged everywhere: rows, slices of a stage, tiles of an item, rows of the last tile; several items for each CTA."""
    rng = np.random.default_rng((*shape, is_large))
    tile_rows, rows, tiles = shape
    num_rows = int(rng.integers(1, 17)) if rows == 16 else int(rng.integers(17, rows + 8))
    out_features = tile_rows * (2 * tiles + 1) - 16
    product = Product(library, rng, num_rows, out_features, num_slices=int(rng.integers(5, 12)))
    got = product.run(*shape, is_large, num_ctas=2)
    expected = product.expected()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-6


def test_bits_do_not_depend_on_the_shape_of_the_item(library: ctypes.CDLL) -> None:
    product = Product(library, np.random.default_rng(1), num_rows=16, out_features=96, num_slices=6)
    first = product.run(32, 16, 1, False, num_ctas=1)
    for rows, tiles, is_large, num_ctas in ((64, 1, False, 2), (128, 1, True, 3), (128, 4, False, 1), (16, 1, True, 2)):
        np.testing.assert_array_equal(product.run(32, rows, tiles, is_large, num_ctas), first)
    np.testing.assert_array_equal(product.run(48, 64, 1, False, 2), first)


def test_input_rows_are_gathered(library: ctypes.CDLL) -> None:
    """The LM head reads the sampled rows where they stand."""
    product = Product(library, np.random.default_rng(2), num_rows=21, out_features=200, num_slices=4, gathered=True)
    got = product.run(112, 64, 1, False, num_ctas=1)
    expected = product.expected()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-6


def test_a_cta_without_an_item_does_nothing(library: ctypes.CDLL) -> None:
    product = Product(library, np.random.default_rng(3), num_rows=3, out_features=32, num_slices=1)
    got = product.run(32, 16, 1, False, num_ctas=4)
    assert np.linalg.norm(got - product.expected()) < 1e-4


def test_a_planted_wrong_weight_is_seen(library: ctypes.CDLL) -> None:
    """The comparison can fail: one weight that differs from the reference's."""
    product = Product(library, np.random.default_rng(4), num_rows=9, out_features=64, num_slices=3)
    expected = product.expected()
    product.weights[63, 191] = 0x4280  # 64.0
    got = product.run(64, 16, 1, True, num_ctas=1)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) > 1e-3
