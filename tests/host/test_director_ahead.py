"""Planning ahead: the step after the one in flight, made and started before that one is committed. DESIGN.md says why.

The long comparison with a reference is test_director_stateful.py; here stand the cases by name. Run: pytest tests/host/test_director_ahead.py
"""

from __future__ import annotations

import random

import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import EOS_ID, VOCAB, PlannedSeq, Rig, Sampler, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

KINDS = ["single", "lanes"]


def attached(kind: str = "single", **changes: int) -> Rig:
    rig = Rig(Shape(**changes), kind)  # type: ignore[arg-type]
    rig.attach_all()
    return rig


def turn(rig: Rig, sampler: Sampler = plain_sampler) -> list[Completion]:
    """One step as the GPU's loop runs it: plan the next while it is in flight, start that, commit. The first call plans afresh."""
    if not rig.in_flight:
        rig.poll()
        if not rig.plan():
            rig.publish()
            return rig.ingresses[0].read()
    rig.publish()
    rig.poll()
    planned, waits = rig.plan_ahead()
    rig.run_workers(sampler)
    if planned and not waits and not rig.every_seq_was_stopped():
        rig.start_next()
    rig.commit(sampler)
    rig.publish()
    rig.check()
    return rig.ingresses[0].read()


def serve(rig: Rig, sampler: Sampler = plain_sampler, num_steps: int = 200) -> list[Completion]:
    found = []
    for _ in range(num_steps):
        found += turn(rig, sampler)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_takes_its_tokens_from_the_one_in_flight(kind: str) -> None:
    rig = attached(kind)
    assert rig.ingresses[0].submit(1, [5, 6, 7], 4)
    rig.poll()
    assert rig.plan() == [PlannedSeq(1, 3, 0, True, 0)]
    assert rig.plan_ahead() == ([PlannedSeq(1, 1, 3, True, 1)], False)
    row = rig.plan_rows(rig.plans[1])[0]
    assert int(row["token"]) == abi.TOKEN_PENDING | 0 and int(row["position"]) == 3
    rig.run_workers(plain_sampler)
    rig.start_next()
    rig.commit(plain_sampler)
    assert rig.in_flight, "step 1 runs already"
    assert rig.plan_ahead() == ([PlannedSeq(1, 1, 4, True, 2)], False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_token_is_known_to_be_the_last(kind: str) -> None:
    """max_tokens needs no look at the token: the next plan has no row for it, and the idle engine runs no step for nobody."""
    rig = attached(kind)
    assert rig.ingresses[0].submit(1, [5], 2)
    rig.poll()
    rig.plan()
    assert rig.plan_ahead()[0]
    rig.run_workers(plain_sampler)
    rig.start_next()
    rig.commit(plain_sampler)
    assert rig.plan_ahead() == ([], False)
    rig.commit(plain_sampler)
    rig.publish()
    assert not rig.in_flight and rig.plan() == []
    assert rig.engine_status("finished_length") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_stops_says_so_at_once_and_is_freed_one_step_later(kind: str) -> None:
    """K3: EOS of one of two. Its row of the step that is planned runs for nothing, and nothing of it is delivered."""
    rig = attached(kind)
    for request_id in (1, 2):
        assert rig.ingresses[0].submit(request_id, [5] * 10, 30)

    def sampler(request_id: int, output_idx: int) -> int:
        return EOS_ID if (request_id, output_idx) == (1, 3) else 100 + output_idx

    found: list[Completion] = []
    while not any(entry.kind == abi.COMPLETION_FINISH for entry in found):
        found += turn(rig, sampler)
    assert rig.running() == [1, 2], "its row is in the step that runs"
    assert rig.queue_pair(0).num_running == 2 and (0, 1) in rig.live_requests()
    assert rig.ingresses[0].submit(1, [9] * 4, 5), "its id is free at once"
    found += turn(rig, sampler)
    assert not any(entry.kind == abi.COMPLETION_REJECT for entry in found)
    assert outputs([entry for entry in found if entry.request_id == 1], 1) == [100, 101, 102, EOS_ID]
    found = serve(rig, sampler)
    assert rig.engine_status("finished_eos") == 2 and rig.engine_status("num_pages_used") == 0
    assert rig.engine_status("output_tokens") == 4 + 30 + 4


def test_a_plan_of_stopped_requests_alone_is_not_run() -> None:
    rig = attached()
    assert rig.ingresses[0].submit(1, [5] * 10, 30, (103,))

    def sampler(_: int, output_idx: int) -> int:
        return 100 + output_idx

    found = serve(rig, sampler, 30)
    assert [entry.kind for entry in found].count(abi.COMPLETION_TOKEN) == 4
    assert rig.engine_status("step") == 4, "no step ran for a request that had stopped"
    assert rig.engine_status("finished_stop_id") == 1 and rig.engine_status("num_pages_used") == 0


@pytest.mark.parametrize("starts", [False, True])
def test_cancel_takes_effect_at_the_next_commit(starts: bool) -> None:
    """K2, with the next step planned before the CANCEL came, and started before the commit or not."""
    rig = attached()
    for request_id in (1, 2):
        assert rig.ingresses[0].submit(request_id, [5] * 10, 30)
    found = serve(rig, num_steps=5)
    num_before = len(outputs(found, 1))
    assert rig.plan_ahead()[0]
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 1)
    rig.poll()
    rig.run_workers(plain_sampler)
    if starts:
        rig.start_next()
    rig.commit(plain_sampler)
    rig.publish()
    found = rig.ingresses[0].read()
    assert [(entry.kind, entry.request_id) for entry in found] == [
        (abi.COMPLETION_FINISH, 1),
        (abi.COMPLETION_TOKEN, 2),
    ]
    assert found[0].output_idx == num_before and found[0].reason == abi.FINISH_CANCELLED
    if not starts:
        assert [seq.request_id for seq in rig.plan()] == [1, 2], "its row is there, for nothing"
    rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    assert [entry.request_id for entry in rig.ingresses[0].read()] == [2]
    assert rig.running() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_while_a_step_runs_is_admitted_to_the_next_one(kind: str) -> None:
    rig = attached(kind)
    assert rig.ingresses[0].submit(1, [5] * 10, 30)
    serve(rig, num_steps=3)
    assert rig.plan_ahead() == ([PlannedSeq(1, 1, 13, True, 4)], False)
    assert rig.ingresses[0].submit(2, [6] * 20, 30)
    rig.poll()
    assert rig.plan_ahead() == ([PlannedSeq(1, 1, 13, True, 4), PlannedSeq(2, 20, 0, True, 0)], False)
    rig.run_workers(plain_sampler)
    rig.start_next()
    rig.commit(plain_sampler)
    assert rig.plan_ahead() == ([PlannedSeq(1, 1, 14, True, 5), PlannedSeq(2, 1, 20, True, 1)], False)


def test_somebody_waits_for_the_place_of_one_that_ends() -> None:
    """Then the next plan is better started after the commit, which gives the place away."""
    rig = attached(max_batch=2)
    for request_id, max_tokens in ((1, 3), (2, 9), (3, 9)):
        assert rig.ingresses[0].submit(request_id, [1, 1], max_tokens)
    rig.poll()
    assert [seq.request_id for seq in rig.plan()] == [1, 2]
    for _ in range(2):
        planned, waits = rig.plan_ahead()
        assert [seq.request_id for seq in planned] == ([1, 2] if not waits else [2])
        rig.run_workers(plain_sampler)
        if not waits:
            rig.start_next()
        rig.commit(plain_sampler)
    planned, waits = rig.plan_ahead()
    assert [seq.request_id for seq in planned] == [2] and waits
    rig.commit(plain_sampler)
    assert [seq.request_id for seq in rig.plan()] == [2, 3]


def test_short_of_pages_or_credit_nothing_is_planned_ahead() -> None:
    """S7: preemption and stalls are for a plan that knows what was sampled."""
    rig = attached(num_pages=3, max_context=128)
    for request_id in (1, 2):
        assert rig.ingresses[0].submit(request_id, [1] * 60, 40)
    found, num_ahead, num_afresh = [], 0, 0
    for _ in range(400):
        rig.poll()
        if not rig.in_flight and not rig.plan():
            rig.publish()
            found += rig.ingresses[0].read()
            continue
        planned, waits = rig.plan_ahead()
        rig.run_workers(plain_sampler)
        num_ahead += bool(planned)
        num_afresh += not planned
        if planned and not waits:
            rig.start_next()
        rig.commit(plain_sampler)
        rig.publish()
        rig.check()
        found += rig.ingresses[0].read()
    for request_id in (1, 2):
        assert outputs(found, request_id) == [plain_sampler(request_id, i) for i in range(40)]
    assert rig.engine_status("preemptions") > 0 and num_ahead > 20 and num_afresh > 1


def test_gap_is_from_the_arrival_to_the_start() -> None:
    rig = attached()
    assert rig.ingresses[0].submit(1, [5] * 10, 30)
    rig.poll()
    rig.plan()
    rig.plan_ahead()
    rig.run_workers(plain_sampler)
    rig.start_next(arrived_ns=10_000, start_ns=11_234)
    rig.commit(plain_sampler)
    rig.publish()
    assert rig.engine_status("gap_ns_last") == 1234


def test_start_without_a_plan_is_a_fault() -> None:
    rig = attached()
    assert rig.ingresses[0].submit(1, [5], 5)
    rig.poll()
    rig.plan()
    rig.start_next()
    assert (rig.fault()["code"], rig.fault()["site"]) == (abi.FAULT_INTEGRITY, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_do_not_depend_on_what_is_planned_ahead(kind: str, seed: int) -> None:
    """M2: the same requests, planned ahead or not, started early or not, by the throw of a coin: the same tokens and reasons."""
    source = random.Random(seed)
    num_requests = 120 if kind == "single" else 25

    def sampler(request_id: int, output_idx: int) -> int:
        mixed = (request_id * 2654435761 + output_idx * 40503) % 97
        return EOS_ID if mixed < 4 else 3 + mixed

    asked = {
        request_id: (
            source.choice([1, 5, 64, 100]),
            source.choice([1, 3, 30, 70]),
            tuple(source.sample(range(3, 99), 2)),
        )
        for request_id in range(1, num_requests + 1)
    }

    def run(ahead: float, starts: float) -> dict[int, list[Completion]]:
        rig = attached(kind, max_batch=6, num_pages=14, num_completions=32, max_context=256)
        found: dict[int, list[Completion]] = {request_id: [] for request_id in asked}
        todo = list(asked)
        for _ in range(100_000):
            while todo:
                num_prompt, max_tokens, stop_ids = asked[todo[0]]
                if not rig.ingresses[0].submit(
                    todo[0], [(todo[0] + i) % VOCAB for i in range(num_prompt)], max_tokens, stop_ids
                ):
                    break
                todo.pop(0)
            rig.poll()
            if rig.in_flight or rig.plan():
                planned, waits = rig.plan_ahead() if source.random() < ahead else ([], False)
                rig.run_workers(sampler)
                if planned and not waits and source.random() < starts:
                    rig.start_next()
                rig.commit(sampler)
            rig.publish()
            for entry in rig.ingresses[0].read():
                found[entry.request_id].append(entry)
            if all(entries and entries[-1].kind == abi.COMPLETION_FINISH for entries in found.values()):
                break
        rig.check()
        return found

    classic = run(0.0, 0.0)
    assert run(1.0, 1.0) == classic
    assert run(0.7, 0.5) == classic
