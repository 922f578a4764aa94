"""Servers that answer with scripted delays: an OpenAI-compatible one over HTTP, and a blinkimp one over ZeroMQ.

Each request has its first token after first_ms, then one every gap_ms; one in `fail_each` is refused. What reached them is counted.
Used by tests/host/test_bench_load.py, tests/host/test_cli_bench.py, tests/host/test_evidence.py, tests/host/test_lab_interference.py and
tests/host/test_lab_sweep.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from blinkimp.protocol import (
    Error,
    Finish,
    GetHealth,
    Health,
    Submit,
    Tokens,
    decode_client_message,
    encode_server_messages,
)
from tests.support import PATIENCE_S


@dataclass
class Script:
    first_ms: float = 30.0
    gap_ms: float = 10.0
    fail_each: int = 0  # 0: none
    vocab_size: int = 0  # 0: not told, as by most servers
    stall_after: int = 0  # the whole server stops for stall_ms when it has taken so many requests; 0: never
    stall_ms: float = 0.0
    hold_for: int = 0  # nobody gets a token before so many requests ran at once, on any machine; 0: no hold
    reasons: tuple[str, ...] = ("length",)  # what requests end with, one after the other and over again
    prompts: list[Any] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    num_connections: int = 0
    clients: set[bytes] = field(default_factory=set)
    stalled_until: float = 0.0
    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self.hold_for:
            with contextlib.suppress(TimeoutError):  # they were never so many: the test says so
                await asyncio.wait_for(self.let_go.wait(), PATIENCE_S)
        await asyncio.sleep(seconds)
        while loop.time() < self.stalled_until:
            await asyncio.sleep(self.stalled_until - loop.time())

    @property
    def reason(self) -> str:
        """Of the request that was taken last."""
        return self.reasons[(len(self.prompts) - 1) % len(self.reasons)]

    def take(self, prompt: Any) -> bool:
        """False: this one is refused."""
        self.prompts.append(prompt)
        if self.stall_after and len(self.prompts) == self.stall_after:
            self.stalled_until = asyncio.get_running_loop().time() + self.stall_ms / 1e3
        if self.fail_each and len(self.prompts) % self.fail_each == 0:
            return False
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once >= self.hold_for:
            self.let_go.set()
        return True


async def serve_http(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    script.num_connections += 1
    try:
        await answer_http(script, reader, writer)
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass  # the client has gone, or the server ends
    finally:
        writer.transport.abort()


async def answer_http(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0
        )
        body = json.loads(await reader.readexactly(length)) if length else {}
        if head.startswith("GET"):
            vocab = {"vocab_size": script.vocab_size} if script.vocab_size else {}
            await respond(writer, 200, {"data": [{"id": "scripted", "max_model_len": 4096, **vocab}]})
        elif not script.take(body.get("prompt") or body["messages"]):
            await respond(writer, 503, {"error": "busy"})
        else:
            await stream_completion(script, writer, body["max_tokens"], "messages" in body)


async def respond(writer: asyncio.StreamWriter, status: int, content: Any) -> None:
    text = json.dumps(content).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
    await writer.drain()


async def stream_completion(script: Script, writer: asyncio.StreamWriter, num_tokens: int, is_chat: bool) -> None:
    def send(event: Any) -> None:
        data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    reason = script.reason
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    if is_chat:
        send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for idx in range(num_tokens):
        await script.wait((script.first_ms if idx == 0 else script.gap_ms) / 1e3)
        piece = {"delta": {"content": f" {idx}"}} if is_chat else {"text": f" {idx}"}
        send({"choices": [{"index": 0, **piece, "finish_reason": reason if idx == num_tokens - 1 else None}]})
        await writer.drain()
    script.at_once -= 1
    send({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}})
    send(b"[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def serve_zmq(script: Script, socket: zmq.asyncio.Socket) -> None:
    tasks: set[asyncio.Task[None]] = set()

    async def send(client: bytes, *messages: Any) -> None:
        await socket.send_multipart([client, encode_server_messages(list(messages))])

    async def answer(client: bytes, submit: Submit) -> None:
        if not script.take(submit.prompt):
            await send(client, Error(submit.id, "busy", "requests", "many", "fewer", "wait", True))
            return
        reason = script.reason
        for idx in range(submit.sampling.max_tokens):
            await script.wait((script.first_ms if idx == 0 else script.gap_ms) / 1e3)
            await send(client, Tokens(submit.id, idx, [7], [0.0], ""))
        script.at_once -= 1
        await send(client, Finish(submit.id, reason, 1, submit.sampling.max_tokens, 0, 0, 0, 0, 0))

    while True:
        client, frame = await socket.recv_multipart()
        with contextlib.suppress(msgspec.DecodeError):
            message = decode_client_message(frame)
            if isinstance(message, GetHealth):
                await send(client, Health(message.id, "ok", 1, 0, "running", 1, 4096, 100, [0]))
            elif isinstance(message, Submit):
                script.clients.add(client)
                task = asyncio.create_task(answer(client, message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)


@contextlib.contextmanager
def scripted_server(kind: str, script: Script) -> Iterator[str]:
    """`http` or `zmq`, in a thread of its own; yields its address."""
    loop = asyncio.new_event_loop()
    address: list[str] = []
    ready = threading.Event()

    async def main() -> None:
        if kind == "http":
            server = await asyncio.start_server(lambda r, w: serve_http(script, r, w), "127.0.0.1", 0)
            address.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            ready.set()
            async with server:
                await server.serve_forever()
        else:
            context = zmq.asyncio.Context()
            socket = context.socket(zmq.ROUTER)
            address.append(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
            ready.set()
            try:
                await serve_zmq(script, socket)
            finally:
                socket.close(linger=0)
                context.term()

    task = loop.create_task(main())

    def run() -> None:
        asyncio.set_event_loop(loop)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        others = asyncio.all_tasks(loop)
        while True:
            for other in others:
                other.cancel()
            loop.run_until_complete(asyncio.gather(*others, return_exceptions=True))
            loop.run_until_complete(asyncio.sleep(0.01))  # transports close in the loop's next rounds
            others = asyncio.all_tasks(loop)
            if not others:  # else they are of connections that came at the last moment
                break
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE_S), "the scripted server did not start"
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(PATIENCE_S)
