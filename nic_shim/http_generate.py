"""What a completion and a chat completion share: prompts to token ids, checks, choices into the engine, replies streamed or whole.

Called by nic_shim/http_app.py. The shape of the replies is http_completions.py's and http_chat.py's. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from blinkimp.nic_shim.admission import prompt_problem, submit_problem, untokenisable
from blinkimp.nic_shim.chat_template import ChatTemplate
from blinkimp.nic_shim.compile_queue import CompileQueue
from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.engine_thread import EngineThread
from blinkimp.nic_shim.http_errors import HttpError, http_error_of
from blinkimp.nic_shim.http_exchange import ClientGoneError, Exchange
from blinkimp.nic_shim.http_fields import GenerationDefaults, Prompt
from blinkimp.nic_shim.http_prompt_scores import score_prompt
from blinkimp.nic_shim.http_types import GenerationFields, PromptTokensDetails, Usage
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.request_log import log_request
from blinkimp.nic_shim.request_metrics import Siblings
from blinkimp.nic_shim.token_bytes import TokenBytes
from blinkimp.nic_shim.tokenizer import IncrementalDetokenizer, Tokenizer
from blinkimp.protocol import Error, Finish, Sampling, Submit, Tokens

log = logging.getLogger("blinkimp.http")

# What is longer is worked on on a thread, so that streams do not wait for it.
MAX_INLINE_CHARS = 4096  # of text to tokenise; token ids
MAX_INLINE_BYTES = 1 << 16  # of a body
CLOSED_STATUS = 499  # for the log: the client has gone

PromptIds = npt.NDArray[np.uint32]
Result = TypeVar("Result")


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
    def take_scores(self, scores: list[Tokens]) -> None: ...
    def opening(self, choice_idx: int) -> bytes | None: ...
    def chunk(self, choice_idx: int, messages: list[Tokens | Finish], usage: Usage | None) -> bytes: ...
    def usage_chunk(self, usage: Usage) -> bytes: ...
    def whole(self, choices: list[Choice], usage: Usage) -> bytes: ...


@dataclass
class Context:
    """What all requests need."""

    engine: EngineThread
    tokenizer: Tokenizer
    token_bytes: TokenBytes
    template: ChatTemplate
    defaults: GenerationDefaults
    model_names: tuple[str, ...]
    max_prompt_chars: int
    pool: ThreadPoolExecutor  # one thread: decodes bodies, tokenises and back, renders templates
    compile_queue: CompileQueue
    exchanges: dict[Exchange, None] = field(default_factory=dict)  # whose reply is under way


async def off_loop_if(is_long: bool, context: Context, work: Callable[[], Result]) -> Result:
    """What work() returns, made on the pool's thread if it takes long."""
    if is_long:
        return await asyncio.get_running_loop().run_in_executor(context.pool, work)
    return work()


async def encode_prompts(
    context: Context, prompts: Sequence[Prompt], *, add_special_tokens: bool = True
) -> list[PromptIds]:
    """Token ids of each prompt. Raises HttpError."""
    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    if num_chars > context.max_prompt_chars:
        submit = Submit(0, "".join(prompt for prompt in prompts if isinstance(prompt, str)))
        problem = submit_problem(submit, context.max_prompt_chars)
        assert problem is not None
        raise http_error_of(problem)

    def encode() -> list[PromptIds]:
        try:
            return [
                context.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
                if isinstance(prompt, str)
                else np.asarray(prompt, dtype=np.uint32)
                for prompt in prompts
            ]
        except Exception as error:  # the binding raises plain Exception
            raise http_error_of(untokenisable(0, error)) from error

    return await off_loop_if(sum(map(len, prompts)) > MAX_INLINE_CHARS, context, encode)


async def texts_of(context: Context, prompts: Sequence[Prompt]) -> list[str]:
    """Each prompt as text; they are of one kind."""
    batch = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not batch:
        return [prompt for prompt in prompts if isinstance(prompt, str)]
    is_long = sum(map(len, batch)) > MAX_INLINE_CHARS
    return await off_loop_if(is_long, context, lambda: context.tokenizer.decode_batch(batch))


async def make_requests(
    context: Context,
    body: GenerationFields,
    prompts: list[PromptIds],
    sampling: Sampling,
    constraint: LoadedConstraint | None,
    exchange: Exchange,
) -> list[LiveRequest]:
    """n choices for each prompt, checked. Raises HttpError."""
    requests: list[LiveRequest] = []
    num_choices = body.n or 1
    for prompt_ids in prompts:
        if requests:
            await asyncio.sleep(0)  # some milliseconds for each prompt of many choices: streams go on in between
        siblings = Siblings(num_choices, num_choices)
        for copy_idx in range(num_choices):
            # Like vLLM: the copies of a seeded request take the seeds that follow.
            seeded = sampling
            if sampling.seed is not None and copy_idx:
                seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + copy_idx) % 2**64)
            submit = Submit(
                len(requests),
                "",
                seeded,
                stream=bool(body.stream),
                priority=body.priority or 0,
                timeout_s=body.timeout,
                cache_salt=body.cache_salt or "",
                prefix_cache=body.prefix_cache is not False,
            )
            limits = context.engine.link.port
            problem = submit_problem(submit, context.max_prompt_chars) or prompt_problem(0, prompt_ids, seeded, limits)
            if problem is not None:
                raise http_error_of(problem)
            request = LiveRequest(submit, exchange)
            request.prompt_ids = prompt_ids
            request.constraint = constraint
            request.siblings = siblings
            request.start_detokenizer(IncrementalDetokenizer(context.tokenizer, prompt_ids[-16:].tolist()))
            requests.append(request)
    return requests


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
                self._shape.take_scores(await self._score_prompts())
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
        """Of each choice; one for all choices of a prompt."""
        scores: list[Tokens] = []
        for choice, request in zip(self._choices, self._requests, strict=True):
            if choice.prompt_idx == len(scores):
                scores.append(
                    await score_prompt(
                        self._engine, self._exchange, request.prompt_ids, request.sampling.top_logprobs, self._body
                    )
                )
        self._exchange.release()
        return [scores[choice.prompt_idx] for choice in self._choices]

    @staticmethod
    def _raise_error(messages: list[Tokens | Finish | Error]) -> None:
        for message in messages:
            if isinstance(message, Error):
                raise http_error_of(message)

    def _reply_headers(self, kind: bytes, num_bytes: int | None) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", kind), (b"x-request-id", self._request_id.encode())]
        if num_bytes is not None:
            headers.append((b"content-length", str(num_bytes).encode()))
        else:
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))  # nginx in between must not collect events
        return headers

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
        payload = self._shape.whole(self._choices, usage_of(self._choices))
        headers = self._reply_headers(b"application/json", len(payload))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": payload})

    # ---- Stream ----------------------------------------------------------------------------------------------------
    async def _send_stream(self, messages: list[Tokens | Finish | Error], send: Send) -> None:
        headers = self._reply_headers(b"text/event-stream; charset=utf-8", None)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        pieces = [self._shape.opening(idx) for idx in range(len(self._choices))]
        opening = [piece for piece in pieces if piece is not None]
        if opening:
            await send({"type": "http.response.body", "body": event_bytes(opening), "more_body": True})
        self._num_unfinished = len(self._choices)
        while True:
            # One write for all that has come for this connection since the last one.
            body = event_bytes(self._pieces_of(messages))
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


def event_bytes(pieces: list[bytes]) -> bytes:
    """Server-sent events."""
    return b"".join([b"data: %b\n\n" % piece for piece in pieces])


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


def new_exchange(context: Context, on_end: Callable[[], Any]) -> Exchange:
    exchange = Exchange(context.engine, on_end, context.exchanges.pop)
    context.exchanges[exchange] = None
    return exchange
