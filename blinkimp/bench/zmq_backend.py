"""A blinkimp server over ZeroMQ as a target of load: one DEALER socket, driven by the asyncio loop through its file descriptor.

Not blinkimp.client: a load needs no resumption of lost requests (they count as failed), and no copies of their output.
The socket's descriptor is edge-triggered, so every send is followed by a look for input. Called by blinkimp/bench/runner.py.
Test: pytest tests/host/test_bench_load.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zmq

from blinkimp.bench.errors import LoadError
from blinkimp.bench.record import Record
from blinkimp.client import configure_socket
from blinkimp.protocol import (
    Alive,
    AliveReply,
    ClientMessage,
    Error,
    Finish,
    GetHealth,
    Health,
    Sampling,
    Submit,
    Tokens,
    decode_server_messages,
    encode_client_message,
)
from blinkimp.transport import Security

ALIVE_PERIOD_S: Final = 1.0


class ZmqBackend:
    """open(), submit() any number of requests, close(). on_end is called with each record that has ended."""

    name = "blinkimp-zmq"

    def __init__(self, endpoint: str, on_end: Callable[[Record], None], *, security: Security | None = None) -> None:
        self.model = "blinkimp"
        self.vocab_size = 0
        self.max_context: int | None = None
        self._endpoint, self._on_end, self._security = endpoint, on_end, security
        self._records: dict[int, Record] = {}
        self._next_id = 1
        self._health: asyncio.Future[Health] | None = None

    async def open(self, timeout_s: float) -> None:
        """Connects and asks what is served. Raises LoadError when nobody answers."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        configure_socket(self._socket, self._security)
        self._socket.connect(self._endpoint)
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._alive = self._loop.create_task(self._keep_alive())
        self._health = self._loop.create_future()
        self._send(GetHealth(0))
        try:
            health = await asyncio.wait_for(self._health, timeout_s)
        except TimeoutError:
            raise LoadError(
                f"{self._endpoint}: no answer within {timeout_s:g} s; expected a blinkimp server; check that it runs and the address"
            ) from None
        if health.status != "ok":
            raise LoadError(
                f"{self._endpoint}: the server is {health.status}, expected ok; wait for it, or see its log"
            )
        self.vocab_size, self.max_context = health.vocab_size, health.max_context

    def submit(self, record: Record, prompt: list[int]) -> None:
        sampling = Sampling(temperature=0.0, max_tokens=record.output_len, ignore_eos=True)
        message = Submit(self._next_id, prompt, sampling, detokenize=False)
        self._records[self._next_id] = record
        self._next_id += 1
        frame = encode_client_message(message)  # before the clock: the prompt's size is not the server's matter
        record.sent_ns = time.monotonic_ns()
        self._socket.send(frame)
        self._loop.call_soon(self._drain)

    async def close(self) -> None:
        if hasattr(self, "_alive"):
            self._alive.cancel()
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)
            self._context.term()

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _send(self, message: ClientMessage) -> None:
        self._socket.send(encode_client_message(message))
        self._loop.call_soon(self._drain)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_PERIOD_S)
            if self._records:
                self._send(Alive(ids=list(self._records)))
            self._drain()

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            now_ns = time.monotonic_ns()
            try:
                messages: list[Any] = decode_server_messages(frame)
            except msgspec.DecodeError as error:
                self._fail_all(now_ns, f"not a message of this protocol: {error}")
                return
            for message in messages:
                self._handle(message, now_ns)

    def _handle(self, message: Any, now_ns: int) -> None:
        if isinstance(message, Tokens):
            if message.token_ids and (record := self._records.get(message.id)) is not None:
                record.add_chunk(now_ns, len(message.token_ids))
        elif isinstance(message, Finish):
            error = "" if message.reason in ("eos", "stop_id", "length") else message.reason
            self._end(message.id, now_ns, num_output_tokens=message.num_output_tokens, error=error)
        elif isinstance(message, Error):
            if message.final and message.id is not None:
                self._end(message.id, now_ns, error=f"{message.code}: {message.what}, got {message.got}")
        elif isinstance(message, AliveReply):
            for request_id in message.unknown_ids:
                self._end(request_id, now_ns, error="the server does not know the request any more")
        elif isinstance(message, Health) and self._health is not None and not self._health.done():
            self._health.set_result(message)

    def _end(self, request_id: int, now_ns: int, **how: Any) -> None:
        record = self._records.pop(request_id, None)
        if record is not None:
            record.end(now_ns, **how)
            self._on_end(record)

    def _fail_all(self, now_ns: int, error: str) -> None:
        for request_id in list(self._records):
            self._end(request_id, now_ns, error=error)
