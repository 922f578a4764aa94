"""What both clients share: requests, what has arrived for them, and when to speak to the server. No sockets, no clocks of its own.

blinkimp/client.py and blinkimp/async_client.py put a DEALER socket around it. The wire is nic_shim/PROTOCOL.md.
Test: pytest tests/null/test_client_core.py

Rule of reconnection: ZeroMQ reconnects by itself; the server forgets a lost connection's requests. So the client says each second
which requests it believes to run (`alive`), and submits again those that the server does not know, with the output it has, under
a new id: whatever still arrives for the old one is ignored.

Invariants
I1  A request's chunks hold each output token once, in order, over any number of connections.
I2  A request ends once: with a Finish, or with an exception.
I3  What goes wrong with one request or one message ends that request: the rest of a frame is handled, nobody else hears of it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from blinkimp.client_errors import ClientError, ClosedError, RequestRefusedError, ServerTimeoutError
from blinkimp.client_request import submit_of
from blinkimp.protocol import (
    Alive,
    AliveReply,
    Cancel,
    ClientMessage,
    Error,
    Finish,
    GetHealth,
    GetStats,
    Health,
    ServerMessage,
    Stats,
    Submit,
    Tokens,
    decode_server_messages,
    encode_client_message,
)

ALIVE_PERIOD_S = 1.0


@dataclass(frozen=True)
class Chunk:
    """Output that arrived together. Text lags behind ids where a character was not complete yet."""

    index: int  # output position of the first id
    token_ids: list[int]
    logprobs: list[float]
    text: str
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # with top_logprobs: alternatives of each id


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # eos, stop_id, stop, length, cancelled, timeout, constraint, draining
    num_prompt_tokens: int
    num_output_tokens: int
    seed: int
    finish: Finish  # with the timestamps


def _nothing() -> None:
    pass


@dataclass
class RequestState:
    """One request as the client sees it."""

    submit: Submit
    chunks: deque[Chunk] = field(default_factory=deque)  # arrived, not yet taken by the caller
    output_ids: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    wake: Callable[[], None] = _nothing  # called after each change; for the async client
    finish: Finish | None = None
    failure: ClientError | None = None

    @property
    def is_ended(self) -> bool:
        return self.finish is not None or self.failure is not None

    def completion(self, chunks: Sequence[Chunk]) -> Completion:
        """The result out of all chunks that the caller took."""
        assert self.finish is not None, "completion() before the end"
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            logprobs=[logprob for chunk in chunks for logprob in chunk.logprobs],
            finish_reason=self.finish.reason,
            num_prompt_tokens=self.finish.num_prompt_tokens,
            num_output_tokens=self.finish.num_output_tokens,
            seed=self.finish.seed,
            finish=self.finish,
        )


@dataclass
class CallState:
    """A stats or health question. It is asked again each second until answered: asking twice does no harm."""

    message: GetStats | GetHealth
    reply: Stats | Health | None = None
    wake: Callable[[], None] = _nothing
    failure: ClientError | None = None


class ClientCore:
    """`send(frame) -> bool` must not block; False: not now (no connection), the core tries again at the next tick."""

    def __init__(self, endpoint: str, send: Callable[[bytes], bool], *, timeout_s: float, now: float) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self.requests: dict[int, RequestState] = {}
        self.calls: dict[int, CallState] = {}
        self._send = send
        self._next_id = 1
        self._unsent: dict[int, RequestState] = {}  # submits that found no connection
        self._cancels: dict[int, None] = {}
        self._is_closed = False
        self._heard_at = now
        self._next_tick = now

    def check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(self.endpoint)

    def close(self) -> None:
        """Cancels what runs, and ends it: from here on nothing is sent. The socket is to be closed after it."""
        for state in list(self.requests.values()):
            self.cancel(state)
        self._is_closed = True
        self.fail_all(ClosedError(self.endpoint))

    # ---- Start things ----------------------------------------------------------------------------------------------
    def submit(
        self, prompt: str | Sequence[int], sampling: dict[str, Any], now: float, *, stream: bool, detokenize: bool
    ) -> RequestState:
        """Raises BadRequestError (submit_of()); then nothing is registered."""
        self.check_open()
        submit, frame = submit_of(self._take_id(), prompt, sampling, stream=stream, detokenize=detokenize)
        state = RequestState(submit)
        self._begin(now)
        self.requests[submit.id] = state
        self._send_submit(state, frame)
        return state

    def cancel(self, state: RequestState) -> None:
        if not state.is_ended:
            state.is_cancelled = True
            self._cancels[state.submit.id] = None
            self._flush_cancels()

    def ask(self, kind: type[GetStats] | type[GetHealth], now: float) -> CallState:
        self.check_open()
        call = CallState(kind(self._take_id()))
        self._begin(now)
        self.calls[call.message.id] = call
        self._send(encode_client_message(call.message))
        return call

    def forget(self, item: RequestState | CallState) -> None:
        """The caller does not want it any more."""
        if isinstance(item, CallState):
            self.calls.pop(item.message.id, None)
            return
        self.cancel(item)
        self.requests.pop(item.submit.id, None)
        self._unsent.pop(item.submit.id, None)

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _begin(self, now: float) -> None:
        if not self.requests and not self.calls:  # silence counts from here on, not from the last conversation
            self._heard_at = now
            self._next_tick = now + ALIVE_PERIOD_S

    def _send_submit(self, state: RequestState, frame: bytes) -> None:
        if self._send(frame):
            self._unsent.pop(state.submit.id, None)
        else:
            self._unsent[state.submit.id] = state

    def _flush_cancels(self) -> None:
        for request_id in list(self._cancels):
            if not self._send(encode_client_message(Cancel(request_id))):
                return
            del self._cancels[request_id]

    # ---- Time ------------------------------------------------------------------------------------------------------
    @property
    def is_busy(self) -> bool:
        return bool(self.requests or self.calls)

    def seconds_to_tick(self, now: float) -> float:
        return max(0.0, self._next_tick - now)

    def tick(self, now: float) -> None:
        """To be called when seconds_to_tick() is over: speaks to the server, notices its silence."""
        if now < self._next_tick or not self.is_busy:
            return
        self._next_tick = now + ALIVE_PERIOD_S
        silent_s = now - self._heard_at
        if silent_s > self.timeout_s:
            self.fail_all(
                ServerTimeoutError(
                    f"no word from {self.endpoint} for {silent_s:.1f} s; expected one each {ALIVE_PERIOD_S:g} s; "
                    "check that the server runs, that the address is right and that it asks for no CURVE key or got the right one, or raise "
                    "timeout_s"
                )
            )
            return
        for state in list(self._unsent.values()):
            self._send_submit(state, encode_client_message(state.submit))
        self._flush_cancels()
        self._send_message(Alive(ids=[key for key in self.requests if key not in self._unsent]))
        for call in self.calls.values():
            self._send_message(call.message)

    def _send_message(self, message: ClientMessage) -> None:
        self._send(encode_client_message(message))

    def fail_all(self, failure: ClientError) -> None:
        """Ends everything that waits."""
        items: list[RequestState | CallState] = [*self.requests.values(), *self.calls.values()]
        for item in items:
            item.failure = failure
            item.wake()
        self.requests.clear()
        self.calls.clear()
        self._unsent.clear()

    # ---- Messages --------------------------------------------------------------------------------------------------
    def handle(self, payload: bytes, now: float) -> None:
        """One frame from the server (I3)."""
        self._heard_at = now
        try:
            messages = decode_server_messages(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ClientError(
                f"{self.endpoint} sent something that is no message of this protocol: {error}; expected a blinkimp server of "
                "the same version; check the address and the versions"
            ) from None
        for message in messages:
            for item_id in message.unknown_ids if isinstance(message, AliveReply) else (message.id,):
                item = None if item_id is None else self.requests.get(item_id) or self.calls.get(item_id)
                if item is None:  # of a request that the caller gave up, or of a lost connection
                    continue
                try:
                    self._handle_message(item, message)
                except Exception as error:
                    self._fail(item, error)

    def _handle_message(self, item: RequestState | CallState, message: ServerMessage) -> None:
        if isinstance(message, Error):
            self._handle_error(item, message)
        elif isinstance(item, CallState):
            if isinstance(message, Stats | Health):
                del self.calls[message.id]
                item.reply = message
                item.wake()
        elif isinstance(message, AliveReply):
            self._resume(item)
        elif isinstance(message, Tokens | Finish):
            self._handle_output(item, message)

    def _fail(self, item: RequestState | CallState, error: Exception) -> None:
        """What was raised while a message of one was handled is its end, and nobody else's."""
        item.failure = ClientError(
            f"a message of {self.endpoint} could not be handled: got {error!r}, expected none; submit again, and report this: it is a "
            "defect of the client"
        )
        item.failure.__cause__ = error
        tables: tuple[dict[int, Any], ...] = (self.requests, self._unsent, self.calls)
        for table in tables:
            for key in [key for key, waiting in table.items() if waiting is item]:
                del table[key]
        with contextlib.suppress(Exception):  # it may be what raised
            item.wake()

    def _handle_output(self, state: RequestState, message: Tokens | Finish) -> None:
        if isinstance(message, Finish):
            self._end(state, finish=message)
        elif message.index != len(state.output_ids):
            failure = ClientError(
                f"{self.endpoint} sent output position {message.index} of request {message.id}; expected position "
                f"{len(state.output_ids)}; submit again, and report this: it is a defect of the server"
            )
            self._end(state, failure=failure)
        else:
            state.output_ids.extend(message.token_ids)
            state.chunks.append(Chunk(message.index, message.token_ids, message.logprobs, message.text, message.top))
            state.wake()

    def _handle_error(self, item: RequestState | CallState, error: Error) -> None:
        if isinstance(item, CallState):
            del self.calls[item.message.id]
            item.failure = RequestRefusedError(error)
            item.wake()
        elif error.final:
            self._end(item, failure=RequestRefusedError(error))

    def _end(self, state: RequestState, *, finish: Finish | None = None, failure: ClientError | None = None) -> None:
        state.finish, state.failure = finish, failure
        self.requests.pop(state.submit.id, None)
        self._cancels.pop(state.submit.id, None)
        state.wake()

    def _resume(self, state: RequestState) -> None:
        """The server does not know a request that we wait for: the connection was lost, or the server is a new one."""
        if state.submit.id in self._unsent:
            return
        if state.is_cancelled:
            self._end(state, finish=_cancelled(state))
            return
        del self.requests[state.submit.id]
        state.submit.id = self._take_id()
        state.submit.delivered_ids = list(state.output_ids)
        self.requests[state.submit.id] = state
        self._send_submit(state, encode_client_message(state.submit))


def _cancelled(state: RequestState) -> Finish:
    """The end of a request that was cancelled and that no server knows any more."""
    seed = state.submit.sampling.seed or 0
    return Finish(state.submit.id, "cancelled", 0, len(state.output_ids), seed, 0, 0, 0, 0)
