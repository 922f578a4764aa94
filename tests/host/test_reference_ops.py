"""Each op of the CPU interpreter against float64 numpy on fresh random inputs, for every instruction set that this machine has.

Memory that an op must not read is NaN, outputs are poisoned before. What the ops promise together: test_reference_invariance.py.
Run: pytest tests/host/test_reference_ops.py
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.reference import Chunk, ReferenceRunner, kernels_in_use, select_kernels
from blinkimp.host.rope import rope_table
from blinkimp.ring_abi import PAGE_TOKENS, BufferId, OpKind
from tests.reference_support import PRECISIONS, Array, OpBench, fresh_rng

KERNELS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if not select_kernels(request.param):
        pytest.skip(f"this machine cannot run {request.param} code")
    assert kernels_in_use() == request.param
    yield request.param
    select_kernels("auto")


@pytest.fixture
def rng() -> np.random.Generator:
    return fresh_rng()


def set_rows(buffer: Array, values: Array) -> None:
    buffer[: len(values)] = values


def normed(bench: OpBench, hidden: Array, gain: Array) -> tuple[Array, Array]:
    """(rounded input of the product, factor behind it) as device/DESIGN.md says."""
    scale = 1 / np.sqrt((hidden.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + bench.config.norm_eps)
    return bench.round(hidden * gain), scale


@pytest.mark.parametrize("precision", PRECISIONS)
def test_embed(rng: np.random.Generator, precision: str) -> None:
    bench = OpBench(rng, precision)
    config = bench.config
    weight, seen = bench.stored(bench.values(config.vocab, config.hidden))
    runner = bench.runner(kind=OpKind.EMBED, weight=weight, in_features=config.hidden, out_features=config.vocab)
    tokens = rng.integers(0, config.vocab, 37)
    runner.step([Chunk(0, tokens.tolist(), "none")])
    hidden = runner.buffer(BufferId.HIDDEN, config.hidden)
    assert np.array_equal(hidden[:37], seen[tokens])
    assert np.isnan(hidden[37:]).all(), "rows beyond the step were written"


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 131, 260])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_project_adds_to_the_hidden_state(rng: np.random.Generator, precision: str, num_rows: int) -> None:
    bench = OpBench(rng, precision)
    config = bench.config
    for source, in_features in (
        (BufferId.ATTENTION, config.query_features),
        (BufferId.ACTIVATION, config.intermediate),
    ):
        weight, seen = bench.stored(bench.values(config.hidden, in_features))
        bias = bench.values(config.hidden)
        runner = bench.runner(
            kind=OpKind.PROJECT,
            weight=weight,
            in_features=in_features,
            out_features=config.hidden,
            input=source,
            bias=bench.address(bias),
        )
        inputs, hidden = bench.values(num_rows, in_features), bench.values(num_rows, config.hidden)
        set_rows(runner.buffer(source, in_features), inputs)
        set_rows(runner.buffer(BufferId.HIDDEN, config.hidden), hidden)
        runner.step([Chunk(0, [0] * num_rows, "none")])
        expected = hidden + inputs.astype(np.float64) @ seen.T.astype(np.float64) + bias
        got = runner.buffer(BufferId.HIDDEN, config.hidden)
        assert np.abs(got[:num_rows] - expected).max() <= 3e-6 * np.abs(expected).max()  # the residual is never rounded
        assert np.isnan(got[num_rows:]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gate_up(rng: np.random.Generator, precision: str) -> None:
    bench = OpBench(rng, precision)
    config = bench.config
    gate, up = bench.values(config.intermediate, config.hidden), bench.values(config.intermediate, config.hidden)
    rows = np.stack([gate.reshape(-1, 8, config.hidden), up.reshape(-1, 8, config.hidden)], axis=1).reshape(
        -1, config.hidden
    )
    weight, _ = bench.stored(rows)
    gain, hidden = bench.values(config.hidden), bench.values(21, config.hidden, scale=2.0)
    runner = bench.runner(
        kind=OpKind.GATE_UP,
        weight=weight,
        norm=bench.address(gain),
        in_features=config.hidden,
        out_features=2 * config.intermediate,
    )
    set_rows(runner.buffer(BufferId.HIDDEN, config.hidden), hidden)
    runner.step([Chunk(0, [0] * 21, "none")])
    inputs, scale = normed(bench, hidden, gain)
    gates = inputs @ bench.round(gate).T * scale
    ups = inputs @ bench.round(up).T * scale
    expected = gates / (1 + np.exp(-gates)) * ups
    got = runner.buffer(BufferId.ACTIVATION, config.intermediate)
    assert np.abs(gates).max() > 20, "the exponential's tails are part of the test"
    assert np.abs(got[:21] - expected).max() <= bench.tolerance(np.abs(expected).max())
    assert np.isnan(got[21:]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("has_qk_norm", [False, True])
def test_qkv_writes_queries_and_pages(rng: np.random.Generator, precision: str, has_qk_norm: bool) -> None:
    bench = OpBench(rng, precision)
    config = bench.config
    num_features = config.query_features + 2 * config.kv_features
    weight, seen = bench.stored(bench.values(num_features, config.hidden))
    gain, bias, hidden = bench.values(config.hidden), bench.values(num_features), bench.values(150, config.hidden)
    q_gain, k_gain = bench.values(config.head_dim), bench.values(config.head_dim)
    table = rope_table(config.rope, config.head_dim, 512)
    norms = {"q_norm": bench.address(q_gain), "k_norm": bench.address(k_gain)} if has_qk_norm else {}
    runner = bench.runner(
        kind=OpKind.QKV, layer=1, weight=weight, norm=bench.address(gain), bias=bench.address(bias), rope=bench.address(table),
        in_features=config.hidden, out_features=num_features, **norms,
    )  # fmt: skip
    set_rows(runner.buffer(BufferId.HIDDEN, config.hidden), hidden)
    positions = np.concatenate([np.arange(60, 170), np.arange(0, 40)])  # over page boundaries
    runner.step([Chunk(2, [0] * 110, "none", position_begin=60), Chunk(0, [0] * 40, "none", position_begin=0)])

    inputs, scale = normed(bench, hidden, gain)
    product = (inputs @ seen.T.astype(np.float64) * scale + bias).reshape(150, -1, config.head_dim)
    queries, keys, values = np.split(product, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
    if has_qk_norm:
        queries, keys = (
            part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + config.norm_eps) * part_gain
            for part, part_gain in ((queries, q_gain), (keys, k_gain))
        )
    cosine, sine = (table[positions, :, idx][:, None, :].astype(np.float64) for idx in range(2))
    half = config.head_dim // 2

    def rotated(part: Array) -> Array:
        low, high = part[..., :half], part[..., half:]
        return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)

    got_queries = runner.buffer(BufferId.QUERY, config.query_features)[:150].reshape(queries.shape)
    got_keys, got_values = read_pages(runner, bench, 1, [(2, np.arange(60, 170)), (0, np.arange(40))])
    for got, expected in ((got_queries, rotated(queries)), (got_keys, rotated(keys)), (got_values, values)):
        assert np.abs(got - expected).max() <= bench.tolerance(np.abs(expected).max())
    pages = kv_pages(runner, bench)
    assert np.isnan(pages[0]).all(), "layer 0 was written"
    assert np.isfinite(pages).sum() == 2 * 150 * config.kv_features, "other positions were written"


def kv_pages(runner: ReferenceRunner, bench: OpBench) -> Array:
    """[num_layers, num_pages, num_kv_heads, 2, kPageTokens, head_dim] as f32."""
    config = bench.config
    shape = (config.num_layers, -1, config.num_kv_heads, 2, PAGE_TOKENS, config.head_dim)
    raw = runner.kv_cache.view(np.uint16 if bench.is_bf16 else np.float32).reshape(shape)
    return f32_from_bf16(raw) if bench.is_bf16 else raw


def page_of(runner: ReferenceRunner, request_idx: int, position: int) -> int:
    address, columns = int(runner.params[0]["page_tables"]), int(runner.params[0]["max_pages_per_request"])
    table = (
        next(memory for memory in runner._memory if memory.ctypes.data == address).view(np.uint32).reshape(-1, columns)
    )
    return int(table[request_idx, position // PAGE_TOKENS])


def read_pages(
    runner: ReferenceRunner, bench: OpBench, layer: int, spans: list[tuple[int, Array]]
) -> tuple[Array, Array]:
    """(keys, values), each [rows, num_kv_heads, head_dim], of the given positions of requests."""
    pages = kv_pages(runner, bench)[layer]
    rows = [pages[page_of(runner, request, pos), :, :, pos % PAGE_TOKENS] for request, span in spans for pos in span]
    stacked = np.stack(rows)  # [rows, num_kv_heads, 2, head_dim]
    return stacked[:, :, 0], stacked[:, :, 1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("window", [0, 1, 50, 64, 130])
def test_attention(rng: np.random.Generator, precision: str, window: int) -> None:
    bench = OpBench(rng, precision)
    config = bench.config
    runner = bench.runner(kind=OpKind.ATTENTION, layer=1, input=BufferId.QUERY, window=window)
    spans = [(0, 0, 70), (1, 200, 1), (2, 61, 130), (3, 63, 1)]  # request, first position, rows
    chunks = [Chunk(request, [0] * num, "none", position_begin=begin) for request, begin, num in spans]
    runner.plan(chunks)  # deals the pages
    raw = runner.kv_cache.view(np.uint16 if bench.is_bf16 else np.float32)
    raw = raw.reshape(config.num_layers, -1, config.num_kv_heads, 2, PAGE_TOKENS, config.head_dim)
    history: dict[int, Array] = {}
    for request, begin, num in spans:
        pairs = bench.values(begin + num, config.num_kv_heads, 2, config.head_dim)
        history[request] = bench.round(pairs)
        for position in range(begin + num):
            pair = bf16_from_f32(pairs[position]) if bench.is_bf16 else pairs[position]
            raw[1, page_of(runner, request, position), :, :, position % PAGE_TOKENS] = pair
    num_rows = sum(num for _, _, num in spans)
    queries = bench.values(num_rows, config.num_heads, config.head_dim, scale=2.0)
    set_rows(runner.buffer(BufferId.QUERY, config.query_features), queries.reshape(num_rows, -1))
    runner.step(chunks)

    group = config.num_heads // config.num_kv_heads
    got = runner.buffer(BufferId.ATTENTION, config.query_features)
    row = 0
    for request, begin, num in spans:
        for position in range(begin, begin + num):
            first = max(0, position - window + 1) if window else 0
            pairs = np.repeat(history[request][first : position + 1], group, axis=1)  # [keys, heads, 2, head_dim]
            scores = np.einsum("hd,khd->hk", queries[row].astype(np.float64), pairs[:, :, 0]) * config.head_dim**-0.5
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            expected = np.einsum("hk,khd->hd", weights, pairs[:, :, 1]).reshape(-1)
            assert np.abs(got[row] - expected).max() <= bench.tolerance(max(1.0, np.abs(expected).max())), (
                request,
                position,
            )
            row += 1
    assert np.isnan(got[row:]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lm_head_and_sample_see_the_sampled_rows_alone(rng: np.random.Generator, precision: str) -> None:
    bench = OpBench(rng, precision)
    config = bench.config
    weight, seen = bench.stored(bench.values(config.vocab, config.hidden))
    gain, hidden = bench.values(config.hidden), bench.values(53, config.hidden)
    hidden[:40][np.arange(40) != 39] = np.nan  # of the first chunk only the last row is sampled
    runner = bench.runner(
        kind=OpKind.LM_HEAD,
        weight=weight,
        norm=bench.address(gain),
        in_features=config.hidden,
        out_features=config.vocab,
    )
    set_rows(runner.buffer(BufferId.HIDDEN, config.hidden), hidden)
    result = runner.step([Chunk(0, [0] * 40, "last"), Chunk(1, [0] * 3, "none"), Chunk(2, [0] * 10, "all")])
    rows = [39, *range(43, 53)]
    inputs, scale = normed(bench, hidden[rows], gain)
    expected = inputs @ seen.T.astype(np.float64) * scale
    assert result.logits.shape == (11, config.vocab)
    assert np.abs(result.logits - expected).max() <= bench.tolerance(np.abs(expected).max())


def test_sample_takes_the_lowest_of_equals_and_its_logprob(rng: np.random.Generator) -> None:
    bench = OpBench(rng, "f32")
    runner = bench.runner(kind=OpKind.SAMPLE, input=BufferId.LOGITS, in_features=bench.config.vocab)
    logits = bench.values(5, bench.config.vocab)
    logits[3, [17, 60, 111]] = 9.0
    set_rows(runner.buffer(BufferId.LOGITS, bench.config.vocab), logits)
    result = runner.step([Chunk(idx, [1], "last", position_begin=0) for idx in (0, 1, 2, 3)] + [Chunk(0, [1], "last")])
    assert result.tokens.tolist() == [*logits[:3].argmax(axis=1), 17, int(logits[4].argmax())]
    wide = logits.astype(np.float64)
    expected = wide.max(axis=1) - np.log(np.exp(wide).sum(axis=1))
    assert np.abs(result.logprobs - expected).max() < 2e-6


def test_an_unknown_op_and_packed_weights_are_refused(rng: np.random.Generator) -> None:
    bench = OpBench(rng, "f32")
    with pytest.raises(ValueError, match=r"op 0 \(kind 99, layer 0\): unknown kind"):
        bench.runner(kind=99)
    weight = bench.address(bench.values(4, 4))
    with pytest.raises(ValueError, match="packed weights: the CPU reads weight_layout 0"):
        bench.runner(kind=OpKind.EMBED, weight=weight, weight_layout=1)
    with pytest.raises(ValueError, match=r"shape is not \[vocab, hidden\]"):
        bench.runner(kind=OpKind.EMBED, weight=weight, in_features=4, out_features=4)


def test_a_program_spoilt_after_its_check_stops_with_a_fault(rng: np.random.Generator) -> None:
    bench = OpBench(rng, "f32")
    runner = bench.runner(kind=OpKind.ATTENTION, layer=0, input=BufferId.QUERY)
    runner.model.ops["kind"] = 42
    with pytest.raises(RuntimeError, match="fault 3 at op 0, kind 42"):
        runner.step([Chunk(0, [0], "none")])
