"""An OpenAI-compatible server as a target of load: streamed completions over plain HTTP/1.1, a connection per running request.

asyncio protocols with a parser of our own: general HTTP clients cost several times as much CPU per event, and the client must not be what is
measured. Prompts are token ids (/v1/completions), or their decimal numbers as text (/v1/chat/completions, whose servers take no ids).
Called by blinkimp/bench/runner.py. Test: pytest tests/host/test_bench_load.py
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import urlsplit

import msgspec

from blinkimp.bench.errors import LoadError
from blinkimp.bench.record import Record
from blinkimp.bench.replay import openai_fields
from blinkimp.bench.sse import EventParser, HttpError, ResponseParser
from blinkimp.trace.arrivals import Arrival

MAX_ERROR_CHARS: Final = 400
# Ends of a whole output; the last two are a chat's. Others (`timeout`, `abort`, `content_filter`, ...) cut it.
COMPLETE: Final = frozenset({"stop", "length", "tool_calls", "function_call"})
DEFAULT_VOCAB: Final = 32000  # of prompts, where the server does not tell and the user does not say


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    """Of a chat completion. The first one may hold the role alone."""

    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    """What counts of a streamed completion."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


class OpenAiBackend:
    """open(), submit() any number of requests, close(). on_end is called with each record that has ended."""

    name = "openai"
    tells_tokens = False

    def __init__(
        self,
        url: str,
        on_end: Callable[[Record], None],
        *,
        model: str | None = None,
        api_key: str | None = None,
        vocab_size: int | None = None,
        chat: bool = False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadError(f"url: got {url!r}, expected http://host:port or https://host:port, with or without /v1")
        self.model = model or ""
        self.vocab_size = vocab_size or 0  # 0: what the server says, see open()
        self.max_context: int | None = None
        self._url, self._host = url, parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        base = parts.path.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        self._chat, self._on_end = chat, on_end
        self._head = f"Host: {parts.netloc}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self._free: deque[_Connection] = deque()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_closing = False
        self._decoder = msgspec.json.Decoder(_Event)
        self._encoder = msgspec.json.Encoder()

    async def open(self, timeout_s: float) -> None:
        """Asks which model is served. Raises LoadError when nobody answers."""
        try:
            status, body = await asyncio.wait_for(self._get(f"{self._base}/models"), timeout_s)
        except (OSError, TimeoutError, HttpError) as error:
            raise LoadError(
                f"{self._url}: {str(error) or 'no answer in HTTP'}; expected an OpenAI-compatible server; check that it runs and the address"
            ) from error
        if status != 200:
            raise LoadError(
                f"{self._url}{self._base}/models: got status {status}: {body[:MAX_ERROR_CHARS]!r}; expected 200; check the URL and --api-key"
            )
        try:
            served = msgspec.json.decode(body)["data"][0]
            self.model = self.model or served["id"]
            self.max_context = served.get("max_model_len")
            self.vocab_size = self.vocab_size or int(served.get("vocab_size") or 0)
        except (msgspec.DecodeError, KeyError, IndexError, TypeError):
            if not self.model:
                raise LoadError(
                    f"{self._url}: /models names no model: {body[:MAX_ERROR_CHARS]!r}; expected data[0].id; give --model-name"
                ) from None
        self.vocab_size = self.vocab_size or DEFAULT_VOCAB

    def prepare(self, output_len: int, prompt: list[int], arrival: Arrival | None = None) -> bytes:
        """A request as submit() takes it: what does not belong to the measured time is done here."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if arrival is not None:
            del body["ignore_eos"]
            body |= openai_fields(arrival)
        if self._chat:
            body["messages"] = [{"role": "user", "content": " ".join(map(str, prompt))}]
        else:
            body["prompt"] = prompt
        path = "/chat/completions" if self._chat else "/completions"
        content = self._encoder.encode(body)
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode("latin-1") + content

    def submit(self, record: Record, request: bytes) -> None:
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed:
                connection.begin(record, request)
                return
        self.begin_on_new(record, request)

    def begin_on_new(self, record: Record, request: bytes) -> None:
        """Making the connection is part of the request's time, as it is for any client."""
        record.sent_ns = record.sent_ns or time.monotonic_ns()
        task = asyncio.get_running_loop().create_task(self._connect_and_begin(record, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Requests that still run end without a word."""
        self.is_closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._connections):
            connection.close()
        while self._connections:  # each leaves when its transport has closed
            await asyncio.sleep(0.001)

    # ---- Inside ------------------------------------------------------------------------------------------------------
    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port, ssl=self._tls)
        self._connections.add(connection)
        return connection

    async def _connect_and_begin(self, record: Record, request: bytes) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            record.end(time.monotonic_ns(), error=f"connect: {error}")
            self._on_end(record)
            return
        connection.begin(record, request)

    async def _get(self, path: str) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\n{self._head}Connection: close\r\n\r\n".encode("latin-1"))
            response, body = ResponseParser(), b""
            while not response.is_done and (data := await reader.read(65536)):
                body += response.feed(data)
            return response.status, body
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def ended(self, connection: _Connection, record: Record) -> None:
        """A connection's request is over; it takes another one if it can."""
        if not connection.is_closed:
            self._free.append(connection)
        self._on_end(record)

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)

    def decode(self, data: bytes) -> _Event:
        return self._decoder.decode(data)


def is_output(choice: _Choice) -> bool:
    """Whether a first piece is a token's: one that tells the role alone is none."""
    return choice.delta is None or bool(choice.delta.content or choice.delta.reasoning_content)


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, backend: OpenAiBackend) -> None:
        self._backend = backend
        self._transport: asyncio.Transport | None = None
        self._record: Record | None = None
        self._response, self._events = ResponseParser(), EventParser()
        self._num_served = 0
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def begin(self, record: Record, request: bytes) -> None:
        assert self._transport is not None and self._record is None, (
            "begin() on a connection that is busy or was never made"
        )
        self._record, self._request = record, request
        self._response.reset()
        self._events = EventParser()
        self._body = b""
        self._usage = 0
        self._error = ""
        if not record.sent_ns:
            record.sent_ns = time.monotonic_ns()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        record = self._record
        if record is None:
            self.close()  # words after the last answer: not to be trusted with another request
            return
        try:
            body = self._response.feed(data)
            if self._response.status == 200:
                for event in self._events.feed(body):
                    self._handle(record, event, now_ns)
            else:
                self._body += body
        except (HttpError, msgspec.DecodeError) as error:
            self._error = f"not a streamed completion: {error}"
            self._end(now_ns, close=True)
            return
        if self._response.is_done:
            self._end(now_ns, close=not self._response.keeps_alive)

    def _handle(self, record: Record, event: bytes, now_ns: int) -> None:
        if event == b"[DONE]":
            return
        found = self._backend.decode(event)
        if found.error is not None:
            self._error = bytes(found.error)[:MAX_ERROR_CHARS].decode(errors="replace")
        if found.choices and (record.chunk_ns or is_output(found.choices[0])):
            record.add_chunk(now_ns, 1)
        for choice in found.choices:
            if choice.finish_reason is not None and choice.finish_reason not in COMPLETE:
                self._error = self._error or choice.finish_reason[:MAX_ERROR_CHARS]
        if found.usage is not None:
            self._usage = found.usage.completion_tokens

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        self._response.finish()
        self._backend.lost(self)
        if self._record is not None and not self._backend.is_closing:
            if self._num_served and not self._response.status:
                # The server had closed an idle connection when the request was written to it: that is nobody's failure.
                record, self._record = self._record, None
                self._backend.begin_on_new(record, self._request)
                return
            if not self._response.is_done:
                self._error = self._error or f"connection lost: {error or 'closed by the server'}"
            self._end(time.monotonic_ns(), close=True)

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def _end(self, now_ns: int, *, close: bool) -> None:
        record, self._record = self._record, None
        assert record is not None
        if self._response.status not in (0, 200):
            text = self._body[:MAX_ERROR_CHARS].decode(errors="replace")
            self._error = f"status {self._response.status}: {text}"
        if close:
            self.close()
        self._num_served += 1
        record.end(now_ns, num_output_tokens=self._usage, error=self._error)
        self._backend.ended(self, record)
