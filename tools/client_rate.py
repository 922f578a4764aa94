#!/usr/bin/env python3
"""How many tokens/s the load generator itself can take: CPU time per streamed token, against a server that only sends.

    python tools/client_rate.py                                     both transports at 40,000 tokens/s, 256 streams
    python tools/client_rate.py --rate 80000 --streams 64 --out client.json

The server is a process of its own that writes a prepared piece to every stream each period, as a model's steps do: over HTTP an event of the size
of vLLM's in a write of its own for each stream, over ZeroMQ a frame for each socket of the client. What counts is the client's CPU time,
not the clock: on a busy machine its process waits, but a token costs what it costs. A client that falls behind finds several events in a read,
which makes each of them cheaper: `events a read` says so. Test: pytest tests/host/test_client_rate.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import zmq  # noqa: E402  (the path above comes first)

from blinkimp.bench import openai_backend  # noqa: E402
from blinkimp.bench.load_plan import LoadOptions  # noqa: E402
from blinkimp.bench.runner import Target, run_load  # noqa: E402
from blinkimp.protocol import (  # noqa: E402
    Finish,
    GetHealth,
    Health,
    Submit,
    Tokens,
    decode_client_message,
    encode_server_messages,
)

GOAL_TOKENS_PER_S: Final = 40_000
EVENT: Final = {
    "id": "cmpl-0123456789abcdef0123456789abcdef", "object": "text_completion", "created": 1700000000, "model": "llama-3-8b",
    "choices": [{"index": 0, "text": " t12345", "logprobs": None, "finish_reason": None, "stop_reason": None}], "usage": None,
}  # fmt: skip
HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


# ---- The server ------------------------------------------------------------------------------------------------------
def chunk_of(event: object) -> bytes:
    data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


class HttpStreams:
    """Connections with one completion each. A stream whose client does not read in time waits for its next turn."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._got: dict[socket.socket, bytes] = {}
        self._left: dict[socket.socket, list[int]] = {}  # [tokens left, tokens of it]
        self._piece = chunk_of(EVENT)

    def receive(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            if peer is self._listener:
                connection, _ = peer.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ)
                self._got[connection] = b""
            else:
                self._read(peer)

    def _read(self, peer: socket.socket) -> None:
        data = peer.recv(65536)
        if not data:
            self._selector.unregister(peer)
            self._left.pop(peer, None)
            del self._got[peer]
            peer.close()
            return
        self._got[peer] += data
        head, end, body = self._got[peer].partition(b"\r\n\r\n")
        length = int(found[1]) if (found := re.search(rb"Content-Length: (\d+)", head)) else 0
        if not end or len(body) < length:
            return
        self._got[peer] = b""
        if head.startswith(b"GET"):
            content = json.dumps({"data": [{"id": "null", "max_model_len": 1 << 20}]}).encode()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
            return
        wanted = re.search(rb'"max_tokens":\s*(\d+)', body)
        assert wanted is not None, f"a completion without max_tokens: {body[:200]!r}"
        peer.send(HEAD)
        self._left[peer] = [int(wanted[1]), int(wanted[1])]

    def step(self) -> None:
        """A token to every stream."""
        for peer, left in list(self._left.items()):
            try:
                peer.send(self._piece)
            except BlockingIOError:
                continue
            left[0] -= 1
            if left[0] == 0:
                usage = chunk_of({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": left[1]}})
                peer.send(usage + chunk_of(b"[DONE]") + b"0\r\n\r\n")
                del self._left[peer]


class ZmqStreams:
    """Requests of every client; a frame to each of them a step."""

    def __init__(self) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._left: dict[bytes, dict[int, list[int]]] = {}

    def receive(self, timeout_s: float) -> None:
        if not self._socket.poll(int(timeout_s * 1e3)):
            return
        with contextlib.suppress(zmq.Again):
            while True:
                client, frame = self._socket.recv_multipart(zmq.NOBLOCK)
                message = decode_client_message(frame)
                if isinstance(message, GetHealth):
                    health = Health(message.id, "ok", 1, 0, "running", 1, 1 << 20, 4096, [0])
                    self._socket.send_multipart([client, encode_server_messages([health])])
                elif isinstance(message, Submit):
                    wanted = message.sampling.max_tokens
                    self._left.setdefault(client, {})[message.id] = [wanted, wanted]

    def step(self) -> None:
        for client, requests in self._left.items():
            messages: list[Any] = []
            for request_id, left in list(requests.items()):
                messages.append(Tokens(request_id, left[1] - left[0], [7], [0.0], ""))
                left[0] -= 1
                if left[0] == 0:
                    messages.append(Finish(request_id, "length", 1, left[1], 0, 0, 0, 0, 0))
                    del requests[request_id]
            if messages:
                self._socket.send_multipart([client, encode_server_messages(messages)])


def serve(transport: str, period_s: float) -> None:
    """Until its stdin closes. The first line says where it is."""
    streams = HttpStreams() if transport == "http" else ZmqStreams()
    print(streams.address, flush=True)
    end = selectors.DefaultSelector()
    end.register(sys.stdin, selectors.EVENT_READ)
    next_s = time.monotonic() + period_s
    while not end.select(0):
        streams.receive(max(0.0, min(next_s - time.monotonic(), 0.1)))
        if time.monotonic() >= next_s:
            streams.step()
            next_s = max(next_s + period_s, time.monotonic())  # a server that is late does not make up for it


@contextlib.contextmanager
def running_server(transport: str, period_s: float) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", transport, "--period-s", str(period_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


# ---- The client ------------------------------------------------------------------------------------------------------
class Reads:
    """Counts what the client's connections were handed, while inside `with`."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Reads:
        original = openai_backend._Connection.data_received
        self._original = original

        def counted(connection: openai_backend._Connection, data: bytes) -> None:
            self.number += 1
            original(connection, data)

        openai_backend._Connection.data_received = counted  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *how: object) -> None:
        openai_backend._Connection.data_received = self._original  # type: ignore[method-assign]


def measure(transport: str, rate: float, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """One load: every stream gets num_tokens tokens, rate of them a second in all."""
    options = LoadOptions(concurrency=num_streams, num_requests=num_streams, input_len=16, output_len=num_tokens)
    with running_server(transport, num_streams / rate) as address, Reads() as reads:
        target = Target(url=address) if transport == "http" else Target(connect=address)
        began, began_cpu = time.monotonic(), time.process_time()
        report = asyncio.run(run_load(options, target))
        cpu_s, wall_s = time.process_time() - began_cpu, time.monotonic() - began
    tokens = report["total_output_tokens"]
    us = cpu_s * 1e6 / tokens
    return {
        "transport": transport,
        "streams": num_streams,
        "tokens": tokens,
        "tokens_per_s": round(tokens / report["duration"], 1),
        "client_us_a_token": round(us, 3),
        "client_cpu_share": round(cpu_s / wall_s, 3),
        "tokens_per_s_a_core": round(1e6 / us),
        "events_a_read": round(tokens / reads.number, 2) if reads.number else None,
        "failed": report["failed"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=float(GOAL_TOKENS_PER_S), help="tokens/s of all streams together")
    parser.add_argument("--streams", type=int, default=256, metavar="N", help="requests at a time")
    parser.add_argument("--seconds", type=float, default=5.0, help="of streaming")
    parser.add_argument("--transports", nargs="+", choices=("http", "zmq"), default=["http", "zmq"])
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    parser.add_argument("--serve", choices=("http", "zmq"), help=argparse.SUPPRESS)
    parser.add_argument("--period-s", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        serve(arguments.serve, arguments.period_s)
        return 0
    num_tokens = max(2, round(arguments.rate * arguments.seconds / arguments.streams))
    rows = []
    for transport in arguments.transports:
        row = measure(transport, arguments.rate, arguments.streams, num_tokens)
        rows.append(row)
        reads = "" if row["events_a_read"] is None else f", {row['events_a_read']} events a read"
        print(
            f"{transport}: {row['tokens_per_s']:,.0f} tokens/s to {row['streams']} streams; {row['client_us_a_token']:.1f} us of the client's CPU "
            f"each{reads}: one core takes {row['tokens_per_s_a_core']:,} tokens/s"
        )
    if arguments.out is not None:
        facts = {"tool": "client_rate", "python": platform.python_version(), "rate": arguments.rate}
        arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
