"""A drain of the HTTP ingress waits for clients that read slowly, also once the engine has long been done with their requests.

Run: pytest tests/host/test_http_drain.py
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from blinkimp.nic_shim.tokenizer import Tokenizer
from tests.http_support import HttpServer, http_ingress, scripted
from tests.ingress_support import wait_until
from tests.support import PATIENCE_S

NUM_PROMPTS, NUM_CHOICES, NUM_PROMPT_TOKENS = 8, 128, 2000
UVICORN_GRACE_S = 2  # what its own shutdown would leave them


@contextlib.contextmanager
def draining(folder: Path, *flags: str, stream: bool) -> Iterator[tuple[HttpServer, socket.socket]]:
    """An ingress that drains, and a client that has read nothing yet of its reply of 20 MB: more than the kernel's buffers take. The engine is
    done with it."""
    with (
        scripted(folder, num_queue_pairs=2) as first,
        http_ingress(first.http.engine_name, folder, *flags, queue_pair_idx=1) as http,
    ):
        (token,) = Tokenizer(folder).encode("\x01").tolist()  # six bytes in JSON, and three of its id
        fields = {
            "prompt": [[token] * NUM_PROMPT_TOKENS] * NUM_PROMPTS,
            "n": NUM_CHOICES,
            "max_tokens": 1,
            "echo": True,
        }
        body = json.dumps({**fields, "return_token_ids": True, "stream": stream}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(PATIENCE_S)
            client.connect(("127.0.0.1", http.port))
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            pair = first.director.queue_pairs[1]
            wait_until(lambda: len(pair.seen) == NUM_PROMPTS * NUM_CHOICES, "all choices have come to the engine")
            http.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not pair.running and not pair.outbox, "the engine is done with them")
            yield http, client
        assert http.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_still_being_read_is_not_cut(tmp_path: Path, stream: bool) -> None:
    """The client begins to read when the ingress has had the time to end."""
    with draining(tmp_path, stream=stream) as (http, client):
        with pytest.raises(subprocess.TimeoutExpired):
            http.process.wait(2 * UVICORN_GRACE_S)
        assert http.get("/ready").json == {"status": "draining"}, "and whoever asks is told why"
        response = HTTPResponse(client)
        response.begin()
        reply = response.read().decode()
    events = reply.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1] if stream else [reply]
    assert reply.endswith("data: [DONE]\n\n" if stream else "}")
    choices = [choice for event in events for choice in json.loads(event.removeprefix("data: "))["choices"]]
    assert sum(choice["text"].count("\x01") for choice in choices) == NUM_PROMPTS * NUM_CHOICES * NUM_PROMPT_TOKENS
    ends = [choice["index"] for choice in choices if choice["finish_reason"] == "length"]
    assert sorted(ends) == list(range(NUM_PROMPTS * NUM_CHOICES))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_nothing_does_not_keep_a_drain_beyond_its_time(tmp_path: Path, stream: bool) -> None:
    with draining(tmp_path, "--drain-timeout", "0.5", stream=stream) as (http, _):
        assert http.process.wait(PATIENCE_S) == 0
        wait_until(lambda: any("drain timed out" in line for line in http.log), "the log says what is cut")
