"""Clients that vanish: their requests are cancelled and every page is free again, whatever they were doing.

Run: pytest tests/host/test_http_cancel.py
"""

from __future__ import annotations

import json
import random
import socket
import time

from blinkimp.host.shared_memory import open_trace
from blinkimp.host.trace_reader import TraceReader
from tests.host.cancel_support import TRACE_EVENTS, assert_let_go_at_the_next_commit
from tests.http_support import HttpServer, embedded
from tests.ingress_support import wait_until

NUM_CLIENTS = 200


def start(server: HttpServer, idx: int) -> socket.socket:
    """A client with a request that would run for long."""
    body = {
        "prompt": [1 + idx % 50] * (1 + 7 * idx % 300),
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": idx % 2 == 0,
        "n": 1 + idx % 2,
    }
    payload = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def test_200_clients_that_vanish_leave_no_page_behind() -> None:
    rng = random.Random(200)
    with (
        embedded(max_batch=32, trace_events=TRACE_EVENTS) as (server, _),
        TraceReader(open_trace(server.engine_name)) as trace,
    ):
        clients = [start(server, idx) for idx in range(NUM_CLIENTS)]
        wait_until(lambda: server.status()["requests_accepted"] == 300, "all choices are accepted")
        assert server.status()["num_pages_used"] > 0
        rng.shuffle(clients)
        for idx, client in enumerate(clients):
            if idx % 3 == 0:  # a reset in place of a farewell
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            if idx % 20 == 0:
                time.sleep(0.01)
        status = server.wait_until_idle()
        num_ended = sum(value for name, value in status.items() if name.startswith("finished_"))
        assert num_ended == status["requests_accepted"] == 300 and status["finished_cancelled"] > 250
        assert_let_go_at_the_next_commit(trace, status["finished_cancelled"])
        outstanding = b'blinkimp:ingress_num_outstanding{protocol="http",queue_pair="0"} 0.0'
        wait_until(lambda: outstanding in server.get("/metrics").body, "no key has to pay for clients that are gone")
        assert server.complete("x", max_tokens=3)["choices"], "and the next one is served"


def test_a_client_that_leaves_while_its_prompt_is_read_is_no_request() -> None:
    with embedded() as (server, _):
        for num_bytes in (10, 60, 100):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                request = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{"prompt": "abc'
                connection.sendall(request[:num_bytes])
        assert server.complete("x", max_tokens=3)["choices"]
        assert server.status()["requests_accepted"] == 1
