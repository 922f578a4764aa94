"""The integrity check finds what it claims to find: each damaged word of the state is a fault with the terms of its equation.

Run: pytest tests/host/test_director_integrity.py
"""

from __future__ import annotations

import time

import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import VOCAB, Rig, Shape, plain_sampler

# Sites of device/fault.cuh
SAMPLED_TOKEN, PAGE_COUNT, PAGE_TWICE, PAGE_OWNER, PAGE_NEED = 3, 10, 11, 12, 13
REQUEST_COUNT, QUEUE_COUNT, RUNNING_LIST, CREDIT, REQUEST_BALANCE, REQUEST_LOOKUP = 14, 15, 16, 17, 18, 19


def busy_rig(kind: str) -> Rig:
    """Two requests run (entries 0 and 1, two pages each), one waits."""
    rig = Rig(Shape(num_pages=8, max_batch=2), kind)
    rig.attach_all()
    for request_id in (1, 2, 3):
        assert rig.ingresses[0].submit(request_id, [1] * 100, 20)
    for _ in range(8):
        rig.step(plain_sampler)
    assert rig.running() == [1, 2]
    return rig


DAMAGE = [  # what, kind, where, value, site
    ("free pages lost", 0, 0, 3, PAGE_COUNT),
    ("free pages invented", 0, 0, 5, PAGE_COUNT),
    ("free pages beyond all pages", 0, 0, 0xFFFFFFFF, PAGE_COUNT),
    ("page of another request", 1, 0, 2, PAGE_OWNER),
    ("page number out of range", 1, 0, 0xFFFFFFF0, PAGE_OWNER),
    ("owner of a free page", 2, 7, 1, PAGE_OWNER),
    ("owner of a used page", 2, 0, 0, PAGE_OWNER),
    ("page twice on the stack", 9, 0, 6, PAGE_TWICE),
    ("running list names one twice", 3, 1, 0, RUNNING_LIST),
    ("running list names a waiting request", 3, 1, 2, RUNNING_LIST),
    ("running list names no request", 3, 0, 9999, RUNNING_LIST),
    ("waiting count", 4, 0, 2, QUEUE_COUNT),
    ("credit overdrawn", 5, 0, 1000, CREDIT),
    ("accepted requests", 6, 0, 77, REQUEST_BALANCE),
    ("computed beyond its pages", 7, 0, 129, PAGE_NEED),
    ("request id", 8, 2, 4711, REQUEST_LOOKUP),
]


@pytest.mark.parametrize("kind", ["single", "lanes"])
@pytest.mark.parametrize(("what", "where", "value", "site"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_found(kind: str, what: int, where: int, value: int, site: int) -> None:
    rig = busy_rig(kind)
    rig.native.bk_director_damage(rig.address, what, where, value)
    assert rig.native.bk_director_check_integrity(rig.address) == 0
    fault = rig.fault()
    assert (fault["code"], fault["site"]) == (abi.FAULT_INTEGRITY, site)
    assert fault["expected"] != fault["seen"]
    rig.publish()
    assert rig.engine_status("state") == abi.ENGINE_FAULTED


def test_page_count_fault_holds_every_term() -> None:
    rig = busy_rig("single")
    rig.native.bk_director_damage(rig.address, 0, 0, 3)
    assert rig.native.bk_director_check_integrity(rig.address) == 0
    seen = rig.fault()["seen"]
    assert (rig.fault()["expected"], seen & 0xFFFFFF, seen >> 24 & 0xFFFFFF, seen >> 48) == (8, 3, 4, 0)


def test_first_fault_wins() -> None:
    rig = busy_rig("single")
    rig.native.bk_director_damage(rig.address, 0, 0, 3)
    rig.native.bk_director_check_integrity(rig.address)
    first = rig.fault()
    rig.native.bk_director_damage(rig.address, 0, 0, 4)
    rig.native.bk_director_damage(rig.address, 6, 0, 77)
    assert rig.native.bk_director_check_integrity(rig.address) == 0
    assert rig.fault() == first


def test_idle_director_checks_itself_but_not_all_the_time() -> None:
    rig = Rig(Shape())
    rig.attach_all()
    before, began = rig.engine_status("integrity_checks"), time.monotonic()
    for _ in range(100):
        rig.poll()
        rig.plan()
        rig.publish()
    # One is due now, and on a slow machine one more each second.
    assert rig.engine_status("integrity_checks") <= before + 2 + (time.monotonic() - began)
    rig.native.bk_director_age_integrity(rig.address, 2_000_000_000)
    now = rig.engine_status("integrity_checks")
    rig.plan()
    rig.publish()
    assert rig.engine_status("integrity_checks") == now + 1
    rig.native.bk_director_age_integrity(rig.address, 2_000_000_000)
    rig.native.bk_director_damage(rig.address, 6, 0, 77)
    rig.plan()
    assert rig.fault()["site"] == REQUEST_BALANCE


def test_sampled_token_outside_the_vocabulary_is_a_fault() -> None:
    rig = Rig(Shape())
    rig.attach_all()
    assert rig.ingresses[0].submit(1, [1], 5)
    rig.poll()
    assert rig.plan()
    rig.commit(lambda request_id, output_idx: VOCAB)
    fault = rig.fault()
    assert (fault["site"], fault["expected"], fault["seen"]) == (SAMPLED_TOKEN, VOCAB, VOCAB)


@pytest.mark.parametrize(
    ("name", "value", "condition"),
    [
        ("num_queue_pairs", 0, 1), ("num_queue_pairs", 33, 1), ("num_requests", 0, 2), ("num_requests", 1 << 16, 2),
        ("max_batch", 513, 3), ("max_step_tokens", 7, 4), ("max_step_tokens", 8193, 4), ("prefill_chunk_tokens", 0, 5),
        ("max_context", 1, 6), ("max_pages_per_request", 15, 6), ("num_pages", 0, 7), ("max_requests_per_queue_pair", 0, 9),
    ],
)  # fmt: skip
def test_params_that_cannot_be_right_are_a_fault_at_init(name: str, value: int, condition: int) -> None:
    rig = Rig(Shape())
    rig.params[0][name] = value
    rig.director_state[:] = 0
    rig.native.bk_director_init(rig.address)
    assert (rig.fault()["site"], rig.fault()["seen"]) == (1, condition)
    rig.poll()
    assert rig.native.bk_director_plan(rig.address, rig.plans[0].ctypes.data) == 0
    assert int(rig.plans[0][:64].view(abi.STEP_PLAN)[0]["flags"]) & abi.PLAN_EXIT
