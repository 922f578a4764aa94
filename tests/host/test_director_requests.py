"""The life of requests: stop conditions, cancel in every state, stop and drain, and ten thousand random ones.

Run: pytest tests/host/test_director_requests.py
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import EOS_ID, VOCAB, Rig, Sampler, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

FINISH = abi.COMPLETION_FINISH


def serve(rig: Rig, num_steps: int, sampler: Sampler = plain_sampler, q: int = 0) -> list[Completion]:
    found = []
    for _ in range(num_steps):
        rig.step(sampler)
        found += rig.ingresses[q].read()
    return found


def one_rig(**changes: int) -> Rig:
    rig = Rig(Shape(**changes))  # type: ignore[arg-type]
    rig.attach_all()
    return rig


# ---- Stop conditions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stop_ids", "ignore_eos", "reason", "num_outputs"),
    [
        ((), 0, abi.FINISH_EOS, 5),
        ((), 1, abi.FINISH_LENGTH, 9),
        ((203,), 0, abi.FINISH_STOP_ID, 4),
        ((203,), 1, abi.FINISH_STOP_ID, 4),
        ((EOS_ID,), 1, abi.FINISH_STOP_ID, 5),
        ((EOS_ID,), 0, abi.FINISH_EOS, 5),
        ((208,), 1, abi.FINISH_STOP_ID, 9),
        (tuple(range(300, 316)), 1, abi.FINISH_LENGTH, 9),
    ],
)
def test_stop_conditions(stop_ids: tuple[int, ...], ignore_eos: int, reason: int, num_outputs: int) -> None:
    """The token that stops is delivered, FINISH carries the usage. EOS before stop id before length."""
    rig = one_rig()

    def sampler(request_id: int, output_idx: int) -> int:
        return EOS_ID if output_idx == 4 else 200 + output_idx

    assert rig.ingresses[0].submit(5, [1, 2, 3], 9, stop_ids, {"ignore_eos": ignore_eos})
    found = serve(rig, 12, sampler)
    assert outputs(found, 5) == [sampler(5, i) for i in range(num_outputs)]
    assert found[-1] == Completion(FINISH, reason, 3, 5, num_outputs)
    assert rig.engine_status("finished_" + abi.FinishReason(reason).name.lower()) == 1
    assert rig.engine_status("output_tokens") == num_outputs


def test_single_token_request_of_a_single_token_prompt() -> None:
    rig = one_rig()
    assert rig.ingresses[0].submit(1, [7], 1)
    found = serve(rig, 3)
    assert [entry.kind for entry in found] == [abi.COMPLETION_ACK, abi.COMPLETION_TOKEN, FINISH]
    assert rig.engine_status("prompt_tokens") == 1


def test_a_request_starts_once_however_often_it_is_preempted() -> None:
    rig = one_rig(num_pages=4, max_context=256, num_completions=512)
    for request_id in (1, 2, 3):
        assert rig.ingresses[0].submit(request_id, [7] * 40, 100)
    found = serve(rig, 600)
    assert rig.engine_status("preemptions") > 0, "or this says nothing"
    for request_id in (1, 2, 3):
        kinds = [entry.kind for entry in found if entry.request_id == request_id]
        assert kinds == [abi.COMPLETION_ACK, abi.COMPLETION_START, *[abi.COMPLETION_TOKEN] * 100, FINISH]


def test_a_start_takes_no_credit_that_a_step_could_need() -> None:
    rig = one_rig(num_completions=128)
    for request_id in range(1, 33):
        while not rig.ingresses[0].submit(request_id, [7], 3):
            rig.step(plain_sampler)
    for _ in range(200):  # it reads nothing
        rig.step(plain_sampler)
    found = [*rig.ingresses[0].read(), *serve(rig, 200)]
    starts = [entry for entry in found if entry.kind == abi.COMPLETION_START]
    assert 0 < len(starts) < 32 and sum(entry.kind == FINISH for entry in found) == 32


# ---- Cancel in every state ---------------------------------------------------------------------------------------
def check_cancelled(rig: Rig, found: list[Completion], request_id: int, num_outputs: int) -> None:
    """K2: one FINISH, after all its tokens; nothing is held any more."""
    of_request = [entry for entry in found if entry.request_id == request_id]
    assert of_request[-1].kind == FINISH and of_request[-1].reason == abi.FINISH_CANCELLED
    assert of_request[-1].output_idx == len(outputs(found, request_id)) == num_outputs
    assert sum(entry.kind == FINISH for entry in of_request) == 1
    assert rig.engine_status("finished_cancelled") == 1


def test_cancel_in_the_ring_behind_its_request() -> None:
    rig = one_rig()
    assert rig.ingresses[0].submit(1, [1] * 10, 10)
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 1)
    check_cancelled(rig, serve(rig, 3), 1, 0)
    assert rig.engine_status("step") == 0


def test_cancel_while_waiting() -> None:
    rig = one_rig(max_batch=1)
    for request_id in (1, 2, 3):
        assert rig.ingresses[0].submit(request_id, [1] * 10, 10)
    found = serve(rig, 3)
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 2)  # between two others in its queue
    found += serve(rig, 30)
    check_cancelled(rig, found, 2, 0)
    assert len(outputs(found, 1)) == len(outputs(found, 3)) == 10


def test_cancel_during_prefill_between_steps() -> None:
    rig = one_rig(prefill_chunk_tokens=8)
    assert rig.ingresses[0].submit(1, [1] * 100, 10)
    found = serve(rig, 3)
    assert rig.live_requests()[0, 1].num_computed == 24
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 1)
    found += serve(rig, 1)
    assert rig.engine_status("num_pages_used") == 0
    check_cancelled(rig, found, 1, 0)


def test_cancel_during_decode_between_steps() -> None:
    rig = one_rig()
    assert rig.ingresses[0].submit(1, [1] * 10, 50)
    found = serve(rig, 7)
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 1)
    found += serve(rig, 2)
    check_cancelled(rig, found, 1, 7)


@pytest.mark.parametrize("num_prompt", [100, 10])
def test_cancel_while_the_step_runs(num_prompt: int) -> None:
    """Its pages stay until the commit, because the workers use them; the token of that step is not delivered (L3, K2)."""
    rig = one_rig(prefill_chunk_tokens=32)
    assert rig.ingresses[0].submit(1, [1] * num_prompt, 50)
    found = serve(rig, 2)
    rig.poll()
    assert rig.plan()
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 1)
    rig.poll()
    rig.publish()
    rig.check()
    assert rig.engine_status("num_pages_used") == -(-num_prompt // 64)
    rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    assert rig.engine_status("num_pages_used") == 0, "free in the same step"
    found += rig.ingresses[0].read()
    check_cancelled(rig, found, 1, 0 if num_prompt == 100 else 2)


def test_cancel_of_a_request_that_stalls_while_a_step_runs() -> None:
    """It runs but is not in the step: nothing was promised to it, so its FINISH may have to wait."""
    rig = one_rig(num_queue_pairs=2, num_completions=4)
    lazy, other = rig.ingresses
    assert lazy.submit(1, [1], 50) and other.submit(1, [1], 50)
    for _ in range(6):
        rig.step(plain_sampler)
        other.read()
    rig.poll()
    assert [seq.request_id for seq in rig.plan()] == [1] and len(rig.running()) == 2
    lazy.write_entry(abi.SUBMISSION_CANCEL, 1)
    rig.poll()
    rig.commit(plain_sampler)
    rig.check()
    rig.publish()
    assert len(rig.running()) == 1
    found = lazy.read()
    for _ in range(2):
        rig.step(plain_sampler)
        found += lazy.read()
    check_cancelled(rig, found, 1, len(outputs(found, 1)))


def test_cancel_of_a_preempted_request() -> None:
    rig = one_rig(num_pages=4, max_context=256, max_batch=2)
    for request_id in (1, 2):
        assert rig.ingresses[0].submit(request_id, [1] * 60, 150)
    found: list[Completion] = []
    while rig.engine_status("preemptions") == 0:
        found += serve(rig, 1)
    assert rig.live_requests()[0, 2].state == 1
    rig.ingresses[0].write_entry(abi.SUBMISSION_CANCEL, 2)
    found += serve(rig, 200)
    check_cancelled(rig, found, 2, len(outputs(found, 2)))
    assert len(outputs(found, 1)) == 150


def test_cancel_while_finishing_and_after_is_silent() -> None:
    rig = one_rig(num_completions=4)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1], 30)
    for _ in range(6):
        rig.step(plain_sampler)
    ingress.write_entry(abi.SUBMISSION_PING, 9)  # with the ACK and two tokens, all of the credit
    rig.step(plain_sampler)
    for _ in range(3):  # the first ends it, the second meets it finishing, the third too
        ingress.write_entry(abi.SUBMISSION_CANCEL, 1)
        rig.step(plain_sampler)
    assert rig.engine_status("num_finishing") == 1
    found: list[Completion] = []
    for _ in range(3):
        found += ingress.read()
        rig.step(plain_sampler)
    ingress.write_entry(abi.SUBMISSION_CANCEL, 1)
    ingress.write_entry(abi.SUBMISSION_CANCEL, 4711)
    found += serve(rig, 3)
    check_cancelled(rig, found, 1, len(outputs(found, 1)))


def test_cancel_needs_no_credit() -> None:
    rig = one_rig(num_completions=4, num_pages=8)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1] * 100, 60)
    for _ in range(8):
        rig.step(plain_sampler)
    ingress.write_entry(abi.SUBMISSION_PING, 2)
    ingress.write_entry(abi.SUBMISSION_PING, 3)
    ingress.write_entry(abi.SUBMISSION_CANCEL, 1)
    rig.step(plain_sampler)
    assert rig.queue_pair(0).submission_consumer_pos == 2, "T1: a PONG has no credit, and entries stay in order"
    ingress.read(2)
    rig.step(plain_sampler)
    assert rig.engine_status("finished_cancelled") == 1 and rig.engine_status("num_pages_used") == 0


# ---- Stop --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("in_flight", [False, True])
def test_stop_ends_every_request_and_then_the_director(in_flight: bool) -> None:
    """M1. Each request gets its FINISH, then the plan carries the exit flag."""
    rig = one_rig(max_batch=2)
    for request_id in range(1, 6):
        assert rig.ingresses[0].submit(request_id, [1] * 5, 50)
    found = serve(rig, 4)
    if in_flight:
        assert rig.plan()
    rig.command(abi.COMMAND_STOP)
    rig.poll()
    if in_flight:
        rig.check()
        rig.commit(plain_sampler)
    for _ in range(6):
        rig.publish()
        rig.poll()
        assert rig.plan() == []
        found += rig.ingresses[0].read()
    finishes = {entry.request_id: entry for entry in found if entry.kind == FINISH}
    assert sorted(finishes) == [1, 2, 3, 4, 5]
    assert all(entry.reason == abi.FINISH_DRAINING for entry in finishes.values())
    header = rig.plan_memory[:64].view(abi.STEP_PLAN)[0]
    assert int(header["flags"]) & abi.PLAN_EXIT
    assert rig.engine_status("state") == abi.ENGINE_STOPPED
    assert rig.engine_status("num_pages_free") == rig.shape.num_pages


def test_stop_does_not_wait_for_ever_for_a_client_that_stopped_reading() -> None:
    rig = Rig(Shape(num_completions=4, ingress_timeout_ns=50_000_000))
    rig.attach_all()
    assert rig.ingresses[0].submit(1, [1], 50)
    for turn in range(6):
        if turn == 4:
            rig.ingresses[0].write_entry(abi.SUBMISSION_PING, 9)  # with the ACK and two tokens, all of the credit
        rig.ingresses[0].beat()
        rig.step(plain_sampler)
    rig.command(abi.COMMAND_STOP)
    for _ in range(1_000_000):
        rig.ingresses[0].beat()
        rig.poll()
        rig.plan()
        rig.publish()
        if rig.engine_status("state") == abi.ENGINE_STOPPED:
            break
    assert rig.engine_status("state") == abi.ENGINE_STOPPED and rig.engine_status("num_finishing") == 1


# ---- Many --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [1])
def test_ten_thousand_random_requests_end_with_every_page_free(seed: int) -> None:
    """Lengths, cancels, stops, several queue pairs of uneven readers, more work than pages: each request ends once, with the right tokens."""
    source = random.Random(seed)
    shape = Shape(
        num_queue_pairs=4, num_requests=256, max_requests_per_queue_pair=80, max_batch=48, max_step_tokens=512,
        prefill_chunk_tokens=128, max_context=512, num_pages=96, num_submissions=64, num_completions=256, arena_bytes=65536,
    )  # fmt: skip
    rig = Rig(shape)
    rig.attach_all()

    def sampler(request_id: int, output_idx: int) -> int:
        mixed = (request_id * 2654435761 + output_idx * 40503) % 397
        return EOS_ID if mixed < 3 else 3 + mixed

    num_requests = 10_000
    expected: dict[tuple[int, int], tuple[int, tuple[int, ...], int]] = {}
    found: dict[tuple[int, int], list[Completion]] = defaultdict(list)
    cancel_asked: set[tuple[int, int]] = set()
    live: list[list[int]] = [[] for _ in range(shape.num_queue_pairs)]
    next_id = 1
    num_steps = 0
    while sum(entries[-1].kind == FINISH for entries in found.values()) < num_requests:
        num_steps += 1
        assert num_steps < 60_000, (next_id, rig.live_requests())
        for q, ingress in enumerate(rig.ingresses):
            while next_id <= num_requests and source.random() < 0.75:
                num_prompt = source.choice([1, 5, 30, 64, 65, 200]) + source.randrange(3)
                max_tokens = source.choice([1, 2, 10, 40, 64])
                stop_ids = tuple(source.sample(range(3, 400), source.choice([0, 0, 1, 4])))
                ignore_eos = source.randrange(2)
                prompt = [(next_id + i) % VOCAB for i in range(num_prompt)]
                if not ingress.submit(next_id, prompt, max_tokens, stop_ids, {"ignore_eos": ignore_eos}):
                    break
                expected[q, next_id] = (max_tokens, stop_ids, ignore_eos)
                live[q].append(next_id)
                next_id += 1
            if live[q] and source.random() < 0.08 and ingress.num_free_entries() > 0:
                request_id = source.choice(live[q])
                ingress.write_entry(abi.SUBMISSION_CANCEL, request_id)
                cancel_asked.add((q, request_id))
            if source.random() < (0.9, 0.9, 0.3, 0.04)[q]:
                for entry in ingress.read():
                    found[q, entry.request_id].append(entry)
                    if entry.kind == FINISH:
                        live[q].remove(entry.request_id)
        rig.poll()
        if rig.plan():
            rig.commit(sampler)
        rig.publish()
        if num_steps % 16 == 0:
            rig.check()
    rig.check()
    reasons: Counter[int] = Counter()
    for (q, request_id), entries in found.items():
        assert entries[0].kind == abi.COMPLETION_ACK
        assert [entry.kind for entry in entries].count(FINISH) == 1
        tokens = outputs(entries, request_id)
        assert tokens == [sampler(request_id, i) for i in range(len(tokens))]
        max_tokens, stop_ids, ignore_eos = expected[q, request_id]
        stops = [token for token in tokens if (token == EOS_ID and not ignore_eos) or token in stop_ids]
        finish = entries[-1]
        reasons[finish.reason] += 1
        assert finish.output_idx == len(tokens) <= max_tokens
        if finish.reason == abi.FINISH_CANCELLED:
            assert (q, request_id) in cancel_asked and not stops
        elif finish.reason == abi.FINISH_LENGTH:
            assert len(tokens) == max_tokens and not stops
        else:
            assert stops == tokens[-1:], "the first token that stops is the last one"
    assert (
        min(reasons[reason] for reason in (abi.FINISH_EOS, abi.FINISH_STOP_ID, abi.FINISH_LENGTH, abi.FINISH_CANCELLED))
        > 100
    )
    assert rig.engine_status("preemptions") > 0 and rig.engine_status("credit_stalls") > 0
    free, cached = rig.engine_status("num_pages_free"), rig.engine_status("num_pages_cached")
    assert free + cached == shape.num_pages and rig.engine_status("num_free_requests") == shape.num_requests
