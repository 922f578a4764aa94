"""A blinkimp server over ZeroMQ as a target of load: DEALER sockets, driven by the asyncio loop through their file descriptors.

Not blinkimp.client: a load needs no resumption of lost requests (they count as failed), and no copies of their output. A load stands for many
clients, and a server limits the requests of each: so there is another socket for every REQUESTS_A_SOCKET requests that run at once.
A socket's descriptor is edge-triggered, so every send is followed by a look for input. Called by blinkimp/bench/runner.py.
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
from blinkimp.bench.replay import submit_of
from blinkimp.client import configure_socket, connect_socket
from blinkimp.protocol import (
    Alive,
    AliveReply,
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
from blinkimp.trace.arrivals import REPEATABLE, Arrival
from blinkimp.transport import Security

ALIVE_PERIOD_S: Final = 1.0
# Ends of a whole output; others cut it, an automaton without a way on too.
COMPLETE: Final = REPEATABLE - {"constraint"}
REQUESTS_A_SOCKET: Final = 128  # half of what an ingress grants a client


class _Link:
    """One socket and the requests on it. Ids are the backend's: no two links share one."""

    def __init__(self, backend: ZmqBackend, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.records: dict[int, Record] = {}
        self._backend, self._loop = backend, asyncio.get_running_loop()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        configure_socket(self._socket, backend.security)
        connect_socket(self._socket, endpoint, context)
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self.drain)

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)
        self._loop.call_soon(self.drain)

    def drain(self) -> None:
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._backend.take(self, frame, time.monotonic_ns())

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)


class ZmqBackend:
    """open(), submit() any number of requests, close(). on_end is called with each record that has ended."""

    name = "blinkimp-zmq"
    tells_tokens = True

    def __init__(self, endpoint: str, on_end: Callable[[Record], None], *, security: Security | None = None) -> None:
        self.model = "blinkimp"
        self.vocab_size = 0
        self.max_context: int | None = None
        self.security = security
        self._endpoint, self._on_end = endpoint, on_end
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._links: list[_Link] = []
        self._next_id = 1

    async def open(self, timeout_s: float) -> None:
        """Connects and asks what is served. Raises LoadError when nobody answers."""
        loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._health: asyncio.Future[Health] = loop.create_future()
        self._alive = loop.create_task(self._keep_alive())
        self._free_link().send(encode_client_message(GetHealth(0)))
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

    def prepare(self, output_len: int, prompt: list[int], arrival: Arrival | None = None) -> tuple[int, bytes]:
        """A request as submit() takes it: what does not belong to the measured time is done here."""
        request_id = self._next_id
        self._next_id += 1
        if arrival is not None:
            return request_id, encode_client_message(submit_of(request_id, prompt, arrival))
        sampling = Sampling(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        return request_id, encode_client_message(Submit(request_id, prompt, sampling, detokenize=False))

    def submit(self, record: Record, prepared: tuple[int, bytes]) -> None:
        request_id, frame = prepared
        link = self._free_link()
        link.records[request_id] = record
        record.sent_ns = time.monotonic_ns()
        link.send(frame)

    async def close(self) -> None:
        if self._context is None:
            return
        self._alive.cancel()
        for link in self._links:
            link.close()
        self._context.term()

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _free_link(self) -> _Link:
        for link in self._links:
            if len(link.records) < REQUESTS_A_SOCKET:
                return link
        assert self._context is not None, "open() comes first"
        self._links.append(_Link(self, self._context, self._endpoint))
        return self._links[-1]

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_PERIOD_S)
            for link in self._links:
                if link.records:
                    link.send(encode_client_message(Alive(ids=list(link.records))))
                link.drain()

    def take(self, link: _Link, frame: bytes, now_ns: int) -> None:
        """What a link has received."""
        try:
            messages: list[Any] = decode_server_messages(frame)
        except msgspec.DecodeError as error:
            for request_id in list(link.records):
                self._end(link, request_id, now_ns, error=f"not a message of this protocol: {error}")
            return
        for message in messages:
            if isinstance(message, Tokens):
                if message.token_ids and (record := link.records.get(message.id)) is not None:
                    record.add_chunk(now_ns, len(message.token_ids))
                    if record.token_ids is not None:
                        record.token_ids += message.token_ids
            elif isinstance(message, Finish):
                failure = "" if message.reason in COMPLETE else message.reason
                self._end(link, message.id, now_ns, num_output_tokens=message.num_output_tokens, error=failure)
            elif isinstance(message, Error):
                if message.final and message.id is not None:
                    self._end(link, message.id, now_ns, error=f"{message.code}: {message.what}, got {message.got}")
            elif isinstance(message, AliveReply):
                for request_id in message.unknown_ids:
                    self._end(link, request_id, now_ns, error="the server does not know the request any more")
            elif isinstance(message, Health) and not self._health.done():
                self._health.set_result(message)

    def _end(self, link: _Link, request_id: int, now_ns: int, **how: Any) -> None:
        record = link.records.pop(request_id, None)
        if record is not None:
            record.end(now_ns, **how)
            self._on_end(record)
