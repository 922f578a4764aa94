"""What the HTTP ingress refuses, with which status and words, and whom: fields, keys, limits, an engine that is gone.

Run: pytest tests/host/test_http_errors.py
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.http_support import MODEL, Reply, Scripted, scripted
from tests.ingress_support import larger_limit_in, wait_until
from tests.support import PATIENCE_S

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    flags = ("--max-request-bytes", "100000", "--max-outstanding", "8", "--max-prompt-chars", "50000")
    with scripted(tmp_path_factory.mktemp("byte"), *flags) as server:
        yield server


def refusal(reply: Reply, status: int) -> dict[str, Any]:
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return dict(error)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": []}, "tools", "expected one of"),
        ({"best_of": 2}, "best_of", "cache_salt"),
        ({"temperature": -1}, "temperature", "float >= 0.0"),
        ({"temperature": "hot"}, "temperature", "expected float"),
        ({"top_p": 0}, "top_p", "float > 0.0"),
        ({"n": 0}, "n", "int >= 1"),
        ({"seed": 2**64}, "seed", "2^64 - 1"),
        ({"max_tokens": 0}, "max_tokens", "int >= 1"),
        ({"stop": ["a"] * 17}, "stop", "length <= 16"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "int >= 0"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "int"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "<= 100"),
        ({"logprobs": 21}, "logprobs", "<= 20"),
        ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
        ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "'other'"),
        ({"timeout": 0}, "timeout", "> 0"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": ["a", [1]]}, "prompt", "list and str"),
        ({"prompt": ["a"] * 300}, "prompt", "at most 256"),
        ({"prompt": 5}, "prompt", "str | array"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "one constraint"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
    ],
)
def test_a_wrong_field_is_named(served: Scripted, fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(served.http.post("/v1/completions", {"prompt": "x", **fields}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert words in error["message"], error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"messages": MESSAGES, "functions": []}, "functions"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": MESSAGES, "tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({}, "messages"),
    ],
)
def test_a_wrong_chat_field_is_named(served: Scripted, fields: dict[str, Any], param: str) -> None:
    assert refusal(served.http.post("/v1/chat/completions", fields), 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"prompt": [9999]}, "bad_token", "9999"),
        ({"prompt": "x", "stop_token_ids": [258]}, "bad_token", "258"),
        ({"prompt": "x", "logit_bias": {"300": 1}}, "bad_token", "300"),
        ({"prompt": ""}, "prompt_empty", "0 tokens"),
        ({"prompt": [[]]}, "prompt_empty", "0 tokens"),
        ({"prompt": "x", "max_tokens": 5000}, "context_length_exceeded", "at most 2048"),
        ({"prompt": "x" * 60000}, "context_length_exceeded", "at most 50000"),
        ({"prompt": "x", "min_tokens": 5, "max_tokens": 4}, "bad_sampling", "min_tokens"),
    ],
)
def test_what_the_model_cannot_run_is_refused(served: Scripted, fields: dict[str, Any], code: str, words: str) -> None:
    error = refusal(served.http.post("/v1/completions", fields), 400)
    assert error["code"] == code and words in error["message"]


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 50000, b"null"])
def test_a_body_that_is_no_request(served: Scripted, payload: bytes) -> None:
    refusal(served.http.post("/v1/completions", payload), 400)


def test_statuses_beside_400(served: Scripted) -> None:
    http = served.http
    assert refusal(http.post("/v1/completions", {"prompt": "x", "model": "gpt-4"}), 404)["code"] == "model_not_found"
    refusal(http.get("/v1/nothing"), 404)
    not_allowed = http.get("/v1/completions")
    assert refusal(not_allowed, 405) and not_allowed.headers["allow"] == "POST"
    too_large = refusal(http.post("/v1/completions", {"prompt": "x" * 200_000}), 413)["message"]
    assert "100000" in too_large and larger_limit_in(too_large) == "--max-request-bytes"
    too_long = refusal(http.post("/v1/completions", {"prompt": "x" * 60_000}), 400)["message"]
    assert "at most 50000" in too_long and larger_limit_in(too_long) == "--max-prompt-chars"
    busy = http.post("/v1/completions", {"prompt": "x", "n": 9})
    assert refusal(busy, 429)["type"] == "rate_limit_error" and busy.headers["retry-after"] == "1"
    assert http.complete("x", model=MODEL, n=8)["choices"], "the refused ones are not counted"


def test_a_body_without_a_length_is_bounded_too(served: Scripted) -> None:
    with socket.create_connection(("127.0.0.1", served.http.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it need not listen any longer once it has answered
            for _ in range(30):
                connection.sendall(b"2710\r\n" + b"x" * 10000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_outstanding_choices_are_limited_while_they_run(served: Scripted) -> None:
    served.director.paused = True
    replies: list[Reply] = []
    body = {"prompt": "x", "max_tokens": 4, "n": 8}
    thread = threading.Thread(target=lambda: replies.append(served.http.post("/v1/completions", body)))
    thread.start()
    try:
        wait_until(lambda: len(served.director.queue_pairs[0].running) == 8, "eight choices run")
        refusal(served.http.post("/v1/completions", {"prompt": "x"}), 429)
    finally:
        served.director.paused = False
        thread.join(PATIENCE_S)
    assert replies[0].status == 200
    assert served.http.complete("x")["choices"]


def test_request_ids_come_back(served: Scripted) -> None:
    reply = served.http.post("/v1/completions", {"prompt": "x"}, headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1" and reply.json["id"] == "cmpl-abc-1"
    odd = served.http.post("/v1/completions", {"prompt": "x"}, headers={"x-request-id": "a b;c"})
    assert len(odd.headers["x-request-id"]) == 32


def test_keys_and_rates(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-secret-key\n\nsecond-secret-key\n")
    keys.chmod(0o600)
    flags = ("--api-key-file", str(keys), "--max-requests-per-s", "1", "--burst-requests", "3")
    with scripted(tmp_path, *flags, environment={"BLINKIMP_API_KEY": "third-secret-key"}) as served:
        http = served.http
        for header in (None, "Bearer wrong-key", "Basic first-secret-key", "first-secret-key", "Bearer"):
            headers = {} if header is None else {"authorization": header}
            reply = http.post("/v1/completions", {"prompt": "x"}, headers=headers)
            assert (
                refusal(reply, 401)["type"] == "authentication_error" and reply.headers["www-authenticate"] == "Bearer"
            )
        for path in ("/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json"):
            assert http.get(path).status == 200, path
        assert http.get("/v1/models").status == 401 and http.post("/tokenize", {"prompt": "x"}).status == 401
        for scheme, key in (("Bearer", "first"), ("bearer", "second"), ("BEARER", "third")):
            headers = {"authorization": f"{scheme} {key}-secret-key"}
            with ThreadPoolExecutor(16) as pool:  # all at once: what comes within 13 s cannot all be served
                posts = [pool.submit(http.post, "/v1/completions", {"prompt": "x"}, headers=headers) for _ in range(16)]
            statuses = [post.result().status for post in posts]
            assert statuses.count(200) >= 3, "each key has a rate of its own"
            assert statuses.count(200) + statuses.count(429) == 16 and 429 in statuses
        wait_until(lambda: http.get("/v1/models", headers=headers).status == 200, "the bucket refills")


def test_a_lost_engine_is_503_and_a_stream_says_so(tmp_path: Path) -> None:
    with scripted(tmp_path, "--loss-timeout-s", "0.5") as served:
        served.director.paused = True
        replies: list[Reply] = []
        bodies = [{"prompt": "x", "max_tokens": 40, "stream": stream} for stream in (False, True)]
        threads = [
            threading.Thread(target=lambda b=body: replies.append(served.http.post("/v1/completions", b)))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(served.director.queue_pairs[0].running) == 2, "both run")
        served.director.stop()
        for thread in threads:
            thread.join(PATIENCE_S)
        for reply in replies:
            assert refusal(reply, 503)["code"] == "engine_lost", reply.body
        assert served.http.get("/ready").json == {"status": "engine_lost"}
        assert refusal(served.http.post("/v1/completions", {"prompt": "x"}), 503)["code"] == "engine_lost"
        assert served.http.get("/health").status == 200


def test_a_stream_that_breaks_ends_with_an_error_event(tmp_path: Path) -> None:
    with scripted(tmp_path, "--loss-timeout-s", "0.5", step_s=0.05) as served:
        with socket.create_connection(("127.0.0.1", served.http.port), timeout=PATIENCE_S) as connection:
            body = json.dumps({"prompt": "x", "max_tokens": 400, "stream": True}).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            data = connection.recv(1 << 16)
            served.director.stop()
            while piece := connection.recv(1 << 16):
                data += piece
        assert data.startswith(b"HTTP/1.1 200") and b'"code":"engine_lost"' in data
        assert data.rstrip(b"\r\n0").endswith(b"data: [DONE]")
