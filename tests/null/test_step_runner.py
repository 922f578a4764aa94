"""tests/gpu/step_runner.py without a GPU: rows, samples and pages of a plan, what does not fit into one, which program a launch runs.

Run: pytest tests/null/test_step_runner.py
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import OpKind
from tests.fake_gpu import FakeGpu, fake_runner
from tests.gpu.step_runner import PLAN_EXIT, Request, StepRunner, in_steps

MAX_ROWS, MAX_BATCH, NUM_PAGES = 64, 8, 16


@pytest.fixture
def runner() -> StepRunner:
    """One that has its tables, but neither context nor memory."""
    runner: Any = StepRunner.__new__(StepRunner)
    runner.sizes = SimpleNamespace(max_batch=MAX_BATCH, max_step_tokens=MAX_ROWS, max_pages_per_request=4)
    runner.page_tables, runner.num_pages_of = np.zeros((MAX_BATCH, 4), np.uint32), np.zeros(MAX_BATCH, int)
    runner.num_shared_of, runner.free_pages = np.zeros(MAX_BATCH, int), list(range(NUM_PAGES))
    return runner  # type: ignore[no-any-return]


def prompt(num_tokens: int) -> np.ndarray[Any, Any]:
    return np.arange(100, 100 + num_tokens, dtype=np.uint32)


def test_a_plan_has_each_requests_rows_and_samples_its_last_ones(runner: StepRunner) -> None:
    bytes_of_plan = runner.plan(
        [Request(prompt(5), 2, 3), Request(prompt(1), 0, 4, sample=False), Request(prompt(2), 0, 5)]
    )
    seqs_at = abi.STEP_PLAN.itemsize
    rows_at = seqs_at + MAX_BATCH * abi.PLAN_SEQ.itemsize
    samples_at = rows_at + MAX_ROWS * abi.PLAN_ROW.itemsize
    header = bytes_of_plan[:seqs_at].view(abi.STEP_PLAN)[0]
    assert [int(header[name]) for name in ("num_rows", "num_seqs", "num_sample_rows", "max_kv_tokens")] == [6, 3, 2, 5]
    seqs = bytes_of_plan[seqs_at:rows_at].view(abi.PLAN_SEQ)[:3]
    assert seqs["row_begin"].tolist() == [0, 3, 4] and seqs["num_rows"].tolist() == [3, 1, 2]
    assert seqs["sample_row"].tolist() == [0, abi.NO_ROW, 1]
    rows = bytes_of_plan[rows_at:samples_at].view(abi.PLAN_ROW)[:6]
    assert rows["token"].tolist() == [102, 103, 104, 100, 100, 101] and rows["position"].tolist() == [2, 3, 4, 0, 0, 1]
    assert bytes_of_plan[samples_at:].view(np.uint32)[:2].tolist() == [2, 5]


def test_pages_come_with_tokens_and_go_with_a_release(runner: StepRunner) -> None:
    runner.plan(
        [
            Request(prompt(abi.PAGE_TOKENS), abi.PAGE_TOKENS - 1, 0),
            Request(prompt(abi.PAGE_TOKENS + 1), abi.PAGE_TOKENS, 1),
        ]
    )
    assert runner.num_pages_of[:2].tolist() == [1, 2] and len(runner.free_pages) == NUM_PAGES - 3
    runner.release(0)
    runner.release(1)
    assert sorted(runner.free_pages) == list(range(NUM_PAGES))


def test_a_prefix_is_in_the_others_pages(runner: StepRunner) -> None:
    whole = prompt(abi.PAGE_TOKENS + 8)
    runner.plan([Request(whole[: abi.PAGE_TOKENS], 0, 0)])
    bytes_of_plan = runner.plan(
        [Request(whole[: abi.PAGE_TOKENS], 63, 0), Request(whole, abi.PAGE_TOKENS, 1, prefix_of=0)]
    )
    seqs = bytes_of_plan[abi.STEP_PLAN.itemsize :][: 2 * abi.PLAN_SEQ.itemsize].view(abi.PLAN_SEQ)
    assert seqs["prefix_is_fresh"].tolist() == [0, 1]
    assert runner.page_tables[0, 0] == runner.page_tables[1, 0] and len(runner.free_pages) == NUM_PAGES - 2
    runner.release(1)
    runner.release(0)
    assert sorted(runner.free_pages) == list(range(NUM_PAGES))


def test_a_step_that_does_not_fit_is_refused_by_its_numbers(runner: StepRunner) -> None:
    with pytest.raises(
        AssertionError, match=f"a step of 1 requests: got {MAX_ROWS + 1} rows, expected {MAX_ROWS} at most"
    ):
        runner.plan([Request(prompt(MAX_ROWS + 1), 0, 0)])
    with pytest.raises(AssertionError, match=f"a step of {MAX_BATCH + 1} requests: .* of {MAX_BATCH} requests at most"):
        runner.plan([Request(prompt(1), 0, i % MAX_BATCH) for i in range(MAX_BATCH + 1)])


@pytest.mark.parametrize("num_tokens", [[1], [64], [30, 34, 1], [60, 5, 64, 1], [20] * 8, []])
def test_requests_are_cut_into_steps_that_fit(runner: StepRunner, num_tokens: list[int]) -> None:
    requests = [Request(prompt(num), 0, i) for i, num in enumerate(num_tokens)]
    steps = list(in_steps(requests, MAX_ROWS))
    for step in steps:
        runner.plan(step)
    assert [request.request_idx for step in steps for request in step] == list(range(len(num_tokens)))
    for step, after in itertools.pairwise(steps):
        assert sum(request.num_rows for request in step) + after[0].num_rows > MAX_ROWS, "cut too early"


# ---- Launches, on a GPU that only keeps time ---------------------------------------------------------------------
def test_a_program_longer_than_the_models_has_a_place_of_its_own() -> None:
    """FakeGpu refuses to read or write behind an allocation, and a launch over the words of the one before."""
    gpu = FakeGpu()
    runner = fake_runner(gpu)
    ops, requests = runner.model.ops, [Request(prompt(5), 4, 0)]
    places = []
    for num_repeats in (1, 7, 3, 50):
        runner.run(requests, ops=lambda ops, n=num_repeats: np.tile(ops[1:3], n))
        assert gpu.launches[-1].tolist() == [OpKind.QKV, OpKind.ATTENTION] * num_repeats
        places.append(runner._program)
    assert places[1] == places[2] and len(set(places)) == 3  # what fits stays where it is
    assert [len(gpu.memory[place]) // abi.OP.itemsize for place in places] == [
        0,
        0,
        0,
        100,
    ]  # the others are free again
    runner.run(requests)
    assert gpu.launches[-1].tolist() == ops["kind"].tolist()
    np.testing.assert_array_equal(gpu.view(int(runner.params["ops"][0]), abi.OP, len(ops)), ops)


def test_what_is_prepared_is_launched_as_often_as_asked() -> None:
    gpu = FakeGpu()
    runner = fake_runner(gpu)
    params = runner.prepare([Request(prompt(9), 0, 2)], ops=lambda ops: ops[:2])
    plan = gpu.view(int(params["plans"][0, 0]), abi.STEP_PLAN, 1)[0]
    assert (plan["num_rows"], plan["flags"]) == (9, 0)
    assert gpu.view(int(params["plans"][0, 1]), abi.STEP_PLAN, 1)[0]["flags"] == PLAN_EXIT
    for _ in range(3):
        runner.launch(params)
    assert [len(kinds) for kinds in gpu.launches] == [2, 2, 2]
    runner.run([])
    assert gpu.view(int(params["plans"][0, 0]), abi.STEP_PLAN, 1)[0]["flags"] == PLAN_EXIT


def test_an_empty_program_is_refused() -> None:
    with pytest.raises(AssertionError, match="got no ops, expected at least one"):
        fake_runner(FakeGpu()).prepare([], ops=lambda ops: ops[:0])


def test_a_lost_context_is_told_with_its_fault_record() -> None:
    gpu = FakeGpu()
    runner = fake_runner(gpu)

    def fail(stream: Any = None) -> None:
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

    params = runner.prepare([Request(prompt(2), 0, 0)])
    gpu.synchronize = fail  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"CUDA_ERROR_LAUNCH_FAILED; fault record \{'code': 0"):
        runner.launch(params)
