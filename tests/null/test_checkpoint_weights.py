"""bf16 in numpy, matrix sources, the host target, and the weights of dummy models. Run: pytest tests/null/test_checkpoint_weights.py"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.checkpoint import Checkpoint
from blinkimp.host.dummy_weights import POOL_ELEMENTS, DummyWeights
from blinkimp.host.weights import ALIGN_BYTES, HostTarget, MatrixSource, PlacedMatrix, item_bytes
from blinkimp.ring_abi import DType, OpKind
from tests.checkpoint_support import CONFIG, random_tensors, write_checkpoint


# ---- bf16 ----------------------------------------------------------------------------------------------------------
def test_every_bf16_survives_the_round_trip() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = f32_from_bf16(bits)
    back = bf16_from_f32(values)
    is_nan = np.isnan(values)
    assert np.array_equal(back[~is_nan], bits[~is_nan])
    assert np.isnan(f32_from_bf16(back[is_nan])).all()


@given(st.floats(width=32, allow_nan=False))
def test_rounding_is_to_nearest_even(value: float) -> None:
    got = int(bf16_from_f32(np.array([value], np.float32))[0])
    bits = int(np.float32(value).view(np.uint32))
    below, rest = bits >> 16, bits & 0xFFFF
    expected = below + (rest > 0x8000 or (rest == 0x8000 and below % 2 == 1))
    assert got == expected


def test_rounding_keeps_nan_and_overflows_to_infinity() -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(f32_from_bf16(bf16_from_f32(nans))).all()
    assert np.isinf(f32_from_bf16(bf16_from_f32(np.array([3.4e38], np.float32)))).all()


# ---- Matrix sources ------------------------------------------------------------------------------------------------
def source(folder: Path, names: list[str], kind: OpKind, dtype: DType = DType.F32) -> MatrixSource:
    checkpoint = Checkpoint(folder)
    shapes = {name: value.shape for name, value in random_tensors(CONFIG).items()}
    parts = tuple(checkpoint.tensor(name, shapes[name]) for name in names)
    return MatrixSource(names[0], kind, 0, dtype, parts, interleaved=kind == OpKind.GATE_UP)


QKV = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
GATE_UP = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]


@pytest.mark.parametrize("span", [(0, 64), (0, 1), (30, 50), (47, 64), (33, 34)])
def test_qkv_rows_are_concatenated(tmp_path: Path, span: tuple[int, int]) -> None:
    tensors = write_checkpoint(tmp_path)
    matrix = source(tmp_path, QKV, OpKind.QKV)
    assert (matrix.out_features, matrix.in_features, matrix.view()) == (64, 32, None)
    expected = np.concatenate([tensors[name] for name in QKV])[slice(*span)]
    assert np.array_equal(matrix.read_rows(*span), expected)


@pytest.mark.parametrize("span", [(0, 96), (0, 8), (8, 16), (5, 29), (95, 96)])
def test_gate_and_up_rows_take_turns_of_eight(tmp_path: Path, span: tuple[int, int]) -> None:
    tensors = write_checkpoint(tmp_path)
    gate, up = (tensors[name] for name in GATE_UP)
    rows = [(gate, up)[row // 8 % 2][row // 16 * 8 + row % 8] for row in range(*span)]
    assert np.array_equal(source(tmp_path, GATE_UP, OpKind.GATE_UP).read_rows(*span), np.stack(rows))


def test_sources_convert_to_the_compute_type(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    got = source(tmp_path, QKV, OpKind.QKV, DType.BF16).read_rows(0, 64)
    assert got.dtype == np.uint16
    assert np.array_equal(got, bf16_from_f32(np.concatenate([tensors[name] for name in QKV])))
    half = random_tensors(CONFIG, "F16")
    write_checkpoint(tmp_path, half)
    wide = source(tmp_path, QKV, OpKind.QKV).read_rows(0, 64)
    assert np.array_equal(wide, np.concatenate([half[name] for name in QKV]).astype(np.float32))


# ---- Host target ---------------------------------------------------------------------------------------------------
def memory_at(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * num_bytes).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)


@pytest.mark.parametrize("map_bytes", [0, 1 << 30])
def test_host_target_holds_the_matrix(tmp_path: Path, map_bytes: int) -> None:
    tensors = write_checkpoint(tmp_path)
    target = HostTarget(map_bytes)
    head = source(tmp_path, ["lm_head.weight"], OpKind.LM_HEAD)
    placed = target.place_matrix(head)
    assert placed == PlacedMatrix(placed.address, 0, 0, 0)
    assert np.array_equal(memory_at(placed.address, (40, 32), np.float32), tensors["lm_head.weight"])
    is_mapped = map_bytes == 0
    assert (target.mapped_bytes, target.num_bytes) == ((head.num_bytes, 0) if is_mapped else (0, head.num_bytes))
    assert is_mapped or placed.address % ALIGN_BYTES == 0
    assert target.place_matrix(head) == placed, "a tied LM head shares the embedding"
    qkv = target.place_matrix(source(tmp_path, QKV, OpKind.QKV, DType.BF16))
    expected = bf16_from_f32(np.concatenate([tensors[name] for name in QKV]))
    assert np.array_equal(memory_at(qkv.address, (64, 32), np.uint16), expected)


def test_host_target_copies_vectors() -> None:
    values = np.arange(5, dtype=np.float32)
    target = HostTarget()
    address = target.place_f32("norm", values)
    values[:] = -1
    assert address % ALIGN_BYTES == 0
    assert memory_at(address, (5,), np.float32).tolist() == [0, 1, 2, 3, 4]


# ---- Dummy weights -------------------------------------------------------------------------------------------------
def test_dummy_weights_are_reproducible_and_read_by_row() -> None:
    first = DummyWeights(7).tensor("model.layers.0.mlp.down_proj.weight", (1300, 4000))
    again = DummyWeights(7).tensor("model.layers.0.mlp.down_proj.weight", (1300, 4000))
    whole = first.read_rows(0, 1300, DType.F32)  # longer than the pool
    assert whole.size > POOL_ELEMENTS
    assert np.array_equal(whole, again.read_rows(0, 1300, DType.F32))
    assert np.array_equal(whole[900:1200], first.read_rows(900, 1200, DType.F32))
    assert np.array_equal(first.read_rows(3, 5, DType.BF16), bf16_from_f32(whole[3:5]))
    assert not np.array_equal(whole, DummyWeights(8).tensor(first.name, (1300, 4000)).read_rows(0, 1300, DType.F32))
    assert abs(whole.std() - 0.02) < 1e-4 and abs(whole.mean()) < 1e-4
    assert len(np.unique(whole[:, 0])) > 1290, "rows repeat"


def test_dummy_norms_are_one() -> None:
    weights = DummyWeights(0)
    for name in (
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight",
    ):
        assert weights.tensor(name, (9,)).read_rows(0, 9, DType.F32).tolist() == [1.0] * 9


def test_item_bytes() -> None:
    assert (item_bytes(DType.F32), item_bytes(DType.BF16)) == (4, 2)
