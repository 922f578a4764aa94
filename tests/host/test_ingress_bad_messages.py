"""Bad messages and limits: each is answered with what, got, expected, remedy, and the ingress lives.

Run: pytest tests/host/test_ingress_bad_messages.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler
from blinkimp.nic_shim.ingress_limits import ZmqLimits
from blinkimp.protocol import Error, Finish
from tests.ingress_support import (
    RawClient,
    Served,
    encoded,
    hold_after_first_tokens,
    larger_limit_in,
    serve,
)
from tests.support import PATIENCE_S

LIMITS = ZmqLimits(max_request_bytes=1 << 18, max_prompt_chars=100_000, max_requests_per_client=8, max_requests=20)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, limits=LIMITS) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.endpoint, timeout_s=PATIENCE_S) as connected:
        yield connected


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
    ids=lambda value: value if isinstance(value, str) else "",  # megabytes of frames are no name
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


def test_what_is_too_large_is_told_the_limit_of_this_ingress(served: Served) -> None:
    frames = {"--max-prompt-chars": encoded(prompt="x" * 100_001), "--max-request-bytes": os.urandom(1 << 21)}
    with RawClient(served.endpoint) as raw:
        for flag, frame in frames.items():
            raw.send(frame)
            (error,) = raw.receive()
            assert isinstance(error, Error) and larger_limit_in(error.remedy) == flag


def test_ten_megabyte_blobs(tmp_path: Path) -> None:
    with serve(tmp_path) as served, RawClient(served.endpoint) as raw:  # default limits
        for _ in range(5):
            raw.send(os.urandom(10_000_000))
            (error,) = raw.receive()
            assert isinstance(error, Error) and (error.code, error.got) == ("too_large", "10000000 bytes")
        raw.send(encoded())
        assert isinstance(raw.receive_until(lambda message: isinstance(message, Finish))[-1], Finish)


def test_frame_beyond_the_hard_limit_closes_only_that_connection(served: Served, client: Client) -> None:
    (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=500)])
    with RawClient(served.endpoint) as raw:
        raw.send(bytes(5 << 20))  # the limit is 16 x 256 KiB
        with pytest.raises(TimeoutError):
            raw.receive(0.3)
    served.director.paused = False
    assert stream.result().num_output_tokens == 500


def test_duplicate_id_leaves_the_first_request_alone(served: Served) -> None:
    served.director.paused = True  # the first still runs when the others come
    with RawClient(served.endpoint) as raw:
        raw.send(encoded(sampling={"max_tokens": 300}))
        raw.send(encoded())
        raw.send(encoded(sampling={"top_p": 9}))  # bad, and its id is in use: not the end of it either
        messages = raw.receive_until(lambda message: isinstance(message, Error) and message.code == "bad_sampling")
        served.director.paused = False
        messages += raw.receive_until(lambda message: isinstance(message, Finish))
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


def test_a_defect_on_one_message_harms_nobody_else(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=300)])
    with RawClient(served.endpoint) as raw, monkeypatch.context() as patch:
        patch.setattr(served.ingress.handler, "_submit", lambda *_: 1 / 0)
        raw.send(encoded())
        (error,) = raw.receive()
        assert isinstance(error, Error) and error.code == "internal_error"
    served.director.paused = False
    assert stream.result().num_output_tokens == 300
    assert client.stats().ingress["failures"] == 1


def test_a_defect_while_a_constraint_is_compiled_ends_the_request(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another thread than the messages: the request must not stay there, unanswered and counted, for ever."""
    monkeypatch.setattr(ConstraintCompiler, "_problem", lambda *_: None)
    monkeypatch.setattr(ConstraintCompiler, "_compile", lambda *_: 1 / 0)
    constraint = {"kind": "regex", "value": "[a-z]"}
    for _ in range(LIMITS.max_requests_per_client + 1):  # more than may be unfinished at once
        with pytest.raises(RequestRefusedError) as caught:
            client.generate("x", constraint=constraint, deadline_s=PATIENCE_S)
        assert caught.value.code == "internal_error"
    assert served.ingress.handler.num_preparing == 0
    ingress = client.stats().ingress
    assert (ingress["failures"], ingress["num_unfinished"]) == (LIMITS.max_requests_per_client + 1, 0)
