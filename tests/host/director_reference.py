"""The director as a reader of DESIGN section 6 would write it: plain lists, one request after the other, no lanes, no memory layout.

test_director_stateful.py runs it beside the real one and compares every step: plans, completions, counters, pages.
It shares no code with device/: where the two differ, one of them is wrong.
Longer than 400 lines because a reference is read as one piece.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from blinkimp import ring_abi as abi
from tests.host.director_rig import PlannedSeq, Shape
from tests.host.prefix_reference import CachedPage, Pages
from tests.host.py_ingress import Completion

STEP_CREDIT = 2
START_CREDIT = 64  # kStartCredit of device/admission.cuh
MAX_STAGED_BY_POLL = 512
MAX_TAKE_ROUNDS = 8
STALL_PATIENCE = 16
FAIR_UNIT_TOKENS = 8
FAIR_WINDOW_TOKENS = FAIR_UNIT_TOKENS << 14


@dataclass(eq=False)
class Job:
    """A request."""

    queue_pair: Lane
    request_id: int
    num_prompt: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    level: int
    timeout_hours: int  # 0 = none
    tokens: list[int]  # that are known
    cache_salt: int = 0
    is_cacheable: bool = False
    num_tokens: int = 0
    num_computed: int = 0
    pages: list[CachedPage | None] = field(default_factory=list)  # None: its own, unknown to the cache
    links: list[int] = field(default_factory=list)  # identities of the cached pages that its full pages equal, 0 = none
    num_cached_tokens: int = 0
    age_hours: int = 0
    running_level: int = 0
    num_preemptions: int = 0
    finish_reason: int = 0
    finished: bool = False
    stop_asked: bool = False
    dropped: bool = False
    num_stalled_plans: int = 0

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def is_decode(self) -> bool:
        return self.num_uncomputed == 1

    @property
    def is_over(self) -> bool:
        return self.finished or self.stop_asked or self.dropped

    @property
    def is_ending(self) -> bool:
        return self.is_over or self.num_outputs >= self.max_tokens

    @property
    def needs_page(self) -> bool:
        return pages_for(self.num_tokens) > self.num_pages

    def completion(self, kind: int, reason: int, token: int, index: int) -> Completion:
        return Completion(kind, reason, token, self.request_id, index)


@dataclass(frozen=True)
class Submission:
    op: int
    request_id: int
    num_prompt: int = 0
    max_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    reject: tuple[int, int] | None = None  # (reason, limit) that the entry or body deserves by itself
    prompt: tuple[int, ...] = ()
    cache_salt: int = 0
    no_prefix_cache: bool = False
    priority: int = 0
    timeout_hours: int = 0
    needs_body: bool = False  # the reason shows in the body only, so quota and duplicates come first
    epoch: int = 0


@dataclass(eq=False)
class Lane:
    """A queue pair."""

    num_completions: int
    epoch: int = 0
    ring: deque[Submission] = field(default_factory=deque)
    waiting: list[Job] = field(default_factory=list)  # by level, in each the next one first
    served: int = 0
    finishing: deque[Job] = field(default_factory=deque)
    staged: list[Completion] = field(default_factory=list)
    unread: deque[Completion] = field(default_factory=deque)  # in the ring, for the ingress to read
    num_owed: int = 0  # unread as far as the last poll saw
    promised: int = 0
    promised_now: int = 0  # of it to the step in flight, while the next one is planned too

    @property
    def is_attached(self) -> bool:
        return self.epoch % 2 == 1

    def push(self, job: Job) -> None:
        self.waiting.insert(sum(other.level <= job.level for other in self.waiting), job)

    def push_front(self, job: Job) -> None:
        self.waiting.insert(sum(other.level < job.level for other in self.waiting), job)

    @property
    def credit(self) -> int:
        if not self.is_attached:
            return 0
        return max(0, self.num_completions - self.num_owed - len(self.staged) - self.promised)


Planned = list[tuple[Job, PlannedSeq]]


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // abi.PAGE_TOKENS)


class Reference:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.lanes = [Lane(shape.num_completions) for _ in range(shape.num_queue_pairs)]
        self.running: list[Job] = []
        self.pages = Pages(shape.num_pages)
        self.plan_fills_cache = False  # the plan made last
        self.counts: Counter[str] = Counter()
        self.next_admit = 0
        self.served_floor = 0
        self.tune(0, 0, 0, False)
        self.next_take = 0
        self.command = abi.COMMAND_RUN
        self.in_flight: list[tuple[Job, PlannedSeq]] | None = None
        self.next: list[tuple[Job, PlannedSeq]] | None = None  # the step after it, planned ahead
        self.next_started = False

    def tune(self, max_running: int, step_tokens: int, chunk_tokens: int, ages: bool) -> None:
        """0 = as launched; more than the engine was launched for is cut to that."""
        shape = self.shape
        self.max_running = min(max_running or shape.max_batch, shape.max_batch)
        self.step_tokens = min(step_tokens or shape.max_step_tokens, shape.max_step_tokens)
        self.chunk_tokens = min(chunk_tokens or shape.prefill_chunk_tokens, shape.max_step_tokens)
        self.ages = ages

    # ---- Poll ----------------------------------------------------------------------------------------------------
    def poll(self, asked_epochs: list[int], stale: set[int], command: int) -> None:
        first_look = [bool(lane.ring) and lane.is_attached for lane in self.lanes]
        for q, lane in enumerate(self.lanes):
            if asked_epochs[q] > lane.epoch or (q in stale and lane.is_attached):
                first_look[q] = False
                self.drop(lane)
                if asked_epochs[q] > lane.epoch:
                    lane.epoch = asked_epochs[q]
                else:
                    lane.epoch += 1
                    self.counts["ingress_drops"] += 1
                if lane.is_attached:
                    lane.ring.clear()
                    lane.unread.clear()
                    lane.num_owed = 0
            elif lane.is_attached:
                lane.num_owed = len(lane.unread)
        for job in [*(job for lane in self.lanes for job in lane.waiting), *self.running]:
            if job.timeout_hours and job.age_hours >= job.timeout_hours and not job.is_over:
                self.stop(job, abi.FINISH_TIMEOUT)
        if command > self.command:
            self.command = command
            if command == abi.COMMAND_STOP:
                for lane in self.lanes:
                    while lane.waiting:
                        self.stop(lane.waiting[0], abi.FINISH_DRAINING)
                for job in reversed(list(self.running)):
                    self.stop(job, abi.FINISH_DRAINING)
        for lane in self.lanes:
            while lane.finishing and self.can_stage(lane):
                self.stage_finish(lane.finishing.popleft())
        ready = first_look
        for _ in range(MAX_TAKE_ROUNDS):
            if not any(ready):
                break
            order = [(self.next_take + k) % len(self.lanes) for k in range(len(self.lanes))]
            taken = {q for q in order if ready[q] and self.take(self.lanes[q])}
            ready = [q in taken and bool(lane.ring) for q, lane in enumerate(self.lanes)]
            self.next_take = (self.next_take + 1) % len(self.lanes)

    def can_stage(self, lane: Lane) -> bool:
        return sum(len(other.staged) for other in self.lanes) < MAX_STAGED_BY_POLL and lane.credit > 0

    def find(self, lane: Lane, request_id: int) -> Job | None:
        live = [
            *lane.waiting,
            *lane.finishing,
            *(job for job in self.running if job.queue_pair is lane and not job.dropped and not job.finished),
        ]
        return next((job for job in live if job.request_id == request_id), None)

    def num_live(self, lane: Lane) -> int:
        return len(lane.waiting) + len(lane.finishing) + sum(job.queue_pair is lane for job in self.running)

    def take(self, lane: Lane) -> bool:
        entry = lane.ring[0]
        if entry.epoch != lane.epoch & 0xFFFFFFFF:
            lane.ring.popleft()
            return True
        if entry.op == abi.SUBMISSION_CANCEL and entry.reject is None:
            lane.ring.popleft()
            if job := self.find(lane, entry.request_id):
                self.stop(job, abi.FINISH_CANCELLED)
            return True
        if not self.can_stage(lane):
            return False
        if entry.op == abi.SUBMISSION_PING and entry.reject is None:
            lane.ring.popleft()
            lane.staged.append(Completion(abi.COMPLETION_PONG, 0, 0, entry.request_id, 0))
            return True
        reject = None if entry.needs_body else entry.reject
        if (
            entry.op == abi.SUBMISSION_REQUEST
            and self.command != abi.COMMAND_RUN
            and reject != (abi.REJECT_MALFORMED, 0)
        ):
            reject = (abi.REJECT_DRAINING, 0)
        if reject is None and self.find(lane, entry.request_id):
            reject = (abi.REJECT_DUPLICATE, 0)
        if reject is None:
            num_free = self.shape.num_requests - sum(self.num_live(other) for other in self.lanes)
            kept_back = 0
            if num_free <= len(self.lanes):
                kept_back = sum(
                    other is not lane and other.is_attached and self.num_live(other) == 0 for other in self.lanes
                )
            if self.num_live(lane) >= self.shape.max_requests_per_queue_pair or num_free <= kept_back:
                return False
            reject = entry.reject
        lane.ring.popleft()
        if reject is not None:
            lane.staged.append(Completion(abi.COMPLETION_REJECT, reject[0], reject[1], entry.request_id, 0))
            self.counts["requests_rejected"] += 1
            return True
        job = Job(
            lane,
            entry.request_id,
            entry.num_prompt,
            entry.max_tokens,
            entry.stop_ids,
            entry.ignore_eos,
            min(max(entry.priority, -8), 7) + 8,
            entry.timeout_hours,
            list(entry.prompt),
            entry.cache_salt,
            self.shape.prefix_cache and not entry.no_prefix_cache,
            entry.num_prompt,
        )
        lane.push(job)
        lane.staged.append(job.completion(abi.COMPLETION_ACK, 0, 0, 0))
        self.counts["requests_accepted"] += 1
        return True

    # ---- Ends ----------------------------------------------------------------------------------------------------
    def count_finish(self, reason: int) -> None:
        self.counts["finished_" + abi.FinishReason(reason).name.lower()] += 1

    def stage_finish(self, job: Job) -> None:
        job.queue_pair.staged.append(
            job.completion(abi.COMPLETION_FINISH, job.finish_reason, job.num_prompt, job.num_outputs)
        )

    def finish(self, job: Job, reason: int) -> None:
        job.finish_reason = reason
        self.count_finish(reason)
        if not job.queue_pair.finishing and self.can_stage(job.queue_pair):
            self.stage_finish(job)
        else:
            job.queue_pair.finishing.append(job)

    def stop(self, job: Job, reason: int) -> None:
        if job in job.queue_pair.waiting:
            job.queue_pair.waiting.remove(job)
            self.finish(job, reason)
        elif job in self.running and (self.in_flight is not None or self.next is not None):
            if not job.is_over:
                job.stop_asked, job.finish_reason = True, reason
        elif job in self.running:
            self.release(job)
            self.finish(job, reason)

    def release(self, job: Job) -> None:
        self.running.remove(job)
        self.pages.release(job)

    def drop(self, lane: Lane) -> None:
        for _ in lane.waiting:
            self.count_finish(abi.FINISH_CANCELLED)
        lane.waiting.clear()
        lane.finishing.clear()
        for job in [job for job in self.running if job.queue_pair is lane and not job.dropped and not job.finished]:
            if self.in_flight is not None or self.next is not None:
                job.dropped = True
            else:
                self.release(job)
                self.count_finish(abi.FINISH_CANCELLED)
        lane.staged.clear()
        lane.promised = lane.promised_now = 0

    # ---- Plan ----------------------------------------------------------------------------------------------------
    def preempt(self, job: Job) -> None:
        self.release(job)
        job.num_computed = 0
        job.num_stalled_plans = 0
        job.num_preemptions += 1
        job.queue_pair.push_front(job)
        self.counts["preemptions"] += 1

    def watermark(self, num_running: int) -> int:
        return 1 + self.shape.num_pages // 128 if num_running else 0

    def plan(self) -> list[PlannedSeq]:
        """After a commit. A plan made ahead of it is kept if anybody in it goes on, and more may be admitted to it."""
        assert self.in_flight is None
        planned, self.next = self.next, None
        if planned is not None and (self.plan_fills_cache or any(not job.is_over for job, _ in planned)):
            self.admit(planned, len(planned), [])
        else:
            if planned is not None:
                for lane in self.lanes:
                    lane.promised = 0
                self.remove_ended()
            planned = self.plan_afresh()
        self.in_flight = planned or None
        return [seq for _, seq in planned]

    def plan_ahead(self) -> tuple[list[PlannedSeq], bool]:
        """While a step is in flight: the next one, or more admissions to it; and whether it should wait for the commit."""
        assert self.in_flight is not None and not self.next_started
        if self.next is None:
            for job, seq in self.in_flight:
                if not job.is_over:
                    job.num_computed = seq.position_begin + seq.num_rows
                    job.num_tokens = job.num_computed + 1 if seq.samples else job.num_tokens
            for lane in self.lanes:
                if STEP_CREDIT * sum(job.queue_pair is lane for job in self.running) > lane.credit:
                    return [], False
            num_needed = sum(not job.is_ending and job.is_decode and job.needs_page for job in self.running)
            if num_needed > self.pages.num_available:
                return [], False
            for lane in self.lanes:
                lane.promised_now = lane.promised
            self.next = self.plan_afresh() or None
            if self.next is None:
                for lane in self.lanes:
                    lane.promised_now = 0
                return [], False
        else:
            self.admit(self.next, len(self.next), [])
        in_next = [job for job, _ in self.next]
        num_rows = sum(seq.num_rows for _, seq in self.next)
        waits = (
            any(lane.waiting for lane in self.lanes)
            and num_rows < self.step_tokens
            and any(job.is_ending and job not in in_next for job in self.running)
        )
        return [seq for _, seq in self.next], waits

    def start_next(self) -> None:
        assert self.next is not None and self.in_flight is not None
        self.next_started = True

    def plan_afresh(self) -> list[tuple[Job, PlannedSeq]]:
        rows: dict[Job, int] = {}
        stalled: list[Job] = []
        self.plan_fills_cache = False
        for lane in self.lanes:
            lane.promised = lane.promised_now
            lane.served += sum(job.queue_pair is lane for job in self.running)

        def promise(job: Job) -> bool:
            if job.queue_pair.credit < STEP_CREDIT:
                stalled.append(job)
                job.num_stalled_plans += 1
                self.counts["credit_stalls"] += 1
                return False
            job.num_stalled_plans = 0
            job.queue_pair.promised += STEP_CREDIT
            return True

        decodes = [job for job in self.running if job.is_decode and not job.is_ending]
        chunks = [job for job in self.running if not job.is_decode and not job.is_ending]
        for job in decodes:
            if promise(job):
                rows[job] = 1
        rows_left = max(0, self.step_tokens - len(decodes))
        for job in chunks:
            count = min(job.num_uncomputed, self.chunk_tokens, rows_left)
            if promise(job):
                if count == 0:
                    job.queue_pair.promised -= STEP_CREDIT
                else:
                    rows[job] = count
                    rows_left -= count

        num_preemptions = self.counts["preemptions"]
        for job in decodes:
            while rows.get(job) and job.needs_page and self.pages.num_available == 0:
                worst = max(reversed(self.running), key=lambda other: other.running_level)
                victim = next((other for other in reversed(self.running) if other in stalled), worst)
                if rows.pop(victim, 0):
                    victim.queue_pair.promised -= STEP_CREDIT
                self.preempt(victim)
            if rows.get(job) and job.needs_page:
                self.pages.take(job, 1)

        order = [job for job in self.running if rows.get(job) and job.is_decode]
        for job in order:
            num_filled, left_over = divmod(job.num_computed, abi.PAGE_TOKENS)
            if job.is_cacheable and left_over == 0 and num_filled == len(job.links) + 1:
                self.pages.register(job, num_filled - 1)
        num_decodes = len(order)
        order += [job for job in self.running if rows.get(job) and not job.is_decode]
        planned = [(job, self.seq(job, rows[job])) for job in order]
        self.admit(planned, num_decodes, stalled, may_admit=num_preemptions == self.counts["preemptions"])
        return planned

    def seq(self, job: Job, num_rows: int) -> PlannedSeq:
        return PlannedSeq(job.request_id, num_rows, job.num_computed, num_rows == job.num_uncomputed, job.num_outputs)

    def register_chunk(self, job: Job, num_rows: int) -> None:
        filled = range(job.num_computed // abi.PAGE_TOKENS, (job.num_computed + num_rows) // abi.PAGE_TOKENS)
        for page_idx in filled if job.is_cacheable else ():
            self.pages.register(job, page_idx)
            self.plan_fills_cache = True

    def admit(self, planned: Planned, num_known: int, stalled: list[Job], *, may_admit: bool = True) -> None:
        """To the end of `planned`; the cache knows the pages of its first num_known."""
        while may_admit and sum(seq.num_rows for _, seq in planned) < self.step_tokens:
            if len(self.running) >= self.max_running and not stalled:
                break
            job = self.choose_admission()
            if job is None:
                break
            num_known = self.register_chunks(planned, num_known)
            if not self.make_room(job, stalled):
                break
            job.running_level = self.effective_level(job)
            job.queue_pair.waiting.remove(job)
            found = self.pages.find(job) if job.is_cacheable else []
            self.pages.hold(job, found)
            self.pages.take(job, pages_for(job.num_tokens) - len(found))
            job.num_computed = len(found) * abi.PAGE_TOKENS
            if job.is_cacheable and job.num_preemptions == 0:
                job.num_cached_tokens = job.num_computed
                self.counts["prefix_query_tokens"] += job.num_prompt
                self.counts["prefix_hit_tokens"] += job.num_computed
            job.queue_pair.promised += STEP_CREDIT
            lane = job.queue_pair
            if job.num_preemptions == 0 and self.can_stage(lane) and lane.credit > START_CREDIT:
                lane.staged.append(job.completion(abi.COMPLETION_START, 0, 0, job.num_cached_tokens))
            self.served_floor += self.lead(job.queue_pair)
            job.queue_pair.served = self.served_floor + job.num_uncomputed
            self.next_admit = (self.lanes.index(job.queue_pair) + 1) % len(self.lanes)
            num_left = self.step_tokens - sum(seq.num_rows for _, seq in planned)
            self.running.append(job)
            planned.append((job, self.seq(job, min(job.num_uncomputed, self.chunk_tokens, num_left))))
        if num_known < len(planned):
            job, seq = planned[-1]
            if num_deferred := self.rows_to_defer(planned):
                planned[-1] = job, seq._replace(num_rows=seq.num_rows - num_deferred, samples=False)
        self.register_chunks(planned, num_known)

    def register_chunks(self, planned: Planned, num_known: int) -> int:
        for job, seq in planned[num_known:]:
            self.register_chunk(job, seq.num_rows)
        return len(planned)

    def rows_to_defer(self, planned: Planned) -> int:
        """Of the last chunk: the step keeps whole tiles, if that and the next one, with a row of each other sequence, are sooner over."""
        tile, costs = self.shape.cost_rows, self.shape.step_costs
        num_rows = sum(seq.num_rows for _, seq in planned)

        def cost(count: int) -> int:
            return costs[min(0 if count <= tile / 2 else -(-count // tile), len(costs) - 1)]

        def both(left: int) -> int:
            return cost(num_rows - left) + cost(len(planned) - 1 + left)

        lefts = [num_rows - kept for kept in range(tile, num_rows, tile)] if tile else []
        lefts = [left for left in lefts if left < planned[-1][1].num_rows]
        best = min(lefts, key=lambda left: (both(left), left), default=0)
        return best if best and both(best) < cost(num_rows) else 0

    def effective_level(self, job: Job) -> int:
        """Waiting brings it closer to the most urgent that could be admitted, but not past them."""
        can = [lane.waiting for lane in self.lanes if lane.waiting and lane.credit >= STEP_CREDIT]
        best = min((waiting[0].level for waiting in can), default=job.level)
        return max(job.level - (job.age_hours if self.ages else 0), best)

    def lead(self, lane: Lane) -> int:
        return min(max(lane.served - self.served_floor, 0), FAIR_WINDOW_TOKENS - 1)

    def best_head(self, lane: Lane) -> Job:
        heads = {job.level: job for job in reversed(lane.waiting)}
        return min(heads.values(), key=lambda job: (self.effective_level(job), -job.level))

    def choose_admission(self) -> Job | None:
        """The best level; then the queue pair that was served least; then the one whose turn it is."""
        choices = []
        for q, lane in enumerate(self.lanes):
            if lane.waiting and lane.credit >= STEP_CREDIT:
                job = self.best_head(lane)
                turn = (q - self.next_admit) % len(self.lanes)
                choices.append((self.effective_level(job), self.lead(lane) // FAIR_UNIT_TOKENS, turn, job))
        if not choices:
            return None
        return min(choices, key=lambda choice: choice[:3])[3]

    def make_room(self, job: Job, stalled: list[Job]) -> bool:
        while not self.has_room(job):
            if not self.make_way(job, stalled):
                return False
        return True

    def missing_pages(self, job: Job) -> int:
        """What there is too little of for the job, if negative; without the pages that stay free while others run."""
        found = self.pages.find(job) if job.is_cacheable else []
        num_pinned = sum(page.num_holders == 0 for page in found)
        return self.pages.num_available - num_pinned - (pages_for(job.num_tokens) - len(found))

    def has_room(self, job: Job) -> bool:
        return len(self.running) < self.max_running and self.missing_pages(job) >= self.watermark(len(self.running))

    def make_way(self, job: Job, stalled: list[Job]) -> bool:
        """The youngest of those that stall for long is preempted, if all of them can be enough."""
        idle = [other for other in self.running if other in stalled and other.num_stalled_plans >= STALL_PATIENCE]
        reachable = self.missing_pages(job) + sum(other.num_pages for other in idle)
        if not idle or reachable < self.watermark(len(self.running) - len(idle)):
            return False
        self.preempt(idle[-1])
        return True

    # ---- Commit, publish -----------------------------------------------------------------------------------------
    def commit(self, sampler: Callable[[int, int], int], eos_ids: tuple[int, ...]) -> None:
        assert self.in_flight is not None
        for job, seq in self.in_flight:
            if job.finished:  # one step ago: a row of a plan that was made before that
                continue
            job.num_computed = seq.position_begin + seq.num_rows
            if job.dropped:
                continue
            if job.stop_asked:
                job.num_tokens = job.num_prompt + seq.output_idx
                job.finished = True
                self.stage_finish(job)
            elif seq.samples:
                token = sampler(job.request_id, seq.output_idx)
                job.num_tokens = job.num_prompt + seq.output_idx + 1
                job.tokens.append(token)
                job.queue_pair.staged.append(job.completion(abi.COMPLETION_TOKEN, 0, token, seq.output_idx))
                self.counts["output_tokens"] += 1
                if token in eos_ids and not job.ignore_eos:
                    job.finish_reason = abi.FINISH_EOS
                elif token in job.stop_ids:
                    job.finish_reason = abi.FINISH_STOP_ID
                elif job.num_outputs == job.max_tokens:
                    job.finish_reason = abi.FINISH_LENGTH
                if job.finish_reason:
                    job.finished = True
                    self.stage_finish(job)
        for lane in self.lanes:
            lane.promised = 0 if self.next is None else lane.promised - lane.promised_now
            lane.promised_now = 0
        self.in_flight = None
        self.remove_ended()
        if self.next_started:
            self.in_flight, self.next, self.next_started = self.next, None, False

    def remove_ended(self) -> None:
        """Those that are rows of the next step stay until its commit."""
        in_next = [job for job, _ in self.next or []]
        for job in [job for job in self.running if job.is_over and job not in in_next]:
            self.release(job)
            if job.dropped:
                self.count_finish(abi.FINISH_CANCELLED)
            elif job.finished:
                self.count_finish(job.finish_reason)
            else:
                self.finish(job, job.finish_reason)

    def publish(self) -> None:
        for lane in self.lanes:
            lane.unread.extend(lane.staged)
            lane.num_owed += len(lane.staged)
            lane.staged.clear()
