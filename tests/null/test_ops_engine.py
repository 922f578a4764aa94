"""tools/ops_engine.py on a GPU that only keeps time (tests/fake_gpu.py): real plans and programs, and every part's time as the table of ops has it.

Run: pytest tests/null/test_ops_engine.py
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.memory_plan import page_bytes_of
from blinkimp.ring_abi import DType, OpKind
from tests.fake_gpu import NUM_PAGES, OP_NS, FakeGpu, fake_runner
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import ops_engine
from ops_engine import PartLoad, fill_kv_pages, measure_row, requests_of
from ops_parts import PARTS
from ops_timing import Settings
from step_rows import Row

DECODE = Row("decode", 3, 128)
PART_NS = {
    "qkv": 2 * OP_NS[OpKind.QKV],
    "attention": 2 * OP_NS[OpKind.ATTENTION],
    "o": 2 * OP_NS[OpKind.PROJECT],
    "gate_up": 2 * OP_NS[OpKind.GATE_UP],
    "down": 2 * OP_NS[OpKind.PROJECT],
    "lm_head": OP_NS[OpKind.LM_HEAD],
    "sample": OP_NS[OpKind.SAMPLE],
}  # of two layers


def test_every_part_is_measured_to_the_microsecond() -> None:
    """FakeGpu's launch takes longer than most ops, and its ops twice as long once it has worked for 0.1 s."""
    gpu = FakeGpu(slow_after_s=0.1)
    runner = fake_runner(gpu)
    figures, bits = measure_row(runner, DECODE, list(PARTS), Settings(), gpu, 1, clock=gpu)
    assert list(figures) == list(PARTS) and bits.shape == (3, 50)
    wanted = PART_NS | {"all": sum(PART_NS.values()) + OP_NS[OpKind.EMBED]}
    for part, nanoseconds in wanted.items():
        found = figures[part]
        assert found.ms == pytest.approx(nanoseconds / 1e6, rel=1e-6), part
        assert found.sustained_ms == pytest.approx(2 * nanoseconds / 1e6, rel=1e-2), part
        assert found.watts == pytest.approx(500, rel=1e-2) and found.sm_clock_mhz == 1500
        assert found.joules == pytest.approx(500 * found.sustained_ms / 1e3, rel=1e-2)
    assert runner.num_pages_of.tolist() == [0] * 8 and sorted(runner.free_pages) == list(range(NUM_PAGES))


def test_a_parts_launches_have_its_ops_alone_and_the_step_runs_before_them() -> None:
    gpu = FakeGpu()
    runner = fake_runner(gpu)
    measure_row(runner, DECODE, ["o", "lm_head"], Settings(seconds=0), None, 1, clock=gpu)
    whole, o, lm_head = runner.model.ops["kind"].tolist(), OpKind.PROJECT, OpKind.LM_HEAD
    launches = [kinds.tolist() for kinds in gpu.launches]
    changes = [launches[0], *(now for before, now in itertools.pairwise(launches) if now[0] != before[0])]
    assert [kinds if kinds == whole else set(kinds) for kinds in changes] == [whole, {o}, whole, {lm_head}, whole]
    assert 20e6 < max(len(kinds) for kinds in launches) * OP_NS[o] < 30e6


def test_the_whole_program_is_repeated_whole_and_a_launch_of_nothing_is_the_embeddings() -> None:
    gpu = FakeGpu()
    runner = fake_runner(gpu)
    load = PartLoad(runner, requests_of(DECODE, np.random.default_rng(0), 50), "all")
    assert load.per_step == 1 and load.max_units * len(runner.model.ops) <= ops_engine.MAX_PROGRAM_OPS
    load.prepare(3)
    for num_units in (0, 2, 3):
        load.run(num_units)
    kinds = runner.model.ops["kind"].tolist()
    assert [launch.tolist() for launch in gpu.launches] == [[OpKind.EMBED], kinds * 2, kinds * 3]


def test_a_part_may_end_within_its_layers() -> None:
    gpu = FakeGpu()
    runner = fake_runner(gpu, num_layers=3)
    runner.model.ops["layer"] = np.arange(18)
    load = PartLoad(runner, requests_of(DECODE, np.random.default_rng(0), 50), "qkv")
    assert load.per_step == 3
    load.prepare(5)
    placed = gpu.view(runner._program, abi.OP, 5)
    assert placed["layer"].tolist() == [1, 6, 11, 1, 6]
    load.run(2)
    assert gpu.launches[-1].tolist() == [OpKind.QKV] * 2


def test_requests_are_those_of_the_row() -> None:
    rng = np.random.default_rng(0)
    assert [(len(r.tokens), r.num_computed) for r in requests_of(Row("prefill", 1, 70), rng, 50)] == [(70, 0)]
    decode = requests_of(DECODE, rng, 50)
    assert [(len(r.tokens), r.num_computed, r.request_idx) for r in decode] == [(128, 127, i) for i in range(3)]


@pytest.mark.parametrize("block_bytes", [1 << 14, 3 << 14, 1 << 25])
def test_all_pages_are_filled_with_numbers_that_differ(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(ops_engine, "KV_BLOCK_BYTES", block_bytes)
    gpu = FakeGpu()
    runner = fake_runner(gpu, num_pages=5)
    fill_kv_pages(runner, np.random.default_rng(0))
    num_bytes = 5 * page_bytes_of(runner.config, DType.BF16)
    values = gpu.view(int(runner.params["kv_cache"][0]), np.uint16, num_bytes // 2)
    as_f32 = (values.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(as_f32).all() and as_f32.std() == pytest.approx(1, abs=0.05)
    assert len(np.unique(values[-4096:])) > 500 and gpu.registered == {}
