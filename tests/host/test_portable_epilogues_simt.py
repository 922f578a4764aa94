"""The GEMM ops of device/portable, product and epilogue, on emulated warps (tests/host/simt) against float64.

Run: pytest tests/host/test_portable_epilogues_simt.py
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.gpu_weights import grouped_order, rotated_order
from blinkimp.ring_abi import OpKind
from tests.host.simt_support import SIMT, build_simt
from tests.host.test_portable_gemm_simt import pack

F64 = NDArray[np.float64]
HIDDEN, NORMED, QUERY, ATTENTION, ACTIVATION, SQUARES, LOGITS = range(7)
LOGIT_BEST = 10
NUM_COLUMNS = 192  # of every input: three slices
MAX_CONTEXT, PAGES_PER_REQUEST, NUM_PAGES, NUM_REQUESTS = 512, 8, 40, 4
POISON = 0xFF
CALL = np.dtype(
    [(name, np.uint64) for name in ("params", "op", "plan", "row_scales", "input", "input_rows")]
    + [("num_rows", np.uint32), ("num_ctas", np.uint32)]
)
# bf16 outputs of products of bf16 numbers: half a unit in the last place, of 8 bits.
MAX_BF16_ERROR = 3e-3
NUM_ROWS = (1, 16, 33, 150)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build_simt(SIMT / "epilogues_simt.cpp", tmp_path_factory.mktemp("simt"), "-O1")
    loaded.bk_op_simt.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    loaded.bk_op_simt.restype = ctypes.c_bool
    return loaded


def relative_error(got: NDArray[Any], expected: F64) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


class OpRun:
    """One op over num_rows rows of two requests, at positions from 60 on, so that pages change under way."""

    def __init__(self, library: ctypes.CDLL, num_rows: int, **dims: int) -> None:
        self.library, self.num_rows, self.rng = library, num_rows, np.random.default_rng(num_rows)
        self.keep: list[Any] = []
        self.params = np.zeros(1, abi.ENGINE_PARAMS)
        for name, value in dims.items():
            self.params["dims"][name] = value
        self.params["dims"]["norm_eps"] = 1e-5
        for name, value in (
            ("max_batch", 4),
            ("max_step_tokens", 256),
            ("num_pages", NUM_PAGES),
            ("max_pages_per_request", PAGES_PER_REQUEST),
        ):
            self.params[name] = value
        self.op = np.zeros(1, abi.OP)
        self.input = bf16_from_f32(self.rng.standard_normal((num_rows, NUM_COLUMNS), np.float32))
        self.scales = self.rng.uniform(0.5, 2, num_rows).astype(np.float32)
        self.plan = self._plan()

    def _plan(self) -> NDArray[np.uint8]:
        header, seqs = np.zeros(1, abi.STEP_PLAN), np.zeros(4, abi.PLAN_SEQ)
        rows, sampled = np.zeros(256, abi.PLAN_ROW), np.zeros(4, np.uint32)
        first = self.num_rows // 2
        seqs["request_idx"][:2] = (3, 1)
        rows["seq_idx"][:first], rows["seq_idx"][first : self.num_rows] = 0, 1
        rows["position"][:first], rows["position"][first : self.num_rows] = (
            60 + np.arange(first),
            3 + np.arange(self.num_rows - first),
        )
        self.positions = rows["position"][: self.num_rows].astype(int)
        tables = (
            self.rng.permutation(NUM_PAGES)[: NUM_REQUESTS * PAGES_PER_REQUEST]
            .astype(np.uint32)
            .reshape(NUM_REQUESTS, PAGES_PER_REQUEST)
        )
        self.pages = tables[seqs["request_idx"][rows["seq_idx"][: self.num_rows]], self.positions // abi.PAGE_TOKENS]
        self.params["page_tables"] = self.address(tables)
        return np.concatenate([part.view(np.uint8).reshape(-1) for part in (header, seqs, rows, sampled)])

    def address(self, array: NDArray[Any]) -> int:
        self.keep.append(array)
        return int(array.ctypes.data)

    def poisoned(self, place: int | str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, POISON, np.uint8).view(dtype).reshape(shape)
        if isinstance(place, str):
            self.params[place] = self.address(array)
        else:
            self.params["workspaces"][0, place] = self.address(array)
        return array

    def weights(self, kind: OpKind, out_features: int, tile_rows: int, order: NDArray[Any] | None = None) -> F64:
        """Random weights, packed in `order`; returns them as they were before that."""
        weights = bf16_from_f32(self.rng.standard_normal((out_features, NUM_COLUMNS), np.float32))
        packed = pack(weights if order is None else weights[order], tile_rows)
        for name, value in (
            ("kind", kind),
            ("in_features", NUM_COLUMNS),
            ("out_features", out_features),
            ("tile_rows", tile_rows),
            ("num_tiles", len(packed)),
        ):
            self.op[name] = value
        self.op["weight"] = self.address(packed)
        return f32_from_bf16(weights).astype(np.float64)

    def vector(self, name: str, values: NDArray[np.float32]) -> F64:
        self.op[name] = self.address(values)
        return values.astype(np.float64)

    def run(self, head_dim: int = 64, input_rows: NDArray[np.uint32] | None = None) -> F64:
        """Returns the input rows of the product, times their scales."""
        call = np.zeros(1, CALL)
        for name, array in (
            ("params", self.params),
            ("op", self.op),
            ("plan", self.plan),
            ("row_scales", self.scales),
            ("input", self.input),
        ):
            call[name] = array.ctypes.data
        rows = self.input if input_rows is None else self.input[input_rows]
        call["input_rows"] = 0 if input_rows is None else input_rows.ctypes.data
        call["num_rows"], call["num_ctas"] = len(rows), 3
        assert self.library.bk_op_simt(call.ctypes.data, head_dim, int(self.rng.integers(1 << 31))), (
            "this shape is not compiled"
        )
        return f32_from_bf16(rows).astype(np.float64)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_project(library: ctypes.CDLL, num_rows: int, biased: bool) -> None:
    hidden = 160
    run = OpRun(library, num_rows, hidden=hidden)
    weights = run.weights(OpKind.PROJECT, hidden, 32, grouped_order(hidden))
    residual = run.poisoned(HIDDEN, (num_rows, hidden), np.float32)
    residual[:] = run.rng.standard_normal((num_rows, hidden))
    normed, squares = (
        run.poisoned(NORMED, (num_rows, hidden), np.uint16),
        run.poisoned(SQUARES, (num_rows, hidden // 32), np.float32),
    )
    gain = run.vector("next_norm", run.rng.standard_normal(hidden).astype(np.float32))
    expected = residual.astype(np.float64)
    if biased:
        expected = expected + run.vector("bias", run.rng.standard_normal(hidden).astype(np.float32))
    expected = expected + run.run() @ weights.T
    assert relative_error(residual, expected) < 1e-6
    assert relative_error(f32_from_bf16(normed), expected * gain) < MAX_BF16_ERROR
    assert relative_error(squares, (expected**2).reshape(num_rows, -1, 32).sum(2)) < 1e-6


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(("tile_rows", "biased"), [(48, False), (48, True), (112, False)])
def test_gate_up(library: ctypes.CDLL, num_rows: int, tile_rows: int, biased: bool) -> None:
    inner = 128
    run = OpRun(library, num_rows, intermediate=inner)
    interleaved = np.arange(2 * inner).reshape(2, inner // 8, 8).transpose(1, 0, 2).reshape(-1)  # 8 gate, 8 up, ...
    weights = run.weights(OpKind.GATE_UP, 2 * inner, tile_rows, interleaved) / 8
    run.scales /= 8
    activation = run.poisoned(ACTIVATION, (num_rows, inner), np.uint16)
    bias = np.zeros(2 * inner)
    if biased:
        bias = run.rng.standard_normal(2 * inner)
        run.vector("bias", bias[interleaved].astype(np.float32))
    products = 8 * (run.run() @ weights.T) * run.scales[:, None].astype(np.float64) + bias
    gate, up = products[:, :inner], products[:, inner:]
    assert relative_error(f32_from_bf16(activation), gate / (1 + np.exp(-gate)) * up) < MAX_BF16_ERROR


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(
    ("tile_rows", "head_dim", "normed", "biased"),
    [(48, 64, False, True), (48, 128, False, False), (64, 64, True, False), (128, 128, True, True)],
)
def test_qkv(library: ctypes.CDLL, num_rows: int, tile_rows: int, head_dim: int, normed: bool, biased: bool) -> None:
    heads, kv_heads, layer = 3, 1, 1
    num_rotated, out_features = (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim
    run = OpRun(library, num_rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    order = np.arange(out_features)
    rotated = rotated_order(head_dim)
    order[:num_rotated] = (np.arange(heads + kv_heads)[:, None] * head_dim + rotated[None]).reshape(-1)
    weights = run.weights(OpKind.QKV, out_features, tile_rows, order)
    run.op["layer"] = layer
    bias = run.rng.standard_normal(out_features).astype(np.float32) if biased else np.zeros(out_features, np.float32)
    if biased:
        run.vector("bias", bias[order])
    gains = {name: run.rng.uniform(0.5, 2, head_dim).astype(np.float32) for name in ("q_norm", "k_norm")}
    if normed:
        for name, gain in gains.items():
            run.vector(name, gain[rotated])
    angles = np.arange(MAX_CONTEXT)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)[None]
    run.vector("rope", np.stack([np.cos(angles), np.sin(angles)], axis=2).astype(np.float32))
    query = run.poisoned(QUERY, (num_rows, heads, head_dim), np.uint16)
    kv = run.poisoned("kv_cache", (layer + 1, NUM_PAGES, kv_heads, 2, abi.PAGE_TOKENS, head_dim), np.uint16)

    products = run.run(head_dim) @ weights.T * run.scales[:, None].astype(np.float64) + bias
    split = products.reshape(num_rows, -1, head_dim)
    expected = {"q": split[:, :heads], "k": split[:, heads : heads + kv_heads], "v": split[:, heads + kv_heads :]}
    for name in ("q", "k"):
        values = expected[name]
        if normed:
            values = values / np.sqrt((values**2).mean(2, keepdims=True) + 1e-5) * gains[f"{name}_norm"]
        low, high = values[..., : head_dim // 2], values[..., head_dim // 2 :]
        cos, sin = np.cos(angles[run.positions])[:, None], np.sin(angles[run.positions])[:, None]
        expected[name] = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)[..., rotated]
    assert relative_error(f32_from_bf16(query), expected["q"]) < MAX_BF16_ERROR
    stored = f32_from_bf16(kv)[layer][run.pages, :, :, run.positions % abi.PAGE_TOKENS]  # [rows, kv_heads, 2, head_dim]
    assert relative_error(stored[:, :, 0], expected["k"]) < MAX_BF16_ERROR
    assert relative_error(stored[:, :, 1], expected["v"]) < MAX_BF16_ERROR
    written = (kv != 0xFFFF).any(axis=(2, 3, 5))  # [layer, page, token]
    assert not written[0].any(), "another layer was written"
    assert written.sum() == num_rows, "other tokens were written"


@pytest.mark.parametrize("num_samples", (1, 40, 130))
def test_lm_head(library: ctypes.CDLL, num_samples: int) -> None:
    """An odd vocabulary; sampled rows gathered from a longer step; the best of each tile, the first among equals."""
    vocab = 3 * 112 + 5
    run = OpRun(library, num_samples + 20, vocab=vocab)
    weights = run.weights(OpKind.LM_HEAD, vocab, 112)
    logits = run.poisoned(LOGITS, (num_samples, vocab), np.float32)
    best = run.poisoned(LOGIT_BEST, (num_samples, 4), np.uint64)
    rows = run.rng.permutation(num_samples + 20)[:num_samples].astype(np.uint32)
    expected = run.run(input_rows=rows) @ weights.T * run.scales[:num_samples, None].astype(np.float64)
    assert relative_error(logits, expected) < 1e-6
    for tile in range(4):
        values = logits[:, tile * 112 : (tile + 1) * 112]
        columns = tile * 112 + values.argmax(1)  # the first of equals
        bits = logits[np.arange(num_samples), columns].view(np.uint32)
        keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
        np.testing.assert_array_equal(
            best[:, tile], keys << np.uint64(32) | np.uint64(0xFFFFFFFF) - columns.astype(np.uint64)
        )
