"""device/attention.cuh, the GPU's code, on emulated warps (tests/host/simt): indices, fragments, swizzles, barriers, schedule.

The arithmetic of the tensor cores themselves is only known on a GPU: tests/gpu/test_attention.py.
Run: pytest tests/host/test_attention_simt.py
"""

from __future__ import annotations

import ctypes
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
)
from tests.host.simt_support import SIMT, build_simt
from tests.support import ROOT


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build_simt(SIMT / "attention_simt.cpp", tmp_path_factory.mktemp("simt"))
    loaded.bk_attention_simt.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
    loaded.bk_attention_simt.restype = ctypes.c_longlong
    return loaded


@pytest.fixture
def run(library: ctypes.CDLL) -> RunStep:
    seeds = iter(range(1_000_000))

    def run_step(step: Step, num_ctas: int) -> Array:
        parts = np.full((max(step.num_slots, 1), step.shape.num_heads, step.shape.head_dim), np.nan, dtype=np.float32)
        softmax = np.full((max(step.num_slots, 1), step.shape.num_heads, 2), np.nan, dtype=np.float32)
        output = np.full(step.query.shape, POISON, dtype=np.uint16)
        arrays = {
            "seqs": step.seqs,
            "page_tables": step.page_tables,
            "query": step.query,
            "kv": step.kv,
            "part_outputs": parts,
            "part_softmax": softmax,
        }
        args = step.args(num_ctas, {name: array.ctypes.data for name, array in arrays.items()})
        conflicts = library.bk_attention_simt(args.ctypes.data, step.shape.head_dim, output.ctypes.data, next(seeds))
        assert conflicts == 0, f"ldmatrix had {conflicts} bank conflicts"
        return output

    return run_step


SHAPES = [Shape(4, 4, 64), Shape(6, 2, 128), Shape(8, 2, 64), Shape(8, 1, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_rows(run: RunStep, shape: Shape) -> None:
    check_spans(run, np.random.default_rng(1), shape, decode_rows([1, 5, 64, 65, 256, 257, 700]), num_ctas=5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_chunks(run: RunStep, shape: Shape) -> None:
    spans = [(0, 2), (60, 70), (0, 130), (255, 300)]
    check_spans(run, np.random.default_rng(2), shape, spans, num_ctas=3)


@pytest.mark.parametrize("window", [1, 63, 64, 100, 300])
def test_sliding_window(run: RunStep, window: int) -> None:
    spans = [(0, 40), (600, 601), (500, 530), (63, 64), (64, 65)]
    check_spans(run, np.random.default_rng(3), Shape(4, 2, 64, window), spans, num_ctas=4)


def test_group_of_more_than_16_heads(run: RunStep) -> None:
    check_spans(run, np.random.default_rng(4), Shape(20, 1, 64), decode_rows([3, 300]), num_ctas=2)


def test_more_than_32_requests(run: RunStep) -> None:
    """The cursor crosses groups of 32; decode, chunks and requests without a slot alternate."""
    rng = np.random.default_rng(5)
    shape = Shape(2, 2, 64)
    shares = []
    for i in range(50):
        end = 300 if i % 7 == 0 else int(rng.integers(1, 40))
        sequence = random_sequence(rng, shape, end, 2.0)
        shares.append(Share(sequence, end - 1 if i % 3 else max(0, end - 3), end))
    for num_slots in (0, 5, 100):
        check_step(run, make_step(rng, shape, shares, num_slots), num_ctas=7)


@pytest.mark.parametrize("shape", [Shape(4, 2, 64), Shape(3, 1, 128), Shape(2, 1, 64, 90)], ids=str)
def test_chunking_and_batch_do_not_change_a_bit(run: RunStep, shape: Shape) -> None:
    rng = np.random.default_rng(6)
    check_chunking(run, rng, shape, 330, [[1, 255, 1, 1, 72], [64, 193, 73]], num_ctas=4)


def test_number_of_ctas_does_not_change_a_bit(run: RunStep) -> None:
    check_grids(run, np.random.default_rng(7), Shape(4, 2, 64), [(599, 600), (3, 80), (9, 10)], [1, 2, 13])


def test_a_planted_wrong_key_is_seen(run: RunStep) -> None:
    check_that_a_planted_wrong_key_is_seen(run, np.random.default_rng(8))


def test_simt_headers_cover_ptx_mma(library: ctypes.CDLL) -> None:
    """A function added to device/ptx_mma.cuh must be emulated too, or this suite tests something else."""
    import re

    def functions(path: Path) -> set[str]:
        return set(re.findall(r"^BK_INLINE \w+ (\w+)\(", path.read_text(), re.MULTILINE))

    emulated = functions(SIMT / "ptx_mma.cuh") | functions(SIMT / "ptx_mma_common.cuh")
    missing = functions(ROOT / "device" / "ptx_mma.cuh") - emulated
    assert not missing, f"tests/host/simt/ptx_mma.cuh lacks {sorted(missing)}"
