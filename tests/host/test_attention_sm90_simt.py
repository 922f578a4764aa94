"""device/attention.cuh, the Hopper's code, on emulated CTAs (tests/host/simt90): schedule, ring, swizzles, patching, barriers, merging.

The arithmetic of the tensor cores themselves is only known on a GPU: tests/gpu/test_attention_sm90.py.
Run: pytest tests/host/test_attention_sm90_simt.py
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from tests.attention_reference import (
    POISON,
    Array,
    RunStep,
    Shape,
    Share,
    Step,
    check_chunking,
    check_grids,
    check_spans,
    check_step,
    check_that_a_planted_wrong_key_is_seen,
    decode_rows,
    make_step,
    random_sequence,
    rising_sequence,
)
from tests.attention_sm90_support import device_step
from tests.host.simt_support import SIMT90, build_simt
from tests.support import ROOT


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build_simt(SIMT90 / "attention_sm90_simt.cpp", tmp_path_factory.mktemp("simt"))
    loaded.bk_attention_sm90_simt.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    loaded.bk_attention_sm90_simt.restype = ctypes.c_int
    loaded.bk_copied_bytes.restype = ctypes.c_ulonglong
    return loaded


@pytest.fixture
def arrays() -> dict[str, Array]:
    """The device's memory as the last run left it, by name."""
    return {}


@pytest.fixture
def run(library: ctypes.CDLL, arrays: dict[str, Array]) -> RunStep:
    seeds = iter(range(1_000_000))

    def run_step(step: Step, num_ctas: int) -> Array:
        arrays.clear()

        def place(name: str, values: Array) -> int:
            padded = np.zeros(values.nbytes + 128, np.uint8)  # bulk copies need 16-byte alignment
            begin = -padded.ctypes.data % 128
            arrays[name] = padded[begin : begin + values.nbytes]
            arrays[name][:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            return arrays[name].ctypes.data

        inputs = device_step(step, num_ctas, place)
        output = np.full(step.query.shape, POISON, dtype=np.uint16)
        status = library.bk_attention_sm90_simt(
            inputs.params.ctypes.data, inputs.new_rows.ctypes.data, output.ctypes.data, next(seeds)
        )
        assert status == 0
        assert not arrays["counters"].any(), "a unit's counter was not reset"
        return output

    return run_step


SHAPES = [
    Shape(4, 4, 64),
    Shape(6, 2, 128),
    Shape(7, 1, 64),
    Shape(8, 1, 128),
    Shape(9, 1, 64),
    Shape(16, 1, 128),
    Shape(20, 1, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_rows(run: RunStep, shape: Shape) -> None:
    check_spans(run, np.random.default_rng(1), shape, decode_rows([1, 5, 64, 65, 256, 257, 700]), num_ctas=5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_chunks(run: RunStep, shape: Shape) -> None:
    spans = [(0, 2), (60, 70), (0, 130), (255, 300)]
    check_spans(run, np.random.default_rng(2), shape, spans, num_ctas=3)


@pytest.mark.parametrize("shape", [Shape(4, 1, 128), Shape(6, 2, 128), Shape(4, 1, 64, 500)], ids=str)
def test_plain_pages(run: RunStep, shape: Shape) -> None:
    """Whole tiles over several splits, items after items on a CTA: most pages are plain."""
    check_spans(run, np.random.default_rng(11), shape, [(0, 450), (600, 700), (333, 334)], num_ctas=2)


@pytest.mark.parametrize("window", [1, 63, 64, 100, 300])
def test_sliding_window(run: RunStep, window: int) -> None:
    spans = [(0, 40), (600, 601), (500, 530), (63, 64), (64, 65)]
    check_spans(run, np.random.default_rng(3), Shape(4, 2, 64, window), spans, num_ctas=4)


def test_more_than_32_requests(run: RunStep) -> None:
    """The planning warp takes 32 at a time; decode rows and chunks alternate."""
    rng = np.random.default_rng(5)
    shape = Shape(2, 2, 64)
    shares = []
    for i in range(50):
        end = 300 if i % 7 == 0 else int(rng.integers(1, 40))
        sequence = random_sequence(rng, shape, end, 2.0)
        shares.append(Share(sequence, end - 1 if i % 3 else max(0, end - 3), end))
    check_step(run, make_step(rng, shape, shares), num_ctas=7)


@pytest.mark.parametrize("num_ctas", [1, 2, 3, 40])
def test_units_shared_by_many_warpgroups(run: RunStep, num_ctas: int) -> None:
    check_spans(run, np.random.default_rng(9), Shape(4, 2, 64), decode_rows([5000, 30, 1025, 2048]), num_ctas)


@pytest.mark.parametrize(
    ("contexts", "is_shared"),
    [
        ([640] * 7, False),  # 14 units of 10 pages: a CTA takes 40, a warpgroup has none, and the mean is 35
        ([600, 640, 577, 640, 639, 600, 640], False),  # the last page is not full
        ([580, 700, 640, 660], False),  # units of 10 and 11 pages
        ([640] * 5, True),  # 40 pages of most CTAs, where the mean is 25
        ([640] * 3 + [1500], True),  # 24 pages of the longest unit: a CTA may have 48
    ],
)
def test_units_stay_whole_where_that_is_sooner(
    run: RunStep, arrays: dict[str, Array], contexts: list[int], is_shared: bool
) -> None:
    """A unit that two CTAs share leaves partial results."""
    check_spans(run, np.random.default_rng(12), Shape(4, 2, 64), decode_rows(contexts), num_ctas=4)
    assert (arrays["parts"] != 0xFF).any() == is_shared


def test_a_last_split_of_one_page_goes_with_the_one_before(run: RunStep, library: ctypes.CDLL) -> None:
    """Three heads of 13 pages for ten warpgroups: ranges of 3.9 pages, rounded up to splits. Else one has a head's last page and then the
    next one's first split, two runs."""
    check_spans(run, np.random.default_rng(14), Shape(3, 3, 64), decode_rows([769]), num_ctas=5)
    ranges = np.zeros((10, 3), np.uint32)
    library.bk_narrow_ranges(ranges.ctypes.data_as(ctypes.POINTER(ctypes.c_uint)))
    num_pages = ranges[:, 2]
    assert sorted(num_pages) == [0, 4, 4, 4, 4, 4, 4, 5, 5, 5]
    assert (ranges[:, 1] + num_pages).max() == 13, "a range goes over a head's end"


@pytest.mark.parametrize("shape", [Shape(4, 2, 64), Shape(4, 1, 128)], ids=str)
def test_of_a_last_page_the_tokens_alone_are_brought(run: RunStep, library: ctypes.CDLL, shape: Shape) -> None:
    """In groups of 8, up to that of the row's own."""
    for context in (1, 2, 9, 10, 64, 65, 66, 700):
        before = library.bk_copied_bytes()
        check_spans(run, np.random.default_rng(13), shape, decode_rows([context]), num_ctas=2)
        num_tokens = -(-context // 8) * 8
        expected = num_tokens * shape.num_kv_heads * 2 * shape.head_dim * 2
        assert library.bk_copied_bytes() - before == expected, context


@pytest.mark.parametrize("num_ctas", [1, 2, 3])
def test_last_pages_without_an_older_token(run: RunStep, num_ctas: int) -> None:
    """Their own token begins the page. Whoever has it patched may not touch stages that another page is still read from."""
    rng = np.random.default_rng(15)
    shape = Shape(6, 2, 128)
    steps = []
    for contexts in ([257] * 3, [65, 256, 321]):
        shares = [Share(random_sequence(rng, shape, n, 2.0), n - 1, n) for n in contexts]
        steps.append(make_step(rng, shape, shares))
    for step in steps * 5:  # each in another order of warps and copies
        check_step(run, step, num_ctas)


def test_a_chunk_after_unequal_decode_rows(run: RunStep) -> None:
    """Cuts are rounded up to splits: here one warpgroup has six pages, more stages than the ring has, and the other one none. When it comes to the
    chunk, the ring is a lap behind."""
    rng = np.random.default_rng(10)
    shape = Shape(1, 1, 128)
    shares = [Share(random_sequence(rng, shape, n, 2.0), n - 1, n) for n in (30, 60, 250)]
    shares += [Share(random_sequence(rng, shape, 328, 2.0), 200, 328)]
    step = make_step(rng, shape, shares)
    for _ in range(20):  # each in another order of warps and copies
        check_step(run, step, num_ctas=1)


@pytest.mark.parametrize("shape", [Shape(4, 2, 64), Shape(3, 1, 128), Shape(2, 1, 64, 90)], ids=str)
def test_chunking_and_batch_do_not_change_a_bit(run: RunStep, shape: Shape) -> None:
    rng = np.random.default_rng(6)
    check_chunking(run, rng, shape, 330, [[1, 255, 1, 1, 72], [64, 193, 73]], num_ctas=4)


@pytest.mark.parametrize("powers", [2.5, 5.0, 12.0, -6.0])
@pytest.mark.parametrize("shape", [Shape(4, 1, 128), Shape(4, 2, 64)], ids=str)
def test_scores_that_rise_within_a_split(run: RunStep, shape: Shape, powers: float) -> None:
    """A split's maximum is its first page's while others exceed it by 2^8 at most, then theirs: in the third page, the second, in each, never."""
    rng = np.random.default_rng(17)
    sequence = rising_sequence(rng, shape, 450, powers)
    check_step(run, make_step(rng, shape, [Share(sequence, 449, 450), Share(sequence, 0, 450)]), num_ctas=3)
    check_chunking(run, rng, shape, 450, [[300, 149, 1]], 4, sequence)


def test_number_of_ctas_does_not_change_a_bit(run: RunStep) -> None:
    check_grids(run, np.random.default_rng(7), Shape(4, 2, 64), [(599, 600), (3, 80), (9, 10)], [1, 2, 13])


def test_a_planted_wrong_key_is_seen(run: RunStep) -> None:
    check_that_a_planted_wrong_key_is_seen(run, np.random.default_rng(8))


@pytest.mark.parametrize("name", ["ptx_attention.cuh", "ptx_wgmma_attention.cuh", "ptx_wgmma.cuh"])
def test_the_emulation_covers_what_the_device_has(name: str) -> None:
    """A function added to a device header must be emulated too, or this suite tests something else."""

    def functions(path: Path) -> set[str]:
        return set(re.findall(r"^BK_INLINE [\w<>]+ (\w+)\(", path.read_text(), re.MULTILINE))

    missing = functions(ROOT / "device" / name) - functions(SIMT90 / name)
    assert not missing, f"tests/host/simt90/{name} lacks {sorted(missing)}"
