"""A load client: keeps a number of streams open over ZeroMQ or HTTP and notes when each token came. One process, no per-stream threads.

    python tools/stream_clients.py '{"transport": "http", "address": "127.0.0.1:8000", "num_streams": 512, ...}'

Run by tools/bench_streams.py, which joins the arrivals with the engine's trace. Prints `started` when every stream has its first token, and
at the end, on a line, the path of a .npz with what it saw. Test: pytest tests/host/test_bench_streams.py
"""

from __future__ import annotations

import json
import random
import re
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import zmq

from blinkimp.protocol import (
    Alive,
    AliveReply,
    Error,
    Finish,
    Sampling,
    Submit,
    Tokens,
    decode_server_messages,
    encode_client_message,
)

PROMPT: Final = "def read_file(path):"
NUM_KEY_TOKENS: Final = 4  # a request's first tokens name it: by them the trace's request is found
TICK_NS: Final = 100_000_000
ANSWER_TIMEOUT_MS: Final = 60_000
RETRY_S: Final = 1.0  # after a 503, as its Retry-After says
END: Final = b"data: [DONE]\n\n"
_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d\d\d)")
_TOKEN_IDS: Final = re.compile(rb'"token_ids":\[([0-9][0-9,]*)\]')


class Plan(msgspec.Struct, frozen=True):
    """What to do, from the command line."""

    transport: str  # zmq, http
    address: str
    num_streams: int
    num_connections: int  # zmq: the streams are spread over so many
    seconds: float
    least_tokens: int  # of a request, drawn evenly up to most_tokens
    most_tokens: int
    sample_period: int  # of so many requests one has its arrivals noted
    seed: int
    output: str  # .npz
    most_requests: int = 0  # ends early once so many are done; 0: by time alone
    num_warm_messages: int = 0  # zmq: so many go to and fro on each connection before its streams begin


@dataclass
class Request:
    """One that runs."""

    is_sampled: bool
    num_tokens: int = 0
    key: list[int] = field(default_factory=list)  # its first tokens
    arrivals_ns: list[int] = field(default_factory=list)  # of each event
    counts: list[int] = field(default_factory=list)  # tokens in each event


class Recorder:
    """Counts everything, keeps the arrivals of sampled requests."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.num_tokens = self.num_events = self.num_requests = self.num_begun = self.num_refused = 0
        self.sampled: list[Request] = []
        self.by_tick: dict[int, int] = {}  # tokens that came in each TICK_NS of the monotonic clock
        self._rng = random.Random(plan.seed)
        self._num_started = 0

    def new_request(self) -> tuple[Request, int, int]:
        """The request, its max_tokens and its seed."""
        self._num_started += 1
        request = Request(self._num_started % self.plan.sample_period == 0)
        if request.is_sampled:
            self.sampled.append(request)
        seed = self._rng.getrandbits(63)
        return request, self._rng.randint(self.plan.least_tokens, self.plan.most_tokens), seed

    def arrived(self, request: Request, num_tokens: int, now_ns: int) -> None:
        """One event of the request. Its key is the caller's to fill."""
        if not request.num_tokens:
            self.num_begun += 1
        request.num_tokens += num_tokens
        self.num_tokens += num_tokens
        self.num_events += 1
        tick = now_ns // TICK_NS
        self.by_tick[tick] = self.by_tick.get(tick, 0) + num_tokens
        if request.is_sampled:
            request.arrivals_ns.append(now_ns)
            request.counts.append(num_tokens)

    def save(self) -> None:
        requests = [request for request in self.sampled if len(request.key) == NUM_KEY_TOKENS]
        np.savez(
            self.plan.output,
            keys=np.array([request.key for request in requests], np.uint32).reshape(len(requests), NUM_KEY_TOKENS),
            num_arrivals=np.array([len(request.counts) for request in requests], np.int64),
            arrivals_ns=np.array([ns for request in requests for ns in request.arrivals_ns], np.int64),
            counts=np.array([count for request in requests for count in request.counts], np.int64),
            ticks=np.array(list(self.by_tick), np.int64),
            tokens=np.array(list(self.by_tick.values()), np.int64),
            totals=np.array([self.num_tokens, self.num_events, self.num_requests, self.num_refused], np.int64),
        )


class Client(Protocol):
    def open(self) -> None: ...
    def turn(self, timeout_s: float) -> None: ...
    def close(self) -> None: ...


# ---- ZeroMQ ----------------------------------------------------------------------------------------------------------
@dataclass
class Connection:
    socket: zmq.Socket[bytes]
    requests: dict[int, Request] = field(default_factory=dict)
    next_id: int = 1


class ZmqClient:
    """num_connections DEALER sockets."""

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self._plan, self._recorder = plan, recorder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connections: dict[Any, Connection] = {}
        self._poller = zmq.Poller()

    def open(self) -> None:
        for _ in range(self._plan.num_connections):
            dealer = self._context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVHWM, 0)
            dealer.connect(self._plan.address)
            self._connections[dealer] = Connection(dealer)
            self._poller.register(dealer, zmq.POLLIN)
        for _ in range(self._plan.num_warm_messages):
            self._warm()
        for idx, connection in enumerate(self._connections.values()):
            share = self._plan.num_streams // self._plan.num_connections
            for _ in range(share + (idx < self._plan.num_streams % self._plan.num_connections)):
                self._submit(connection)

    def _warm(self) -> None:
        """One message to and fro on each connection."""
        for dealer in self._connections:
            dealer.send(encode_client_message(Alive()))
        for dealer in self._connections:
            messages: list[Any] = []
            while not any(isinstance(message, AliveReply) for message in messages):
                if not dealer.poll(ANSWER_TIMEOUT_MS):
                    raise RuntimeError(
                        f"{self._plan.address} is silent, expected an answer to `alive`; its log says why"
                    )
                messages = decode_server_messages(dealer.recv())

    def _submit(self, connection: Connection) -> None:
        request, max_tokens, seed = self._recorder.new_request()
        connection.requests[connection.next_id] = request
        sampling = Sampling(max_tokens=max_tokens, seed=seed)
        connection.socket.send(encode_client_message(Submit(connection.next_id, PROMPT, sampling)))
        connection.next_id += 1

    def turn(self, timeout_s: float) -> None:
        for dealer, _ in self._poller.poll(int(timeout_s * 1000)):
            connection = self._connections[dealer]
            while True:
                try:
                    frame = dealer.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._take(connection, frame, time.monotonic_ns())

    def _take(self, connection: Connection, frame: bytes, now_ns: int) -> None:
        for message in decode_server_messages(frame):
            if isinstance(message, Tokens):
                request = connection.requests[message.id]
                if request.is_sampled and len(request.key) < NUM_KEY_TOKENS:
                    request.key += message.token_ids[: NUM_KEY_TOKENS - len(request.key)]
                self._recorder.arrived(request, len(message.token_ids), now_ns)
            elif isinstance(message, Finish):
                request = connection.requests.pop(message.id)
                if message.reason != "length" or request.num_tokens != message.num_output_tokens:
                    raise RuntimeError(f"got {message} after {request.num_tokens} tokens, expected them to agree")
                self._recorder.num_requests += 1
                self._submit(connection)
            elif isinstance(message, Error):
                raise RuntimeError(f"the ingress refused a request: {message}")

    def close(self) -> None:
        self._context.destroy()


# ---- HTTP ------------------------------------------------------------------------------------------------------------
@dataclass
class SseStream:
    connection: socket.socket
    request: Request
    tail: bytes = b""
    retry_at: float | None = None  # was refused: what still comes is the rest of that answer


class HttpClient:
    """A connection a stream, epoll, no HTTP library: tokens are counted by their ids in the events."""

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self._plan, self._recorder = plan, recorder
        self._epoll = select.epoll()
        self._streams: dict[int, SseStream] = {}
        self._refused: deque[SseStream] = deque()  # in the order of their retry_at

    def open(self) -> None:
        host, _, port = self._plan.address.rpartition(":")
        for _ in range(self._plan.num_streams):
            connection = socket.create_connection((host, int(port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = SseStream(connection, Request(False))
            self._streams[connection.fileno()] = stream
            self._ask(stream)
            connection.setblocking(False)
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _ask(self, stream: SseStream) -> None:
        stream.request, max_tokens, seed = self._recorder.new_request()
        body = {"prompt": PROMPT, "max_tokens": max_tokens, "seed": seed, "stream": True, "return_token_ids": True}
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(payload)}\r\n\r\n"
        stream.connection.sendall(head.encode() + payload)

    def turn(self, timeout_s: float) -> None:
        for fd, _ in self._epoll.poll(timeout_s):
            self._take(self._streams[fd])
        now = time.monotonic()
        while self._refused and now >= (self._refused[0].retry_at or 0.0):
            stream = self._refused.popleft()
            stream.retry_at = None
            self._ask(stream)

    def _take(self, stream: SseStream) -> None:
        data = stream.connection.recv(1 << 18)
        now_ns = time.monotonic_ns()
        if not data:
            raise RuntimeError(f"the ingress closed a connection, after {stream.tail[-500:]!r}")
        if stream.retry_at is not None:
            return
        data = stream.tail + data
        found = _STATUS.search(data, 0, 48)  # behind the end of the answer before it
        if found and found[1] != b"200":
            if found[1] != b"503":
                raise RuntimeError(f"the ingress refused a request: {data[:500]!r}")
            # It takes the engine for lost, on a machine that stands still for two seconds: any client would ask again.
            self._recorder.num_refused += 1
            stream.tail, stream.retry_at = b"", time.monotonic() + RETRY_S
            self._refused.append(stream)
            return
        whole, mark, stream.tail = data.rpartition(b"\n\n")  # whole events only
        if not mark:
            return
        request = stream.request
        for ids in _TOKEN_IDS.findall(whole):
            if request.is_sampled and len(request.key) < NUM_KEY_TOKENS:
                request.key += [int(token) for token in ids.split(b",")][: NUM_KEY_TOKENS - len(request.key)]
            self._recorder.arrived(request, ids.count(b",") + 1, now_ns)
        if b'"finish_reason":"abort"' in whole or b'"error":' in whole:
            raise RuntimeError(f"a stream ended badly: {whole[-500:]!r}")
        if whole.endswith(END[:-2]):
            self._recorder.num_requests += 1
            self._ask(stream)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.connection.close()
        self._epoll.close()


is_told_to_end = threading.Event()  # by SIGTERM: what was seen until then is saved


def run(plan: Plan) -> Recorder:
    """Every stream begins; then `seconds` more."""
    recorder = Recorder(plan)
    client: Client = ZmqClient(plan, recorder) if plan.transport == "zmq" else HttpClient(plan, recorder)
    client.open()
    while recorder.num_begun < plan.num_streams:
        client.turn(0.1)
    print("started", flush=True)
    deadline = time.monotonic() + plan.seconds
    while (
        time.monotonic() < deadline
        and not is_told_to_end.is_set()
        and not 0 < plan.most_requests <= recorder.num_requests
    ):
        client.turn(0.1)
    client.close()
    return recorder


def main() -> int:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    signal.signal(signal.SIGTERM, lambda *_: is_told_to_end.set())
    run(plan).save()
    print(Path(plan.output).resolve(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
