"""A director in Python: the other end of the queue pairs, as device/ring_abi.h describes it, with a scripted model.

It lets the ingress be tested and measured without an engine. The token at position p of a request (prompt included) is
script[p % len(script)], so a request that was resubmitted with the tokens it had goes on with the right one. Plain numpy loads
and stores: aligned words on x86-64 and its store order suffice for a test.
Used by tests/host/test_ingress_port.py, tests/host/test_zmq_ingress.py and others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.metrics_memory import About
from blinkimp.host.shared_memory import EngineRegions, QueuePairGeometry, Region, create_engine_regions
from blinkimp.host.trace_memory import TraceGeometry

DEFAULT_SCRIPT = tuple(range(40, 120))


@dataclass
class FakeRequest:
    request_id: int
    num_prompt_tokens: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    prompt_ids: tuple[int, ...]
    sampling: dict[str, float]
    body: Any = None  # REQUEST_BODY
    entry: Any = None  # SUBMISSION_ENTRY
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_output_tokens: int = 0


class FakeQueuePair:
    """The director's view of one queue pair."""

    def __init__(self, region: Region, script: Sequence[int], eos_ids: Sequence[int], timeout_s: float) -> None:
        self.region = region
        words = np.frombuffer(region.buffer, dtype=abi.QUEUE_PAIR, count=1)
        self.header = words[0]["header"]
        self.ingress = words["ingress"]
        self.director = words["director"]
        self.num_submissions = int(self.header["num_submissions"])
        self.num_completions = int(self.header["num_completions"])
        self.arena_bytes = int(self.header["arena_bytes"])
        self.arena = np.frombuffer(
            region.buffer, dtype=np.uint8, count=self.arena_bytes, offset=int(self.header["arena_offset"])
        )
        offset = int(self.header["submissions_offset"])
        self.submissions = np.frombuffer(region.buffer, abi.SUBMISSION_ENTRY, self.num_submissions, offset)
        offset = int(self.header["completions_offset"])
        self.completions = np.frombuffer(region.buffer, abi.COMPLETION_ENTRY, self.num_completions, offset)
        self.script = list(script)
        self.eos_ids = frozenset(eos_ids)
        self.timeout_s = timeout_s
        self.epoch = int(self.director["epoch"][0])
        self.submission_consumer_pos = int(self.director["submission_consumer_pos"][0])
        self.arena_consumer_pos = int(self.director["arena_consumer_pos"][0])
        self.completion_producer_pos = int(self.director["completion_producer_pos"][0])
        self.running: dict[int, FakeRequest] = {}
        self.outbox: deque[tuple[int, int, int, int, float, int]] = (
            deque()
        )  # CompletionEntry members, commit without parity
        self.heartbeat = 0
        self.heartbeat_seen_at = time.monotonic()
        self.seen: list[FakeRequest] = []  # every request that was accepted, for the tests
        self.constraints: dict[int, bytes] = {}  # by slot: what was loaded, in order and without a gap
        self.num_cancels = 0
        self.num_pings = 0
        self.hold_acks = False  # a test's way to keep arena and ring full

    # ---- Attach ----------------------------------------------------------------------------------------------------
    def poll(self) -> None:
        asked = int(self.ingress["epoch"][0])
        if asked > self.epoch:  # epochs only grow; after a drop ours is ahead
            self._answer(asked)
        if self.epoch % 2 == 0:
            return
        heartbeat = int(self.ingress["heartbeat_ns"][0])
        if heartbeat != self.heartbeat:
            self.heartbeat, self.heartbeat_seen_at = heartbeat, time.monotonic()
        elif time.monotonic() - self.heartbeat_seen_at > self.timeout_s:
            self.drop()
            return
        if not self.hold_acks:
            self._take_submissions()

    def drop(self) -> None:
        """Forgets the ingress, as after a stale heartbeat."""
        self.epoch += 1
        self.running.clear()
        self.outbox.clear()
        self.director["epoch"] = self.epoch

    def _answer(self, asked: int) -> None:
        self.running.clear()
        self.outbox.clear()
        while self._next_submission() is not None:  # what was committed under an older epoch is skipped
            self.submission_consumer_pos += 1
        self.director["submission_consumer_pos"] = self.submission_consumer_pos
        self.director["arena_consumer_pos"] = self.arena_consumer_pos
        self.director["completion_producer_pos"] = self.completion_producer_pos
        self.epoch = asked
        self.heartbeat_seen_at = time.monotonic()
        self.director["epoch"] = asked

    # ---- Submissions -----------------------------------------------------------------------------------------------
    def _next_submission(self) -> Any:
        entry = self.submissions[self.submission_consumer_pos & (self.num_submissions - 1)]
        parity = 1 - (self.submission_consumer_pos // self.num_submissions) % 2
        return entry if int(entry["commit"]) & abi.COMMIT_PARITY_MASK == parity else None

    def _take_submissions(self) -> None:
        while (entry := self._next_submission()) is not None:
            is_ours = int(entry["epoch"]) == self.epoch & 0xFFFFFFFF
            if is_ours and self._is_over_quota(entry):
                return
            self.submission_consumer_pos += 1
            if is_ours:
                self._take(entry)
            self.director["arena_consumer_pos"] = self.arena_consumer_pos
            self.director["submission_consumer_pos"] = self.submission_consumer_pos

    def _is_over_quota(self, entry: Any) -> bool:
        """A request that the table has no place for stays at the ring's head, and with it what lies behind."""
        is_request = int(entry["commit"]) >> abi.COMMIT_KIND_SHIFT == abi.SUBMISSION_REQUEST
        return is_request and 0 < int(self.header["max_requests"]) <= len(self.running)

    def _take(self, entry: Any) -> None:
        op = int(entry["commit"]) >> abi.COMMIT_KIND_SHIFT
        request_id = int(entry["request_id"])
        if op == abi.SUBMISSION_PING:
            self.num_pings += 1
            self._queue(abi.COMPLETION_PONG, 0, 0, request_id, 0, 0.0, int(entry["client_ns"]))
        elif op == abi.SUBMISSION_CANCEL:
            self.num_cancels += 1
            request = self.running.pop(request_id, None)
            if request is not None:
                self._finish(request, abi.FINISH_CANCELLED)
        elif op == abi.SUBMISSION_REQUEST:
            self._take_request(entry, request_id)
        elif op == abi.SUBMISSION_CONSTRAINT:
            loaded = self.constraints.get(request_id, b"") if int(entry["client_ns"]) else b""
            assert len(loaded) == int(entry["client_ns"]), "pieces of a constraint come in order"
            self.constraints[request_id] = loaded + self._take_body(entry)
        else:
            self._queue(abi.COMPLETION_REJECT, abi.REJECT_MALFORMED, 0, request_id, 0, 0.0, 0)

    def _take_body(self, entry: Any) -> bytes:
        arena_pos, body_bytes = int(entry["arena_pos"]), int(entry["body_bytes"])
        offset = arena_pos & (self.arena_bytes - 1)
        assert arena_pos % abi.ARENA_ALIGN_BYTES == 0 and offset + body_bytes <= self.arena_bytes, "a body never wraps"
        assert self.arena_consumer_pos <= arena_pos, "arena positions only grow"
        body = self.arena[offset : offset + body_bytes].tobytes()
        aligned_bytes = -(-body_bytes // abi.ARENA_ALIGN_BYTES) * abi.ARENA_ALIGN_BYTES
        assert arena_pos + aligned_bytes <= self.arena_consumer_pos + self.arena_bytes, "a body overtook the credit"
        self.arena_consumer_pos = arena_pos + aligned_bytes
        return body

    def _take_request(self, entry: Any, request_id: int) -> None:
        body = self._take_body(entry)
        head = np.frombuffer(body, dtype=abi.REQUEST_BODY, count=1)[0]
        words = np.frombuffer(body, dtype=np.uint32, offset=abi.REQUEST_BODY.itemsize)
        num_stop_ids, num_prompt_tokens = int(head["num_stop_ids"]), int(entry["num_prompt_tokens"])
        num_bias_words = 2 * int(head["sampling"]["num_logit_bias"])
        bias = words[num_stop_ids : num_stop_ids + num_bias_words].view(abi.LOGIT_BIAS)
        ids = np.concatenate([words[:num_stop_ids], words[num_stop_ids + num_bias_words :]])
        assert len(ids) == num_stop_ids + num_prompt_tokens, "counts must agree with body_bytes"
        max_tokens = int(entry["max_tokens"])
        reason = 0
        if num_prompt_tokens == 0:
            reason = abi.REJECT_PROMPT_EMPTY
        elif num_prompt_tokens + max_tokens > int(self.header["max_context"]):
            reason = abi.REJECT_TOO_LONG
        elif ids.max() >= int(self.header["vocab_size"]):
            reason = abi.REJECT_BAD_TOKEN
        elif request_id in self.running:
            reason = abi.REJECT_DUPLICATE
        if reason:
            self._queue(abi.COMPLETION_REJECT, reason, int(self.header["max_context"]), request_id, 0, 0.0, 0)
            return
        sampling = {name: float(head["sampling"][name]) for name in ("temperature", "top_p", "min_p", "top_k")}
        sampling["seed"] = int(head["sampling"]["seed"])
        request = FakeRequest(
            request_id=request_id,
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            stop_ids=tuple(ids[:num_stop_ids].tolist()),
            ignore_eos=bool(head["sampling"]["ignore_eos"]),
            prompt_ids=tuple(ids[num_stop_ids:].tolist()),
            sampling=sampling,
            body=head.copy(),
            entry=entry.copy(),
            logit_bias=tuple((int(one["token"]), float(one["bias"])) for one in bias),
        )
        self.running[request_id] = request
        self.seen.append(request)
        self._queue(abi.COMPLETION_ACK, 0, 0, request_id, 0, 0.0, time.monotonic_ns())

    # ---- The scripted model ----------------------------------------------------------------------------------------
    def step(self) -> int:
        """One token for every running request that has credit. Returns the number of tokens."""
        credit = self.credit() - len(self.outbox)
        device_ns = time.monotonic_ns()
        commit = abi.COMPLETION_TOKEN << abi.COMMIT_KIND_SHIFT
        num_tokens = 0
        for request in list(self.running.values()):
            if credit < 2:  # a token and perhaps a finish
                break
            position = request.num_prompt_tokens + request.num_output_tokens
            token = self.script[position % len(self.script)]
            index = int(request.body["num_prior_outputs"]) + request.num_output_tokens
            self.outbox.append((commit, token, request.request_id, index, -0.5, device_ns))
            request.num_output_tokens += 1
            num_tokens += 1
            credit -= 1
            reason = 0
            if token in self.eos_ids and not request.ignore_eos:
                reason = abi.FINISH_EOS
            elif token in request.stop_ids:
                reason = abi.FINISH_STOP_ID
            elif request.num_output_tokens == request.max_tokens:
                reason = abi.FINISH_LENGTH
            if reason:
                del self.running[request.request_id]
                self._finish(request, reason)
                credit -= 1
        return num_tokens

    def _finish(self, request: FakeRequest, reason: int) -> None:
        prompt, output = request.num_prompt_tokens, request.num_output_tokens
        self._queue(abi.COMPLETION_FINISH, reason, prompt, request.request_id, output, 0.0, time.monotonic_ns())

    # ---- Completions -----------------------------------------------------------------------------------------------
    def _queue(
        self, kind: int, reason: int, token: int, request_id: int, index: int, logprob: float, device_ns: int
    ) -> None:
        commit = kind << abi.COMMIT_KIND_SHIFT | reason << abi.COMMIT_REASON_SHIFT
        self.outbox.append((commit, token, request_id, index, logprob, device_ns))

    def credit(self) -> int:
        used = self.completion_producer_pos - int(self.ingress["completion_consumer_pos"][0])
        assert 0 <= used <= self.num_completions, f"completion credit is broken: {used} of {self.num_completions} used"
        return self.num_completions - used

    def publish(self) -> int:
        """Writes what is queued, as far as credit goes. Returns the number of entries."""
        if self.epoch % 2 == 0 or not self.outbox:
            return 0
        num = min(len(self.outbox), self.credit())
        if num == 0:
            return 0
        batch = np.array([self.outbox.popleft() for _ in range(num)], dtype=abi.COMPLETION_ENTRY)
        positions = self.completion_producer_pos + np.arange(num)
        slots = positions & (self.num_completions - 1)
        for name in ("token", "request_id", "index", "logprob", "device_ns"):
            self.completions[name][slots] = batch[name]
        parity = 1 - (positions // self.num_completions) % 2
        self.completions["commit"][slots] = batch["commit"] | parity.astype(np.uint32)
        self.completion_producer_pos += num
        self.director["completion_producer_pos"] = self.completion_producer_pos
        return num


class FakeDirector:
    """A whole engine: its regions, its status page, and a loop on a thread."""

    def __init__(
        self,
        engine_name: str,
        *,
        num_queue_pairs: int = 1,
        geometry: QueuePairGeometry | None = None,
        max_context: int = 2048,
        vocab_size: int = 4096,
        num_constraint_slots: int = 0,
        constraint_slot_bytes: int = 0,
        max_requests: int = 0,  # unfinished ones of a queue pair; 0: any number
        script: Sequence[int] = DEFAULT_SCRIPT,
        eos_ids: Sequence[int] = (),
        ingress_timeout_s: float = 3600.0,  # a test that wants an ingress dropped for its silence says so
        step_s: float = 0.0005,
        trace: TraceGeometry | None = None,
        about: About | None = None,
    ) -> None:
        self.regions: EngineRegions = create_engine_regions(
            engine_name,
            num_queue_pairs=num_queue_pairs,
            geometry=geometry or QueuePairGeometry(num_submissions=256, num_completions=4096, arena_bytes=1 << 20),
            max_context=max_context,
            vocab_size=vocab_size,
            max_requests=max_requests,
            num_constraint_slots=num_constraint_slots,
            constraint_slot_bytes=constraint_slot_bytes,
            trace=trace,
            about=about,
        )
        self.queue_pairs = [
            FakeQueuePair(region, script, eos_ids, ingress_timeout_s) for region in self.regions.queue_pairs
        ]
        self.status = np.frombuffer(self.regions.engine_page.buffer, abi.ENGINE_PAGE, 1)["status"]
        self.step_s = step_s
        self.paused = False  # polls and publishes go on, the model stands still
        self.num_allowed_steps = 0  # that bring tokens, while paused: set by the test, counted down by the loop
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def turn(self) -> int:
        """One round over all queue pairs. Returns the number of tokens."""
        num_tokens = 0
        for queue_pair in self.queue_pairs:
            queue_pair.poll()
            if not self.paused or self.num_allowed_steps:
                num_tokens += queue_pair.step()
            queue_pair.publish()
        if num_tokens and self.num_allowed_steps:
            self.num_allowed_steps -= 1
        self.status["heartbeat"] += 1
        self.status["device_ns"] = time.monotonic_ns()
        self.status["output_tokens"] += num_tokens
        self.status["num_running"] = sum(len(queue_pair.running) for queue_pair in self.queue_pairs)
        self.status["state"] = abi.ENGINE_RUNNING
        return num_tokens

    def run(self) -> None:
        try:
            while not self._stop.is_set():
                if self.turn() == 0 or self.step_s > 0:
                    time.sleep(max(self.step_s, 0.0002))
        except BaseException as error:  # a broken rule of the ABI, found on this thread: close() raises it in the test
            self.error = error
            if threading.current_thread() is threading.main_thread():
                raise

    def start(self) -> FakeDirector:
        self._thread = threading.Thread(target=self.run, name="fake-director", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        self.stop()
        self.regions.unlink()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> FakeDirector:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
