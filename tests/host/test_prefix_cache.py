"""The prefix cache: what is shared and what is not, when pages leave it, and what a hit is worth on the emulated device.

The long comparison with a reference is test_director_stateful.py. Run: pytest tests/host/test_prefix_cache.py
"""

from __future__ import annotations

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.memory_plan import EngineSizes, prefix_cache_bytes_of
from tests.host.director_rig import Rig, Shape, outputs, plain_sampler
from tests.host.py_ingress import Completion

FINISH = abi.COMPLETION_FINISH
PROMPT = [7 + i % 300 for i in range(400)]
BOTH = pytest.mark.parametrize("kind", ["single", "lanes"])


def cache_rig(kind: str = "single", **changes: int) -> Rig:
    rig = Rig(Shape(prefix_cache=True, **changes), kind)  # type: ignore[arg-type]
    rig.attach_all()
    return rig


def run_to_end(rig: Rig, num_requests: int = 1) -> list[Completion]:
    found: list[Completion] = []
    for _ in range(4000):
        rig.step(plain_sampler)
        for ingress in rig.ingresses:
            found += ingress.read()
        if sum(entry.kind == FINISH for entry in found) == num_requests:
            return found
    raise AssertionError(f"{num_requests} requests never end: {rig.live_requests()}")


def cached_of(rig: Rig, request_id: int, prompt: list[int], q: int = 0, max_tokens: int = 3, **entry: int) -> int:
    """Runs a request alone; its cached tokens as FINISH reports them."""
    assert rig.ingresses[q].submit(request_id, prompt, max_tokens, **entry)
    assert outputs(run_to_end(rig), request_id) == [plain_sampler(request_id, i) for i in range(max_tokens)]
    return rig.ingresses[q].num_cached_tokens[request_id]


@BOTH
@pytest.mark.parametrize(
    ("num_common", "num_prompt", "num_hit"),
    [(400, 400, 384), (384, 384, 320), (383, 400, 320), (64, 400, 64), (63, 400, 0), (65, 65, 64), (64, 64, 0)],
)
def test_full_pages_of_the_common_beginning_are_shared(
    kind: str, num_common: int, num_prompt: int, num_hit: int
) -> None:
    """F4: at least the last token of a prompt is computed."""
    rig = cache_rig(kind)
    assert cached_of(rig, 1, PROMPT) == 0
    prompt = PROMPT[:num_common] + [500] * (num_prompt - num_common)
    assert cached_of(rig, 2, prompt) == num_hit
    assert rig.engine_status("prefix_query_tokens") == 400 + num_prompt
    assert rig.engine_status("prefix_hit_tokens") == num_hit
    free, used = rig.engine_status("num_pages_free"), rig.engine_status("num_pages_used")
    assert used == 0 and free + rig.engine_status("num_pages_cached") == rig.shape.num_pages


@BOTH
def test_equal_prompts_at_once_share_pages_within_one_plan(kind: str) -> None:
    """n > 1: the pages enter the cache when the chunk that fills them is planned, so the second copy starts behind them."""
    rig = cache_rig(kind, max_step_tokens=256, prefill_chunk_tokens=256, num_pages=20)
    for request_id in range(1, 5):
        assert rig.ingresses[0].submit(request_id, PROMPT[:200], 20)
    rig.poll()
    planned = rig.plan()
    assert [(seq.num_rows, seq.position_begin) for seq in planned] == [(200, 0), (8, 192), (8, 192), (8, 192)]
    assert len({tuple(rig.page_tables[r, :3]) for r in range(4)}) == 1
    assert len({int(rig.page_tables[r, 3]) for r in range(4)}) == 4
    assert rig.num_fresh == 3, "read_plan() has seen that they say so"
    rig.commit(plain_sampler)
    rig.publish()
    assert rig.engine_status("num_pages_used") == 3 + 4
    found = run_to_end(rig, 4)
    for request_id in range(1, 5):
        assert outputs(found, request_id) == [plain_sampler(request_id, i) for i in range(20)]


@BOTH
def test_salt_and_opt_out_keep_requests_apart(kind: str) -> None:
    rig = cache_rig(kind)
    assert cached_of(rig, 1, PROMPT, cache_salt=5) == 0
    assert cached_of(rig, 2, PROMPT) == 0
    assert cached_of(rig, 3, PROMPT, cache_salt=5) == 384
    opts_out = {"flags": abi.REQUEST_NO_PREFIX_CACHE}
    assert rig.ingresses[0].submit(4, PROMPT, 3, body=opts_out)
    run_to_end(rig)
    assert rig.ingresses[0].num_cached_tokens[4] == 0
    other = [9, *PROMPT]
    assert rig.ingresses[0].submit(5, other, 3, body=opts_out)
    run_to_end(rig)
    assert cached_of(rig, 6, other) == 0, "it left nothing behind"


@BOTH
def test_outputs_are_shared_with_the_next_turn_of_a_chat(kind: str) -> None:
    rig = cache_rig(kind)
    assert cached_of(rig, 1, PROMPT[:50], max_tokens=150) == 0
    answer = [plain_sampler(1, i) for i in range(150)]
    # 199 tokens have KV: the last output was never computed.
    assert cached_of(rig, 2, PROMPT[:50] + answer + [3] * 30) == 192 - 192 % 64


@BOTH
def test_a_prompts_last_row_that_is_planned_as_a_decode_row(kind: str) -> None:
    """63 rows fit into the first step; the 64th fills the page without being a chunk."""
    rig = cache_rig(kind, max_step_tokens=63, prefill_chunk_tokens=63)
    assert cached_of(rig, 1, PROMPT[:64], max_tokens=70) == 0
    answer = [plain_sampler(1, i) for i in range(70)]
    assert cached_of(rig, 2, PROMPT[:64] + answer) == 128


@BOTH
def test_pages_are_evicted_oldest_first_and_leaves_before_what_they_continue(kind: str) -> None:
    rig = cache_rig(kind, num_pages=10, max_context=640)
    old, young = [1] * 200, [2] * 200  # three full pages each
    assert cached_of(rig, 1, old) == 0 and cached_of(rig, 2, young) == 0
    assert rig.num_free_and_cached() == (4, 6)
    assert cached_of(rig, 3, [3] * 300, max_tokens=3) == 0  # five pages: takes four and evicts one
    assert rig.num_free_and_cached() == (1, 9)
    assert cached_of(rig, 4, old) == 128, "its last page is gone, its first two are not"
    assert cached_of(rig, 5, young) == 128, "for the two pages that were missing, one was free and one was its last"


@BOTH
def test_pages_in_use_are_never_evicted(kind: str) -> None:
    """F3, at 100 % pages: a long request runs on shared pages while others come and go around it."""
    rig = cache_rig(kind, num_pages=8, max_context=512, max_batch=2)
    assert cached_of(rig, 1, PROMPT[:200]) == 0
    assert rig.ingresses[0].submit(2, PROMPT[:200], 60)
    found: list[Completion] = []
    for turn in range(120):
        rig.ingresses[0].submit(100 + turn, [turn % 200] * 150, 10)
        rig.step(plain_sampler)
        found += rig.ingresses[0].read()
    assert rig.ingresses[0].num_cached_tokens[2] == 192
    assert outputs(found, 2) == [plain_sampler(2, i) for i in range(60)]


def test_a_request_that_is_cancelled_before_its_chunk_runs_leaves_pages_that_are_written() -> None:
    """F2: a plan made ahead that fills pages of the cache runs, although nobody in it goes on: somebody may have found them."""
    rig = cache_rig(max_step_tokens=128, prefill_chunk_tokens=64)
    ingress = rig.ingresses[0]
    assert ingress.submit(1, PROMPT[:200], 5)
    rig.poll()
    assert rig.plan()
    ahead, _ = rig.plan_ahead()
    assert [(seq.position_begin, seq.num_rows) for seq in ahead] == [(64, 64)]
    ingress.write_entry(abi.SUBMISSION_CANCEL, 1)
    rig.poll()
    rig.commit(plain_sampler)
    assert rig.plan() == ahead, "the chunk whose page is in the cache already"
    rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    ingress.read()
    assert cached_of(rig, 2, PROMPT[:200]) == 128


@BOTH
def test_a_preempted_request_finds_its_own_pages_again(kind: str) -> None:
    rig = cache_rig(kind, num_pages=6, max_context=320, max_batch=2)
    for request_id in (1, 2):
        assert rig.ingresses[0].submit(request_id, [request_id] * 120, 120)
    found = run_to_end(rig, 2)
    assert rig.engine_status("preemptions") > 0
    for request_id in (1, 2):
        assert outputs(found, request_id) == [plain_sampler(request_id, i) for i in range(120)]
    assert rig.engine_status("prompt_tokens") < 2 * 120 + 2 * 64 * rig.engine_status("preemptions")


@BOTH
def test_the_lru_ring_is_compacted_when_stale_entries_fill_it(kind: str) -> None:
    """The same pages found and let go again and again: each time leaves a stale entry."""
    rig = cache_rig(kind, num_pages=8, max_context=512)
    assert cached_of(rig, 1, PROMPT[:260]) == 0
    for turn in range(40):
        assert cached_of(rig, 2 + turn, PROMPT[:260], max_tokens=1) == 256
    assert rig.num_free_and_cached() == (4, 4)


@BOTH
def test_200_cancels_free_every_page_at_the_next_commit(kind: str) -> None:
    """While a step runs they are only noted (L3); its commit lets go of all, waiting and running, shared pages and own ones."""
    rig = cache_rig(
        kind, num_requests=256, max_requests_per_queue_pair=256, max_batch=64, max_step_tokens=1024, prefill_chunk_tokens=256,
        num_pages=200, max_context=256, num_submissions=256, num_completions=1024, arena_bytes=1 << 18,
    )  # fmt: skip
    ingress = rig.ingresses[0]
    for request_id in range(1, 201):
        assert ingress.submit(request_id, PROMPT[:70] + [request_id] * 10, 100)
    for _ in range(40):
        rig.step(plain_sampler)
        ingress.read()
    rig.poll()
    assert len(rig.plan()) == 64 and rig.engine_status("num_waiting") == 136
    for request_id in range(1, 201):
        ingress.write_entry(abi.SUBMISSION_CANCEL, request_id)
    for _ in range(26):
        rig.poll()
    rig.check()
    rig.commit(plain_sampler)
    rig.publish()
    rig.check()
    free, cached = rig.num_free_and_cached()
    assert free + cached == 200 and cached >= 1 and rig.engine_status("num_pages_used") == 0
    assert rig.engine_status("num_running") == rig.engine_status("num_waiting") == 0
    found = ingress.read()
    assert sum(entry.kind == FINISH and entry.reason == abi.FINISH_CANCELLED for entry in found) == 200


def test_the_host_and_the_director_size_the_cache_alike() -> None:
    for num_pages, num_requests in ((1, 1), (16, 7), (17, 64), (1000, 3)):
        rig = Rig(Shape(prefix_cache=True, num_pages=num_pages, num_requests=num_requests, max_context=640))
        sizes = EngineSizes(1, num_requests, num_requests, 8, 64, 32, 640, 10, num_pages, 1)
        assert int(rig.native.bk_director_prefix_cache_bytes(rig.address)) == prefix_cache_bytes_of(sizes)


@BOTH
@pytest.mark.parametrize("damage", ["slot", "position in the ring", "holders"])
def test_the_integrity_check_sees_a_damaged_cache(kind: str, damage: str) -> None:
    rig = cache_rig(kind)
    assert cached_of(rig, 1, PROMPT) == 0
    page = int(rig.page_tables[0, 0])
    words = rig.prefix_cache.view(np.uint64)[
        page * 40 :
    ]  # CachedPage: hash, identity, parent, salt, lru_pos, slot, ...
    if damage == "slot":
        words[5] += 1
    elif damage == "position in the ring":
        words[4] += 1
    else:
        rig.page_owners[page] += 1
    assert rig.native.bk_director_check_integrity(rig.address) == 0
    assert rig.fault()["code"] == abi.FAULT_INTEGRITY
