"""Clients of the ZeroMQ ingress that vanish, cancel or run out of time: their pages are free at the engine's next commit.

Run: pytest tests/host/test_zmq_cancel.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from blinkimp.host.engine import Engine
from blinkimp.host.shared_memory import open_trace
from blinkimp.host.trace_reader import TraceReader
from blinkimp.nic_shim import engine_watch
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import Finish, Health, ServerMessage
from tests.host.cancel_support import TRACE_EVENTS, assert_let_go_at_the_next_commit
from tests.host.engine_support import assert_all_pages_are_back, make_tiny_checkpoint, running_engine
from tests.host.standing_still import standing_still
from tests.ingress_support import RawClient, encoded, wait_until, write_byte_tokenizer
from tests.support import PATIENCE_S

NUM_CLIENTS = 200


@contextmanager
def served(folder: Path) -> Iterator[tuple[Engine, str, ZmqIngress]]:
    model = make_tiny_checkpoint(folder, max_position_embeddings=4096)
    write_byte_tokenizer(model)
    with running_engine(model, trace_events=TRACE_EVENTS, max_batch=32, num_requests=512) as engine:
        ingress = ZmqIngress(engine.config.engine_name, 0, "tcp://127.0.0.1:*", Tokenizer(model), eos_ids=())
        endpoint = ingress.start()
        try:
            yield engine, endpoint, ingress
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S), "the ingress's loop does not end"


@pytest.fixture(autouse=True)
def _no_engine_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it stands still."""
    monkeypatch.setattr(engine_watch, "HEARTBEAT_TIMEOUT_S", 2 * PATIENCE_S)


def is_idle(engine: Engine) -> bool:
    status = engine.status()
    return status["num_running"] + status["num_waiting"] + status["num_finishing"] == 0


def test_200_clients_that_vanish_leave_no_page_behind(tmp_path: Path) -> None:
    """Half of them read a stream; the others have asked for the whole output, so nothing would be sent to them for long."""
    rng = random.Random(200)
    with served(tmp_path) as (engine, endpoint, ingress), TraceReader(open_trace(engine.config.engine_name)) as trace:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        clients = []
        with standing_still(engine.device.pid):
            for idx in range(NUM_CLIENTS):
                client = context.socket(zmq.DEALER)
                client.setsockopt(zmq.LINGER, 0)
                client.connect(endpoint)
                sampling = {"max_tokens": 4000, "ignore_eos": True}
                client.send(encoded(prompt=[3 + idx % 50] * (1 + 7 * idx % 80), sampling=sampling, stream=idx % 2 == 0))
                clients.append(client)
            wait_until(lambda: ingress.link.num_live == NUM_CLIENTS, "all have come")
        wait_until(lambda: engine.status()["requests_accepted"] == NUM_CLIENTS, "all are accepted")
        wait_until(lambda: engine.status()["output_tokens"] > 500, "the first of them run")
        rng.shuffle(clients)
        with standing_still(engine.device.pid):
            for client in clients:
                client.close()
            wait_until(lambda: ingress.sessions.counters.clients_gone > NUM_CLIENTS // 2, "their end is noticed")
        wait_until(lambda: is_idle(engine), "nobody's request runs any more")
        wait_until(lambda: ingress.sessions.is_idle, "nobody is owed anything")
        context.term()
        assert_all_pages_are_back(engine.status)
        status = engine.status()
        num_ended = sum(value for name, value in status.items() if name.startswith("finished_"))
        assert num_ended == NUM_CLIENTS and status["finished_cancelled"] > NUM_CLIENTS // 2
        assert_let_go_at_the_next_commit(trace, status["finished_cancelled"])
        assert ingress.sessions.counters.clients_gone > NUM_CLIENTS // 2
        with RawClient(endpoint) as client_after:
            client_after.send(encoded(prompt=[5, 6], sampling={"max_tokens": 3}))
            assert client_after.receive_until(lambda message: isinstance(message, Finish))


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_what_is_cancelled_or_late_ends_with_its_pages(how: str, tmp_path: Path) -> None:
    with served(tmp_path) as (engine, endpoint, ingress), TraceReader(open_trace(engine.config.engine_name)) as trace:
        with RawClient(endpoint) as client:
            timeout_s = 0.3 if how == "deadline" else None
            with standing_still(engine.device.pid):
                for idx in range(40):
                    fields = {"sampling": {"max_tokens": 4000, "ignore_eos": True}, "timeout_s": timeout_s}
                    client.send(encoded(id=idx, prompt=[3 + idx] * 20, **fields))
                wait_until(lambda: ingress.link.num_live == 40, "all have come")
            wait_until(lambda: engine.status()["requests_accepted"] == 40, "all are accepted")
            messages: list[ServerMessage] = []
            if how == "cancel":
                with standing_still(engine.device.pid):
                    for idx in range(40):
                        client.send_message({"type": "cancel", "id": idx})
                    client.send_message({"type": "health", "id": 1000})
                    messages = client.receive_until(lambda message: isinstance(message, Health))
            reasons = [message.reason for message in messages if isinstance(message, Finish)]
            while len(reasons) < 40:
                reasons += [message.reason for message in client.receive() if isinstance(message, Finish)]
        wait_until(lambda: is_idle(engine), "nothing runs")
        status = engine.status()
        num_stopped = status["finished_cancelled" if how == "cancel" else "finished_timeout"]
        assert reasons.count("cancelled" if how == "cancel" else "timeout") == num_stopped
        if how == "cancel":
            assert num_stopped > 20
            assert_let_go_at_the_next_commit(trace, num_stopped)
        assert_all_pages_are_back(engine.status)
