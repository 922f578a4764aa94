"""Throws wrong and half-wrong inputs at both ingresses in front of a real engine on the emulated device, and counts what came back.

    python tools/fuzz.py [--inputs 100000] [--seed N] [--out FILE.json]

Half are bodies of the HTTP API, half are frames of the ZeroMQ protocol. Each begins as a valid message; then fields are dropped, renamed,
or get values of the wrong type and size, or bytes are flipped, cut and repeated. Fails unless every HTTP answer is one of the documented
statuses with its envelope (500 is none of them), no process has died, and every page of the engine is free or cached at the end.
Test: pytest tests/host/test_fuzz.py (a slice)
"""

from __future__ import annotations

import collections
import http.client
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fuzz_command import fuzz_parser, run_fuzzer  # noqa: E402  (the path above comes first)

from blinkimp.nic_shim.http_types import ChatRequest, CompletionRequest  # noqa: E402  (the path above comes first)
from blinkimp.nic_shim.ingress_limits import ZmqLimits  # noqa: E402
from blinkimp.nic_shim.tokenizer import Tokenizer  # noqa: E402
from blinkimp.nic_shim.zmq_ingress import ZmqIngress  # noqa: E402
from blinkimp.protocol import Error, Sampling, ServerMessage, Submit  # noqa: E402
from tests.host.engine_support import make_tiny_checkpoint, running_engine  # noqa: E402
from tests.http_support import HttpServer, http_ingress  # noqa: E402
from tests.ingress_support import RawClient, wait_until, write_byte_tokenizer  # noqa: E402
from tests.support import PATIENCE_S  # noqa: E402

STATUSES = frozenset({200, 400, 404, 405, 413, 422, 429})
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 255, 256, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63), 0.0, 0.5, -0.5, 1e308, 1e-300,
    "", "a", "\x00", "naïve 日本", "😀" * 50, "x" * 5000, [], [1], ["a"], [[1, 2], [3]], ["a", 1], [[]], {}, {"a": 1}, {"5": 1.5},
    {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, list(range(40)), [-1], [2**32], {"1": "x"},
)  # fmt: skip


def http_body(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choices(PATHS, (6, 4, 1, 1))[0]
    messages = [
        {"role": rng.choice(["system", "user", "assistant", "developer"]), "content": "hi"}
        for _ in range(rng.randint(1, 3))
    ]
    valid: dict[str, dict[str, Any]] = {
        "/v1/completions": {
            "prompt": rng.choice(["Hi", [5, 6], ["a", "b"], [[7], [8, 9]]]),
            "max_tokens": rng.randint(1, 6),
        },
        "/v1/chat/completions": {"messages": messages, "max_tokens": rng.randint(1, 6)},
        "/tokenize": {"prompt": "Hi"},
        "/detokenize": {"tokens": [5, 6]},
    }
    body = valid[path]
    names = (ChatRequest if "chat" in path else CompletionRequest).__struct_fields__
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        body[rng.choice((*names, "tools", "", "ünknown"))] = rng.choice(VALUES)
    if rng.random() < 0.1:
        body.pop(rng.choice(list(body)))
    # A request that may run for long would only measure the model.
    asked = body.get("max_tokens", 1)
    if asked is None or (isinstance(asked, int) and 64 < asked < 2**32):
        body["max_tokens"] = 3
    return path, mutated(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"), rng)


def zmq_frame(rng: random.Random, idx: int) -> bytes:
    sampling: dict[str, Any] = {"max_tokens": rng.randint(1, 6)}
    message: dict[str, Any] = {
        "type": rng.choices(["submit", "cancel", "alive", "stats", "health", "other"], (20, 3, 1, 1, 1, 1))[0],
        "id": idx,
    }
    if message["type"] == "submit":
        message |= {"prompt": rng.choice(["Hi", [5, 6]]), "sampling": sampling}
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        value = rng.choice([value for value in VALUES if not isinstance(value, int) or -(2**63) <= value < 2**64])
        if rng.random() < 0.5:
            sampling[rng.choice((*Sampling.__struct_fields__, "junk"))] = value
        else:
            message[rng.choice((*Submit.__struct_fields__, "junk", "ids"))] = value
    if isinstance(sampling["max_tokens"], int) and sampling["max_tokens"] > 64:
        sampling["max_tokens"] = 3
    return mutated(msgspec.msgpack.encode(message), rng)


def mutated(payload: bytes, rng: random.Random) -> bytes:
    """Mostly as it is; else with bytes flipped, cut or repeated."""
    if rng.random() < 0.7 or not payload:
        return payload
    data = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 8)] * rng.randint(1, 50)
            case _:
                data[at:at] = rng.choice((b"{", b"[" * 2000, b'"', b"\xff", b"\\u0000", b"\\ud800", b"1e999", b"\x00"))
    return bytes(data)


def fuzz_http(server: HttpServer, num_inputs: int, rng: random.Random, counts: collections.Counter[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    for idx in range(num_inputs):
        path, payload = http_body(rng)
        connection.request("POST", path, payload)
        reply = connection.getresponse()
        content = reply.read()
        counts[f"http {reply.status}"] += 1
        if reply.status not in STATUSES:
            raise SystemExit(f"input {idx}: POST {path} {payload!r} got {reply.status} {content!r}")
        if reply.status != 200:
            error = json.loads(content)["error"]
            if not error["message"] or error["code"] == "internal_error":
                raise SystemExit(f"input {idx}: POST {path} {payload!r} got {error}")
        if reply.getheader("connection") == "close":
            connection.close()
    connection.close()


def fuzz_zmq(
    ingress: ZmqIngress, endpoint: str, num_inputs: int, rng: random.Random, counts: collections.Counter[str]
) -> None:
    def take(messages: list[ServerMessage], frames: list[bytes]) -> None:
        for message in messages:
            name = f"error {message.code}" if isinstance(message, Error) else type(message).__name__.lower()
            counts[f"zmq {name}"] += 1
            if name in ("error internal_error", "error engine_error", "error rejected"):
                raise SystemExit(f"{frames!r} got {message}")

    with RawClient(endpoint) as client:
        for idx in range(num_inputs):
            frames = [zmq_frame(rng, idx + 1)]
            if rng.random() < 0.01:
                frames = frames * rng.randint(2, 4)
            client.send(*frames)
            counts["zmq frames"] += 1
            while client.socket.poll(0):
                take(client.receive(), frames)
            while idx % 64 == 0 and ingress.sessions.num_requests > 128:  # or the rest would only be refused
                take(client.receive(), frames)
        deadline = time.monotonic() + PATIENCE_S
        while ingress.sessions.num_requests or client.socket.poll(100):
            take(client.receive(), [])
            if time.monotonic() > deadline:
                raise SystemExit(f"{ingress.sessions.num_requests} requests do not end")
    if ingress.error is not None:
        raise ingress.error


def run(num_inputs: int, seed: int) -> dict[str, Any]:
    """Both halves. Raises SystemExit or AssertionError where something is wrong."""
    rng, counts = random.Random(seed), collections.Counter[str]()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_checkpoint(Path(folder) / "model")
        write_byte_tokenizer(model)
        limits = ("--max-requests-per-s", "1000000", "--burst-requests", "1000000", "--log-level", "warning")
        with running_engine(model, log_level="warning", constraint_slots=2) as engine:
            name = engine.config.engine_name
            with http_ingress(name, model, *limits) as server:
                fuzz_http(server, num_inputs // 2, rng, counts)
                unlimited = ZmqLimits(max_requests_per_s=1_000_000, burst_requests=1_000_000)
                ingress = ZmqIngress(name, 1, "tcp://127.0.0.1:*", Tokenizer(model), limits=unlimited)
                endpoint = ingress.start()
                try:
                    fuzz_zmq(ingress, endpoint, num_inputs - num_inputs // 2, rng, counts)
                    wait_until(lambda: ingress.sessions.is_idle, "the client's requests are gone")
                finally:
                    ingress.stop()
                    ingress.join(PATIENCE_S)
                status = server.wait_until_idle()
                outstanding = b'blinkimp:ingress_num_outstanding{protocol="http",queue_pair="0"} 0.0'
                assert outstanding in server.get("/metrics").body
    seconds = round(time.monotonic() - started, 1)
    pages = {
        key: status[key]
        for key in ("num_pages", "num_pages_free", "num_pages_cached", "requests_accepted", "requests_rejected")
    }
    return {
        "inputs": num_inputs,
        "seed": seed,
        "seconds": seconds,
        "answers": dict(sorted(counts.items())),
        "engine": pages,
    }


def main() -> None:
    run_fuzzer(fuzz_parser(__doc__, 100_000).parse_args(), run)


if __name__ == "__main__":
    main()
