"""device/attention.cuh on the GPU: against float64, and against itself in other chunkings, batches and grids, to the last bit.

Inputs are fresh in each run; the seed is printed on failure. Schedule, swizzles, barriers and merging are also tested without a GPU:
tests/host/test_attention_sm90_simt.py.
Run: pytest -m gpu tests/gpu/test_attention_sm90.py          times: add -s -k times
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from tests.attention_reference import (
    PAGE,
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
    rising_sequence,
)
from tests.attention_sm90_support import WS_ATTENTION_COUNTERS, WS_ATTENTION_PART, WS_QUERY, device_step, part_bytes
from tests.gpu.gpu_harness import DeviceArray, KernelRunner, compile_kernel

NUM_CTAS = 131  # the worker's: one SM is the director's
NUM_THREADS = 384
SHARED_BYTES = 227 * 1024


@pytest.fixture
def run(runner: KernelRunner) -> RunStep:
    def run_step(step: Step, num_ctas: int) -> Array:
        arrays: dict[str, DeviceArray] = {}

        def place(name: str, values: Array) -> int:
            arrays[name] = runner.array(values)
            return arrays[name].address

        inputs = device_step(step, num_ctas, place)
        place("new_rows", inputs.new_rows)
        output = runner.poisoned(step.query.shape, np.uint16)
        times = runner.zeros((1,), np.uint64)
        kernel = compile_kernel("attention_sm90_test.cu", [f"-DHEAD_DIM={step.shape.head_dim}"])
        arguments = [inputs.params, arrays["new_rows"], output, times]
        runner.run(kernel, "attention_test", num_ctas, NUM_THREADS, arguments, SHARED_BYTES, cooperative=True)
        result = output.numpy()
        counters = arrays["counters"].numpy()
        runner.free(*arrays.values(), output, times)
        assert not counters.any(), "a unit's counter was not reset"
        return result

    return run_step


# 1, 3, 4, 7, 8, 16 query heads per kv head, and 20: too many for one warp's rows
SHAPES = [
    Shape(num_heads, num_kv_heads, head_dim)
    for num_heads, num_kv_heads in [(4, 4), (6, 2), (8, 2), (14, 2), (16, 2), (16, 1), (20, 1)]
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
    check_step(run, make_step(rng, shape, shares), NUM_CTAS)


@pytest.mark.parametrize("num_ctas", [1, 2, 3, NUM_CTAS])
def test_last_pages_without_an_older_token(run: RunStep, rng: np.random.Generator, num_ctas: int) -> None:
    """Their own token begins the page. On few CTAs its warpgroup comes to it while the other one's pages are read."""
    for contexts in ([257] * 12, [65, 256, 321] * 4):
        check_spans(run, rng, Shape(6, 2, 128), decode_rows(contexts), num_ctas)


def test_scores_far_apart(run: RunStep, rng: np.random.Generator) -> None:
    """Maxima that grow by hundreds from page to page: rescaling under- and overflows unless it is done relative to them."""
    shape = Shape(4, 2, 64)
    sequence = random_sequence(rng, shape, 600, 60.0)
    step = make_step(rng, shape, [Share(sequence, 599, 600), Share(sequence, 100, 600)])
    check_step(run, step, NUM_CTAS)


@pytest.mark.parametrize("powers", [2.5, 5.0, 12.0, -6.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_rise_within_a_split(run: RunStep, rng: np.random.Generator, head_dim: int, powers: float) -> None:
    """A split's maximum stays, or follows once, twice, never: the same bits in decode rows and chunks."""
    shape = Shape(8, 2, head_dim)
    sequence = rising_sequence(rng, shape, 1100, powers)
    check_step(run, make_step(rng, shape, [Share(sequence, 1099, 1100), Share(sequence, 0, 1100)]), NUM_CTAS)
    check_chunking(run, rng, shape, 1100, [[511, 513, 75, 1], [1] * 40 + [1060]], NUM_CTAS, sequence)


@pytest.mark.parametrize("shape", [*SHAPES, Shape(8, 2, 128, 500), Shape(6, 2, 64, 90)], ids=str)
def test_chunking_and_batch_do_not_change_a_bit(run: RunStep, rng: np.random.Generator, shape: Shape) -> None:
    chunkings = [[1, 255, 1, 1, 842], [64] * 17 + [12], [511, 513, 76], [1] * 40 + [1060]]
    check_chunking(run, rng, shape, 1100, chunkings, NUM_CTAS)


def test_a_decode_row_at_32k_equals_the_chunk_s(run: RunStep, rng: np.random.Generator) -> None:
    """128 splits, left by many warpgroups and folded by one, against the same splits folded in registers."""
    shape = Shape(4, 1, 128)
    sequence = random_sequence(rng, shape, 32_700, 2.0)
    chunk = run(make_step(rng, shape, [Share(sequence, 32_640, 32_700)]), NUM_CTAS)
    row = run(make_step(rng, shape, [Share(sequence, 32_699, 32_700)]), NUM_CTAS)
    assert (row[0] == chunk[-1]).all()


def test_number_of_ctas_does_not_change_a_bit(run: RunStep, rng: np.random.Generator) -> None:
    check_grids(run, rng, Shape(8, 2, 128), [(2599, 2600), (3, 400), (9, 10)], [1, 2, 13, 131, 131, 132])


# ---- Times -----------------------------------------------------------------------------------------------------------
LLAMA_3_8B = Shape(32, 8, 128)
BANDWIDTH, MATRIX_RATE = 4.6e12, 790e12  # bytes and operations a second that an H200 reaches


def layer_times(runner: KernelRunner, shape: Shape, spans: list[tuple[int, int]], num_layers: int) -> Array:
    """ns of each layer but the last, its grid barrier included. Keys and values are arbitrary: their bytes are what costs."""
    num_pages = sum(-(-end // PAGE) for _, end in spans)
    max_pages = max(-(-end // PAGE) for _, end in spans)
    tables = np.zeros((len(spans), max_pages), np.uint32)
    seqs = np.zeros(len(spans), abi.PLAN_SEQ)
    page_ids = np.random.default_rng(1).permutation(num_pages).astype(np.uint32)
    row = page = 0
    for i, (begin, end) in enumerate(spans):
        count = -(-end // PAGE)
        tables[i, :count] = page_ids[page : page + count]
        page += count
        seqs[i]["request_idx"], seqs[i]["row_begin"] = i, row
        seqs[i]["num_rows"], seqs[i]["position_begin"] = end - begin, begin
        row += end - begin
    header = np.zeros(1, abi.STEP_PLAN)
    header["num_rows"], header["num_seqs"] = row, len(spans)
    plan = np.concatenate([header.view(np.uint8), seqs.view(np.uint8)])
    ops = np.zeros(num_layers, abi.OP)
    ops["kind"], ops["layer"] = abi.OP_ATTENTION, np.arange(num_layers)
    query = (
        np.random.default_rng(2).integers(0, 2**15, (row, shape.num_heads * shape.head_dim)).astype(np.uint16) % 0x4000
    )
    kv_bytes = num_layers * num_pages * shape.num_kv_heads * 2 * PAGE * shape.head_dim * 2
    kv = runner.zeros((kv_bytes,), np.uint8)
    runner.context.fill(kv.address, 0x3C, kv_bytes)  # 0.0115 in every place
    arrays = {
        "tables": runner.array(tables),
        "plan": runner.array(plan),
        "ops": runner.array(ops),
        "query": runner.array(query),
        "parts": runner.zeros((part_bytes(shape, len(spans), max_pages),), np.uint8),
        "counters": runner.zeros((len(spans) * shape.num_kv_heads,), np.uint32),
        "grid_words": runner.zeros((abi.GRID_WORDS_BYTES,), np.uint8),
        "engine_page": runner.zeros((8192,), np.uint8),
    }
    params = np.zeros(1, abi.ENGINE_PARAMS)
    params["max_batch"], params["max_step_tokens"] = len(spans), row
    params["max_pages_per_request"], params["num_pages"] = max_pages, num_pages
    params["num_ops"], params["num_workers"] = num_layers, NUM_CTAS
    params["spin_budget_ns"] = 2_000_000_000
    params["dims"]["num_heads"], params["dims"]["num_kv_heads"] = shape.num_heads, shape.num_kv_heads
    params["dims"]["head_dim"], params["dims"]["attention_scale"] = shape.head_dim, 1 / np.sqrt(shape.head_dim)
    params["page_tables"], params["plans"] = arrays["tables"].address, arrays["plan"].address
    params["ops"], params["kv_cache"] = arrays["ops"].address, kv.address
    params["grid_words"] = arrays["grid_words"].address
    params["director_state"] = params["engine_page"] = arrays["engine_page"].address
    params["workspaces"][0, WS_QUERY] = arrays["query"].address
    params["workspaces"][0, WS_ATTENTION_PART] = arrays["parts"].address
    params["workspaces"][0, WS_ATTENTION_COUNTERS] = arrays["counters"].address
    output = runner.poisoned(query.shape, np.uint16)
    times = runner.zeros((num_layers,), np.uint64)
    kernel = compile_kernel("attention_sm90_test.cu", [f"-DHEAD_DIM={shape.head_dim}"])
    best = np.full(num_layers - 1, np.inf)
    for _ in range(4):
        runner.context.fill(arrays["grid_words"].address, 0, abi.GRID_WORDS_BYTES)
        arguments = [params, ctypes.c_uint64(0), output, times]
        runner.run(kernel, "attention_test", NUM_CTAS, NUM_THREADS, arguments, SHARED_BYTES, cooperative=True)
        best = np.minimum(best, np.diff(times.numpy().astype(np.float64)))
    runner.free(*arrays.values(), kv, output, times)
    return best


@pytest.mark.parametrize(
    ("batch", "context"),
    [(1, 1024), (16, 1024), (64, 1024), (128, 1024), (256, 1024), (1, 8192), (1, 32_768), (16, 8192)],
)
def test_decode_times(runner: KernelRunner, batch: int, context: int) -> None:
    """us a layer, barrier included, beside the bytes' limit; asserts only that the measurement is one."""
    kv_bytes = batch * context * LLAMA_3_8B.num_kv_heads * 2 * LLAMA_3_8B.head_dim * 2
    num_layers = int(min(32, max(6, 300e6 // kv_bytes)))  # beyond the L2 cache in all
    times = layer_times(runner, LLAMA_3_8B, [(context - 1, context)] * batch, num_layers)[1:]
    limit_us = kv_bytes / BANDWIDTH * 1e6
    median = float(np.median(times)) / 1e3
    ratio, total_ms = median / limit_us, median * 0.032
    print(
        f"decode batch {batch:3} context {context:6}: {median:8.2f} us a layer, bytes {limit_us:8.2f}, "
        f"ratio {ratio:.2f}, 32 layers {total_ms:.3f} ms"
    )
    assert 0.9 * limit_us < median < 100 * limit_us + 100


@pytest.mark.parametrize("spans", [[(0, 128)], [(0, 1024)], [(0, 8192)], [(6144, 8192)], [(30_720, 32_768)]], ids=str)
def test_prefill_times(runner: KernelRunner, spans: list[tuple[int, int]]) -> None:
    shape = LLAMA_3_8B
    operations = sum(
        4 * shape.num_heads * shape.head_dim * (end * (end + 1) - begin * (begin + 1)) / 2 for begin, end in spans
    )
    median = float(np.median(layer_times(runner, shape, spans, 6)[1:])) / 1e3
    print(
        f"prefill {spans}: {median:9.2f} us a layer, {operations / median / 1e6:6.1f} TFLOP/s, limit {operations / MATRIX_RATE * 1e6:8.2f} us"
    )
    assert median > 0.9 * operations / MATRIX_RATE * 1e6
