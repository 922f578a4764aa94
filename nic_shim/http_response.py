"""The reply to a generation: streamed as server-sent events, or whole.

Made by nic_shim/http_app.py, of requests that nic_shim/http_generate.py has checked. What stands in the JSON is http_completions.py's and
http_chat.py's. A reply may be far larger than its request: n choices each say their prompt. It is made and sent in parts, each when the
client has read those before, and all but small ones on a thread.
Test: pytest tests/host/test_http_ingress.py tests/null/test_http_many_choices.py
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from blinkimp.nic_shim.engine_thread import EngineThread
from blinkimp.nic_shim.http_errors import HttpError, http_error_of
from blinkimp.nic_shim.http_exchange import ClientGoneError, Exchange
from blinkimp.nic_shim.http_prompt_scores import score_prompt
from blinkimp.nic_shim.http_request_log import CLOSED_STATUS
from blinkimp.nic_shim.http_types import ChatReply, CompletionReply, GenerationFields, PromptTokensDetails, Usage
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.request_log import log_request
from blinkimp.protocol import Error, Finish, Tokens

log = logging.getLogger("blinkimp.http")

PART_BYTES = 1 << 18  # what is made and sent at once, and a choice more
MAX_INLINE_TOKENS = 4096  # of output: a whole reply with more is made on a thread

_encode = msgspec.json.Encoder().encode


@dataclass
class Choice:
    """What one choice has come to."""

    prompt_idx: int
    num_prompt_tokens: int
    discards_output: bool = False  # max_tokens 0: it says a token, as the engine knows no request without one
    messages: list[Tokens | Finish] = field(default_factory=list)  # of a reply that goes out whole
    num_output_tokens: int = 0
    finish: Finish | None = None

    def count(self, messages: list[Tokens | Finish]) -> bool:
        """Usage and end; True when this was the end."""
        for message in messages:
            if isinstance(message, Finish):
                self.finish = message
            elif not self.discards_output:
                self.num_output_tokens += len(message.token_ids)
        return self.finish is not None


class ReplyShape(Protocol):
    """Builds the JSON of one API. `messages` are all of one choice: Tokens, and perhaps a Finish at the end."""

    def needs_scores(self) -> bool: ...
    def take_scores(self, scores: list[Tokens]) -> None: ...  # of each prompt
    def opening(self, choice_idx: int) -> bytes | None: ...
    def chunk(self, choice_idx: int, messages: list[Tokens | Finish], usage: Usage | None) -> bytes: ...
    def usage_chunk(self, usage: Usage) -> bytes: ...
    def whole(self, choices: list[Choice], usage: Usage) -> Iterator[bytes]: ...  # a choice at a time


def usage_of(choices: Sequence[Choice]) -> Usage:
    """Each prompt counts once, however many choices it has."""
    prompts = {choice.prompt_idx: choice.num_prompt_tokens for choice in choices}
    cached: dict[int, int] = {}
    for choice in choices:
        num_cached = choice.finish.num_cached_tokens if choice.finish is not None else 0
        cached[choice.prompt_idx] = min(num_cached, cached.get(choice.prompt_idx, num_cached))
    num_prompt, num_output = sum(prompts.values()), sum(choice.num_output_tokens for choice in choices)
    return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(sum(cached.values())))


class GenerationResponse(Response):
    """Runs an exchange and answers: whole, or as a stream of server-sent events."""

    def __init__(
        self,
        engine: EngineThread,
        exchange: Exchange,
        requests: list[LiveRequest],
        shape: ReplyShape,
        body: GenerationFields,
        request_id: str,
    ) -> None:
        self._engine = engine
        self._exchange = exchange
        self._requests = requests
        self._shape = shape
        self._body = body
        self._request_id = request_id
        num_choices = body.n or 1
        self._choices = [
            Choice(idx // num_choices, len(request.prompt_ids), body.max_tokens == 0)
            for idx, request in enumerate(requests)
        ]
        self._num_unfinished = 0
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["is_logged"] = True
        needs_scores = self._shape.needs_scores()
        self._exchange.start(self._requests, receive, is_held=needs_scores)
        try:
            first = await self._exchange.next()
            self._raise_error(first)
            if needs_scores:
                scores = await self._score_prompts()
                await asyncio.get_running_loop().run_in_executor(None, self._shape.take_scores, scores)
            if self._body.stream:
                await self._send_stream(first, send)
            else:
                await self._send_whole(first, send)
        except ClientGoneError:
            self.status_code = CLOSED_STATUS
        except HttpError as error:  # nothing has been sent yet
            self.status_code = error.status
            response = error.response()
            response.headers["x-request-id"] = self._request_id
            await response(scope, receive, send)
        finally:
            self._exchange.close()
            log_request(
                log, self._requests, request_id=self._request_id, transport="http", path=scope["path"], status=self.status_code,
                stream=bool(self._body.stream), user=(self._body.user or "")[:64] or None,
            )  # fmt: skip

    async def _score_prompts(self) -> list[Tokens]:
        """Of each prompt."""
        scores: list[Tokens] = []
        for choice, request in zip(self._choices, self._requests, strict=True):
            if choice.prompt_idx == len(scores):
                scores.append(await score_prompt(self._engine, self._exchange, request, self._body))
        self._exchange.release()
        return scores

    @staticmethod
    def _raise_error(messages: list[Tokens | Finish | Error]) -> None:
        for message in messages:
            if isinstance(message, Error):
                raise http_error_of(message)

    async def _start(self, send: Send, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
        own = [(b"content-type", kind), (b"x-request-id", self._request_id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": [*own, *headers]})

    async def _part(self, pieces: Iterator[bytes], *, is_long: bool) -> bytes:
        """The next pieces; shorter than PART_BYTES where these are the last. Raises ClientGoneError."""
        if self._exchange.is_gone:
            raise ClientGoneError
        if is_long:
            return await asyncio.get_running_loop().run_in_executor(None, next_part, pieces)
        return next_part(pieces)

    # ---- Whole -----------------------------------------------------------------------------------------------------
    async def _send_whole(self, messages: list[Tokens | Finish | Error], send: Send) -> None:
        num_unfinished = len(self._choices)
        while True:
            self._raise_error(messages)
            for message in messages:
                assert not isinstance(message, Error), "raised above"
                choice = self._choices[message.id]
                choice.messages.append(message)
                num_unfinished -= choice.count([message])
            if num_unfinished == 0:
                break
            messages = await self._exchange.next()
        usage = usage_of(self._choices)
        is_long = self._shape.needs_scores() or usage.completion_tokens > MAX_INLINE_TOKENS
        pieces = self._shape.whole(self._choices, usage)
        part = await self._part(pieces, is_long=is_long)
        length = [(b"content-length", str(len(part)).encode())] if len(part) < PART_BYTES else []
        await self._start(send, b"application/json", *length)
        while len(part) >= PART_BYTES:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            part = await self._part(pieces, is_long=True)
        await send({"type": "http.response.body", "body": part})

    # ---- Stream ----------------------------------------------------------------------------------------------------
    async def _send_stream(self, messages: list[Tokens | Finish | Error], send: Send) -> None:
        await self._start(
            send,
            b"text/event-stream; charset=utf-8",
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx in between must not collect events
        )
        openings = map(event_of, filter(None, map(self._shape.opening, range(len(self._choices)))))
        part = await self._part(openings, is_long=self._shape.needs_scores())
        while len(part) >= PART_BYTES:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            part = await self._part(openings, is_long=True)
        if part:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        self._num_unfinished = len(self._choices)
        while True:
            # One write for all that has come for this connection since the last one.
            body = b"".join(map(event_of, self._pieces_of(messages)))
            if self._num_unfinished == 0:
                break
            await send({"type": "http.response.body", "body": body, "more_body": True})
            messages = await self._exchange.next()
        await send({"type": "http.response.body", "body": body + b"data: [DONE]\n\n"})

    def _pieces_of(self, messages: list[Tokens | Finish | Error]) -> list[bytes]:
        """The chunks of one write. An Error ends the stream: the status line is gone already, so the stream itself says it."""
        options = self._body.stream_options
        with_usage = options is not None and options.continuous_usage_stats
        by_choice: dict[int, list[Tokens | Finish]] = {}
        for message in messages:
            if isinstance(message, Error):
                error = http_error_of(message)
                self.status_code = error.status
                self._num_unfinished = 0
                return [msgspec.json.encode(error.body())]
            by_choice.setdefault(message.id, []).append(message)
        pieces: list[bytes] = []
        for idx, own in by_choice.items():
            choice = self._choices[idx]
            self._num_unfinished -= choice.count(own)
            pieces.append(self._shape.chunk(idx, own, usage_of([choice]) if with_usage else None))
        if self._num_unfinished == 0 and options is not None and options.include_usage:
            pieces.append(self._shape.usage_chunk(usage_of(self._choices)))
        return pieces


def event_of(piece: bytes) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % piece


def next_part(pieces: Iterator[bytes]) -> bytes:
    """The next pieces, joined, until they reach PART_BYTES."""
    taken: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        taken.append(piece)
        num_bytes += len(piece)
        if num_bytes >= PART_BYTES:
            break
    return b"".join(taken)


def reply_pieces(reply: CompletionReply | ChatReply, choices: Iterable[msgspec.Struct]) -> Iterator[bytes]:
    """The reply's JSON with `choices` in place of its own, of which it has none."""
    head, mark, tail = _encode(reply).partition(b'"choices":[')
    assert mark and tail.startswith(b"]"), "the reply is made without choices"
    separator = head + mark
    for choice in choices:
        yield separator + _encode(choice)
        separator = b","
    yield tail


def merged(messages: list[Tokens | Finish]) -> tuple[Tokens | None, Finish | None]:
    """Several messages of one choice as one: a client that lags gets its tokens in larger chunks."""
    if len(messages) == 1:
        message = messages[0]
        return (message, None) if isinstance(message, Tokens) else (None, message)
    tokens = [message for message in messages if isinstance(message, Tokens)]
    finish = messages[-1] if isinstance(messages[-1], Finish) else None
    if len(tokens) <= 1:
        return (tokens[0] if tokens else None), finish
    whole = Tokens(tokens[0].id, tokens[0].index, [], [], "")
    for message in tokens:
        whole.token_ids += message.token_ids
        whole.logprobs += message.logprobs
        whole.top = whole.top + message.top
    whole.text = "".join(message.text for message in tokens)
    return whole, finish


_FINISH_NAMES = {"eos": "stop", "stop_id": "stop", "stop": "stop", "length": "length", "timeout": "timeout"}


def finish_name(finish: Finish | None) -> str | None:
    """finish_reason of OpenAI's APIs; what has no name there is `abort`, as in vLLM."""
    return None if finish is None else _FINISH_NAMES.get(finish.reason, "abort")
