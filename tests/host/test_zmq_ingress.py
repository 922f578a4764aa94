"""The ZeroMQ ingress over real sockets and real shared memory, with a scripted director: requests, cancel, whole characters,
and an engine that drops the ingress, is replaced, or goes away.

Run: pytest tests/host/test_zmq_ingress.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.host.shared_memory import QueuePairGeometry
from blinkimp.nic_shim.ingress_limits import ZmqLimits
from blinkimp.protocol import Cancel, Finish, GetStats, Sampling, Stats, Submit, Tokens
from tests.fake_director import FakeDirector
from tests.ingress_support import (
    EOS_ID,
    RawClient,
    Served,
    expected_ids,
    hold_after_first_tokens,
    serve,
    wait_until,
)
from tests.support import PATIENCE_S


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
    director, queue_pair = served.director, served.director.queue_pairs[0]
    director.paused = True
    stream = client.submit([5] * start, max_tokens=2 * start)
    for _ in range(2 * start):  # one token at a time: the ingress has taken each before the next is said
        director.num_allowed_steps = 1
        wait_until(
            lambda: not director.num_allowed_steps and queue_pair.credit() == queue_pair.num_completions, "taken"
        )
    pieces = [chunk.text for chunk in stream]
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
    clients = [Client(served.endpoint, timeout_s=PATIENCE_S) for _ in range(4)]
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
    queue_pair = served.director.queue_pairs[0]
    with RawClient(served.endpoint) as raw:
        served.director.step_s = 0.0
        queue_pair.publish = lambda: 0  # type: ignore[method-assign]
        raw.send_message(Submit(1, [5], Sampling(max_tokens=2000)))
        wait_until(lambda: bool(queue_pair.seen) and not queue_pair.running, "the model has said everything")
        del queue_pair.publish  # the class's own again: now all of it arrives
        messages = raw.receive_until(lambda message: isinstance(message, Finish))
    tokens = [message for message in messages if isinstance(message, Tokens)]
    assert sum(len(message.token_ids) for message in tokens) == 2000
    assert len(tokens) <= 20, "a ring that is read once is told in few messages"
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
    (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=2000)])
    stream.cancel()
    completion = stream.result()
    assert completion.finish_reason == "cancelled" and 0 < completion.num_output_tokens < 2000
    assert completion.token_ids == expected_ids(served, 1, completion.num_output_tokens)
    assert not served.director.queue_pairs[0].running


def test_cancel_waiting_for_the_ring(served: Served, client: Client) -> None:
    queue_pair = served.director.queue_pairs[0]
    queue_pair.hold_acks = True
    with RawClient(served.endpoint) as raw:
        for request_id in range(8):
            raw.send_message(Submit(request_id, "x"))
        for request_id in range(8):
            raw.send_message(Cancel(request_id))
        raw.send_message(GetStats(1))
        messages = raw.receive_until(lambda message: isinstance(message, Stats))  # the ingress has seen the cancels
        served.director.paused = True  # and no request ends by itself
        queue_pair.hold_acks = False
        while sum(isinstance(message, Finish) for message in messages) < 8:
            messages += raw.receive()
    reasons = {message.reason for message in messages if isinstance(message, Finish)}
    assert reasons == {"cancelled"}


def test_cancel_of_unknown_id_is_ignored(served: Served, client: Client) -> None:
    with RawClient(served.endpoint) as raw:
        raw.send_message(Cancel(77))
        raw.send_message(GetStats(1))
        assert isinstance(raw.receive()[0], Stats)
    wait_until(lambda: served.ingress.sessions.is_idle, "no session is left behind")


def test_leaving_a_stream_early_cancels(served: Served, client: Client) -> None:
    (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=2000)])
    with stream:
        pass
    wait_until(lambda: served.director.queue_pairs[0].num_cancels == 1, "the cancel reaches the director")


# ---- The engine's absences -------------------------------------------------------------------------------------------
def test_drop_by_the_director_is_a_pause(served: Served, client: Client) -> None:
    queue_pair = served.director.queue_pairs[0]
    streams = hold_after_first_tokens(
        served, lambda: [client.submit([7] * number, max_tokens=300, temperature=0) for number in (1, 2, 3)]
    )
    for _ in range(3):
        queue_pair.drop()
        wait_until(lambda: queue_pair.epoch % 2 == 1 and len(queue_pair.running) == 3, "the ingress submits them again")
        served.director.num_allowed_steps = 40
        wait_until(lambda: served.director.num_allowed_steps == 0, "they go on")
    served.director.paused = False
    for number, stream in zip((1, 2, 3), streams, strict=True):
        completion = stream.result()
        assert completion.token_ids == expected_ids(served, number, 300)
        assert completion.text == served.tokenizer.decode(completion.token_ids).rstrip("\ufffd")
        assert (completion.num_prompt_tokens, completion.finish_reason) == (number, "length")
    assert client.stats().ingress["attaches"] == 4 and client.stats().ingress["resubmissions"] == 9


def test_lost_finish_is_not_run_on(tmp_path: Path) -> None:
    with serve(tmp_path, eos_ids=[EOS_ID]) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
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
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=400, temperature=0)])
        name, script = served.director.regions.engine_name, served.script
        served.director.stop()
        served.director.regions.unlink()
        assert client.health().status in ("ok", "engine_lost")
        with FakeDirector(name, script=script, vocab_size=258) as second:
            assert stream.result().token_ids == expected_ids(served, 1, 400)
            wait_until(lambda: client.health().status == "ok", "health")
            assert len(second.queue_pairs[0].seen) == 1
            served.ingress.stop()
            assert served.ingress.join(PATIENCE_S)


def test_requests_fail_when_no_engine_comes_back(tmp_path: Path) -> None:
    with (
        serve(tmp_path, limits=ZmqLimits(loss_timeout_s=0.5)) as served,
        Client(served.endpoint, timeout_s=PATIENCE_S) as client,
    ):
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=2000)])
        served.director.stop()
        with pytest.raises(RequestRefusedError) as caught:
            stream.result()
        assert caught.value.code == "engine_lost"
        assert client.health().status == "engine_lost"


def test_full_ring_delays_but_loses_nothing(tmp_path: Path) -> None:
    geometry = QueuePairGeometry(num_submissions=4, num_completions=16, arena_bytes=16384)
    with serve(tmp_path, geometry=geometry) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        served.director.queue_pairs[0].hold_acks = True
        streams = [client.submit([7] * (1 + number), max_tokens=20) for number in range(100)]
        wait_until(lambda: client.stats().ingress["ring_full"] > 0, "the ring is full")
        served.director.queue_pairs[0].hold_acks = False
        for number, stream in enumerate(streams):
            assert stream.result().token_ids == expected_ids(served, 1 + number, 20)
