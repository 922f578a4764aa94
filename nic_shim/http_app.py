"""The HTTP API as an ASGI application: routes, who may use them, and what each does before the engine has its turn.

Made by nic_shim/http_ingress.py. nic_shim/HTTP.md describes it for users. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from blinkimp import __version__
from blinkimp import ring_abi as abi
from blinkimp.nic_shim.admission import PromptIds, larger_limit
from blinkimp.nic_shim.chat_template import ChatTemplateError
from blinkimp.nic_shim.http_chat import ChatShape, template_messages
from blinkimp.nic_shim.http_completions import CompletionShape
from blinkimp.nic_shim.http_constraint import OverdueError, compile_constraint
from blinkimp.nic_shim.http_errors import HttpError, bad_field
from blinkimp.nic_shim.http_exchange import Exchange
from blinkimp.nic_shim.http_fields import (
    DEFAULT_COMPLETION_TOKENS,
    Body,
    check_combinations,
    check_model,
    constraint_of,
    decode_body,
    prompts_of,
    sampling_of,
)
from blinkimp.nic_shim.http_gate import Gate
from blinkimp.nic_shim.http_generate import (
    MAX_INLINE_BYTES,
    MAX_INLINE_CHARS,
    Context,
    encode_prompts,
    make_requests,
    new_exchange,
    off_loop_if,
    texts_of,
)
from blinkimp.nic_shim.http_openapi import docs_page, openapi_document
from blinkimp.nic_shim.http_response import GenerationResponse, ReplyShape
from blinkimp.nic_shim.http_types import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeReply,
    DetokenizeRequest,
    GenerationFields,
    Model,
    ModelList,
    ServerStatus,
    ServerVersion,
    TokenizeReply,
    TokenizeRequest,
)
from blinkimp.nic_shim.live_request import deadline_ns_of
from blinkimp.nic_shim.tokenizer import USER_SPEAKS
from blinkimp.protocol import Sampling

log = logging.getLogger("blinkimp.http")

Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class Api:
    """The handlers. `render_metrics` gives body and type of /metrics, for an Accept header."""

    context: Context
    gate: Gate
    max_request_bytes: int
    render_metrics: Callable[[str | None], tuple[bytes, str]]
    model_root: str
    is_draining: bool = False

    def __post_init__(self) -> None:
        self._created = int(time.time())
        port = self.context.engine.link.port
        self._openapi = openapi_document(
            vocab_size=port.vocab_size, max_context=port.max_context, model_names=self.context.model_names
        )

    def app(self) -> Starlette:
        open_routes = {"/health": self.health, "/ready": self.ready, "/version": self.version, "/metrics": self.metrics}
        open_routes |= {"/openapi.json": self.openapi, "/docs": self.docs}
        guarded = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat}
        guarded |= {"/tokenize": self.tokenize, "/detokenize": self.detokenize}
        routes = [Route(path, handler, methods=["GET"]) for path, handler in open_routes.items()]
        routes += [Route(path, self._guarded(handler), methods=["POST"]) for path, handler in guarded.items()]
        routes.append(Route("/v1/models", self._guarded(self.models), methods=["GET"]))
        routes.append(Route("/v1/models/{name:path}", self._guarded(self.model), methods=["GET"]))
        return Starlette(
            routes=routes,
            exception_handlers={HTTPException: _on_http_exception, HttpError: _on_http_error, Exception: _on_defect},
        )

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            caller = self.gate.caller_of(request.headers.get("authorization"))
            self.gate.count_request(caller)
            request.state.caller = caller
            return await handler(request)

        return guarded

    # ---- Generation ------------------------------------------------------------------------------------------------
    async def completions(self, request: Request) -> Response:
        body = await self._decoded(request, CompletionRequest)
        check_model(body.model, self.context.model_names)
        check_combinations(body)
        prompts = prompts_of(body)
        with self._entered(request, len(prompts) * (body.n or 1)) as exchange:
            prompt_ids = await encode_prompts(self.context, prompts)
            shows_ids = body.return_token_ids or (body.echo and body.logprobs is not None)
            shape = CompletionShape(
                _request_id(request),
                body.model or self.context.model_names[0],
                body,
                self.context.tokenizer.token_bytes,
                echoes=await texts_of(self.context, prompts) if body.echo else [""] * len(prompts),
                prompt_ids=[ids.tolist() for ids in prompt_ids] if shows_ids else [],
            )
            max_tokens, num_top = self._completion_tokens(body, max(map(len, prompt_ids))), body.logprobs or 0
            sampling = sampling_of(body, self.context.defaults, max_tokens=max_tokens, num_top_logprobs=num_top)
            return await self._generate(request, body, prompt_ids, sampling, shape, exchange)

    def _completion_tokens(self, body: CompletionRequest, num_prompt_tokens: int) -> int:
        """Output tokens at most; at least one, as the engine knows no request without any."""
        if body.max_tokens is not None:
            return max(1, body.max_tokens)
        num_left = self.context.engine.link.port.max_context - num_prompt_tokens
        most = self.context.defaults.max_new_tokens or DEFAULT_COMPLETION_TOKENS
        return max(1, min(DEFAULT_COMPLETION_TOKENS, most, num_left))

    async def chat(self, request: Request) -> Response:
        body = await self._decoded(request, ChatRequest)
        check_model(body.model, self.context.model_names)
        check_combinations(body)
        variables = body.chat_template_kwargs or {}
        if "messages" in variables or "add_generation_prompt" in variables:
            raise bad_field(
                "chat_template_kwargs", "chat_template_kwargs cannot be used", "messages or add_generation_prompt in it",
                "other variables of the template", "use the request's own fields",
            )  # fmt: skip
        with self._entered(request, body.n or 1) as exchange:
            add_prompt = body.add_generation_prompt is not False
            prompt_ids = await self._chat_prompt(body.messages, add_generation_prompt=add_prompt, variables=variables)
            max_context = self.context.engine.link.port.max_context
            num_left = max(1, max_context - len(prompt_ids))
            asked = body.max_completion_tokens or body.max_tokens
            max_tokens = asked or min(num_left, self.context.defaults.max_new_tokens or num_left)
            sampling = sampling_of(
                body, self.context.defaults, max_tokens=max_tokens, num_top_logprobs=body.top_logprobs or 0
            )
            if self.context.template.is_plain:  # no token says that the reply is over: the next speaker's name does
                sampling = msgspec.structs.replace(sampling, stop=[*sampling.stop, USER_SPEAKS])
            shape = ChatShape(
                _request_id(request),
                body.model or self.context.model_names[0],
                body,
                self.context.tokenizer.token_bytes,
                echo=_chat_echo(body),
                prompt_ids=prompt_ids.tolist() if body.return_token_ids else [],
            )
            return await self._generate(request, body, [prompt_ids], sampling, shape, exchange)

    async def _chat_prompt(
        self, messages: list[ChatMessage], *, add_generation_prompt: bool, variables: dict[str, Any]
    ) -> PromptIds:
        context = self.context

        def render() -> str:
            # On the pool's thread: a template may take up to its deadline.
            return context.template.text(
                template_messages(messages), add_generation_prompt=add_generation_prompt, **variables
            )

        try:
            text = await asyncio.get_running_loop().run_in_executor(context.pool, render)
        except ChatTemplateError as error:
            raise HttpError(400, str(error), code="bad_messages", param="messages") from None
        (ids,) = await encode_prompts(context, [text], add_special_tokens=context.template.is_plain)
        return ids

    @contextlib.contextmanager
    def _entered(self, request: Request, num_choices: int) -> Iterator[Exchange]:
        """An exchange for so many choices, before any work is done for them. What fails inside gives them back."""
        self._refuse_while_down()
        caller = request.state.caller
        self.gate.enter(caller, num_choices)
        exchange = new_exchange(self.context, lambda: self.gate.leave(caller, num_choices))
        try:
            yield exchange
        except BaseException:
            exchange.abandon()
            raise

    async def _generate(
        self,
        request: Request,
        body: GenerationFields,
        prompt_ids: list[PromptIds],
        sampling: Sampling,
        shape: ReplyShape,
        exchange: Exchange,
    ) -> Response:
        deadline_ns = deadline_ns_of(request.state.arrived_ns, body.timeout)
        try:
            constraint = await compile_constraint(self.context.compile_queue, request, constraint_of(body), deadline_ns)
        except OverdueError:
            constraint = None  # the engine link ends the request as one that is overdue: it does not run without
        self._refuse_while_down()  # the drain may have begun meanwhile
        requests = await make_requests(self.context, body, prompt_ids, sampling, constraint, exchange)
        for one in requests:  # its time began before its prompt was tokenised
            one.received_ns = request.state.arrived_ns
        return GenerationResponse(self.context.engine, exchange, requests, shape, body, _request_id(request))

    def _refuse_while_down(self) -> None:
        status = self.status()
        if status in ("draining", "engine_faulted", "engine_lost"):
            raise HttpError(
                503,
                f"the server takes no requests: got one while it is {status}, expected none; ask another server, or again later",
                code=status,
            )

    async def _body_of(self, request: Request) -> bytes:
        """The request's body, within max_request_bytes."""
        declared = request.headers.get("content-length", "0")
        num_bytes, chunks = int(declared) if declared.isdecimal() else 0, []
        if num_bytes <= self.max_request_bytes:
            num_bytes = 0
            try:
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > self.max_request_bytes:
                        break
                    chunks.append(chunk)
            except ClientDisconnect:
                raise HttpError(
                    400, "the body ended early: got a closed connection, expected the whole body; send it again"
                ) from None
        if num_bytes > self.max_request_bytes:
            raise HttpError(
                413,
                f"the body is too large: got {num_bytes} bytes or more, expected at most {self.max_request_bytes}; send a shorter prompt, or "
                + larger_limit("max_request_bytes"),
                code="too_large",
            )
        request.state.arrived_ns = time.monotonic_ns()
        return b"".join(chunks)

    async def _decoded(self, request: Request, body_type: type[Body]) -> Body:
        payload = await self._body_of(request)
        is_long = len(payload) > MAX_INLINE_BYTES
        return await off_loop_if(is_long, self.context, lambda: decode_body(payload, body_type))

    # ---- Tokens ----------------------------------------------------------------------------------------------------
    async def tokenize(self, request: Request) -> Response:
        body = await self._decoded(request, TokenizeRequest)
        check_model(body.model, self.context.model_names)
        if (body.prompt is None) == (body.messages is None):
            raise bad_field(
                "prompt", "prompt and messages cannot be used", "both or neither", "one of them", "send one"
            )
        if body.messages is not None:
            ids = await self._chat_prompt(body.messages, add_generation_prompt=body.add_generation_prompt, variables={})
        else:
            (ids,) = await encode_prompts(self.context, [body.prompt or ""], add_special_tokens=body.add_special_tokens)
        tokens, is_long, text = ids.tolist(), len(ids) > MAX_INLINE_CHARS, self.context.tokenizer.token_bytes.text
        names = (
            await off_loop_if(is_long, self.context, lambda: list(map(text, tokens)))
            if body.return_token_strs
            else None
        )
        return _json(TokenizeReply(len(tokens), self.context.engine.link.port.max_context, tokens, names))

    async def detokenize(self, request: Request) -> Response:
        body = await self._decoded(request, DetokenizeRequest)
        check_model(body.model, self.context.model_names)
        vocab_size = self.context.engine.link.port.vocab_size
        if body.tokens and max(body.tokens) >= vocab_size:
            raise bad_field(
                "tokens", "a token id is not in the vocabulary", str(max(body.tokens)), f"0 to {vocab_size - 1}",
                "use this model's tokenizer",
            )  # fmt: skip
        (text,) = await texts_of(self.context, [body.tokens])
        return _json(DetokenizeReply(text))

    # ---- About the server ------------------------------------------------------------------------------------------
    def _model(self, name: str) -> Model:
        port = self.context.engine.link.port
        return Model(
            id=name,
            created=self._created,
            root=self.model_root,
            max_model_len=port.max_context,
            vocab_size=port.vocab_size,
        )

    async def models(self, _: Request) -> Response:
        return _json(ModelList(data=[self._model(name) for name in self.context.model_names]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name, self.context.model_names)
        return _json(self._model(name))

    def status(self) -> str:
        """ok, starting, draining, engine_lost, engine_faulted."""
        link = self.context.engine.link
        state = link.watch.state
        if state == abi.EngineState.FAULTED:
            return "engine_faulted"
        if self.is_draining or state == abi.EngineState.DRAINING:
            return "draining"
        if link.watch.is_lost or not link.is_attached:
            return "engine_lost"
        return "starting" if state == abi.EngineState.STARTING else "ok"

    async def health(self, _: Request) -> Response:
        """Live: this process answers. A faulted engine is started anew by its supervisor; /ready tells when it is back."""
        return _json(ServerStatus(self.status()))

    async def ready(self, _: Request) -> Response:
        """Whether a request would be taken now."""
        status = self.status()
        return _json(ServerStatus(status), 200 if status == "ok" else 503)

    async def version(self, _: Request) -> Response:
        return _json(ServerVersion(__version__))

    async def metrics(self, request: Request) -> Response:
        # On a thread: some milliseconds, for which no stream should wait.
        render, accept = self.render_metrics, request.headers.get("accept")
        body, content_type = await asyncio.get_running_loop().run_in_executor(None, render, accept)
        return Response(body, headers={"content-type": content_type})

    async def openapi(self, _: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def docs(self, _: Request) -> Response:
        return Response(docs_page(self._openapi), media_type="text/html")


def _chat_echo(body: ChatRequest) -> str:
    """As vLLM: the last message, where it is of the role that the reply goes on with."""
    last = body.messages[-1]
    goes_on = last.role == "assistant" or body.add_generation_prompt is False
    return template_messages([last])[0]["content"] if body.echo and goes_on else ""


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _request_id(request: Request) -> str:
    """As http_request_log.py found or made it."""
    request_id: str = request.state.request_id
    return request_id


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    request.state.error_code = error.code
    return error.response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; `GET /openapi.json` lists what there is"
    response = HttpError(error.status_code, message, code="not_found").response()
    response.headers.update(error.headers or {})  # Allow, of a 405
    return response


async def _on_defect(_: Request, error: Exception) -> Response:
    log.error("a request could not be handled", exc_info=error)
    return HttpError(
        500,
        f"the server failed on this request: got {type(error).__name__}, expected an answer; report this with the server's log",
        code="internal_error",
    ).response()
