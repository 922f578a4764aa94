"""What the ops of the CPU interpreter promise together: the same bits whatever the number of threads, the cut of a prompt into
chunks, and the company in the batch. Run: pytest tests/host/test_reference_invariance.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from blinkimp.host.program import Model, model_dims
from blinkimp.host.reference import Chunk, ReferenceRunner, StepResult, select_kernels
from blinkimp.host.rope import rope_table
from blinkimp.host.weights import HostTarget
from blinkimp.ring_abi import OP, BufferId, OpKind
from tests.reference_support import PRECISIONS, Array, OpBench, fresh_rng


@pytest.fixture(params=["baseline", "avx2", "avx512"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if not select_kernels(request.param):
        pytest.skip(f"this machine cannot run {request.param} code")
    yield
    select_kernels("auto")


@pytest.fixture
def rng() -> np.random.Generator:
    return fresh_rng()


def whole_model(rng: np.random.Generator, precision: str) -> Model:
    """Two layers with window, biases and q/k norms."""
    bench = OpBench(rng, precision, windows=(0, 70))
    config = bench.config
    target = HostTarget()
    rope = bench.address(rope_table(config.rope, config.head_dim, 512))
    ops = []

    def append(kind: OpKind, out_features: int = 0, in_features: int = 0, **members: Any) -> None:
        op = np.zeros(1, OP)
        op["kind"], op["weight_dtype"], op["in_features"], op["out_features"] = (
            kind,
            bench.dtype,
            in_features,
            out_features,
        )
        if in_features:
            op["weight"] = bench.stored(bench.values(out_features, in_features, scale=in_features**-0.5))[0]
        for name, value in members.items():
            op[name] = value
        ops.append(op)

    def gain(num: int) -> int:
        return bench.address(1 + bench.values(num, scale=0.2))

    num_qkv = config.query_features + 2 * config.kv_features
    append(OpKind.EMBED, config.vocab, config.hidden)
    for layer, window in enumerate(config.windows):
        head_gains = {"q_norm": gain(config.head_dim), "k_norm": gain(config.head_dim)}
        append(
            OpKind.QKV,
            num_qkv,
            config.hidden,
            layer=layer,
            rope=rope,
            norm=gain(config.hidden),
            bias=gain(num_qkv),
            **head_gains,
        )
        append(OpKind.ATTENTION, layer=layer, window=window, input=BufferId.QUERY)
        append(OpKind.PROJECT, config.hidden, config.query_features, layer=layer, input=BufferId.ATTENTION)
        append(OpKind.GATE_UP, 2 * config.intermediate, config.hidden, layer=layer, norm=gain(config.hidden))
        append(OpKind.PROJECT, config.hidden, config.intermediate, layer=layer, input=BufferId.ACTIVATION)
    append(OpKind.LM_HEAD, config.vocab, config.hidden, norm=gain(config.hidden))
    append(OpKind.SAMPLE, input=BufferId.LOGITS)
    model = Model(
        config, model_dims(config, bench.dtype, bench.dtype, ()), np.concatenate(ops), (), 512, bench.dtype, 0, target
    )
    object.__setattr__(model, "keepalive", bench)
    return model


def logits_in_chunks(runner: ReferenceRunner, request_idx: int, tokens: list[int], lengths: list[int]) -> Array:
    pieces, begin = [], 0
    for length in lengths:
        result: StepResult = runner.step([Chunk(request_idx, tokens[begin : begin + length], "all")])
        pieces.append(result.logits)
        begin += length
    assert begin == len(tokens)
    return np.concatenate(pieces)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_threads_chunks_or_batch(rng: np.random.Generator, precision: str) -> None:
    model = whole_model(rng, precision)
    tokens = rng.integers(0, model.config.vocab, 200).tolist()
    others = [rng.integers(0, model.config.vocab, length).tolist() for length in (33, 90)]
    sizes: dict[str, Any] = {"max_batch": 200, "max_step_tokens": 330}
    expected = logits_in_chunks(ReferenceRunner(model, num_workers=1, **sizes), 0, tokens, [200])
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0.5
    for num_workers in (2, 3, 7):
        got = logits_in_chunks(
            ReferenceRunner(model, num_workers=num_workers, page_seed=num_workers, **sizes), 0, tokens, [200]
        )
        assert np.array_equal(got, expected), f"{num_workers} threads"
    for lengths in ([1] * 200, [64, 64, 72], [3, 130, 1, 1, 65], [7, 8, 9, 16, 17, 143]):
        got = logits_in_chunks(ReferenceRunner(model, **sizes), 2, tokens, lengths)
        assert np.array_equal(got, expected), f"chunks {lengths[:6]}"
    runner = ReferenceRunner(model, **sizes)
    got_rows = []
    for begin in range(0, 200, 40):  # beside other requests, in front and behind
        chunks = [
            Chunk(1, others[0][:], "none", 0),
            Chunk(0, tokens[begin : begin + 40], "all"),
            Chunk(3, others[1][:], "none", 0),
        ]
        got_rows.append(runner.step(chunks).logits)
    assert np.array_equal(np.concatenate(got_rows), expected), "batch"


def test_more_threads_than_cores_finish(rng: np.random.Generator) -> None:
    """Waits sleep in the kernel when spinning does not pay; no wake-up may be lost."""
    runner = ReferenceRunner(whole_model(rng, "f32"), num_workers=24, max_batch=64)
    reference = ReferenceRunner(runner.model, num_workers=1, max_batch=64)
    for step in range(20):
        chunks = [Chunk(0, [step % 7, step % 5], "all")]
        assert np.array_equal(runner.step(chunks).logits, reference.step(chunks).logits)
