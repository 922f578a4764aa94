"""The director against a reference written in Python, call by call: whatever ingresses do, in whatever order the calls come.

Compared after every call: the plan's sequences, completions in order, counters, free pages, the running list; and the director's own
integrity check. Run: pytest tests/host/test_director_stateful.py
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blinkimp import ring_abi as abi
from tests.host.director_reference import Reference, Submission
from tests.host.director_rig import EOS_ID, VOCAB, Rig, Shape

MALFORMED = (abi.REJECT_MALFORMED, 0)
COMPARED_COUNTS = (
    "requests_accepted", "requests_rejected", "finished_eos", "finished_stop_id", "finished_length", "finished_cancelled",
    "finished_draining", "finished_timeout", "preemptions", "credit_stalls", "output_tokens", "ingress_drops",
    "prefix_query_tokens", "prefix_hit_tokens",
)  # fmt: skip

PLAIN_SHAPES = st.builds(
    Shape,
    num_queue_pairs=st.integers(1, 3),
    num_requests=st.sampled_from([3, 6, 40]),
    max_requests_per_queue_pair=st.sampled_from([2, 5, 40]),
    max_batch=st.sampled_from([1, 2, 4, 6]),
    max_step_tokens=st.sampled_from([6, 40, 96]),
    prefill_chunk_tokens=st.sampled_from([3, 32, 96]),
    max_context=st.just(512),
    num_pages=st.sampled_from([5, 8, 14]),
    num_submissions=st.sampled_from([2, 4, 16]),
    num_completions=st.sampled_from([2, 4, 8, 32, 128]),
    arena_bytes=st.just(8192),
    prefix_cache=st.booleans(),
)
# What a step costs, by tiles of rows: each adds little or much.
COSTS = st.lists(st.sampled_from([0, 1, 20]), min_size=abi.MAX_STEP_COSTS, max_size=abi.MAX_STEP_COSTS)
SHAPES = st.builds(
    lambda shape, tile, steps: dataclasses.replace(
        shape, cost_rows=tile, step_costs=tuple(itertools.accumulate(steps))
    ),
    PLAIN_SHAPES,
    st.sampled_from([0, 4, 16]),
    COSTS,
)
QUEUE_PAIRS = st.integers(0, 2)
IDS = st.integers(1, 12)
HOUR_MS, HOUR_NS, NEVER = 3_600_000, 3_600_000_000_000, 0xFFFFFFFF  # of tests that take seconds: waits are whole hours


def sampler(request_id: int, output_idx: int) -> int:
    """EOS now and then, small ids often enough for stop ids to be met. The same answer whenever it is asked."""
    mixed = (request_id * 2654435761 + output_idx * 40503) % 97
    return EOS_ID if mixed < 4 else 3 + mixed


class DirectorMachine(RuleBasedStateMachine):
    kind = "single"

    @initialize(shape=SHAPES)
    def start(self, shape: Shape) -> None:
        self.rig = Rig(shape, self.kind)
        self.reference = Reference(shape)
        self.stale: set[int] = set()
        self.command = abi.COMMAND_RUN
        self.next_id = 1000
        self.tuning = (0, 0, 0, False)
        self.rig.tune(aging_ms=NEVER)
        for ingress in self.rig.ingresses:
            ingress.ask_attach()
        self.poll()

    def ingress(self, q: int) -> tuple[Any, Any]:
        q %= len(self.rig.ingresses)
        return self.rig.ingresses[q], self.reference.lanes[q]

    # ---- What ingresses do ---------------------------------------------------------------------------------------
    @rule(
        q=QUEUE_PAIRS, request_id=IDS, num_prompt=st.integers(1, 300), max_tokens=st.integers(1, 90),
        stop_ids=st.lists(st.integers(3, 99), max_size=3), ignore_eos=st.booleans(), kin=st.integers(0, 2),
        num_shared=st.sampled_from([0, 64, 100, 192, 300]), salt=st.sampled_from([0, 0, 0, 5]), opts_out=st.integers(0, 9),
        priority=st.sampled_from([0, 0, 0, 0, 1, 2, -3, 7, 100, -2147483648]), timeout_hours=st.sampled_from([0, 0, 1, 2, 5]),
    )  # fmt: skip
    def submit(
        self, q: int, request_id: int, num_prompt: int, max_tokens: int, stop_ids: list[int], ignore_eos: bool,
        kin: int = 0, num_shared: int = 0, salt: int = 0, opts_out: int = 0, priority: int = 0, timeout_hours: int = 0,
    ) -> None:  # fmt: skip
        """The first num_shared tokens of the prompt are those of all requests of the same kin."""
        ingress, lane = self.ingress(q)
        if not ingress.is_attached:
            return
        prompt = [(kin * 50 + i if i < num_shared else request_id + i) % VOCAB for i in range(num_prompt)]
        body = {"flags": abi.REQUEST_NO_PREFIX_CACHE} if opts_out == 1 else {}
        sampling = {"ignore_eos": int(ignore_eos)}
        words = {"cache_salt": salt, "priority": priority, "timeout_ns": timeout_hours * HOUR_NS}
        if ingress.submit(request_id, prompt, max_tokens, stop_ids, sampling, body, **words):
            num_pages = -(-(num_prompt + max_tokens) // abi.PAGE_TOKENS)
            limit = self.rig.shape.num_pages
            reject = (abi.REJECT_TOO_LONG, limit * abi.PAGE_TOKENS) if num_pages > limit else None
            lane.ring.append(
                Submission(
                    abi.SUBMISSION_REQUEST, request_id, num_prompt, max_tokens, tuple(stop_ids), ignore_eos, reject,
                    prompt=tuple(prompt), cache_salt=salt, no_prefix_cache=opts_out == 1, priority=priority,
                    timeout_hours=timeout_hours, epoch=ingress.epoch,
                )
            )  # fmt: skip

    @rule(q=QUEUE_PAIRS, lengths=st.lists(st.integers(1, 200), min_size=3, max_size=8), max_tokens=st.integers(20, 150))
    def burst(self, q: int, lengths: list[int], max_tokens: int) -> None:
        """Enough at once to fill batches and pages."""
        for num_prompt in lengths:
            self.next_id += 1
            self.submit(
                q,
                self.next_id,
                num_prompt,
                max_tokens,
                [],
                self.next_id % 3 != 0,
                1,
                num_prompt // 2,
                priority=self.next_id % 4,
            )
        self.run(3)

    @rule(q=QUEUE_PAIRS, request_id=IDS, fault=st.integers(0, 8))
    def submit_bad(self, q: int, request_id: int, fault: int) -> None:
        ingress, lane = self.ingress(q)
        if not ingress.is_attached or ingress.num_free_entries() == 0:
            return
        prompt: list[int] = [5, 6, 7]
        words: dict[str, Any]
        words, reject, needs_body = [
            ({"body": {"reserved1": 1}}, MALFORMED, True),
            ({"arena_pos": ingress.arena_pos + ingress.arena_bytes * 3}, MALFORMED, False),
            ({"body_bytes": 144}, MALFORMED, True),
            ({"max_tokens": 0}, (abi.REJECT_BAD_SAMPLING, 1), False),
            ({"max_tokens": 510}, (abi.REJECT_TOO_LONG, 512), False),
            ({"prompt": [5, VOCAB, 7]}, (abi.REJECT_BAD_TOKEN, VOCAB), True),
            ({"sampling": {"temperature": float("nan")}}, (abi.REJECT_BAD_SAMPLING, 0), True),
            ({"body": {"num_stop_ids": 1}}, MALFORMED, True),
            ({"epoch": 12345}, None, False),
        ][fault]
        words = {"prompt": prompt, "max_tokens": 2, **words}
        if ingress.submit(request_id, **words):
            epoch = 12345 if fault == 8 else ingress.epoch
            lane.ring.append(
                Submission(abi.SUBMISSION_REQUEST, request_id, 3, 2, reject=reject, needs_body=needs_body, epoch=epoch)
            )

    @rule(q=QUEUE_PAIRS, request_id=IDS)
    def cancel(self, q: int, request_id: int) -> None:
        ingress, lane = self.ingress(q)
        if ingress.is_attached and ingress.num_free_entries() > 0:
            ingress.write_entry(abi.SUBMISSION_CANCEL, request_id)
            lane.ring.append(Submission(abi.SUBMISSION_CANCEL, request_id, epoch=ingress.epoch))

    @rule(q=QUEUE_PAIRS, op=st.sampled_from([abi.SUBMISSION_PING, 0, 9]))
    def ping_or_unknown(self, q: int, op: int) -> None:
        ingress, lane = self.ingress(q)
        if ingress.is_attached and ingress.num_free_entries() > 0:
            ingress.write_entry(op, 77, client_ns=5)
            reject = None if op == abi.SUBMISSION_PING else MALFORMED
            lane.ring.append(Submission(op, 77, reject=reject, epoch=ingress.epoch))

    @rule(q=QUEUE_PAIRS, count=st.sampled_from([1, 5, 100, 100, 100]))
    def read(self, q: int, count: int) -> None:
        ingress, lane = self.ingress(q)
        if ingress.is_attached:
            expected = [lane.unread.popleft() for _ in range(min(count, len(lane.unread)))]
            assert ingress.read(count) == expected

    @rule(q=QUEUE_PAIRS, how=st.sampled_from(["attach", "detach", "stale"]), really=st.integers(0, 7))
    def come_or_go(self, q: int, how: str, really: int) -> None:
        ingress, _ = self.ingress(q)
        q %= len(self.rig.ingresses)
        if really != 0:  # else hardly a request would live to its end
            return
        if how == "attach":
            ingress.ask_attach()
        elif ingress.is_attached and how == "detach":
            ingress.detach()
        elif ingress.is_attached and how == "stale":
            self.rig.age_heartbeat(q, 2 * self.rig.shape.ingress_timeout_ns)
            self.stale.add(q)
        self.poll()

    # ---- What the engine does ------------------------------------------------------------------------------------
    @rule()
    def poll(self) -> None:
        asked = [int(ingress.words["ingress"]["epoch"]) for ingress in self.rig.ingresses]
        fresh = [asked[q] > lane.epoch and asked[q] % 2 == 1 for q, lane in enumerate(self.reference.lanes)]
        self.reference.tune(*self.tuning)
        self.reference.poll(asked, self.stale, self.command)
        self.rig.poll()
        self.stale.clear()
        for q, ingress in enumerate(self.rig.ingresses):
            if fresh[q]:
                assert ingress.finish_attach(), "D1: an attach is answered by the next poll"

    @precondition(lambda self: self.reference.in_flight is None)
    @rule()
    def plan(self) -> None:
        assert self.rig.plan() == self.reference.plan()

    @precondition(lambda self: self.reference.in_flight is not None and not self.reference.next_started)
    @rule()
    def plan_ahead(self) -> None:
        assert self.rig.plan_ahead() == self.reference.plan_ahead()

    @precondition(lambda self: self.reference.next is not None and not self.reference.next_started)
    @precondition(lambda self: self.reference.in_flight is not None)
    @rule()
    def start_next(self) -> None:
        self.rig.start_next()
        self.reference.start_next()

    @precondition(lambda self: self.reference.in_flight is not None)
    @rule()
    def commit(self) -> None:
        self.rig.commit(sampler)
        self.reference.commit(sampler, self.rig.shape.eos_ids)

    @rule()
    def publish(self) -> None:
        self.rig.publish()
        self.reference.publish()

    @rule(num_turns=st.integers(1, 60), num_readers=st.integers(0, 3))
    def run(self, num_turns: int, num_readers: int = 0) -> None:
        """The engine's loop; the first num_readers queue pairs read along."""
        for _ in range(num_turns):
            while self.reference.in_flight is not None:
                self.commit()
            self.poll()
            self.plan()
            self.publish()
            for q in range(min(num_readers, len(self.rig.ingresses))):
                self.read(q, 100)

    @rule(num_turns=st.integers(1, 60), num_readers=st.integers(0, 3), starts=st.integers(0, 1))
    def run_ahead(self, num_turns: int, num_readers: int, starts: int) -> None:
        """The loop of the GPU: each step is planned while the one before it runs, and started before that one's commit."""
        for turn in range(num_turns):
            if self.reference.in_flight is None:
                self.poll()
                self.plan()
            self.publish()
            if self.reference.in_flight is not None:
                for _ in range(1 + turn % 2):
                    if not self.reference.next_started:
                        self.plan_ahead()
                    self.poll()
                if starts and self.reference.next is not None and not self.reference.next_started:
                    self.start_next()
                self.commit()
            for q in range(min(num_readers, len(self.rig.ingresses))):
                self.read(q, 100)

    @rule(
        max_running=st.sampled_from([0, 1, 2, 99]), step_tokens=st.sampled_from([0, 1, 7, 50, 9999]),
        chunk_tokens=st.sampled_from([0, 1, 20, 70, 9999]), ages=st.booleans(),
    )  # fmt: skip
    def tune(self, max_running: int, step_tokens: int, chunk_tokens: int, ages: bool) -> None:
        self.tuning = (max_running, step_tokens, chunk_tokens, ages)
        self.rig.tune(
            max_running=max_running, step_tokens=step_tokens, prefill_chunk_tokens=chunk_tokens, aging_ms=HOUR_MS if ages else NEVER
        )  # fmt: skip

    @rule(q=QUEUE_PAIRS, pick=st.integers(0, 20), hours=st.integers(1, 3))
    def hours_pass(self, q: int, pick: int, hours: int) -> None:
        """For one request."""
        _, lane = self.ingress(q)
        live = [*lane.waiting, *(job for job in self.reference.running if job.queue_pair is lane and not job.is_over)]
        if live:
            job = live[pick % len(live)]
            job.age_hours += hours
            self.rig.age_request(q % len(self.rig.ingresses), job.request_id, hours * HOUR_NS)
            self.poll()

    @rule(command=st.sampled_from([abi.COMMAND_DRAIN, abi.COMMAND_STOP]), really=st.integers(0, 30))
    def order(self, command: int, really: int) -> None:
        if really == 0 and self.command == abi.COMMAND_RUN and command == abi.COMMAND_DRAIN:
            self.command = command
            self.rig.command(command)
            self.poll()

    # ---- What must hold ------------------------------------------------------------------------------------------
    @invariant()
    def same_state(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.check()
        assert self.rig.running() == [job.request_id for job in self.reference.running]
        for q, lane in enumerate(self.reference.lanes):
            view = self.rig.queue_pair(q)
            assert view.num_waiting == len(lane.waiting) and view.num_finishing == len(lane.finishing)
            assert view.num_promised == lane.promised and view.num_staged == len(lane.staged)
            assert view.credit == lane.credit
        assert self.rig.num_free_and_cached() == (self.reference.pages.num_free, len(self.reference.pages.lru))

    def teardown(self) -> None:
        """Everybody reads: all that is unfinished ends, and all pages come home."""
        if not hasattr(self, "rig"):
            return
        last_output, num_idle = 0, 0
        while num_idle < 1000:
            num_idle = num_idle + 1 if self.reference.counts["output_tokens"] == last_output else 0
            last_output = self.reference.counts["output_tokens"]
            while self.reference.in_flight is not None:
                self.commit()
            self.poll()
            self.plan()
            self.publish()
            for q in range(len(self.rig.ingresses)):
                self.read(q, 100)
            if not self.reference.running and not any(
                lane.waiting or lane.finishing or (lane.ring and lane.is_attached) for lane in self.reference.lanes
            ):
                break
        else:
            live = "\n".join(map(str, self.rig.live_requests().values()))
            pytest.fail(f"requests never end, {self.reference.counts}, {self.rig.shape}:\n{live}")
        assert self.reference.pages.num_available == self.rig.shape.num_pages
        for name in COMPARED_COUNTS:
            assert self.rig.engine_status(name) == self.reference.counts[name], name


class LanesMachine(DirectorMachine):
    kind = "lanes"


COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TestDirector = DirectorMachine.TestCase
TestDirector.settings = settings(max_examples=150, stateful_step_count=40, **COMMON)
TestDirectorOnLanes = LanesMachine.TestCase
TestDirectorOnLanes.settings = settings(max_examples=15, stateful_step_count=25, **COMMON)
