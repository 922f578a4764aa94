"""How much one HTTP ingress carries: streamed tokens/s over server-sent events, with a scripted director in place of an engine.

    python tools/bench_http.py [--streams 512] [--seconds 10] [--rate 12000]

Director, ingress and the client (one process, epoll, no HTTP library) are processes of their own and share this machine's cores. First as
fast as it goes, then paced at --rate tokens/s over all streams: what each token is late by against the director's clock is the added
latency (a stream whose every event arrives on time has 0). Prints the ingress's CPU time per token and its memory at begin and end.
Test: pytest tests/host/test_bench_http.py
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_ingress import cpu_s, start  # noqa: E402  (the path above comes first)

from tests.ingress_support import write_byte_tokenizer  # noqa: E402

MAX_TOKENS = 1000
END = b"data: [DONE]\n\n"


@dataclass
class Stream:
    """One connection, which asks again as soon as it has an answer."""

    connection: socket.socket
    arrivals: list[float] = field(default_factory=list)  # of the request that runs: when each event came
    tail: bytes = b""


@dataclass
class Result:
    num_events: int = 0
    num_tokens: int = 0
    num_requests: int = 0
    seconds: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)


def request_bytes() -> bytes:
    body = {"prompt": [5, 6, 7], "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True, "return_token_ids": True}
    payload = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload


def run_streams(port: int, num_streams: int, seconds: float) -> Result:
    """Keeps num_streams streams open. Tokens are counted by their ids in the events."""
    request, result = request_bytes(), Result()
    selector = selectors.DefaultSelector()
    for _ in range(num_streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, Stream(connection))
    started = time.monotonic()
    warm_until, deadline = started + min(2.0, seconds / 4), started + seconds
    while (now := time.monotonic()) < deadline:
        is_warm = now >= warm_until
        for key, _ in selector.select(0.1):
            stream: Stream = key.data
            data = stream.connection.recv(1 << 18)
            if not data:
                raise RuntimeError("the ingress closed a connection; see its messages above")
            data = stream.tail + data
            head, mark, stream.tail = data.rpartition(b"\n\n")  # whole events only
            head += mark
            num_events = head.count(b'"token_ids":[') - head.count(b'"token_ids":[]')
            if is_warm and num_events:
                result.num_events += num_events
                result.num_tokens += sum(
                    ids.partition(b"]")[0].count(b",") + 1
                    for ids in head.split(b'"token_ids":[')[1:]
                    if not ids.startswith(b"]")
                )
                if stream.arrivals:
                    result.gaps_ms.append((now - stream.arrivals[-1]) * 1e3)
                stream.arrivals = [now]
            if END in head:
                result.num_requests += is_warm
                stream.arrivals = []
                stream.connection.sendall(request)
    result.seconds = time.monotonic() - warm_until
    for key in list(selector.get_map().values()):
        key.data.connection.close()
    selector.close()
    return result


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(name: str, port: int, pid: int, num_streams: int, seconds: float, step_s: float) -> Result:
    cpu_before, memory_before = cpu_s(pid), resident_mb(pid)
    result = run_streams(port, num_streams, seconds)
    used_s = cpu_s(pid) - cpu_before
    rate = result.num_tokens / result.seconds
    print(
        f"{name:40} {rate:9,.0f} tokens/s in {result.num_events / result.seconds:8,.0f} events/s   ingress CPU "
        f"{used_s / seconds * 100:4.0f} %, {used_s / seconds / max(1.0, rate) * 1e6:5.1f} us a token, "
        f"memory {memory_before:.0f} -> {resident_mb(pid):.0f} MB"
    )
    if step_s and len(result.gaps_ms) > 100:
        late = [gap - step_s * 1e3 for gap in result.gaps_ms]
        quantiles = statistics.quantiles(late, n=100)
        print(
            f"{'':40} gap between events beyond the step's {step_s * 1e3:g} ms: p50 {quantiles[49]:.1f} ms, p99 {quantiles[98]:.1f} ms"
        )
    return result


def with_server(step_s: float, num_streams: int, use: Callable[[int, int], Result]) -> Result:
    """A director process and an ingress process around use(port, ingress_pid)."""
    engine_name = f"bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder))
        arguments = ("--engine", engine_name, "--step-us", str(step_s * 1e6), "--vocab-size", "258")
        director, _ = start("tests.fake_director", *arguments)
        try:
            limits = (
                "--max-outstanding",
                str(2 * num_streams),
                "--max-requests-per-s",
                "100000",
                "--burst-requests",
                "100000",
            )
            command = (
                "--engine",
                engine_name,
                "--bind",
                "127.0.0.1:0",
                "--model-folder",
                folder,
                "--log-level",
                "warning",
            )
            ingress, url = start("blinkimp.nic_shim.http_ingress", *command, *limits)
            try:
                return use(int(url.rpartition(":")[2]), ingress.pid)
            finally:
                ingress.terminate()
                ingress.wait()
        finally:
            director.terminate()
            director.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=12000.0, help="tokens/s over all streams of the paced run")
    arguments = parser.parse_args()
    streams, seconds = arguments.streams, arguments.seconds
    print(
        f"{os.cpu_count()} cores; director, ingress and client are processes of their own; byte-level tokenizer, text and ids"
    )
    with_server(
        0.0, streams, lambda port, pid: measure(f"{streams} streams, full speed", port, pid, streams, seconds, 0.0)
    )
    step_s = streams / arguments.rate
    name = f"{streams} streams, {arguments.rate:,.0f} tokens/s asked for"
    with_server(step_s, streams, lambda port, pid: measure(name, port, pid, streams, seconds, step_s))


if __name__ == "__main__":
    main()
