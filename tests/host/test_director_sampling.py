"""Biases, penalties, constraints and top logprobs in the director: bodies that disagree, slots of counts, TOPs behind their TOKEN, credit.

On one lane and on four, as a warp. The sampling itself: test_sampling_engine.py. Run: pytest tests/host/test_director_sampling.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.constraint_table import build_constraint_table
from tests.host.director_rig import VOCAB, Rig, Shape, plain_sampler
from tests.host.py_ingress import Completion, PyIngress
from tests.host.sampling_rig import NUM_SLOTS, SLOT_BYTES, SamplingRig


@pytest.fixture(params=["single", "lanes"])
def rig(request: pytest.FixtureRequest) -> Iterator[SamplingRig]:
    made = SamplingRig(Shape(num_pages=40, num_requests=32), request.param)
    made.attach_all()
    yield made


def send(
    ingress: PyIngress,
    request_id: int,
    prompt: list[int],
    max_tokens: int,
    *,
    stop_ids: tuple[int, ...] = (),
    bias: tuple[tuple[int, float], ...] = (),
    sampling: dict[str, Any] | None = None,
    body: dict[str, int] | None = None,
) -> None:
    """One request with biases, in its own layout."""
    head = np.zeros(1, abi.REQUEST_BODY)
    head["sampling"]["top_p"], head["sampling"]["num_logit_bias"], head["num_stop_ids"] = 1.0, len(bias), len(stop_ids)
    for name, value in (sampling or {}).items():
        head["sampling"][name] = value
    for name, value in (body or {}).items():
        head[name] = value
    lists = np.array(stop_ids, np.uint32).tobytes() + np.array(list(bias), abi.LOGIT_BIAS).tobytes()
    send_bytes(
        ingress, request_id, head.tobytes() + lists + np.array(prompt, np.uint32).tobytes(), len(prompt), max_tokens
    )


def send_bytes(ingress: PyIngress, request_id: int, raw: bytes, num_prompt_tokens: int, max_tokens: int) -> None:
    pos = ingress.claim_arena(len(raw))
    assert pos is not None and ingress.num_free_entries() > 0
    ingress.arena[pos % ingress.arena_bytes :][: len(raw)] = np.frombuffer(raw, np.uint8)
    ingress.write_entry(
        abi.SUBMISSION_REQUEST,
        request_id,
        arena_pos=pos,
        body_bytes=len(raw),
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=max_tokens,
    )


def load(ingress: PyIngress, slot: int, piece: bytes, offset: int = 0, **words: int) -> None:
    pos = ingress.claim_arena(len(piece))
    assert pos is not None
    ingress.arena[pos % ingress.arena_bytes :][: len(piece)] = np.frombuffer(piece, np.uint8)
    values = {"arena_pos": pos, "body_bytes": len(piece), "client_ns": offset, **words}
    ingress.write_entry(abi.SUBMISSION_CONSTRAINT, slot, **values)


def serve(rig: Rig, num_steps: int = 6) -> list[Completion]:
    found = []
    for _ in range(num_steps):
        rig.step(plain_sampler)
        found += rig.ingresses[0].read()
    return found


def ends_of(found: list[Completion]) -> dict[int, tuple[int, int]]:
    kinds = (abi.COMPLETION_FINISH, abi.COMPLETION_REJECT)
    return {entry.request_id: (entry.kind, entry.reason) for entry in found if entry.kind in kinds}


# ---- Bodies ----------------------------------------------------------------------------------------------------------
def test_lists_of_a_body_land_in_their_places(rig: SamplingRig) -> None:
    bias = tuple((10 + i, 0.5 * i) for i in range(37))
    send(rig.ingresses[0], 1, [5, 6, 7], 3, stop_ids=(8, 9), bias=bias)
    serve(rig, 1)
    (request_idx,) = [i for i in range(rig.shape.num_requests) if rig.request(i).state != 0]
    placed = rig.tables["logit_biases"].view(abi.LOGIT_BIAS).reshape(-1, abi.MAX_LOGIT_BIAS)[request_idx]
    assert [(int(one["token"]), float(one["bias"])) for one in placed[:37]] == list(bias)
    assert rig.tokens[request_idx, :3].tolist() == [5, 6, 7]
    stop_ids = rig.requests.view(np.uint32).reshape(rig.shape.num_requests, -1)[request_idx, 16:18]
    assert stop_ids.tolist() == [8, 9]


BAD_BODIES: list[tuple[str, dict[str, Any], int]] = [
    ("bias of an id outside", {"bias": ((VOCAB, 1.0),)}, abi.REJECT_BAD_TOKEN),
    ("bias NaN", {"bias": ((1, float("nan")),)}, abi.REJECT_BAD_SAMPLING),
    ("bias infinite", {"bias": ((1, 1.0), (2, float("-inf")))}, abi.REJECT_BAD_SAMPLING),
    ("more biases than there are", {"sampling": {"num_logit_bias": 1}}, abi.REJECT_MALFORMED),
    ("count of biases huge", {"sampling": {"num_logit_bias": 0x80000000}}, abi.REJECT_MALFORMED),
    ("repetition penalty negative", {"sampling": {"repetition_penalty": -0.5}}, abi.REJECT_BAD_SAMPLING),
    ("repetition penalty NaN", {"sampling": {"repetition_penalty": float("nan")}}, abi.REJECT_BAD_SAMPLING),
    ("presence penalty", {"sampling": {"presence_penalty": 2.1}}, abi.REJECT_BAD_SAMPLING),
    ("frequency penalty", {"sampling": {"frequency_penalty": float("inf")}}, abi.REJECT_BAD_SAMPLING),
    ("too many top logprobs", {"sampling": {"num_top_logprobs": 21}}, abi.REJECT_BAD_SAMPLING),
    ("more prior outputs than ids", {"body": {"num_prior_outputs": 4}}, abi.REJECT_MALFORMED),
    ("constraint of an empty slot", {"body": {"constraint": 1}}, abi.REJECT_BAD_CONSTRAINT),
    ("constraint of no slot", {"body": {"constraint": 0xFFFFFFFF}}, abi.REJECT_BAD_CONSTRAINT),
]


@pytest.mark.parametrize(("words", "reason"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES])
def test_bad_body_is_rejected_with_its_reason(rig: SamplingRig, words: dict[str, Any], reason: int) -> None:
    send(rig.ingresses[0], 7, [5, 6, 7], 2, **words)
    send(rig.ingresses[0], 8, [5, 6, 7], 2, bias=((3, 1.0),))
    assert ends_of(serve(rig)) == {
        7: (abi.COMPLETION_REJECT, reason),
        8: (abi.COMPLETION_FINISH, abi.FINISH_LENGTH),
    }


def test_without_memory_for_it_each_feature_is_rejected() -> None:
    rig = Rig(Shape())
    rig.attach_all()
    send(rig.ingresses[0], 1, [5], 2, bias=((3, 1.0),))
    for request_id, name in enumerate(("presence_penalty", "repetition_penalty", "num_top_logprobs"), start=2):
        send(rig.ingresses[0], request_id, [5], 2, sampling={name: 2})
    send(rig.ingresses[0], 5, [5], 2, body={"constraint": 1})
    ends = ends_of(serve(rig))
    assert [ends[i] for i in range(1, 5)] == [(abi.COMPLETION_REJECT, abi.REJECT_BAD_SAMPLING)] * 4
    assert ends[5] == (abi.COMPLETION_REJECT, abi.REJECT_BAD_CONSTRAINT)


def test_random_bodies_are_never_a_fault(rig: SamplingRig) -> None:
    """Thousands of bodies: random bytes, and good ones with some words changed."""
    rng = random.Random(31)
    ingress = rig.ingresses[0]
    num_bodies = 4000 if rig.kind == "single" else 400
    answered: set[int] = set()
    accepted: set[int] = set()
    for request_id in range(1, num_bodies + 1):
        num_bias, num_stop = rng.choice([0, 0, 3, 100]), rng.choice([0, 2, 16])
        num_prompt = rng.randint(1, 20)
        head = np.zeros(1, abi.REQUEST_BODY)
        head["sampling"]["top_p"], head["sampling"]["num_logit_bias"], head["num_stop_ids"] = 1.0, num_bias, num_stop
        words = np.frombuffer(head.tobytes(), np.uint32).copy()
        words = np.append(
            words, np.array([rng.randrange(VOCAB) for _ in range(num_stop + 2 * num_bias + num_prompt)], np.uint32)
        )
        if rng.random() < 0.3:
            words = np.frombuffer(rng.randbytes(words.nbytes), np.uint32).copy()
        for _ in range(rng.choice([0, 0, 1, 3])):
            words[rng.randrange(len(words))] = rng.choice([0, 1, 2, 17, 0x7F800000, 0xFFFFFFFF, rng.getrandbits(32)])
        raw = words.tobytes()[: len(words) * 4 - rng.choice([0, 0, 0, 2, 4, 64])]
        send_bytes(ingress, request_id, raw, num_prompt + rng.choice([0, 0, 0, 1, -1]), rng.randint(1, 3))
        if rng.random() < 0.2:
            load(
                ingress, rng.randrange(NUM_SLOTS + 1), rng.randbytes(rng.randint(1, 300)), rng.choice([0, 0, 16, 64, 7])
            )
        while ingress.num_free_entries() < 2 or rng.random() < 0.3:
            rig.step(plain_sampler)
            for entry in ingress.read():
                if entry.kind in (abi.COMPLETION_FINISH, abi.COMPLETION_REJECT):
                    assert entry.request_id not in answered
                    answered.add(entry.request_id)
                elif entry.kind == abi.COMPLETION_ACK:
                    accepted.add(entry.request_id)
        ingress.arena_pos = max(ingress.arena_pos, (int(rig.queue_pair(0).arena_consumer_pos) + 63) // 64 * 64)
        ingress.beat()
    for entry in serve(rig, 300):
        if entry.kind in (abi.COMPLETION_FINISH, abi.COMPLETION_REJECT):
            answered.add(entry.request_id)
    assert answered == set(range(1, num_bodies + 1)) and len(accepted) > num_bodies // 20
    assert rig.live_requests() == {}


# ---- Constraints -----------------------------------------------------------------------------------------------------
TABLE = build_constraint_table(VOCAB, [{5: 1}, {6: 0, 7: 1}], max_bytes=SLOT_BYTES).data
END_OF = {True: (abi.COMPLETION_FINISH, abi.FINISH_LENGTH), False: (abi.COMPLETION_REJECT, abi.REJECT_BAD_CONSTRAINT)}


@pytest.mark.parametrize(
    ("pieces", "is_whole"),
    [
        ([(0, 0, len(TABLE))], True),
        ([(0, 0, 64), (64, 64, len(TABLE))], True),
        ([(0, 0, 64), (64, 64, 512), (512, 512, len(TABLE))], True),
        ([(0, 0, 64), (0, 0, len(TABLE))], True),
        ([(0, 0, 64), (128, 128, len(TABLE))], False),
        ([(64, 64, len(TABLE)), (0, 0, 64)], False),
        ([(0, 0, 64), (64, 64, 128), (64, 64, len(TABLE))], False),
        ([(0, 0, 72), (72, 72, len(TABLE))], False),
        ([(0, 0, len(TABLE)), (0, 0, 64)], False),
        ([(0, 0, len(TABLE)), (1 << 63, 0, 64)], False),
        ([(0, 0, len(TABLE)), (SLOT_BYTES, 0, 64)], False),
    ],
    ids=str,
)
def test_pieces_make_a_whole_in_order_only(
    rig: SamplingRig, pieces: list[tuple[int, int, int]], is_whole: bool
) -> None:
    ingress = rig.ingresses[0]
    for offset, begin, end in pieces:
        load(ingress, 2, TABLE[begin:end], offset)
    send(ingress, 1, [5], 2, body={"constraint": 3})
    send(ingress, 2, [5], 2, body={"constraint": 3, "constraint_state": 2})
    assert ends_of(serve(rig)) == {1: END_OF[is_whole], 2: END_OF[False]}
    if is_whole:
        begin = 2 * SLOT_BYTES
        assert rig.tables["constraints"][begin : begin + len(TABLE)].tobytes() == TABLE
        assert not rig.tables["constraints"][:begin].any()


@pytest.mark.parametrize("word", ["num_prompt_tokens", "max_tokens", "priority", "timeout_ns", "cache_salt"])
def test_reserved_words_of_a_piece_are_zero(rig: SamplingRig, word: str) -> None:
    load(rig.ingresses[0], 0, TABLE, 0, **{word: 1})
    send(rig.ingresses[0], 1, [5], 2, body={"constraint": 1})
    assert ends_of(serve(rig)) == {1: END_OF[False]}


def test_piece_outside_the_arena_is_dropped_without_an_answer(rig: SamplingRig) -> None:
    ingress = rig.ingresses[0]
    load(ingress, 0, TABLE)
    load(ingress, 0, TABLE, arena_pos=1 << 40)
    load(ingress, NUM_SLOTS, TABLE)
    load(ingress, 1 << 40, TABLE)
    send(ingress, 1, [5], 2, body={"constraint": 1})
    assert ends_of(serve(rig)) == {1: END_OF[False]}


# ---- Counts and positions --------------------------------------------------------------------------------------------
def count_slots(rig: Rig) -> dict[int, int]:
    """By request id of what runs: slot + 1."""
    words = rig.requests.view(np.uint32).reshape(rig.shape.num_requests, -1)
    found = {}
    for i in range(rig.shape.num_requests):
        if rig.request(i).state == 2:
            found[rig.request(i).request_id] = int(words[i, 328 // 4])
    return found


def test_running_requests_with_penalties_have_slots_of_their_own(rig: SamplingRig) -> None:
    rng = random.Random(3)
    ingress = rig.ingresses[0]
    for request_id in range(1, 60):
        penalty = {"frequency_penalty": 0.5} if request_id % 3 else {}
        send(ingress, request_id, [5] * rng.randint(1, 40), rng.randint(1, 12), sampling=penalty)
        while ingress.num_free_entries() < 2 or rng.random() < 0.6:
            serve(rig, 1)
            slots = count_slots(rig)
            used = [slot for request, slot in slots.items() if request % 3]
            assert len(set(used)) == len(used) and all(1 <= slot <= rig.shape.max_batch for slot in used)
            assert all(slot == 0 for request, slot in slots.items() if request % 3 == 0)


def test_output_positions_go_on_from_an_earlier_life(rig: SamplingRig) -> None:
    send(rig.ingresses[0], 1, [5, 6, 7, 8], 3, body={"num_prior_outputs": 3})
    found = serve(rig)
    assert [entry.output_idx for entry in found if entry.kind == abi.COMPLETION_TOKEN] == [3, 4, 5]
    (finish,) = [entry for entry in found if entry.kind == abi.COMPLETION_FINISH]
    assert finish.output_idx == 3, "outputs of this life"


# ---- Top logprobs ----------------------------------------------------------------------------------------------------
def test_tops_follow_their_token_through_many_laps(rig: SamplingRig) -> None:
    """A ring of 64 entries, and requests with none to all of the alternatives: in order, and never over what was not read."""
    rng = random.Random(9)
    ingress = rig.ingresses[0]
    wanted: dict[int, int] = {}
    found: list[Completion] = []
    for request_id in range(1, 40):
        wanted[request_id] = rng.choice([0, 1, 5, 20])
        send(ingress, request_id, [5, 6], rng.randint(1, 9), sampling={"num_top_logprobs": wanted[request_id]})
        while ingress.num_free_entries() < 2 or rng.random() < 0.5:
            rig.step(plain_sampler)
            found += ingress.read(rng.choice([None, 3, 30]))
    for _ in range(300):
        rig.step(plain_sampler)
        found += ingress.read()
    assert len(ends_of(found)) == 39 and rig.live_requests() == {}
    place = 0
    while place < len(found):
        entry = found[place]
        place += 1
        assert entry.kind != abi.COMPLETION_TOP
        if entry.kind == abi.COMPLETION_TOKEN:
            tops = found[place : place + wanted[entry.request_id]]
            assert [(top.kind, top.request_id, top.output_idx, top.token) for top in tops] == [
                (abi.COMPLETION_TOP, entry.request_id, rank, rank) for rank in range(wanted[entry.request_id])
            ]
            place += len(tops)


def test_more_tops_than_the_ring_holds_are_rejected() -> None:
    rig = SamplingRig(Shape(num_completions=16))
    rig.attach_all()
    send(rig.ingresses[0], 1, [5], 2, sampling={"num_top_logprobs": 15})
    send(rig.ingresses[0], 2, [5], 2, sampling={"num_top_logprobs": 14})
    found = serve(rig)
    assert Completion(abi.COMPLETION_REJECT, abi.REJECT_BAD_SAMPLING, 14, 1, 0) in found
    assert ends_of(found)[2] == (abi.COMPLETION_FINISH, abi.FINISH_LENGTH)


def test_no_token_is_the_end_of_its_request_alone(rig: SamplingRig) -> None:
    for request_id in (1, 2):
        send(rig.ingresses[0], request_id, [5], 4)
    found = []
    for step in range(8):
        rig.poll()
        if rig.plan():
            rig.run_workers(plain_sampler)
            if step == 1:  # as no_token() of device/step_plan.cuh says it
                samples = rig.samples_of_step[rig.num_commits]
                rig.sampled[
                    rig.num_commits & 1, [i for i, (request_id, _) in enumerate(samples) if request_id == 2]
                ] = (0, 1.0)
                rig.run_workers = lambda _: None  # type: ignore[method-assign]
            rig.commit(plain_sampler)
            rig.__dict__.pop("run_workers", None)
        rig.publish()
        rig.check()
        found += rig.ingresses[0].read()
    assert ends_of(found) == {
        1: (abi.COMPLETION_FINISH, abi.FINISH_LENGTH),
        2: (abi.COMPLETION_FINISH, abi.FINISH_CONSTRAINT),
    }
    finish = [entry for entry in found if entry.kind == abi.COMPLETION_FINISH and entry.request_id == 2]
    assert [entry.output_idx for entry in finish] == [1]
    assert rig.engine_status("finished_constraint") == 1
