"""Plans: what is in a step, in which order, with how many rows. The long comparison with a reference is test_director_stateful.py.

Run: pytest tests/host/test_director_plan.py
"""

from __future__ import annotations

import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import PlannedSeq, Rig, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion


def attached(kind: str = "single", **changes: int) -> Rig:
    rig = Rig(Shape(**changes), kind)  # type: ignore[arg-type]
    rig.attach_all()
    return rig


def one_plan(rig: Rig) -> list[PlannedSeq]:
    rig.poll()
    planned = rig.plan()
    if planned:
        rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    for ingress in rig.ingresses:
        ingress.read()
    return planned


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_prefill_goes_in_chunks_and_only_the_last_one_samples(kind: str) -> None:
    rig = attached(kind, prefill_chunk_tokens=32)
    assert rig.ingresses[0].submit(1, list(range(1, 81)), 3)
    assert [one_plan(rig) for _ in range(6)] == [
        [PlannedSeq(1, 32, 0, False, 0)],
        [PlannedSeq(1, 32, 32, False, 0)],
        [PlannedSeq(1, 16, 64, True, 0)],
        [PlannedSeq(1, 1, 80, True, 1)],
        [PlannedSeq(1, 1, 81, True, 2)],
        [],
    ]
    assert rig.engine_status("prompt_tokens") == 80


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_steps_are_counted_by_their_rows(kind: str) -> None:
    rig = attached(kind, max_step_tokens=64, prefill_chunk_tokens=64)
    expected, num_rows = [0] * 15, 0
    for request_id, num_prompt in enumerate([1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64]):
        assert rig.ingresses[0].submit(request_id + 1, [7] * num_prompt, 2)
        assert [sum(seq.num_rows for seq in one_plan(rig)) for _ in range(2)] == [num_prompt, 1]
        expected[(num_prompt - 1).bit_length()] += 1
        expected[0] += 1
        num_rows += num_prompt + 1
    counts = rig.engine_page[0]["step_counts"]
    assert (counts["by_rows"].tolist(), int(counts["num_rows"])) == (expected, num_rows)
    assert sum(expected) == rig.engine_status("step")


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_decode_rows_come_first_and_prefill_fills_the_budget(kind: str) -> None:
    rig = attached(kind, max_step_tokens=40, prefill_chunk_tokens=32)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1] * 100, 50)
    one_plan(rig)
    assert ingress.submit(2, [2] * 10, 50)
    assert ingress.submit(3, [3] * 70, 50)
    # 1 goes on with its prefill, 2 and 3 are admitted behind it until 40 rows are full.
    assert one_plan(rig) == [PlannedSeq(1, 32, 32, False, 0), PlannedSeq(2, 8, 0, False, 0)]
    assert one_plan(rig) == [
        PlannedSeq(1, 32, 64, False, 0),
        PlannedSeq(2, 2, 8, True, 0),
        PlannedSeq(3, 6, 0, False, 0),
    ]
    # 2 decodes: it stands first although it is younger than 1.
    assert one_plan(rig) == [
        PlannedSeq(2, 1, 10, True, 1),
        PlannedSeq(1, 4, 96, True, 0),
        PlannedSeq(3, 32, 6, False, 0),
    ]
    assert one_plan(rig) == [
        PlannedSeq(1, 1, 100, True, 1),
        PlannedSeq(2, 1, 11, True, 2),
        PlannedSeq(3, 32, 38, True, 0),
    ]


# Tiles of 8 rows, rounds of two: 17 rows take as long as 32.
ROUNDS = {"cost_rows": 8, "step_costs": tuple(2 + 10 * -(-tiles // 2) for tiles in range(abi.MAX_STEP_COSTS))}


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_what_would_only_begin_a_tile_waits_for_the_next_step(kind: str) -> None:
    rig = attached(kind, prefill_chunk_tokens=64, prefix_cache=True, **ROUNDS)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1] * 3, 50)
    assert one_plan(rig) == [PlannedSeq(1, 3, 0, True, 0)]
    assert ingress.submit(2, [2] * 16, 50)
    assert one_plan(rig) == [PlannedSeq(1, 1, 3, True, 1), PlannedSeq(2, 15, 0, False, 0)], "16 rows, not 17"
    assert one_plan(rig) == [PlannedSeq(1, 1, 4, True, 2), PlannedSeq(2, 1, 15, True, 0)]
    assert ingress.submit(3, [3] * 32, 50)
    assert one_plan(rig)[2:] == [PlannedSeq(3, 30, 0, False, 0)], "a running prompt's last rows, likewise"
    assert [seq.num_rows for seq in one_plan(rig)] == [1, 1, 2]


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_a_whole_tile_waits_where_it_begins_a_round(kind: str) -> None:
    costs = (1, 3, 4, 5, 6, 30, *(30,) * (abi.MAX_STEP_COSTS - 6))
    rig = attached(kind, prefill_chunk_tokens=64, max_batch=16, cost_rows=8, step_costs=costs)
    for request_id in range(1, 9):
        assert rig.ingresses[0].submit(request_id, [1], 50)
    one_plan(rig)
    assert rig.ingresses[0].submit(9, [2] * 32, 2)
    assert [seq.num_rows for seq in one_plan(rig)] == [1] * 8 + [24], (
        "8 + 32 rows take 30; 32, and 8 + 8 in the next step, 6 and 4"
    )
    assert [seq.num_rows for seq in one_plan(rig)] == [1] * 8 + [8]


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_rows_stay_where_another_step_would_cost_more(kind: str) -> None:
    rig = attached(kind, prefill_chunk_tokens=64, max_step_tokens=64, **ROUNDS)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1] * 13, 1)
    assert [seq.num_rows for seq in one_plan(rig)] == [13], "13 rows take 12, 8 and then 5 of them 12 and 12"
    assert ingress.submit(2, [2] * 16, 1)
    assert [seq.num_rows for seq in one_plan(rig)] == [16], "whole tiles"


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_a_chunk_that_others_follow_is_whole(kind: str) -> None:
    """Only the step's end is cut, and never a whole chunk."""
    rig = attached(kind, prefill_chunk_tokens=64, max_step_tokens=64, **ROUNDS)
    for request_id, num_prompt in enumerate([17, 15, 1]):
        assert rig.ingresses[0].submit(request_id + 1, [1] * num_prompt, 2)
    assert [seq.num_rows for seq in one_plan(rig)] == [17, 15, 1], (
        "the 33rd row begins a round, but is all of its chunk"
    )


def test_a_single_token_prompt_is_admitted_as_one_row_that_samples() -> None:
    rig = attached()
    assert rig.ingresses[0].submit(1, [9], 2)
    assert one_plan(rig) == [PlannedSeq(1, 1, 0, True, 0)]
    assert one_plan(rig) == [PlannedSeq(1, 1, 1, True, 1)]


def test_queue_pairs_take_turns_at_admission() -> None:
    """First come first served within a queue pair, round robin between them."""
    rig = attached(num_queue_pairs=3, max_batch=8, max_step_tokens=64, num_requests=64)
    for q, count in enumerate((4, 1, 3)):
        for k in range(count):
            assert rig.ingresses[q].submit(10 * (q + 1) + k, [1] * 3, 5)
    assert [seq.request_id for seq in one_plan(rig)] == [10, 20, 30, 11, 31, 12, 32, 13]


def test_batch_is_bounded_and_the_next_in_line_enters_when_one_ends() -> None:
    rig = attached(max_batch=2)
    for request_id, max_tokens in ((1, 2), (2, 9), (3, 9)):
        assert rig.ingresses[0].submit(request_id, [1, 1], max_tokens)
    assert [seq.request_id for seq in one_plan(rig)] == [1, 2]
    assert [seq.request_id for seq in one_plan(rig)] == [1, 2]
    assert [seq.request_id for seq in one_plan(rig)] == [2, 3]


def test_credit_bounds_how_many_of_a_queue_pair_are_in_a_step() -> None:
    """S2: two completions for each; the oldest first."""
    rig = attached(num_completions=8, max_batch=8)
    for request_id in range(1, 7):
        assert rig.ingresses[0].submit(request_id, [1] * 3, 50)
    rig.poll()  # six ACKs are staged: credit for one request
    assert [seq.request_id for seq in rig.plan()] == [1]
    rig.commit(plain_sampler)
    rig.publish()
    rig.ingresses[0].read()
    assert [seq.request_id for seq in one_plan(rig)] == [1, 2, 3, 4]
    assert [seq.request_id for seq in one_plan(rig)] == [1, 2, 3, 4], "nobody is admitted without credit"


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_a_full_batch_of_256_decodes_in_every_step(kind: str) -> None:
    """The steady state that all lanes plan side by side; pages turn over in the middle of it."""
    rig = attached(
        kind, max_batch=256, num_requests=256, max_requests_per_queue_pair=256, max_step_tokens=1024, prefill_chunk_tokens=64,
        num_pages=600, max_context=256, num_submissions=256, num_completions=1024, arena_bytes=131072,
    )  # fmt: skip
    ingress = rig.ingresses[0]
    for request_id in range(1, 257):
        assert ingress.submit(request_id, [request_id] * (40 + request_id % 3), 60)
    found: list[Completion] = []
    num_full = 0
    for _ in range(100):
        rig.poll()
        planned = rig.plan()
        if planned:
            rig.commit(plain_sampler)
        rig.publish()
        found += ingress.read()
        num_full += len(planned) == 256 and all(seq.num_rows == 1 for seq in planned)
    rig.check()
    # A poll takes eight submissions, so the last one enters when the first one has half of its tokens.
    assert num_full >= 20
    for request_id in range(1, 257):
        assert outputs(found, request_id) == [plain_sampler(request_id, i) for i in range(60)]
    assert rig.engine_status("preemptions") == 0 and rig.engine_status("num_pages_free") == 600


def test_plan_and_commit_must_alternate() -> None:
    for wrong in ("plan twice", "commit without plan"):
        rig = attached()
        assert rig.ingresses[0].submit(1, [1], 5)
        rig.poll()
        if wrong == "plan twice":
            assert rig.plan()
            assert rig.native.bk_director_plan(rig.address, rig.plans[1].ctypes.data) == 0
        else:
            rig.native.bk_director_commit(rig.address, rig.plans[0].ctypes.data)
        assert (rig.fault()["code"], rig.fault()["site"]) == (abi.FAULT_INTEGRITY, 2)
