"""What the ZeroMQ ingress does with each message of a client: checks it, answers it, or makes a request of it.

Every refusal is an `error` reply with what, got, expected, remedy; nothing that a client sends raises out of handle().
Called by nic_shim/zmq_ingress.py, from one thread. Test: pytest tests/host/test_zmq_ingress.py
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.admission import PromptIds, larger_limit, prompt_problem, submit_problem, untokenisable
from blinkimp.nic_shim.compile_queue import Answer, CompileQueue, Ticket
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler
from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.ingress_limits import REMEDIES, ZmqLimits
from blinkimp.nic_shim.live_request import NO_DEADLINE, LiveRequest
from blinkimp.nic_shim.quotas import RateLimiter
from blinkimp.nic_shim.request_log import log_refusal
from blinkimp.nic_shim.sessions import Session, SessionTable
from blinkimp.nic_shim.tokenizer import IncrementalDetokenizer, Tokenizer
from blinkimp.protocol import (
    PROTOCOL_VERSION,
    Alive,
    AliveReply,
    BadMessageError,
    Cancel,
    Error,
    ErrorCode,
    GetHealth,
    GetStats,
    Health,
    Stats,
    Submit,
    decode_client_message,
)

log = logging.getLogger("blinkimp.ingress")

MAX_INLINE_PROMPT_BYTES = 4096  # longer prompts are tokenised on a thread of their own: streams do not wait for them


@dataclass
class HandlerCounters:
    messages: int = 0
    bad_messages: int = 0
    refused: int = 0
    failures: int = 0  # defects; their tracebacks are in the log
    requests: int = 0
    prompt_tokens: int = 0


class MessageHandler:
    """Messages in, requests and replies out."""

    def __init__(self, link: EngineLink, sessions: SessionTable, tokenizer: Tokenizer, limits: ZmqLimits) -> None:
        self.counters = HandlerCounters()
        self.is_draining = False
        self._link = link
        self._sessions = sessions
        self._tokenizer = tokenizer
        self._limits = limits
        self._rate = RateLimiter(limits.max_requests_per_s, limits.burst_requests)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blinkimp-tokenise")
        # Appended on the threads of the pool and of the queue, emptied by take_prepared(); deque's methods are atomic.
        self._tokenised: deque[tuple[LiveRequest, PromptIds | Error]] = deque()
        self._compiled: deque[tuple[LiveRequest, Answer]] = deque()
        self._compiling: dict[LiveRequest, tuple[Ticket, Submit]] = {}  # until the answer is taken, or nobody waits
        self._earliest_deadline_ns = NO_DEADLINE  # of those, or of some that were among them
        self._num_tokenising = 0
        self._compile_queue = CompileQueue(
            ConstraintCompiler(
                tokenizer.path, link.port.vocab_size, tuple(link.eos_ids), link.port.constraint_slot_bytes
            )
        )

    def close(self) -> None:
        self._compile_queue.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def num_preparing(self) -> int:
        """Requests whose prompt or constraint is not ready."""
        return self._num_tokenising + len(self._compiling)

    # ---- Messages --------------------------------------------------------------------------------------------------
    def handle(self, identity: bytes, frames: list[bytes], caller: bytes | None = None) -> None:
        """One message: all frames after the identity. caller: the CURVE key it came with."""
        self.counters.messages += 1
        session = self._sessions.open(identity, caller or identity)
        try:
            self._handle(session, frames)
        except Exception:  # a defect: it must not take the other clients' streams with it
            log.exception("a message of %d frames could not be handled", len(frames))
            self.counters.failures += 1
            error = _error(
                None,
                "internal_error",
                "the server failed on this message",
                f"{len(frames)} frames",
                "an answer",
                "report this with the ingress's log: it is a defect",
            )
            self._sessions.reply(session, error)
        self._sessions.settle(session)

    def _handle(self, session: Session, frames: list[bytes]) -> None:
        problem = self._frame_problem(frames)
        if problem is not None:
            self._refuse_bad(session, problem)
            return
        try:
            message = decode_client_message(frames[0])
        except BadMessageError as error:
            self._refuse_bad(session, error.error)
            return
        if isinstance(message, Submit):
            self._submit(session, message)
        elif isinstance(message, Cancel):
            self._cancel(session, message)
        elif isinstance(message, Alive):
            unknown_ids = [client_id for client_id in message.ids if client_id not in session.requests]
            self._sessions.reply(session, AliveReply(unknown_ids=unknown_ids))
        elif isinstance(message, GetStats):
            self._sessions.reply(session, Stats(message.id, self._link.watch.counters(), self._ingress_counters()))
        else:
            self._sessions.reply(session, self._health(message))

    def _frame_problem(self, frames: list[bytes]) -> Error | None:
        if len(frames) != 1:
            return _error(
                None,
                "bad_message",
                "a message has the wrong number of frames",
                f"{len(frames)} frames",
                "1 frame, one msgpack map",
                "use a DEALER socket and send each message as one frame",
            )
        if len(frames[0]) > self._limits.max_request_bytes:
            return _error(
                None,
                "too_large",
                "the message is too large",
                f"{len(frames[0])} bytes",
                f"at most {self._limits.max_request_bytes} bytes",
                f"send a shorter prompt, or {larger_limit('max_request_bytes')}",
            )
        return None

    def _refuse_bad(self, session: Session, error: Error) -> None:
        self.counters.bad_messages += 1
        # Of a request that runs under this id it is not the end.
        error.final = error.final and error.id is not None and error.id not in session.requests
        self._sessions.reply(session, error)

    # ---- Requests --------------------------------------------------------------------------------------------------
    def _submit(self, session: Session, submit: Submit) -> None:
        refusal = self._refusal(session, submit)
        if refusal is not None:
            self.counters.refused += 1
            self._sessions.reply(session, refusal)
            log_refusal(log, session.identity, submit.id, refusal)
            return
        request = LiveRequest(submit, session)
        request.observer = self._link.metrics.on_end  # for its end before it reaches the link
        self._sessions.add_request(session, request)
        constraint = submit.sampling.constraint
        if constraint is None:
            self._take_prompt(request, submit)
            return
        answer = self._compile_queue.ask(
            session.caller, constraint, lambda answer: self._compiled.append((request, answer))
        )
        if isinstance(answer, Ticket):
            self._compiling[request] = (answer, submit)
            self._earliest_deadline_ns = min(self._earliest_deadline_ns, request.deadline_ns)
        else:
            self._take_constraint(request, submit, answer)

    def _take_constraint(self, request: LiveRequest, submit: Submit, answer: Answer) -> None:
        if isinstance(answer, Error):
            self._start(request, msgspec.structs.replace(answer, id=submit.id))
        else:
            request.constraint = answer
            self._take_prompt(request, submit)

    def _take_prompt(self, request: LiveRequest, submit: Submit) -> None:
        if isinstance(submit.prompt, list) or len(submit.prompt) <= MAX_INLINE_PROMPT_BYTES:
            self._start(request, self._encode(submit))
        else:
            self._num_tokenising += 1
            self._pool.submit(lambda: self._tokenised.append((request, self._encode(submit))))

    def _encode(self, submit: Submit) -> PromptIds | Error:
        if isinstance(submit.prompt, list):
            return np.asarray(submit.prompt, dtype=np.uint32)
        try:
            return self._tokenizer.encode(submit.prompt)
        except Exception as error:  # the binding raises plain Exception
            return untokenisable(submit.id, error)

    def take_prepared(self) -> None:
        """Goes on with the requests whose constraints are compiled, or will not be in time; starts those whose long prompts are tokenised."""
        while self._compiled:
            request, answer = self._compiled.popleft()
            _, submit = self._compiling.pop(request)
            self._take_constraint(request, submit, answer)
        self._end_overdue(time.monotonic_ns())
        while self._tokenised:
            request, prompt_ids = self._tokenised.popleft()
            self._num_tokenising -= 1
            self._start(request, prompt_ids)

    def _end_overdue(self, now_ns: int) -> None:
        """Of those whose constraint waits or is being compiled. Nearly free while no deadline has passed."""
        if now_ns <= self._earliest_deadline_ns:
            return
        overdue = [request for request in self._compiling if now_ns > request.deadline_ns]
        for request in overdue:
            self._stop_compiling(request, abi.FINISH_TIMEOUT)
        self._sessions.touch(overdue)
        self._earliest_deadline_ns = min((request.deadline_ns for request in self._compiling), default=NO_DEADLINE)

    def _stop_compiling(self, request: LiveRequest, reason: int) -> None:
        """Ends it, unless its answer is there or about to be: its place in the queue is given up."""
        if request in self._compiling and self._compile_queue.withdraw(self._compiling[request][0]):
            del self._compiling[request]
            request.finish(reason)

    def _start(self, request: LiveRequest, prompt_ids: PromptIds | Error) -> None:
        if request.cancelled:
            request.finish(abi.FINISH_CANCELLED)
        elif isinstance(prompt_ids, Error):
            request.fail_with(prompt_ids)
            if prompt_ids.code == "internal_error":
                self.counters.failures += 1
            else:
                self.counters.refused += 1
        elif not self._fail_bad_prompt(request, prompt_ids):
            request.prompt_ids = prompt_ids
            self.counters.requests += 1
            self.counters.prompt_tokens += len(prompt_ids)
            if request.wants_text:
                request.start_detokenizer(IncrementalDetokenizer(self._tokenizer, prompt_ids[-16:].tolist()))
            self._link.submit(request)
        if request.end is not None:
            self._sessions.touch([request])

    def _fail_bad_prompt(self, request: LiveRequest, prompt_ids: PromptIds) -> bool:
        """Ends the request where its prompt cannot be run."""
        problem = prompt_problem(request.client_id, prompt_ids, request.sampling, self._link.port, request.output_ids)
        if problem is None:
            return False
        request.fail_with(problem)
        self.counters.refused += 1
        return True

    def _refusal(self, session: Session, submit: Submit) -> Error | None:
        """Why this request is not taken at all, or None."""
        limits = self._limits
        if submit.id in session.requests:
            return _error(
                submit.id,
                "duplicate_id",
                "the id belongs to an unfinished request",
                str(submit.id),
                "an id that no unfinished request of this client has",
                "count ids up",
            )
        if self.is_draining:
            return _error(
                submit.id,
                "draining",
                "the server is about to stop",
                "a new request",
                "none: it only finishes what it has",
                "submit to another server, or again after the restart",
                final=True,
            )
        wait_s = self._rate.wait_s(session.caller)
        if wait_s:
            return _error(
                submit.id,
                "too_many_requests",
                "too many requests a second",
                f"more than {limits.max_requests_per_s} a second, beyond a burst of {limits.burst_requests}",
                f"no request for {wait_s} s",
                f"slow down, or {larger_limit('max_requests_per_s')}",
                final=True,
            )
        sessions = self._sessions
        quotas: tuple[tuple[ErrorCode, str, int, str], ...] = (
            (
                "too_many_requests",
                "unfinished requests of this client",
                len(session.requests),
                "max_requests_per_client",
            ),
            (
                "too_many_requests",
                "unfinished requests of this key",
                sessions.num_requests_of(session.caller),
                "max_outstanding",
            ),
            ("busy", "unfinished requests of this ingress", sessions.num_requests, "max_requests"),
            ("busy", "clients with unfinished requests", len(sessions.sessions) - 1, "max_clients"),
        )
        for code, what, num_unfinished, limit_name in quotas:
            limit = getattr(limits, limit_name)
            if num_unfinished >= limit:
                return _error(
                    submit.id,
                    code,
                    f"too many {what}",
                    str(num_unfinished),
                    f"fewer than {limit}",
                    f"wait for some to finish, or {REMEDIES[limit_name]}",
                    final=True,
                )
        return submit_problem(submit, limits.max_prompt_chars)

    def _cancel(self, session: Session, cancel: Cancel) -> None:
        request = session.requests.get(cancel.id)
        if request is not None:
            self.cancel(request)

    def cancel(self, request: LiveRequest) -> None:
        """Stops a request, wherever it is. One whose constraint waits ends now."""
        self._link.cancel(request)
        self._stop_compiling(request, abi.FINISH_CANCELLED)
        if request.end is not None:
            self._sessions.touch([request])

    # ---- Stats and health ------------------------------------------------------------------------------------------
    def _ingress_counters(self) -> dict[str, int]:
        sources = (self.counters, self._link.counters, self._sessions.counters)
        counters = {name: value for source in sources for name, value in vars(source).items()}
        counters["num_clients"] = len(self._sessions.sessions)
        counters["num_unfinished"] = self._sessions.num_requests
        return counters

    def status(self) -> str:
        state = self._link.watch.state
        if state == abi.EngineState.FAULTED:
            return "engine_faulted"
        if self._link.watch.is_lost or not self._link.is_attached:
            return "engine_lost"
        if self.is_draining or state == abi.EngineState.DRAINING:
            return "draining"
        return "starting" if state == abi.EngineState.STARTING else "ok"

    def _health(self, message: GetHealth) -> Health:
        watch, port = self._link.watch, self._link.port
        return Health(
            id=message.id,
            status=self.status(),
            protocol_version=PROTOCOL_VERSION,
            queue_pair_idx=port.queue_pair_idx,
            engine_state=watch.state.name.lower(),
            engine_heartbeat_age_ms=int(watch.heartbeat_age_s * 1000),
            max_context=port.max_context,
            vocab_size=port.vocab_size,
            eos_ids=sorted(self._link.eos_ids),
        )


def _error(
    request_id: int | None, code: ErrorCode, what: str, got: str, expected: str, remedy: str, *, final: bool = False
) -> Error:
    return Error(request_id, code, what, got, expected, remedy, final)
