"""The ZeroMQ ingress over real sockets and real shared memory, with a scripted director: bad messages, slow, vanished and many
clients, cancel, whole characters, drops, a new engine, drain. Invariants cited are those of nic_shim/sessions.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from blinkimp.client import Client, RequestRefusedError
from blinkimp.host.shared_memory import QueuePairGeometry
from blinkimp.nic_shim import sessions
from blinkimp.nic_shim.message_handler import IngressLimits
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import (
    Cancel,
    Error,
    Finish,
    GetStats,
    Sampling,
    ServerMessage,
    Stats,
    Submit,
    Tokens,
    decode_server_messages,
)
from tests.fake_director import FakeDirector
from tests.ingress_support import EOS_ID, Served, engine_name, serve, write_byte_tokenizer
from tests.support import ROOT

LIMITS = IngressLimits(max_message_bytes=1 << 20, max_prompt_bytes=100_000, max_requests_per_client=8, max_requests=20)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, limits=LIMITS) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.endpoint, timeout_s=10) as connected:
        yield connected


class RawClient:
    """A DEALER socket that sends what it is told to."""

    def __init__(self, endpoint: str, *, recv_hwm: int = 1000, recv_bytes: int = -1) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, recv_hwm)
        self.socket.setsockopt(zmq.RCVBUF, recv_bytes)
        self.socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def send_message(self, message: Any) -> None:
        self.send(msgspec.msgpack.encode(message))

    def receive(self, timeout_s: float = 5.0) -> list[ServerMessage]:
        if not self.socket.poll(int(timeout_s * 1000)):
            raise TimeoutError("no frame from the server")
        return decode_server_messages(self.socket.recv())

    def receive_until(self, wanted: Callable[[ServerMessage], bool]) -> list[ServerMessage]:
        messages: list[ServerMessage] = []
        while not any(wanted(message) for message in messages):
            messages += self.receive()
        return messages

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.005)


def expected_ids(served: Served, num_prompt_tokens: int, num_tokens: int) -> list[int]:
    return [served.script[(num_prompt_tokens + i) % len(served.script)] for i in range(num_tokens)]


# ---- Requests --------------------------------------------------------------------------------------------------------
def test_stream_by_text_and_by_ids(served: Served, client: Client) -> None:
    by_text = client.generate("hello", max_tokens=100)
    by_ids = client.generate(served.tokenizer.encode("hello").tolist(), max_tokens=100)
    assert by_text.token_ids == by_ids.token_ids == expected_ids(served, 5, 100)
    assert by_text.text == by_ids.text == served.tokenizer.decode(by_text.token_ids).rstrip("\ufffd")
    assert (by_text.finish_reason, by_text.num_prompt_tokens, by_text.num_output_tokens) == ("length", 5, 100)
    assert by_text.logprobs == [-0.5] * 100
    assert 0 < by_text.finish.accepted_ns <= by_text.finish.first_token_ns <= by_text.finish.finished_ns


def test_stream_never_shows_half_a_character(served: Served, client: Client) -> None:
    start = len(served.script)  # so the output starts where the script does
    pieces = [chunk.text for chunk in client.submit([5] * start, max_tokens=2 * start)]
    whole = served.tokenizer.decode(served.script)
    assert "".join(pieces) == whole * 2
    assert not any("\ufffd" in piece for piece in pieces) and "😀" in pieces


def test_sampling_reaches_the_ring(served: Served, client: Client) -> None:
    completion = client.generate(
        "x",
        temperature=0.25,
        top_p=0.5,
        min_p=0.125,
        top_k=3,
        seed=9,
        max_tokens=2,
        stop_token_ids=[4, 5],
        ignore_eos=True,
    )
    (request,) = served.director.queue_pairs[0].seen
    assert request.sampling == {"temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "top_k": 3, "seed": 9}
    assert (request.stop_ids, request.ignore_eos, request.max_tokens, completion.seed) == ((4, 5), True, 2, 9)


def test_seeds_are_drawn_when_absent(served: Served, client: Client) -> None:
    seeds = {client.generate("x", max_tokens=1).seed for _ in range(4)}
    assert len(seeds) == 4
    assert {request.sampling["seed"] for request in served.director.queue_pairs[0].seen} == seeds


def test_stop_id_ends_the_request(served: Served, client: Client) -> None:
    stop = expected_ids(served, 1, 4)[3]
    completion = client.generate("x", max_tokens=50, stop_token_ids=[stop])
    assert completion.finish_reason == "stop_id" and completion.token_ids[-1] == stop


def test_no_detokenisation_on_request(client: Client) -> None:
    completion = client.generate("hello", max_tokens=5, detokenize=False)
    assert completion.text == "" and len(completion.token_ids) == 5


def test_many_streams_of_many_clients(served: Served) -> None:
    clients = [Client(served.endpoint, timeout_s=10) for _ in range(4)]
    try:
        streams = [
            (number, client, client.submit([7] * number, max_tokens=60)) for number in range(1, 5) for client in clients
        ]
        for number, _, stream in reversed(streams):
            assert stream.result().token_ids == expected_ids(served, number, 60)
    finally:
        for client in clients:
            client.close()


def test_tokens_that_arrive_together_share_a_message(served: Served) -> None:
    with RawClient(served.endpoint) as raw:
        served.director.step_s = 0.0
        raw.send_message(Submit(1, [5], Sampling(max_tokens=2000)))
        messages = raw.receive_until(lambda message: isinstance(message, Finish))
    tokens = [message for message in messages if isinstance(message, Tokens)]
    assert sum(len(message.token_ids) for message in tokens) == 2000
    assert len(tokens) < 1500
    indexes = [message.index for message in tokens]
    assert indexes == sorted(indexes)


def test_long_prompt_is_tokenised_beside_the_streams(served: Served, client: Client) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        client.generate(
            "word " * 15_000, max_tokens=1
        )  # 75,000 tokens, beyond the context, but only the tokenizer knows
    assert caught.value.code == "prompt_too_long" and "75000 prompt tokens" in str(caught.value)
    assert client.generate("word " * 400, max_tokens=4).num_prompt_tokens == 2000


# ---- Cancel ----------------------------------------------------------------------------------------------------------
def test_cancel_running(served: Served, client: Client) -> None:
    stream = client.submit("x", max_tokens=2000)
    next(stream)
    stream.cancel()
    completion = stream.result()
    assert completion.finish_reason == "cancelled" and 0 < completion.num_output_tokens < 2000
    assert completion.token_ids == expected_ids(served, 1, completion.num_output_tokens)
    assert not served.director.queue_pairs[0].running


def test_cancel_waiting_for_the_ring(served: Served, client: Client) -> None:
    served.director.queue_pairs[0].hold_acks = True
    with RawClient(served.endpoint) as raw:
        for request_id in range(8):
            raw.send_message(Submit(request_id, "x"))
        for request_id in range(8):
            raw.send_message(Cancel(request_id))
        time.sleep(0.05)
        served.director.queue_pairs[0].hold_acks = False
        messages: list[ServerMessage] = []
        while sum(isinstance(message, Finish) for message in messages) < 8:
            messages += raw.receive()
    reasons = {message.reason for message in messages if isinstance(message, Finish)}
    assert reasons == {"cancelled"}


def test_cancel_of_unknown_id_is_ignored(served: Served, client: Client) -> None:
    with RawClient(served.endpoint) as raw:
        raw.send_message(Cancel(77))
        raw.send_message(GetStats(1))
        assert isinstance(raw.receive()[0], Stats)


def test_leaving_a_stream_early_cancels(served: Served, client: Client) -> None:
    with client.submit("x", max_tokens=2000) as stream:
        next(stream)
    wait_until(lambda: served.director.queue_pairs[0].num_cancels == 1, "the cancel reaches the director")


# ---- Bad messages ----------------------------------------------------------------------------------------------------
def encoded(**fields: Any) -> bytes:
    return msgspec.msgpack.encode({"type": "submit", "id": 1, "prompt": "x"} | fields)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "bad_message"),
        ([b"", b""], "bad_message"),
        ([encoded(), b"more"], "bad_message"),
        ([b""] * 20, "bad_message"),
        ([encoded()[:-3]], "bad_message"),
        ([b"\xff\xfe\xfd"], "bad_message"),
        ([msgspec.msgpack.encode([1, 2, 3])], "bad_message"),
        ([encoded(type="boom")], "bad_message"),
        ([encoded(prompt=3.5)], "bad_message"),
        ([encoded(prompt=["a"])], "bad_message"),
        ([encoded(extra=1)], "bad_message"),
        ([encoded(sampling={"temprature": 1})], "bad_sampling"),
        ([encoded(sampling={"top_p": 7})], "bad_sampling"),
        ([encoded(prompt="")], "prompt_empty"),
        ([encoded(prompt=[])], "prompt_empty"),
        ([encoded(prompt=[258])], "bad_token"),
        ([encoded(sampling={"stop_token_ids": [9999]})], "bad_token"),
        ([encoded(prompt="x" * 3000)], "prompt_too_long"),
        ([encoded(prompt="x" * 100_001)], "prompt_too_long"),
        ([encoded(sampling={"max_tokens": 2048})], "prompt_too_long"),
        ([encoded(delivered_ids=[5] * 17)], "bad_message"),
        ([os.urandom(1 << 21)], "too_large"),
    ],
    ids=str,
)
def test_bad_message_gets_an_explanation_and_the_server_lives(served: Served, frames: list[bytes], code: str) -> None:
    with RawClient(served.endpoint) as raw:
        raw.send(*frames)
        (error,) = raw.receive()
        assert isinstance(error, Error)
        assert error.code == code, error
        assert all((error.what, error.got, error.expected, error.remedy)) and len(error.got) < 300
        raw.send(encoded(id=2))
        assert isinstance(raw.receive_until(lambda message: isinstance(message, Finish))[-1], Finish)


def test_ten_megabyte_blobs(tmp_path: Path) -> None:
    with serve(tmp_path) as served, RawClient(served.endpoint) as raw:  # default limits
        for _ in range(5):
            raw.send(os.urandom(10_000_000))
            (error,) = raw.receive()
            assert isinstance(error, Error) and (error.code, error.got) == ("too_large", "10000000 bytes")
        raw.send(encoded())
        assert isinstance(raw.receive_until(lambda message: isinstance(message, Finish))[-1], Finish)


def test_frame_beyond_the_hard_limit_closes_only_that_connection(served: Served, client: Client) -> None:
    stream = client.submit("x", max_tokens=500)
    with RawClient(served.endpoint) as raw:
        raw.send(bytes(9 << 20))  # the limit is 8 x 1 MiB
        with pytest.raises(TimeoutError):
            raw.receive(0.3)
    assert stream.result().num_output_tokens == 500


def test_duplicate_id_leaves_the_first_request_alone(served: Served) -> None:
    with RawClient(served.endpoint) as raw:
        raw.send(encoded(sampling={"max_tokens": 300}))
        raw.send(encoded())
        raw.send(encoded(sampling={"top_p": 9}))  # bad, and its id is in use: not the end of it either
        messages = raw.receive_until(lambda message: isinstance(message, Finish))
        errors = [message for message in messages if isinstance(message, Error)]
        assert [(error.code, error.final) for error in errors] == [("duplicate_id", False), ("bad_sampling", False)]
        (finish,) = (message for message in messages if isinstance(message, Finish))
        assert finish.num_output_tokens == 300


def test_limits_of_a_client_and_of_the_server(served: Served) -> None:
    served.director.paused = True
    raws = [RawClient(served.endpoint) for _ in range(3)]
    try:
        for raw in raws[:2]:
            for request_id in range(9):
                raw.send(encoded(id=request_id))
            (error,) = raw.receive()
            assert isinstance(error, Error) and (error.code, error.id, error.final) == ("too_many_requests", 8, True)
        for request_id in range(5):
            raws[2].send(encoded(id=request_id))
        (error,) = raws[2].receive()
        assert isinstance(error, Error) and (error.code, error.id) == ("busy", 4)
        served.director.paused = False
        for raw in raws:  # a finished request makes room
            raw.receive_until(lambda message: isinstance(message, Finish))
            raw.send(encoded(id=100))
            raw.receive_until(lambda message: isinstance(message, Finish) and message.id == 100)
    finally:
        for raw in raws:
            raw.close()


# ---- Slow and vanished clients ---------------------------------------------------------------------------------------
SMALL_BUFFERS = {"recv_hwm": 1, "recv_bytes": 4096}  # of a client, so that it is soon seen not to read


@pytest.fixture
def small_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blinkimp.nic_shim.zmq_ingress.SEND_HWM", 2)
    monkeypatch.setattr(sessions, "MAX_TOKENS_PER_FRAME", 64)


@pytest.mark.usefixtures("small_pipes")
def test_client_that_stops_reading_loses_nothing_and_others_go_on(tmp_path: Path) -> None:
    num_requests, max_tokens = 64, 500
    limits = IngressLimits(max_requests_per_client=num_requests)
    with (
        serve(tmp_path, limits=limits, step_s=0.0, send_buffer_bytes=8192) as served,
        RawClient(served.endpoint, **SMALL_BUFFERS) as slow,
        Client(served.endpoint, timeout_s=10) as fast,
    ):
        for request_id in range(num_requests):
            slow.send(encoded(id=request_id, sampling={"max_tokens": max_tokens}))
        deadline = time.monotonic() + 30
        while (stats := fast.stats()).ingress["tokens"] < num_requests * max_tokens:
            assert time.monotonic() < deadline, stats
            assert fast.generate("x", max_tokens=3).num_output_tokens == 3  # others do not notice
        (blocked,) = [session for session in served.ingress.sessions.sessions.values() if session.requests]
        assert blocked.blocked_since is not None  # the pipe is full: what is left waits in the session (I1)
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
        for message in raw.receive(10):
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
    limits = IngressLimits(stall_timeout_s=0.3)
    with (
        serve(tmp_path, limits=limits, step_s=0.0, send_buffer_bytes=8192, max_context=1 << 20) as served,
        RawClient(served.endpoint, **SMALL_BUFFERS) as slow,
        Client(served.endpoint, timeout_s=10) as other,
    ):
        for request_id in range(20):
            slow.send(encoded(id=request_id, sampling={"max_tokens": 1_000_000}))
        wait_until(lambda: other.stats().ingress["clients_stalled"] == 1, "the stalled client is dropped", 30)
        wait_until(lambda: not served.director.queue_pairs[0].running, "its requests are cancelled")
        assert other.stats().ingress["num_unfinished"] == 0


@pytest.mark.usefixtures("small_pipes")
def test_flood_of_bad_messages_without_reading_is_bounded(tmp_path: Path) -> None:
    with (
        serve(tmp_path, send_buffer_bytes=8192) as served,
        RawClient(served.endpoint, **SMALL_BUFFERS) as flood,
        Client(served.endpoint, timeout_s=10) as other,
    ):
        deadline = time.monotonic() + 30
        while other.stats().ingress["replies_dropped"] == 0:
            assert time.monotonic() < deadline
            for _ in range(500):
                flood.send(b"\xc1" * 150)
        (flooding,) = [session for session in served.ingress.sessions.sessions.values() if session.blocked_since]
        assert len(flooding.control) <= sessions.MAX_CONTROL_MESSAGES  # I1
        assert other.generate("x", max_tokens=3).num_output_tokens == 3


def test_vanished_client_has_its_requests_cancelled(served: Served, client: Client) -> None:
    with RawClient(served.endpoint) as raw:
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


# ---- The engine's absences -------------------------------------------------------------------------------------------
def test_drop_by_the_director_is_a_pause(served: Served, client: Client) -> None:
    queue_pair = served.director.queue_pairs[0]
    streams = [client.submit([7] * number, max_tokens=300, temperature=0) for number in (1, 2, 3)]
    for stream in streams:
        next(stream)
    for _ in range(3):
        time.sleep(0.02)
        queue_pair.drop()
        wait_until(lambda: queue_pair.epoch % 2 == 1, "the ingress attaches again")
    for number, stream in zip((1, 2, 3), streams, strict=True):
        completion = stream.result()
        assert completion.token_ids == expected_ids(served, number, 300)
        assert completion.text == served.tokenizer.decode(completion.token_ids).rstrip("\ufffd")
        assert (completion.num_prompt_tokens, completion.finish_reason) == (number, "length")
    assert client.stats().ingress["attaches"] == 4 and client.stats().ingress["resubmissions"] >= 3


def test_lost_finish_is_not_run_on(tmp_path: Path) -> None:
    with serve(tmp_path, eos_ids=[EOS_ID]) as served, Client(served.endpoint, timeout_s=10) as client:
        queue_pair = served.director.queue_pairs[0]
        served.director.paused = True
        stream = client.submit("x", max_tokens=2)
        wait_until(lambda: bool(queue_pair.running), "the request runs")
        queue_pair.publish = lambda: 0  # type: ignore[method-assign]
        served.director.paused = False
        wait_until(lambda: not queue_pair.running, "the request has ended in the director")
        while queue_pair.outbox and queue_pair.outbox[-1][0] >> 8 & 0xFF != 2:
            queue_pair.outbox.pop()  # the FINISH never makes it
        del queue_pair.publish  # the class's own again
        next(stream)
        wait_until(lambda: client.stats().ingress["tokens"] == 2, "both tokens arrived")
        queue_pair.drop()
        completion = stream.result()
        assert (completion.finish_reason, completion.num_output_tokens) == ("length", 2)
        assert len(queue_pair.seen) == 1  # it was not submitted again


def test_new_engine_of_the_same_name_takes_over(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=10) as client:
        stream = client.submit("x", max_tokens=400, temperature=0)
        next(stream)
        name, script = served.director.regions.engine_name, served.script
        served.director.stop()
        served.director.regions.unlink()
        assert client.health().status in ("ok", "engine_lost")
        with FakeDirector(name, script=script, vocab_size=258) as second:
            assert stream.result().token_ids == expected_ids(served, 1, 400)
            wait_until(lambda: client.health().status == "ok", "health")
            assert len(second.queue_pairs[0].seen) == 1
            served.ingress.stop()
            assert served.ingress.join(5)


def test_requests_fail_when_no_engine_comes_back(tmp_path: Path) -> None:
    with (
        serve(tmp_path, limits=IngressLimits(loss_timeout_s=0.5)) as served,
        Client(served.endpoint, timeout_s=20) as client,
    ):
        stream = client.submit("x", max_tokens=2000)
        next(stream)
        served.director.stop()
        with pytest.raises(RequestRefusedError) as caught:
            stream.result()
        assert caught.value.code == "engine_lost"
        assert client.health().status == "engine_lost"


def test_full_ring_delays_but_loses_nothing(tmp_path: Path) -> None:
    geometry = QueuePairGeometry(num_submissions=4, num_completions=16, arena_bytes=16384)
    with serve(tmp_path, geometry=geometry) as served, Client(served.endpoint, timeout_s=20) as client:
        served.director.queue_pairs[0].hold_acks = True
        streams = [client.submit([7] * (1 + number), max_tokens=20) for number in range(100)]
        wait_until(lambda: client.stats().ingress["ring_full"] > 0, "the ring is full")
        served.director.queue_pairs[0].hold_acks = False
        for number, stream in enumerate(streams):
            assert stream.result().token_ids == expected_ids(served, 1 + number, 20)


# ---- Drain, processes ------------------------------------------------------------------------------------------------
def test_drain_finishes_what_runs_and_refuses_the_rest(served: Served, client: Client) -> None:
    stream = client.submit("x", max_tokens=500)
    next(stream)
    served.ingress.drain(20)
    wait_until(lambda: served.ingress.handler.is_draining, "draining")
    with pytest.raises(RequestRefusedError) as caught:
        client.generate("y")
    assert caught.value.code == "draining"
    assert client.health().status == "draining"
    assert stream.result().num_output_tokens == 500
    assert served.ingress.join(5)


def test_drain_is_bounded(served: Served, client: Client) -> None:
    served.director.step_s = 0.05
    stream = client.submit("x", max_tokens=2000)
    next(stream)
    started = time.monotonic()
    served.ingress.drain(0.2)
    completion = stream.result()
    assert completion.finish_reason == "cancelled" and completion.num_output_tokens < 2000
    assert served.ingress.join(5) and time.monotonic() - started < 4


def start_process(name: str, tokenizer: Path, queue_pair_idx: int, *flags: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "blinkimp.nic_shim.zmq_ingress", "--engine", name, "--tokenizer", str(tokenizer)]
    command += ["--queue-pair", str(queue_pair_idx), "--bind", "tcp://127.0.0.1:*", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    assert ready and ready[0] == "ready", f"the ingress said {ready}"
    return process, ready[1]


def end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_two_ingress_processes_one_is_killed_the_other_drains(tmp_path: Path) -> None:
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(
        engine_name(), num_queue_pairs=2, vocab_size=258, ingress_timeout_s=0.5, step_s=0.002
    ) as director:
        first, first_endpoint = start_process(director.regions.engine_name, tokenizer, 0)
        second, second_endpoint = start_process(director.regions.engine_name, tokenizer, 1)
        try:
            with Client(first_endpoint, timeout_s=20) as doomed, Client(second_endpoint, timeout_s=20) as client:
                lost = doomed.submit("x", max_tokens=2000)
                stream = client.submit("x", max_tokens=400)
                next(lost), next(stream)
                first.kill()
                first.wait()
                killed_at = time.monotonic()
                wait_until(lambda: not director.queue_pairs[0].running, "the dead one's requests are gone", 2)
                assert time.monotonic() - killed_at < 2
                second.send_signal(signal.SIGTERM)
                assert stream.result().num_output_tokens == 400  # untouched, and finished during the drain
                assert second.wait(10) == 0
                # A new process takes the dead one's place, and the client's request goes on where it stopped.
                third, third_endpoint = start_process(
                    director.regions.engine_name, tokenizer, 0, "--bind", first_endpoint
                )
                try:
                    assert third_endpoint == first_endpoint
                    assert lost.result().num_output_tokens == 2000
                    third.terminate()
                    assert third.wait(10) == 0
                finally:
                    end_process(third)
        finally:
            for process in (first, second):
                end_process(process)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--engine", "no-such-engine"], "no-such-engine"),
        (["--tokenizer", "/nowhere"], "no tokenizer at /nowhere"),
        (["--max-requests", "0"], "max_requests is 0"),
        (["--queue-pair", "7"], "qp7"),
    ],
)
def test_process_says_what_is_wrong(tmp_path: Path, flags: list[str], complaint: str) -> None:
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), vocab_size=258) as director:
        command = [sys.executable, "-m", "blinkimp.nic_shim.zmq_ingress", "--engine", director.regions.engine_name]
        command += ["--tokenizer", str(tokenizer), "--bind", "tcp://127.0.0.1:*", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
    assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_bind_to_a_taken_port_is_explained(served: Served, tmp_path: Path) -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director:
        rival = ZmqIngress(director.regions.engine_name, 0, served.endpoint, served.tokenizer)
        with pytest.raises(OSError, match=r"cannot bind .*: Address already in use; expected a free endpoint"):
            rival.start()
        assert int(director.queue_pairs[0].ingress["owner_pid"][0]) == 0  # the queue pair was given back
