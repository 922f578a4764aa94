"""The director's side of a queue pair: laps, credit, attach, drops, and a region that outlives a launch.

Run: pytest tests/host/test_ring_director.py
"""

from __future__ import annotations

import pytest

from blinkimp import ring_abi as abi
from tests.host.director_rig import Rig, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

FINISH = abi.COMPLETION_FINISH


def dump(rig: Rig, q: int) -> str:
    ingress = rig.ingresses[q]
    return (
        f"{rig.queue_pair(q)}\nsubmissions {ingress.submissions['commit']}\ncompletions {ingress.completions['commit']}"
    )


@pytest.mark.parametrize("kind", ["single", "lanes"])
@pytest.mark.parametrize(("num_submissions", "num_completions"), [(2, 2), (2, 8), (4, 4)])
def test_wrap_at_lap_boundary(kind: str, num_submissions: int, num_completions: int) -> None:
    """Many laps of tiny rings: every entry is seen once, in order (D2, D4)."""
    rig = Rig(Shape(num_submissions=num_submissions, num_completions=num_completions, arena_bytes=512), kind)
    rig.attach_all()
    ingress = rig.ingresses[0]
    found: list[Completion] = []
    next_id, num_requests = 1, 60 if kind == "single" else 12
    for _ in range(2000):
        if next_id <= num_requests and ingress.submit(next_id, [1, 2], 3):
            next_id += 1
        rig.step(plain_sampler)
        found += ingress.read()
        if next_id > num_requests and not rig.live_requests() and not ingress.num_free_entries() < num_submissions:
            break
    for request_id in range(1, num_requests + 1):
        expected = [plain_sampler(request_id, i) for i in range(3)]
        assert outputs(found, request_id) == expected, dump(rig, 0)
    assert [entry.request_id for entry in found if entry.kind == FINISH] == list(range(1, num_requests + 1))
    assert rig.queue_pair(0).published_pos == 5 * num_requests > 3 * num_completions


def test_unread_completions_are_never_overwritten() -> None:
    """C1, and credit exhaustion: one client stops reading, the others go on, nothing is lost, it resumes."""
    rig = Rig(Shape(num_queue_pairs=3, num_completions=16, num_requests=32))
    rig.attach_all()
    lazy, *others = rig.ingresses
    for request_id in range(1, 5):
        assert lazy.submit(request_id, [1, 2, 3], 40)
    served: list[list[Completion]] = [[], []]
    next_id = 1
    for _ in range(150):
        for ingress in others:
            ingress.submit(next_id, [4, 5], 6)
        next_id += 1
        rig.step(plain_sampler)
        for q, ingress in enumerate(others):
            served[q] += ingress.read()
    view = rig.queue_pair(0)
    assert view.published_pos - view.consumer_pos in (15, 16), "all of its credit, and not one more"
    assert rig.engine_status("credit_stalls") > 0
    for completions in served:
        assert sum(entry.kind == FINISH for entry in completions) > 50, "the others do not notice"
    found: list[Completion] = []
    for _ in range(600):
        found += lazy.read(5)
        rig.step(plain_sampler)
    for request_id in range(1, 5):
        assert outputs(found, request_id) == [plain_sampler(request_id, i) for i in range(40)], (
            "nothing lost, nothing twice"
        )
    assert sum(entry.kind == FINISH for entry in found) == 4


def test_finish_of_a_cancelled_request_waits_for_credit() -> None:
    """L2: its pages do not."""
    rig = Rig(Shape(num_completions=8))
    rig.attach_all()
    ingress = rig.ingresses[0]
    for request_id in (1, 2, 3):
        assert ingress.submit(request_id, [1] * 70, 100)
    for _ in range(12):
        rig.step(plain_sampler)
    assert rig.queue_pair(0).credit < 2, "stalled"
    for request_id in (1, 2, 3):
        ingress.write_entry(abi.SUBMISSION_CANCEL, request_id)
    rig.step(plain_sampler)
    assert rig.engine_status("num_pages_free") == rig.shape.num_pages
    assert rig.engine_status("num_finishing") >= 2 and rig.engine_status("finished_cancelled") == 3
    found: list[Completion] = []
    for _ in range(5):
        found += ingress.read()
        rig.step(plain_sampler)
    finishes = [entry for entry in found if entry.kind == FINISH]
    assert sorted(entry.request_id for entry in finishes) == [1, 2, 3]
    assert all(entry.reason == abi.FINISH_CANCELLED for entry in finishes)
    assert all(entry.output_idx == len(outputs(found, entry.request_id)) for entry in finishes), (
        "usage is what was delivered"
    )


@pytest.mark.parametrize("nonsense", [1 << 63, 1000, (1 << 64) - 1])
def test_nonsense_consumer_position_is_worth_no_credit(nonsense: int) -> None:
    rig = Rig(Shape(num_queue_pairs=2, num_completions=8))
    rig.attach_all()
    bad, _good = rig.ingresses
    for ingress in rig.ingresses:
        assert ingress.submit(1, [1], 20)
    bad.words["ingress"]["completion_consumer_pos"] = nonsense
    for _ in range(30):
        rig.step(plain_sampler)
        rig.ingresses[1].read()
    assert rig.queue_pair(0).credit == 0 and rig.queue_pair(0).published_pos <= 8
    assert rig.queue_pair(1).published_pos == 22, "ACK, 20 tokens, FINISH"
    found: list[Completion] = []
    for _ in range(30):
        found += bad.read()  # stores a sane position again
        rig.step(plain_sampler)
    assert len(outputs(found, 1)) == 20


def test_backward_consumer_position_is_no_news() -> None:
    rig = Rig(Shape(num_completions=8))
    rig.attach_all()
    ingress = rig.ingresses[0]
    assert ingress.submit(1, [1], 4)
    for _ in range(8):
        rig.step(plain_sampler)
        ingress.read()
    position = rig.queue_pair(0).consumer_pos
    ingress.words["ingress"]["completion_consumer_pos"] = 0
    rig.step(plain_sampler)
    assert rig.queue_pair(0).consumer_pos == position == 6


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("how", ["attach", "detach", "stale"])
def test_an_ingress_that_leaves_takes_its_requests_with_it(how: str, in_flight: bool) -> None:
    """Pages are free by the next commit, others do not notice, nothing of the old epoch reaches the new one (D1, D5, L3)."""
    rig = Rig(Shape(num_queue_pairs=2, max_batch=4, num_requests=16))
    rig.attach_all()
    leaver, other = rig.ingresses
    for request_id in range(1, 7):
        assert leaver.submit(request_id, [1] * 70, 50)
    assert other.submit(1, [9, 9], 30)
    kept: list[Completion] = []
    for _ in range(20):
        rig.step(plain_sampler)
        kept += other.read()
    leaver.submit(99, [1], 1)  # committed, not taken
    if in_flight:
        assert rig.plan()
    if how == "attach":
        leaver.ask_attach()
    elif how == "detach":
        leaver.detach()
    else:
        rig.age_heartbeat(0, 2 * rig.shape.ingress_timeout_ns)
    rig.poll()
    rig.check()
    if in_flight:
        rig.commit(plain_sampler)
        rig.check()
    rig.publish()
    owner = {view.queue_pair_idx for view in rig.live_requests().values()}
    assert owner == {1}, "all requests of the queue pair are gone"
    assert rig.engine_status("num_pages_used") == 1
    assert rig.engine_status("finished_cancelled") == 6
    assert rig.engine_status("ingress_drops") == (1 if how == "stale" else 0)
    if how != "attach":
        assert not leaver.is_attached and int(leaver.words["director"]["epoch"]) % 2 == 0
        leaver.ask_attach()
        rig.poll()
    assert leaver.finish_attach()
    assert leaver.submit(1, [1, 2], 3)
    found: list[Completion] = []
    for _ in range(40):
        rig.step(plain_sampler)
        found += leaver.read()
        kept += other.read()
    assert [entry.kind for entry in found] == [abi.COMPLETION_ACK, *[abi.COMPLETION_TOKEN] * 3, FINISH]
    assert len(outputs(kept, 1)) == 30


def test_dropped_ingress_is_not_served_until_it_asks_again() -> None:
    rig = Rig(Shape())
    rig.attach_all()
    ingress = rig.ingresses[0]
    rig.age_heartbeat(0, 2 * rig.shape.ingress_timeout_ns)
    rig.poll()
    ingress.beat()
    ingress.submit(1, [1], 1)
    for _ in range(3):
        rig.step(plain_sampler)
    assert rig.engine_status("requests_accepted") == 0 and not ingress.is_attached
    assert rig.engine_status("num_queue_pairs_attached") == 0


def test_a_moving_heartbeat_keeps_an_ingress() -> None:
    rig = Rig(Shape())
    rig.attach_all()
    for _ in range(5):
        rig.age_heartbeat(0, rig.shape.ingress_timeout_ns * 2)
        rig.ingresses[0].beat()
        rig.poll()
        assert rig.ingresses[0].is_attached


@pytest.mark.parametrize("kind", ["single", "lanes"])
@pytest.mark.parametrize("num_left_behind", [0, 1, 5, 8])
def test_attach_passes_over_what_an_earlier_epoch_committed(kind: str, num_left_behind: int) -> None:
    """Up to a whole ring of it, wherever in the lap."""
    rig = Rig(Shape(num_submissions=8), kind)
    rig.attach_all()
    ingress = rig.ingresses[0]
    for lap in range(5):
        for request_id in range(num_left_behind):
            ingress.write_entry(abi.SUBMISSION_PING, 1000 + request_id)
        ingress.ask_attach()
        rig.poll()
        assert ingress.finish_attach() and ingress.num_free_entries() == 8
        ingress.write_entry(abi.SUBMISSION_PING, lap)
        for _ in range(2):
            rig.step(plain_sampler)
        assert ingress.read() == [Completion(abi.COMPLETION_PONG, 0, 0, lap, 0)], dump(rig, 0)


def test_a_second_launch_goes_on_from_the_regions_positions() -> None:
    """The watchdog relaunches with zeroed device memory and the same queue pairs: the ingress attaches again, no entry is confused."""
    shape = Shape(num_submissions=4, num_completions=8)
    rig = Rig(shape)
    rig.attach_all()
    ingress = rig.ingresses[0]
    for request_id in range(1, 4):
        assert ingress.submit(request_id, [1], 9)
    for _ in range(6):
        rig.step(plain_sampler)
        ingress.read(2)
    # The launch ended between the commit words and their count.
    ingress.words["director"]["completion_producer_pos"] -= 1
    published = rig.queue_pair(0).published_pos
    for memory in (rig.director_state, rig.requests, rig.page_tables, rig.free_pages, rig.page_owners):
        memory[:] = 0
    rig.native.bk_director_init(rig.address)
    rig.num_commits = 0
    assert rig.queue_pair(0).published_pos == published
    assert not ingress.is_attached, "its requests are gone, so it must attach again"
    ingress.ask_attach()
    rig.poll()
    assert ingress.finish_attach()
    found: list[Completion] = []
    assert ingress.submit(1, [1], 5)
    for _ in range(12):
        rig.step(plain_sampler)
        found += ingress.read()
    assert outputs(found, 1) == [plain_sampler(1, i) for i in range(5)] and found[0].kind == abi.COMPLETION_ACK


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("magic", 1),
        ("abi_version", 99),
        ("num_completions", 48),
        ("arena_bytes", 1 << 40),
        ("completions_offset", 1 << 30),
    ],
)
def test_a_header_that_cannot_be_right_is_a_fault_at_init(word: str, value: int) -> None:
    rig = Rig(Shape(num_queue_pairs=2))
    rig.ingresses[1].words["header"][word] = value
    rig.director_state[:] = 0
    rig.native.bk_director_init(rig.address)
    rig.num_commits = 0
    assert rig.fault() == {"code": abi.FAULT_INTEGRITY, "site": 1, "expected": 0, "seen": 101, "step": 0}
    assert rig.engine_status("state") == abi.ENGINE_FAULTED


def test_a_header_that_changes_later_moves_no_pointer() -> None:
    rig = Rig(Shape())
    rig.attach_all()
    header = rig.ingresses[0].words["header"]
    for word in ("num_submissions", "num_completions", "arena_bytes", "submissions_offset", "arena_offset"):
        header[word] = 0x7FFFFFF0
    assert rig.ingresses[0].submit(1, [1, 2], 3)
    found: list[Completion] = []
    for _ in range(6):
        rig.step(plain_sampler)
        found += rig.ingresses[0].read()
    assert len(outputs(found, 1)) == 3
