"""Who runs when: priorities, aging, shares of queue pairs, deadlines, long prompts beside decodes, and full pages.

The long comparison with a reference is test_director_stateful.py. Run: pytest tests/host/test_scheduling.py
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.tuning import NEVER
from tests.host.director_rig import PlannedSeq, Rig, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

FINISH, SECOND_NS = abi.COMPLETION_FINISH, 1_000_000_000
BOTH = pytest.mark.parametrize("kind", ["single", "lanes"])


def attached(kind: str = "single", **changes: int) -> Rig:
    rig = Rig(Shape(**changes), kind)  # type: ignore[arg-type]
    rig.attach_all()
    return rig


def turn(rig: Rig) -> list[PlannedSeq]:
    """One step; what was planned."""
    rig.poll()
    planned = rig.plan()
    if planned:
        rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    return planned


def order_of_admission(rig: Rig, num_turns: int) -> list[int]:
    seen: list[int] = []
    for _ in range(num_turns):
        seen += [seq.request_id for seq in turn(rig) if seq.request_id not in seen]
        for ingress in rig.ingresses:
            ingress.read()
    return seen


@BOTH
def test_lower_priorities_run_first_and_equal_ones_in_order(kind: str) -> None:
    rig = attached(kind, max_batch=1)
    rig.tune(aging_ms=NEVER)  # the turns themselves may take seconds
    for request_id, priority in ((1, 3), (2, 0), (3, -5), (4, 0), (5, 3), (6, -5), (7, 99), (8, -99)):
        assert rig.ingresses[0].submit(request_id, [1, 2], 2, priority=priority)
    assert order_of_admission(rig, 20) == [8, 3, 6, 2, 4, 1, 5, 7]


@BOTH
def test_waiting_is_worth_a_level_for_each_aging_period(kind: str) -> None:
    """2.5 periods bring a request of level 3 before one of level 1, and not before one of level 0."""
    rig = attached(kind, max_batch=1)
    rig.tune(aging_ms=1_000_000)  # so long that the time of the turns themselves is nothing
    for request_id, priority in ((1, 0), (2, 1), (3, 3)):
        assert rig.ingresses[0].submit(request_id, [1, 2], 2, priority=priority)
    rig.poll()
    rig.age_request(0, 3, 2500 * SECOND_NS)
    assert order_of_admission(rig, 8) == [1, 3, 2]


@BOTH
def test_by_default_a_second_is_worth_a_level(kind: str) -> None:
    """All grow older while this runs: the first is far ahead, so that seconds of it change nothing."""
    rig = attached(kind, max_batch=1)
    for request_id, priority in ((1, -8), (2, 4), (3, 6)):
        assert rig.ingresses[0].submit(request_id, [1, 2], 2, priority=priority)
    rig.poll()
    rig.age_request(0, 3, 2_500_000_000)
    assert order_of_admission(rig, 8) == [1, 3, 2]


@BOTH
def test_a_stream_of_short_urgent_requests_does_not_starve_a_patient_one(kind: str) -> None:
    """W2. Each turn takes a tenth of an aging period for those that wait; without aging the patient one never runs."""
    admitted = {}
    for aging_ms in (1_000_000, NEVER):  # so long that the time of the turns themselves is nothing
        rig = attached(kind, max_batch=1, num_requests=16)
        rig.tune(aging_ms=aging_ms)
        ingress = rig.ingresses[0]
        assert ingress.submit(1, [1] * 40, 3, priority=7)
        next_id, seen = 2, 0
        for number in range(200):
            while next_id - seen < 4:
                assert ingress.submit(next_id, [1] * 3, 1, priority=-8)
                next_id += 1
            planned = turn(rig)
            seen = max([seen, *(seq.request_id for seq in planned)])
            if any(seq.request_id == 1 for seq in planned):
                admitted[aging_ms] = number
                break
            rig.age_request(0, 1, 100 * SECOND_NS)
            ingress.read()
    assert list(admitted) == [1_000_000] and 140 <= admitted[1_000_000] <= 165, admitted


@BOTH
def test_queue_pairs_share_tokens_not_requests(kind: str) -> None:
    """W3. One sends prompts of 50 tokens, the other of 5, both more than fits: tokens come out even."""
    rig = attached(kind, num_queue_pairs=2, max_batch=2, num_requests=64, num_submissions=16)
    served: Counter[int] = Counter()
    next_id = 1
    for _ in range(300):
        for q, num_prompt in ((0, 50), (1, 5)):
            while rig.queue_pair(q).num_waiting < 6 and rig.ingresses[q].submit(next_id * 2 + q, [1] * num_prompt, 2):
                next_id += 1
                rig.poll()
        for seq in turn(rig):
            served[seq.request_id % 2] += seq.num_rows
        for ingress in rig.ingresses:
            ingress.read()
    assert 0.85 < served[0] / served[1] < 1.18, served


@BOTH
def test_a_queue_pair_that_was_alone_for_long_is_not_set_back_for_ever(kind: str) -> None:
    """W3: of the 2,000 tokens that it was served alone, no more than its last request counts once another comes."""
    rig = attached(kind, num_queue_pairs=2, max_batch=1, num_requests=64)
    for request_id in range(2, 42, 2):
        assert rig.ingresses[0].submit(request_id, [1] * 100, 1)
        for _ in range(4):
            turn(rig)
        rig.ingresses[0].read()
    for request_id in range(100, 106):
        assert rig.ingresses[request_id % 2].submit(request_id, [1] * 100, 1)
    order = order_of_admission(rig, 30)
    assert sorted(order) == list(range(100, 106))
    assert [request_id % 2 for request_id in order].index(0) <= 2, order


@BOTH
def test_deadlines_end_waiting_and_running_requests(kind: str) -> None:
    """N2. What waits ends at once, what runs at the next commit, with the tokens it has."""
    rig = attached(kind, max_batch=1)
    ingress = rig.ingresses[0]
    for request_id, timeout_s in ((1, 6000), (2, 6000), (3, 0), (4, 720_000)):
        assert ingress.submit(request_id, [1] * 5, 50, timeout_ns=timeout_s * SECOND_NS)
    for _ in range(5):
        turn(rig)
    before = ingress.read()
    rig.age_request(0, 1, 5000 * SECOND_NS)
    turn(rig)
    assert not [entry for entry in ingress.read() if entry.kind == FINISH]
    rig.poll()
    assert rig.plan()
    for request_id in (1, 2):
        rig.age_request(0, request_id, 6001 * SECOND_NS)
    rig.poll()
    rig.publish()
    rig.check()
    waiting = [entry for entry in ingress.read() if entry.kind == FINISH]
    assert waiting == [Completion(FINISH, abi.FINISH_TIMEOUT, 5, 2, 0)]
    rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    assert ingress.read() == [Completion(FINISH, abi.FINISH_TIMEOUT, 5, 1, len(outputs(before, 1)) + 1)]
    assert rig.engine_status("finished_timeout") == 2 and rig.engine_status("num_pages_used") == 0
    for _ in range(110):
        turn(rig)
        before += ingress.read()
    assert len(outputs(before, 3)) == len(outputs(before, 4)) == 50


@BOTH
def test_a_page_shortage_preempts_the_worst_level_then_the_youngest(kind: str) -> None:
    rig = attached(kind, num_pages=7, max_batch=4, max_context=320)
    rig.tune(aging_ms=NEVER)
    for request_id, priority in ((1, 5), (2, 0), (3, 0), (4, 5)):
        assert rig.ingresses[0].submit(request_id, [request_id] * 50, 200, priority=priority)
    gone: list[int] = []
    ended: list[int] = []
    while len(ended) < 4:
        before = rig.running()
        turn(rig)
        found = rig.ingresses[0].read()
        ended += [entry.request_id for entry in found if entry.kind == FINISH]
        gone += [request_id for request_id in before if request_id not in rig.running() and request_id not in ended]
    assert gone[:2] == [4, 1] and ended[:2] == [2, 3], (gone, ended)


@BOTH
def test_a_long_prompt_costs_running_streams_no_token(kind: str) -> None:
    """Every decode row is in every step, and a step has no more rows than the chunk that was asked for beside them."""
    rig = attached(kind, max_context=1024, max_step_tokens=64, prefill_chunk_tokens=16, num_pages=64)
    ingress = rig.ingresses[0]
    for request_id in range(1, 5):
        assert ingress.submit(request_id, [1] * 4, 200)
    for _ in range(3):
        turn(rig)
        ingress.read()
    assert ingress.submit(9, [1] * 900, 5)
    for _ in range(57):
        planned = turn(rig)
        ingress.read()
        assert [seq.request_id for seq in planned][:4] == [1, 2, 3, 4]
        assert sum(seq.num_rows for seq in planned) <= 4 + 16


@BOTH
def test_tuned_limits_are_obeyed_at_the_next_poll_and_clamped(kind: str) -> None:
    """N1."""
    rig = attached(kind, max_batch=4, max_step_tokens=64, prefill_chunk_tokens=32, num_completions=256)
    ingress = rig.ingresses[0]
    for request_id in range(1, 7):
        assert ingress.submit(request_id, [1] * 40, 100)
    rig.tune(max_running=2, step_tokens=10, prefill_chunk_tokens=6)
    assert [seq.num_rows for seq in turn(rig)] == [6, 4]
    assert rig.engine_status("tuning_generation") == 1
    rig.tune(max_running=9999, step_tokens=9999, prefill_chunk_tokens=9999)
    assert [seq.num_rows for seq in turn(rig)] == [34, 30], "at most max_step_tokens; a chunk may be all of it"
    rig.tune()
    assert [seq.num_rows for seq in turn(rig)] == [1, 6, 32, 25], "as launched"
    for _ in range(10):
        turn(rig)
        ingress.read()
    rig.tune(max_running=1, step_tokens=1)
    for _ in range(5):
        planned = turn(rig)
        ingress.read()
        assert [seq.num_rows for seq in planned] == [1, 1, 1, 1], "decode rows are never left out"


@pytest.mark.parametrize("seed", range(4))
def test_full_pages_with_everything_at_once_neither_deadlock_nor_overcommit(seed: int) -> None:
    """Random prompts that share, priorities, cancels, deadlines, tuning, at pages for two requests: all end, each token is right."""
    pick = random.Random(seed)
    rig = Rig(Shape(num_queue_pairs=3, num_pages=9, max_context=512, max_batch=6, num_requests=64, prefix_cache=True))
    rig.attach_all()
    live: dict[int, tuple[int, int]] = {}
    found: list[Completion] = []
    next_id, num_full = 1, 0
    for number in range(1500):
        q = pick.randrange(3)
        ingress = rig.ingresses[q]
        if number < 1000 and len(live) < 30:
            prompt = [pick.randrange(2)] * pick.randrange(1, 250) + [
                pick.randrange(300) for _ in range(pick.randrange(1, 60))
            ]
            words = {"priority": pick.randrange(-2, 3), "timeout_ns": pick.choice([0, 0, 3600 * SECOND_NS])}
            if ingress.submit(next_id, prompt, pick.randrange(1, 150), **words):
                live[next_id] = (q, len(prompt))
                next_id += 1
        if live and pick.randrange(12) == 0 and ingress.num_free_entries():
            ingress.write_entry(abi.SUBMISSION_CANCEL, pick.choice(list(live)))
        if live and pick.randrange(20) == 0:
            request_id = pick.choice(list(live))
            rig.age_request(live[request_id][0], request_id, 1800 * SECOND_NS)
        if pick.randrange(60) == 0:
            rig.tune(
                max_running=pick.randrange(5), step_tokens=pick.randrange(70), prefill_chunk_tokens=pick.randrange(40)
            )
        turn(rig)
        num_full += rig.engine_status("num_pages_used") == 9
        for ingress in rig.ingresses:
            read = ingress.read()
            found += read
            for entry in read:
                if entry.kind in (FINISH, abi.COMPLETION_REJECT):
                    live.pop(entry.request_id, None)
    rig.tune()
    for _ in range(6000):
        if not live:
            break
        turn(rig)
        for ingress in rig.ingresses:
            read = ingress.read()
            found += read
            for entry in read:
                if entry.kind == FINISH:
                    live.pop(entry.request_id, None)
    assert not live, rig.live_requests()
    assert rig.engine_status("num_pages_used") == 0 and num_full > 20 and rig.engine_status("preemptions") > 0
    assert rig.engine_status("prefix_hit_tokens") > 0 and rig.engine_status("finished_timeout") > 0
    for request_id in range(1, next_id):
        tokens = outputs(found, request_id)
        assert tokens == [plain_sampler(request_id, i) for i in range(len(tokens))]
