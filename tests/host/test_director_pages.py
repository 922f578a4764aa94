"""KV pages: exhaustion, preemption by recompute, who gives way, and that no page is lost.

Run: pytest tests/host/test_director_pages.py
"""

from __future__ import annotations

import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import Rig, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

FINISH = abi.COMPLETION_FINISH


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_page_exhaustion_preempts_and_every_token_is_right(kind: str) -> None:
    """K1: tokens that were delivered before a preemption are neither repeated nor skipped."""
    rig = Rig(Shape(num_pages=6, max_context=256, max_batch=6), kind)
    rig.attach_all()
    num_requests = 6 if kind == "single" else 4
    for request_id in range(1, num_requests + 1):
        assert rig.ingresses[0].submit(request_id, [1] * 50, 100)
    found: list[Completion] = []
    num_steps = 0
    while sum(entry.kind == FINISH for entry in found) < num_requests:
        rig.step(plain_sampler)
        found += rig.ingresses[0].read()
        num_steps += 1
        assert num_steps < 2000
    assert rig.engine_status("preemptions") > 0
    for request_id in range(1, num_requests + 1):
        assert outputs(found, request_id) == [plain_sampler(request_id, i) for i in range(100)]
    assert rig.engine_status("num_pages_free") == 6
    assert rig.engine_status("prompt_tokens") > 50 * num_requests, "recomputation is counted"


def test_the_oldest_is_never_preempted_for_a_younger_one() -> None:
    """S4: in order of age they reach their end, whatever the shortage."""
    rig = Rig(Shape(num_pages=4, max_context=256, max_batch=4))
    rig.attach_all()
    for request_id in range(1, 5):
        assert rig.ingresses[0].submit(request_id, [1] * 30, 200)
    found: list[Completion] = []
    while sum(entry.kind == FINISH for entry in found) < 4:
        running = rig.running()
        rig.step(plain_sampler)
        found += rig.ingresses[0].read()
        done = {entry.request_id for entry in found if entry.kind == FINISH}
        if running and running[0] not in done:
            assert rig.running()[0] == running[0]
    assert [entry.request_id for entry in found if entry.kind == FINISH] == [1, 2, 3, 4]


def test_a_request_of_all_pages_runs_alone() -> None:
    """T2: it is accepted, waits for the others to end, and is not starved by small ones that come later."""
    rig = Rig(Shape(num_pages=4, max_context=256, max_batch=4, num_queue_pairs=2))
    rig.attach_all()
    small, large = rig.ingresses
    assert small.submit(1, [1] * 30, 30)
    rig.step(plain_sampler)
    assert large.submit(1, [1] * 250, 6)
    found: list[Completion] = []
    for turn in range(300):
        small.submit(100 + turn, [1] * 30, 30)
        rig.step(plain_sampler)
        small.read()
        found += large.read()
    assert len(outputs(found, 1)) == 6 and found[-1].kind == FINISH


def test_admission_keeps_a_watermark_while_others_run() -> None:
    rig = Rig(Shape(num_pages=3, max_context=128, max_batch=3))
    rig.attach_all()
    for request_id in range(1, 4):
        assert rig.ingresses[0].submit(request_id, [1] * 20, 20)
    rig.step(plain_sampler)
    assert rig.running() == [1, 2] and rig.engine_status("num_pages_free") == 1


@pytest.mark.parametrize("kind", ["single", "lanes"])
def test_stalled_requests_give_pages_and_places_to_others(kind: str) -> None:
    """S5: a client that does not read holds all pages and batch places; another queue pair is served within kStallPatience plans."""
    rig = Rig(Shape(num_queue_pairs=2, num_pages=8, max_context=256, max_batch=2, num_completions=16), kind)
    rig.attach_all()
    lazy, other = rig.ingresses
    for request_id in (1, 2):
        assert lazy.submit(request_id, [1] * 100, 100)
    for _ in range(12):
        rig.step(plain_sampler)
    assert rig.running() == [1, 2] and rig.engine_status("credit_stalls") > 0
    assert other.submit(7, [1] * 200, 20)
    found: list[Completion] = []
    for _ in range(16 + 4 + 20 + 4):
        rig.step(plain_sampler)
        found += other.read()
    assert len(outputs(found, 7)) == 20
    late: list[Completion] = []
    for _ in range(250):
        late += lazy.read(8)
        rig.step(plain_sampler)
    for request_id in (1, 2):
        assert outputs(late, request_id) == [plain_sampler(request_id, i) for i in range(100)]


def test_a_reader_that_is_a_step_late_keeps_its_pages() -> None:
    """S5, the other half: it stalls again and again, but never for kStallPatience plans in a row."""
    rig = Rig(Shape(num_queue_pairs=2, num_pages=4, max_context=256, max_batch=1, num_completions=4))
    rig.attach_all()
    late, other = rig.ingresses
    assert late.submit(1, [1] * 30, 40)
    rig.step(plain_sampler)
    assert other.submit(1, [1] * 30, 4)
    found: list[Completion] = []
    for turn in range(300):
        rig.step(plain_sampler)
        if turn % 5 == 0:
            found += late.read()
        other.read()
    assert len(outputs(found, 1)) == 40
    assert rig.engine_status("credit_stalls") > 10 and rig.engine_status("preemptions") == 0


def test_pages_are_taken_from_the_stack_in_order_and_return_to_it() -> None:
    rig = Rig(Shape(num_pages=16))
    rig.attach_all()
    assert rig.ingresses[0].submit(1, [1] * 200, 60)
    rig.step(plain_sampler)
    assert list(rig.page_tables[0, :4]) == [0, 1, 2, 3]
    assert list(rig.page_owners[:5]) == [1, 1, 1, 1, 0]
    for _ in range(80):
        rig.step(plain_sampler)
        rig.ingresses[0].read()
    assert rig.engine_status("num_pages_free") == 16 and not rig.page_owners.any()
    assert sorted(rig.free_pages) == list(range(16))
