"""Intake: every way an entry can be wrong gets its reason, nothing is a fault, and the ring goes on.

Run: pytest tests/host/test_director_intake.py
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import VOCAB, Rig, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

NAN = float("nan")
INF = float("inf")


def reject(reason: int, request_id: int, limit: int = 0) -> Completion:
    return Completion(abi.COMPLETION_REJECT, reason, limit, request_id, 0)


def serve(rig: Rig, num_steps: int = 8) -> list[Completion]:
    found = []
    for _ in range(num_steps):
        rig.step(plain_sampler)
        found += rig.ingresses[0].read()
    return found


@pytest.fixture
def rig() -> Rig:
    rig = Rig(Shape(num_pages=12, max_context=1024))
    rig.attach_all()
    return rig


BAD_SAMPLING: dict[str, list[float]] = {
    "temperature": [-1.0, NAN, INF, -INF],
    "top_p": [0.0, -0.5, 1.001, NAN, INF],
    "min_p": [-0.001, 1.5, NAN, INF],
    "ignore_eos": [2, 0xFFFFFFFF],
}
BAD_REQUESTS: list[tuple[str, dict[str, Any], int, int]] = [
    ("no body", {"body_bytes": 0}, abi.REJECT_MALFORMED, 0),
    ("body shorter than its header", {"body_bytes": 124}, abi.REJECT_MALFORMED, 0),
    ("body not of whole ids", {"body_bytes": 142}, abi.REJECT_MALFORMED, 0),
    ("fewer ids than prompt tokens", {"body_bytes": 136}, abi.REJECT_MALFORMED, 0),
    ("too many stop ids", {"body_bytes": 128 + 4 * (3 + abi.MAX_STOP_IDS + 1)}, abi.REJECT_MALFORMED, 0),
    ("body larger than the arena", {"body_bytes": 0xFFFFFFFC}, abi.REJECT_MALFORMED, 0),
    ("arena position misaligned", {"arena_pos": 4}, abi.REJECT_MALFORMED, 0),
    ("arena position far ahead", {"arena_pos": 1 << 40}, abi.REJECT_MALFORMED, 0),
    ("arena position at the end of time", {"arena_pos": (1 << 64) - 64}, abi.REJECT_MALFORMED, 0),
    ("body across the arena's end", {"arena_pos": 16384 - 128, "body_bytes": 140}, abi.REJECT_MALFORMED, 0),
    ("counts that disagree", {"body": {"num_stop_ids": 2}}, abi.REJECT_MALFORMED, 0),
    ("count of stop ids huge", {"body": {"num_stop_ids": 0xFFFFFFFF}}, abi.REJECT_MALFORMED, 0),
    ("body reserved0", {"body": {"reserved0": 1}}, abi.REJECT_MALFORMED, 0),
    ("body reserved5", {"body": {"reserved5": 1}}, abi.REJECT_MALFORMED, 0),
    ("sampling reserved0", {"sampling": {"reserved0": 1}}, abi.REJECT_MALFORMED, 0),
    ("no prompt", {"num_prompt_tokens": 0}, abi.REJECT_PROMPT_EMPTY, 0),
    ("no output", {"max_tokens": 0}, abi.REJECT_BAD_SAMPLING, 1),
    ("longer than the context", {"max_tokens": 1022}, abi.REJECT_TOO_LONG, 1024),
    ("sum overflows 32 bits", {"max_tokens": 0xFFFFFFFF}, abi.REJECT_TOO_LONG, 1024),
    ("prompt count overflows", {"num_prompt_tokens": 0xFFFFFFFF}, abi.REJECT_TOO_LONG, 1024),
    ("more pages than exist", {"max_tokens": 12 * 64 - 2}, abi.REJECT_TOO_LONG, 12 * 64),
    ("prompt token", {"prompt": [5, VOCAB, 7]}, abi.REJECT_BAD_TOKEN, VOCAB),
    ("last prompt token", {"prompt": [5, 6, 0xFFFFFFFF]}, abi.REJECT_BAD_TOKEN, VOCAB),
    ("stop token", {"stop_ids": [1, VOCAB]}, abi.REJECT_BAD_TOKEN, VOCAB),
    *(
        (f"{name} {value}", {"sampling": {name: value}}, abi.REJECT_BAD_SAMPLING, 0)
        for name, values in BAD_SAMPLING.items()
        for value in values
    ),
]


@pytest.mark.parametrize(
    ("words", "reason", "limit"), [case[1:] for case in BAD_REQUESTS], ids=[case[0] for case in BAD_REQUESTS]
)
def test_bad_request_is_rejected_with_its_reason(rig: Rig, words: dict[str, Any], reason: int, limit: int) -> None:
    ingress = rig.ingresses[0]
    good_arena_pos = ingress.arena_pos
    assert ingress.submit(7, **{"prompt": [5, 6, 7], "max_tokens": 2, **words})
    assert serve(rig, 2) == [reject(reason, 7, limit)]
    assert rig.live_requests() == {} and rig.engine_status("requests_rejected") == 1
    # T3: the arena is freed by entries that lie in it only, and the next good request passes. An ingress that claimed more bytes than it
    # wrote goes on behind them.
    freed = rig.queue_pair(0).arena_consumer_pos
    assert freed in (
        good_arena_pos,
        good_arena_pos + words.get("body_bytes", 128 + 4 * (3 + len(words.get("stop_ids", [])))),
    )
    ingress.arena_pos = max(ingress.arena_pos, (freed + 63) // 64 * 64)
    assert ingress.submit(8, [1, 2, 3], 2)
    assert len(outputs(serve(rig), 8)) == 2


@pytest.mark.parametrize("op", [0, 5, 255])
def test_unknown_operation_is_malformed(rig: Rig, op: int) -> None:
    rig.ingresses[0].write_entry(op, 9)
    assert serve(rig, 2) == [reject(abi.REJECT_MALFORMED, 9)]


@pytest.mark.parametrize("bits", [1 << 1, 1 << 7, 1 << 16, 1 << 31])
def test_reserved_bits_of_the_commit_word_are_malformed(rig: Rig, bits: int) -> None:
    rig.ingresses[0].write_entry(abi.SUBMISSION_PING, 9, commit_bits=bits)
    assert serve(rig, 2) == [reject(abi.REJECT_MALFORMED, 9)]


def test_limits_themselves_are_accepted(rig: Rig) -> None:
    ingress = rig.ingresses[0]
    sampling = {
        "temperature": 3.4e38,
        "top_p": 1e-30,
        "min_p": 1.0,
        "top_k": 0xFFFFFFFF,
        "seed": (1 << 64) - 1,
        "ignore_eos": 1,
    }
    stop_ids = list(range(300, 300 + abi.MAX_STOP_IDS))
    assert ingress.submit(1, [VOCAB - 1, 0], 12 * 64 - 2, stop_ids, sampling)
    assert serve(rig, 1)[0].kind == abi.COMPLETION_ACK


def test_sampling_parameters_stand_at_byte_0_of_the_request(rig: Rig) -> None:
    assert rig.ingresses[0].submit(1, [4], 5, [9], {"temperature": 0.5, "top_k": 3, "seed": 77})
    rig.poll()
    sampling = rig.requests[: abi.SAMPLING_PARAMS.itemsize // 8].view(abi.SAMPLING_PARAMS)[0]
    assert (sampling["temperature"], sampling["top_k"], sampling["seed"], sampling["top_p"]) == (0.5, 3, 77, 1.0)


def test_ping_is_answered_with_the_clients_time(rig: Rig) -> None:
    ingress = rig.ingresses[0]
    ingress.write_entry(abi.SUBMISSION_PING, 5, client_ns=123456789)
    rig.step(plain_sampler)
    assert int(ingress.completions[0]["device_ns"]) == 123456789
    assert ingress.read() == [Completion(abi.COMPLETION_PONG, 0, 0, 5, 0)]


def test_duplicate_id_is_rejected_while_the_first_lives_and_welcome_after(rig: Rig) -> None:
    ingress = rig.ingresses[0]
    assert ingress.submit(7, [1, 2], 3) and ingress.submit(7, [3, 4], 3)
    found = serve(rig)
    assert reject(abi.REJECT_DUPLICATE, 7) in found and len(outputs(found, 7)) == 3
    assert ingress.submit(7, [1, 2], 3)
    assert len(outputs(serve(rig), 7)) == 3


def test_same_id_on_two_queue_pairs_is_two_requests() -> None:
    rig = Rig(Shape(num_queue_pairs=2))
    rig.attach_all()
    for ingress in rig.ingresses:
        assert ingress.submit(7, [1, 2], 3)
    for _ in range(6):
        rig.step(plain_sampler)
    assert all(len(outputs(ingress.read(), 7)) == 3 for ingress in rig.ingresses)


def test_quota_leaves_submissions_in_the_ring() -> None:
    """Beyond it nothing is lost: what waits is taken as others end."""
    rig = Rig(Shape(max_requests_per_queue_pair=2, max_batch=2))
    rig.attach_all()
    ingress = rig.ingresses[0]
    for request_id in range(1, 7):
        assert ingress.submit(request_id, [1], 3)
    rig.poll()
    assert rig.queue_pair(0).submission_consumer_pos == 2 and len(rig.live_requests()) == 2
    found = serve(rig, 20)
    assert all(len(outputs(found, request_id)) == 3 for request_id in range(1, 7))


def test_a_free_entry_is_kept_for_queue_pairs_that_hold_none() -> None:
    rig = Rig(Shape(num_queue_pairs=2, num_requests=4))
    rig.attach_all()
    greedy, modest = rig.ingresses
    for request_id in range(1, 9):
        assert greedy.submit(request_id, [1], 50)
    rig.poll()
    assert rig.queue_pair(0).num_waiting == 3
    assert modest.submit(1, [1], 2)
    for _ in range(4):
        rig.step(plain_sampler)
    assert len(outputs(modest.read(), 1)) == 2


def test_entry_of_another_epoch_is_dropped_without_an_answer(rig: Rig) -> None:
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1], 2, epoch=0xDEAD)
    ingress.write_entry(abi.SUBMISSION_PING, 2)
    assert serve(rig, 2) == [Completion(abi.COMPLETION_PONG, 0, 0, 2, 0)]


def test_drain_rejects_new_requests_and_finishes_the_others(rig: Rig) -> None:
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1], 5)
    serve(rig, 1)
    rig.command(abi.COMMAND_DRAIN)
    assert ingress.submit(2, [1], 5)
    found = serve(rig, 8)
    assert reject(abi.REJECT_DRAINING, 2) in found and found[-1] == Completion(
        abi.COMPLETION_FINISH, abi.FINISH_LENGTH, 1, 1, 5
    )
    assert rig.engine_status("state") == abi.ENGINE_DRAINING


@pytest.mark.parametrize("seed", range(12))
def test_random_bytes_never_fault(seed: int) -> None:
    """Entries and arena of random bytes, mixed with good requests: each entry is answered or dropped, the good ones are served."""
    source = random.Random(seed)
    rig = Rig(Shape(num_pages=8, max_requests_per_queue_pair=64, num_completions=32))
    rig.attach_all()
    ingress = rig.ingresses[0]
    rng = np.random.default_rng(seed)
    num_good = 0
    found: list[Completion] = []
    for turn in range(400):
        ingress.arena_pos = max(ingress.arena_pos, (rig.queue_pair(0).arena_consumer_pos + 63) // 64 * 64)
        if ingress.num_free_entries() > 0 and source.random() < 0.6:
            words = rng.integers(0, 1 << 32, 16, np.uint32)
            entry = words.view(abi.SUBMISSION_ENTRY)[0]
            if source.random() < 0.8:  # near misses go deeper than noise
                entry["epoch"] = ingress.epoch
                entry["arena_pos"] = ingress.arena_pos + source.choice([0, 0, 64, 16320])
                entry["num_prompt_tokens"] = source.choice([1, 3, 8, 1000])
                entry["body_bytes"] = 64 + 4 * source.choice([1, 3, 8, 24, 1000])
                entry["max_tokens"] = source.choice([1, 5, 2000])
            names = [name for name in abi.SUBMISSION_ENTRY.names or () if name != "commit"]
            if source.random() < 0.5:
                ingress.arena[:] = rng.integers(0, 256, ingress.arena_bytes, np.uint8)
            ingress.write_entry(
                source.choice([0, 1, 1, 1, 2, 3, 77]),
                turn,
                **{name: int(entry[name]) for name in names if name != "request_id"},
            )
        elif ingress.submit(100_000 + turn, [1, 2, 3], 2):
            num_good += 1
        rig.step(plain_sampler)
        found += ingress.read()
    found += serve(rig, 3000 // 8)
    finished = {entry.request_id for entry in found if entry.kind == abi.COMPLETION_FINISH}
    answered = {entry.request_id for entry in found if entry.kind == abi.COMPLETION_REJECT}
    good = {request_id for request_id in finished | answered if request_id >= 100_000}
    assert len(good) == num_good > 20
    assert not rig.live_requests() and rig.engine_status("num_pages_free") == 8
