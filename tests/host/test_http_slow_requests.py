"""Connections on which no byte of a request comes: they are closed, and what runs or is answered is not.

Covers nic_shim/http_protocol.py. Run: pytest tests/host/test_http_slow_requests.py
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.http_support import Scripted, scripted
from tests.ingress_support import larger_limit_in, wait_until
from tests.support import PATIENCE_S, undisturbed

LIMIT_S = 1.0
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
ASK_HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
UNFINISHED = {
    "nothing": b"",
    "half a line": b"POST /v1/comp",
    "half a head": HEAD,
    "no body": HEAD + b"\r\n",
    "half a body": HEAD + b'\r\n{"prompt": ',
    "half a chunk": b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n40\r\n{"pro',
    "no continuation": HEAD + b"expect: 100-continue\r\n\r\n",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with scripted(tmp_path_factory.mktemp("slow"), "--read-timeout-s", str(LIMIT_S), "--max-connections", "12") as both:
        yield both


def connect(served: Scripted) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.http.port), timeout=PATIENCE_S)


@contextlib.contextmanager
def not_closed() -> Iterator[None]:
    """For a test whose own process may stand still for longer than the limit: then the server has closed (undisturbed)."""
    try:
        yield
    except ConnectionError as error:
        raise AssertionError("it was closed") from error


def is_answered(connection: socket.socket) -> bool:
    """Or closed: there is something to read, or the end."""
    return bool(select.select([connection], [], [], 0)[0])


def read_to_end(connection: socket.socket) -> bytes:
    """Until the server closes; TimeoutError where it does not."""
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    reply = b""
    while not reply.endswith(end):
        piece = connection.recv(1 << 16)
        assert piece, reply
        reply += piece
    return reply


# A connection that says nothing behind a reply is uvicorn's to close.
@pytest.mark.parametrize(
    ("what", "is_second"),
    [(what, is_second) for what in UNFINISHED for is_second in (False, True) if what != "nothing" or not is_second],
)
def test_a_request_that_is_not_completed_is_closed(served: Scripted, what: str, is_second: bool) -> None:
    began = time.monotonic()  # not after the server's own clock
    with connect(served) as connection:
        if is_second:  # behind another on the same connection
            connection.sendall(ASK_HEALTH)
            read_until(connection, b'"ok"}')
            began = time.monotonic()
        connection.sendall(UNFINISHED[what])
        reply = read_to_end(connection).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert time.monotonic() - began >= LIMIT_S * 0.9
    if what == "nothing":
        assert reply == b""
        return
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head
    assert b"x-request-id" not in head, "as http_openapi.py has it"
    error = json.loads(body)["error"]
    assert error["code"] == "request_timeout" and "expected the rest" in error["message"]
    assert larger_limit_in(error["message"]) == "--read-timeout-s"


@undisturbed
def test_they_make_room_for_others(served: Scripted) -> None:
    held = [connect(served) for _ in range(12)]
    for connection in held:
        connection.sendall(UNFINISHED["half a body"])
    assert served.http.get("/health").status == 503, "every connection is taken"
    wait_until(lambda: served.http.get("/health").status == 200, "they are closed")
    for connection in held:
        assert read_to_end(connection).startswith((b"HTTP/1.1 408", b"HTTP/1.1 503"))
        connection.close()


def test_a_request_that_runs_for_longer_is_not_closed(served: Scripted) -> None:
    served.director.paused = True
    replies: list[Any] = []
    thread = threading.Thread(target=lambda: replies.append(served.http.complete("x", max_tokens=5)))
    thread.start()
    wait_until(lambda: served.http.status()["num_running"] == 1, "it runs")
    time.sleep(2.5 * LIMIT_S)
    served.director.paused = False
    thread.join(PATIENCE_S)
    assert replies[0]["usage"]["completion_tokens"] == 5


@undisturbed
def test_a_request_behind_one_that_runs_for_longer_has_its_time(served: Scripted) -> None:
    """It is pipelined and half sent: its time begins when the first has been answered."""
    body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    served.http.wait_until_idle()  # of a run before that was disturbed
    with not_closed(), connect(served) as connection:
        served.director.paused = True
        try:
            connection.sendall(request + request[:-5])
            wait_until(lambda: served.http.status()["num_running"] == 1 or is_answered(connection), "the first runs")
            assert not is_answered(connection), "it was closed before it was read"
            time.sleep(2.5 * LIMIT_S)
        finally:
            served.director.paused = False
        assert read_until(connection, b"}}}").startswith(b"HTTP/1.1 200")
        connection.sendall(request[-5:] + ASK_HEALTH.replace(b"host", b"connection: close\r\nhost"))
        assert b"HTTP/1.1 200" in read_to_end(connection)


@undisturbed
def test_a_request_that_comes_in_drops_is_read(served: Scripted) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )
    with not_closed(), connect(served) as connection:
        for idx in range(0, len(request), 10):
            connection.sendall(request[idx : idx + 10])
            time.sleep(0.2 * LIMIT_S)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200")
