"""The HTTP ingress's log and request ids: one valid line of JSON for each request, the client's id in reply and log.

Run: pytest tests/host/test_http_log.py
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_support import Scripted, scripted
from tests.ingress_support import wait_until
from tests.support import PATIENCE_S

KEYS = {"time", "level", "logger", "process", "pid", "message", "event"}
GENERATION = KEYS | {
    *("request_id", "transport", "path", "status", "stream", "user", "reason", "error", "choices"),
    *("prompt_tokens", "cached_tokens", "output_tokens", "queue_s", "prefill_s", "ttft_s", "decode_s", "e2e_s", "seed"),
}
REFUSAL = KEYS | {"request_id", "transport", "path", "status", "error", "e2e_s"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with scripted(tmp_path_factory.mktemp("log"), "--log-format", "json") as both:
        yield both


def lines(server: Scripted, **fields: Any) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in server.http.log]
    return [line for line in parsed if fields.items() <= line.items()]


def the_line(server: Scripted, request_id: str) -> dict[str, Any]:
    wait_until(lambda: lines(server, request_id=request_id), f"a line of {request_id}")
    (line,) = lines(server, request_id=request_id)
    return line


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_one_line_with_its_id_and_tokens(server: Scripted, stream: bool) -> None:
    request_id = f"my-id_{int(stream)}"
    body = {"prompt": [65, 66, 67], "max_tokens": 5, "n": 2, "seed": 11, "stream": stream, "user": "somebody"}
    reply = server.http.post("/v1/completions", body, headers={"X-Request-Id": request_id})
    assert reply.status == 200 and reply.headers["x-request-id"] == request_id
    line = the_line(server, request_id)
    assert set(line) == GENERATION
    expected = {"event": "request", "transport": "http", "path": "/v1/completions", "status": 200, "reason": "length"}
    expected |= {"seed": "11"} | {
        "choices": 2,
        "prompt_tokens": 3,
        "output_tokens": 10,
        "stream": stream,
        "user": "somebody",
    }
    assert expected.items() <= line.items() and line["error"] is None
    assert line["process"] == "http ingress 0" and line["level"] == "info"
    assert 0 <= line["ttft_s"] <= line["e2e_s"]


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/v1/completions", {"promp": "x"}, 400, "invalid_value"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "model_not_found"),
        ("/nowhere", {}, 404, None),
    ],
)
def test_a_refusal_leaves_one_line_too(server: Scripted, path: str, body: Any, status: int, error: str | None) -> None:
    reply = server.http.post(path, body)
    request_id = reply.headers["x-request-id"]
    assert reply.status == status and len(request_id) == 32
    line = the_line(server, request_id)
    assert set(line) == REFUSAL and (line["status"], line["error"], line["path"]) == (status, error, path)


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", 'a"b', "<script>", "é"])
def test_an_id_that_is_not_sane_is_replaced(server: Scripted, given: str) -> None:
    reply = server.http.get("/v1/models", headers={"X-Request-Id": given})
    assert reply.status == 200 and len(reply.headers["x-request-id"]) == 32


def test_every_reply_has_an_id(server: Scripted) -> None:
    for path in ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json", "/v1/models", "/tokenize"):
        assert server.http.get(path, headers={"X-Request-Id": "q-1"}).headers["x-request-id"] == "q-1", path


def test_what_is_asked_all_the_time_is_not_logged(server: Scripted) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        server.http.get(path, headers={"X-Request-Id": "quiet"})
    server.http.complete("x", max_tokens=1)
    assert not lines(server, request_id="quiet")


def test_a_client_that_goes_away_is_logged_as_such(server: Scripted) -> None:
    server.director.paused = True
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.http.port, timeout=PATIENCE_S)
        body = json.dumps({"prompt": "x", "max_tokens": 50})
        connection.request("POST", "/v1/completions", body, {"X-Request-Id": "gone"})
        wait_until(lambda: server.http.status()["num_running"] == 1, "the request runs")
        connection.close()
        line = the_line(server, "gone")
    finally:
        server.director.paused = False
    assert (line["status"], line["reason"], line["output_tokens"]) == (499, "abort", 0)


def test_the_life_of_the_process_is_in_the_log(tmp_path: Path) -> None:
    with scripted(tmp_path, "--log-format", "json") as server:
        server.http.complete("x", max_tokens=1)
    events = [json.loads(line)["event"] for line in server.http.log]
    assert events == ["request", "draining", "ended"]
