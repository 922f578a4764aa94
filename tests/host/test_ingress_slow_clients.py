"""Clients that stop reading, flood, or vanish: they cost bounded memory and nobody else notices (I1 to I3 of nic_shim/sessions.py).

Run: pytest tests/host/test_ingress_slow_clients.py
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from blinkimp.client import Client
from blinkimp.nic_shim import sessions
from blinkimp.nic_shim.ingress_limits import ZmqLimits
from blinkimp.protocol import Error, Finish, Tokens
from tests.fake_director import FakeDirector
from tests.ingress_support import (
    RawClient,
    Served,
    encoded,
    end_process,
    engine_name,
    expected_ids,
    serve,
    start_process,
    wait_until,
    write_byte_tokenizer,
)
from tests.support import PATIENCE_S

SMALL_BUFFERS = {"recv_hwm": 1, "recv_bytes": 4096}  # of a client, so that it is soon seen not to read


@pytest.fixture
def small_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blinkimp.nic_shim.zmq_ingress.SEND_HWM", 2)
    monkeypatch.setattr(sessions, "MAX_TOKENS_PER_FRAME", 64)


@pytest.mark.usefixtures("small_pipes")
def test_client_that_stops_reading_loses_nothing_and_others_go_on(tmp_path: Path) -> None:
    num_requests, max_tokens = 64, 500
    limits = ZmqLimits(max_requests_per_client=num_requests, stall_timeout_s=3600)
    with (
        serve(tmp_path, limits=limits, step_s=0.0, send_buffer_bytes=8192) as served,
        RawClient(served.endpoint, **SMALL_BUFFERS) as slow,
        Client(served.endpoint, timeout_s=PATIENCE_S) as fast,
    ):
        for request_id in range(num_requests):
            slow.send(encoded(id=request_id, sampling={"max_tokens": max_tokens}))
        deadline = time.monotonic() + PATIENCE_S
        while (stats := fast.stats()).ingress["tokens"] < num_requests * max_tokens:
            assert time.monotonic() < deadline, stats
            assert fast.generate("x", max_tokens=3).num_output_tokens == 3  # others do not notice
        (blocked,) = [session for session in served.ingress.sessions.sessions.values() if session.requests]
        # What is left waits in the session (I1).
        wait_until(lambda: blocked.blocked_since is not None, "the pipe is full")
        for request_id in range(num_requests, 2 * num_requests):  # what it has not read counts against its limit
            slow.send(encoded(id=request_id))
        output, refused = _collect(slow, num_requests)
        assert {error.code for error in refused} == {"too_many_requests"}
        for request_id, tokens in output.items():
            assert tokens == expected_ids(served, 1, max_tokens), f"request {request_id} lost output"
        assert fast.stats().ingress["clients_stalled"] == 0


def _collect(raw: RawClient, num_requests: int) -> tuple[dict[int, list[int]], list[Error]]:
    """Everything that the requests 0 to num_requests - 1 are owed."""
    output: dict[int, list[int]] = {request_id: [] for request_id in range(num_requests)}
    refused: list[Error] = []
    num_finished = 0
    while num_finished < num_requests:
        for message in raw.receive():
            if isinstance(message, Tokens) and message.id in output:
                assert message.index == len(output[message.id])
                output[message.id] += message.token_ids
            elif isinstance(message, Finish) and message.id in output:
                num_finished += 1
            elif isinstance(message, Error):
                refused.append(message)
    return output, refused


@pytest.mark.usefixtures("small_pipes")
def test_client_that_never_reads_again_is_dropped(tmp_path: Path) -> None:
    limits = ZmqLimits(stall_timeout_s=0.3)
    with (
        serve(tmp_path, limits=limits, step_s=0.0, send_buffer_bytes=8192, max_context=1 << 20) as served,
        RawClient(served.endpoint, **SMALL_BUFFERS) as slow,
        Client(served.endpoint, timeout_s=PATIENCE_S) as other,
    ):
        for request_id in range(20):
            slow.send(encoded(id=request_id, sampling={"max_tokens": 1_000_000}))
        wait_until(lambda: other.stats().ingress["clients_stalled"] == 1, "the stalled client is dropped")
        wait_until(lambda: not served.director.queue_pairs[0].running, "its requests are cancelled")
        wait_until(lambda: other.stats().ingress["num_unfinished"] == 0, "and forgotten")


@pytest.mark.usefixtures("small_pipes")
def test_flood_of_bad_messages_without_reading_is_bounded(tmp_path: Path) -> None:
    with (
        serve(tmp_path, limits=ZmqLimits(stall_timeout_s=3600), send_buffer_bytes=8192) as served,
        RawClient(served.endpoint, **SMALL_BUFFERS) as flood,
        Client(served.endpoint, timeout_s=PATIENCE_S) as other,
    ):
        deadline = time.monotonic() + PATIENCE_S
        while other.stats().ingress["replies_dropped"] == 0:
            assert time.monotonic() < deadline
            for _ in range(500):
                flood.send(b"\xc1" * 150)
        table = served.ingress.sessions.sessions
        wait_until(lambda: any(session.blocked_since for session in list(table.values())), "its pipe is full")
        assert all(len(session.control) <= sessions.MAX_CONTROL_MESSAGES for session in list(table.values()))  # I1
        assert other.generate("x", max_tokens=3).num_output_tokens == 3


def test_vanished_client_has_its_requests_cancelled(served: Served, client: Client) -> None:
    with RawClient(served.endpoint) as raw:
        served.director.paused = True  # it would never end by itself
        served.director.num_allowed_steps = 1
        raw.send(encoded(sampling={"max_tokens": 2000}))
        raw.receive()
    wait_until(lambda: served.director.queue_pairs[0].num_cancels == 1, "the cancel reaches the director")
    wait_until(lambda: not served.director.queue_pairs[0].running, "the request is gone")
    assert client.stats().ingress["clients_gone"] == 1


def test_vanished_client_without_output_is_found_out(served: Served) -> None:
    served.director.paused = True
    with RawClient(served.endpoint) as raw:
        raw.send(encoded())
        wait_until(lambda: bool(served.director.queue_pairs[0].running), "the request runs")
    wait_until(lambda: not served.director.queue_pairs[0].running, "nothing is sent, yet the probe finds out")


def test_clients_with_zmtp_heartbeats_cannot_abort_the_ingress(tmp_path: Path) -> None:
    """A ping that meets a full receive queue aborts libzmq; the ingress's queues must never be full."""
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), vocab_size=258) as director:
        process, endpoint = start_process(director.regions.engine_name, tokenizer, 0)
        try:
            for _ in range(20):
                context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
                sockets = [context.socket(zmq.DEALER) for _ in range(4)]
                for socket in sockets:
                    socket.setsockopt(zmq.LINGER, 0)
                    socket.setsockopt(zmq.HEARTBEAT_IVL, 5)
                    socket.connect(endpoint)
                for _ in range(2000):
                    for socket in sockets:
                        if socket.poll(0, zmq.POLLOUT):
                            socket.send(b"\xc1" * 20, zmq.NOBLOCK)
                time.sleep(0.02)
                for socket in sockets:
                    socket.close()
                context.term()
                assert process.poll() is None, f"the ingress ended with {process.poll()}"
            with Client(endpoint, timeout_s=PATIENCE_S) as client:
                assert client.generate("x", max_tokens=3).num_output_tokens == 3
        finally:
            end_process(process)


def test_memory_is_bounded_by_an_end(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.ingress._memory.max_bytes = 1
        with pytest.raises(MemoryError, match="expected at most 1; it ends"):
            served.ingress.join(PATIENCE_S)
        served.ingress.error = None
