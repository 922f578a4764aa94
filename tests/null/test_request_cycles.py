"""What a request was goes when it ends, without the collector: none leaves a cycle of references, however it ends.

The ingresses' collector looks rarely (nic_shim/garbage.py). Here the engine is a few lines, everything in front of it is the real thing, but
for uvicorn and ZeroMQ's socket.
Run: pytest tests/null/test_request_cycles.py
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.chat_template import ChatTemplate
from blinkimp.nic_shim.compile_queue import CompileQueue
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler
from blinkimp.nic_shim.http_app import Api
from blinkimp.nic_shim.http_exchange import deliver
from blinkimp.nic_shim.http_fields import GenerationDefaults
from blinkimp.nic_shim.http_gate import Gate
from blinkimp.nic_shim.http_generate import Context
from blinkimp.nic_shim.http_request_log import RequestLog
from blinkimp.nic_shim.ingress_limits import HttpLimits, ZmqLimits
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.message_handler import MessageHandler
from blinkimp.nic_shim.sessions import SendResult, SessionTable
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.protocol import Cancel, Sampling, Submit, encode_client_message
from tests.ingress_support import write_byte_tokenizer

NUM_REQUESTS = 8
NEVER = "a client that goes away"  # the engine says one token and then nothing

Load = Callable[[], None]


def cycles_of(load: Load) -> list[Any]:
    """What only the collector can free of what `load` has left behind."""
    load()  # what is made once
    gc.collect()
    gc.disable()
    try:
        load()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def names_of(garbage: Iterable[Any]) -> list[str]:
    return sorted(f"{type(entry).__module__}.{type(entry).__qualname__}" for entry in garbage)


class Engine:
    """Answers each request with two tokens at once; an engine thread's and a link's face."""

    def __init__(self, eos_id: int) -> None:
        self.port = SimpleNamespace(vocab_size=258, max_context=4096, constraint_slot_bytes=1 << 16)
        self.watch = SimpleNamespace(state=abi.EngineState.RUNNING, is_lost=False)
        self.is_attached, self.eos_ids = True, frozenset([eos_id])
        self.metrics = SimpleNamespace(on_end=None)
        self.link = self
        self.touched: list[LiveRequest] = []

    def submit(self, request: LiveRequest) -> None:
        request.push_token(40, -1.0, 1)
        if request.priority == 0:
            request.push_token(41, -1.0, 2)
            request.finish(abi.FINISH_LENGTH, 3)
        self.touched.append(request)

    def cancel(self, requests: LiveRequest | Iterable[LiveRequest]) -> None:
        for request in [requests] if isinstance(requests, LiveRequest) else requests:
            if request.end is None:
                request.finish(abi.FINISH_CANCELLED, 3)
                self.touched.append(request)


class LoopEngine(Engine):
    """Whose messages come by the event loop."""

    def submit(self, request: LiveRequest) -> None:
        super().submit(request)
        self._deliver()

    def cancel(self, requests: LiveRequest | Iterable[LiveRequest]) -> None:
        super().cancel(requests)
        self._deliver()

    def _deliver(self) -> None:
        for request in self.touched:
            messages = [request.take_tokens(1 << 20)] if request.has_unsent() else []
            ends = [] if request.end is None else [request.end]
            asyncio.get_running_loop().call_soon(deliver, [(request.session, [*messages, *ends])])
        self.touched.clear()


@contextlib.contextmanager
def http_api(folder: Path) -> Iterator[Any]:
    tokenizer = Tokenizer(write_byte_tokenizer(folder))
    engine: Any = LoopEngine(1)
    queue = CompileQueue(ConstraintCompiler(tokenizer.path, 258, (1,), engine.port.constraint_slot_bytes))
    with ThreadPoolExecutor(1) as pool:
        context = Context(
            engine, tokenizer, ChatTemplate(folder), GenerationDefaults(), ("model",), 1 << 20, pool, queue,
        )  # fmt: skip
        api = Api(context, Gate((), HttpLimits(max_requests_per_s=1e9)), 1 << 20, lambda _: (b"", ""), "")
        slot = [0.0] * 4096
        yield RequestLog(api.app(), lambda: slot)
    queue.close()
    assert not context.exchanges


def scope_of(path: str, payload: bytes) -> dict[str, Any]:
    """What uvicorn hands to the application with such a request."""
    return {
        "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "headers": [(b"content-length", b"%d" % len(payload))],
        "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip


async def ask(app: Any, path: str, payload: bytes) -> int:
    """The status; of a stream's client that goes away after the first chunk, too."""
    statuses: list[int] = []
    bodies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    bodies.put_nowait({"type": "http.request", "body": payload, "more_body": False})

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        elif b'"priority":1' in payload:
            bodies.put_nowait({"type": "http.disconnect"})

    await app(scope_of(path, payload), bodies.get, send)
    return statuses[0]


COMPLETION: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "whole": ("completions", 200, COMPLETION),
    "stream": ("completions", 200, {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}),
    "text with stop strings": (
        "completions",
        200,
        {"prompt": "hello", "max_tokens": 2, "stop": ["zz"], "stream": True},
    ),
    "several choices": (
        "completions",
        200,
        {**COMPLETION, "prompt": [[5], [6, 7]], "n": 2, "logprobs": 0, "stream": True},
    ),
    "chat": ("chat/completions", 200, CHAT),
    "chat stream": ("chat/completions", 200, {**CHAT, "stream": True}),
    NEVER: ("completions", 200, {**COMPLETION, "stream": True, "priority": 1}),
    "field out of range": ("completions", 400, {**COMPLETION, "max_tokens": -1}),
    "neutral field and one that is wrong": ("completions", 400, {**COMPLETION, "best_of": 1, "top_p": 7}),
    "prompt too long": ("completions", 400, {**COMPLETION, "max_tokens": 5000}),
    "bad constraint": ("completions", 400, {**COMPLETION, "structured_outputs": {"regex": "(("}}),
    "prompt's scores that are not complete": (
        "completions",
        503,
        {**COMPLETION, "prompt": [5] * 300, "echo": True, "logprobs": 0},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_http_requests_leave_no_cycles(tmp_path: Path, name: str) -> None:
    path, status, body = BODIES[name]
    payload = msgspec.json.encode(body)
    with http_api(tmp_path) as app, asyncio.Runner() as runner:

        async def serve() -> None:
            for _ in range(NUM_REQUESTS):
                assert await ask(app, f"/v1/{path}", payload) == status
            for _ in range(8):  # for what was cancelled to end
                await asyncio.sleep(0)

        async def idle() -> None:
            return None

        idle_garbage = names_of(cycles_of(lambda: runner.run(idle())))
        garbage = names_of(cycles_of(lambda: runner.run(serve())))
    assert garbage == idle_garbage


def test_zmq_requests_leave_no_cycles(tmp_path: Path) -> None:
    engine: Any = Engine(1)
    sent: list[bytes] = []

    def send(identity: bytes, frame: bytes) -> SendResult:
        sent.append(identity)
        return SendResult.GONE if identity == b"gone" and len(frame) > 40 else SendResult.SENT

    sessions = SessionTable(send, engine.cancel, stall_timeout_s=60.0)
    handler = MessageHandler(engine, sessions, Tokenizer(write_byte_tokenizer(tmp_path)), ZmqLimits())
    try:

        def message(identity: bytes, payload: bytes) -> None:
            handler.handle(identity, [payload])
            while handler.num_preparing:
                handler.take_prepared()
            sessions.touch(engine.touched)
            engine.touched.clear()
            sessions.flush()

        def serve() -> None:
            for idx in range(NUM_REQUESTS):
                for identity in (b"client", b"gone"):
                    message(identity, encode_client_message(Submit(idx, [5, 6, 7], Sampling(max_tokens=2))))
                message(b"client", encode_client_message(Submit(idx, "x" * 5000, Sampling(max_tokens=2))))
                message(b"client", encode_client_message(Submit(idx, [5], Sampling(max_tokens=9999))))
                message(b"client", encode_client_message(Submit(idx, [5], Sampling(max_tokens=9), priority=1)))
                message(b"client", encode_client_message(Cancel(idx)))
                message(b"client", b"junk")

        garbage = cycles_of(serve)
        assert sent and not sessions.sessions and sessions.counters.clients_gone
        assert names_of(garbage) == []
    finally:
        handler.close()
