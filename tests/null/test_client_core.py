"""The clients' shared core against a server made of plain calls: reconnection, silence, cancel, refusal. Time is a number here.

Run: pytest tests/null/test_client_core.py
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from blinkimp.async_client import AsyncClient
from blinkimp.bench.zmq_backend import ZmqBackend
from blinkimp.client import Client
from blinkimp.client_core import ClientCore
from blinkimp.client_errors import (
    BadRequestError,
    ClientError,
    ClosedError,
    EndpointError,
    RequestRefusedError,
    ServerTimeoutError,
)
from blinkimp.protocol import (
    Alive,
    AliveReply,
    Cancel,
    ClientMessage,
    Error,
    Finish,
    GetHealth,
    ServerMessage,
    Submit,
    Tokens,
    decode_client_message,
    encode_server_messages,
)
from tests.support import PATIENCE_S


class Wire:
    """What the core sends, and a connection that can be cut."""

    def __init__(self) -> None:
        self.is_up = True
        self.sent: list[ClientMessage] = []
        self.core = ClientCore("test", self.send, timeout_s=10, now=0.0)

    def send(self, frame: bytes) -> bool:
        if self.is_up:
            self.sent.append(decode_client_message(frame))
        return self.is_up

    def receive(self, *messages: ServerMessage, now: float = 0.0) -> None:
        self.core.handle(encode_server_messages(list(messages)), now)

    def take(self) -> list[ClientMessage]:
        sent, self.sent = self.sent, []
        return sent


def finish(request_id: int, num_output_tokens: int, reason: str = "length") -> Finish:
    return Finish(request_id, reason, 2, num_output_tokens, 5, 1, 2, 3, 4)


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_field_out_of_range_is_told_by_name() -> None:
    with pytest.raises(BadRequestError, match=r"^max_tokens: got 0, expected int >= 1; correct it$"):
        Wire().core.submit("a", {"max_tokens": 0}, 0.0, stream=True, detokenize=True)
    with pytest.raises(BadRequestError, match=r"^stop\[0\]: got \[''\], expected str of length >= 1; correct it$"):
        Wire().core.submit("a", {"stop": [""]}, 0.0, stream=True, detokenize=True)


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "tcp://:5555:x"])
def test_endpoint_that_cannot_be_is_refused_and_nothing_stays_open(endpoint: str) -> None:
    async def connect_async() -> None:
        AsyncClient(endpoint)

    async def open_backend() -> None:
        backend = ZmqBackend(endpoint, lambda record: None)
        try:
            await backend.open(1.0)
        finally:
            await backend.close()

    with pytest.raises(EndpointError, match=f"got '{endpoint}'.*expected a server's, such as tcp://"):
        Client(endpoint)
    for attempt in (connect_async, open_backend):
        with pytest.raises(EndpointError):
            asyncio.run(attempt())


@pytest.mark.parametrize("endpoint", [None, 5, b"tcp://127.0.0.1:5555", "tcp://a\ud800:1"])
def test_endpoint_that_is_no_text_is_refused(endpoint: Any) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(EndpointError, match=r"^endpoint: got .*\(no text that is UTF-8\), expected a server's"):
            make(endpoint)


@pytest.mark.parametrize("value", ["5", float("nan"), -1, None, 10**400])
def test_timeout_that_is_no_time_is_refused(value: Any) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(
            BadRequestError, match=r"^timeout_s: got .*, expected a number of at least 0, of seconds; correct it$"
        ):
            make("tcp://127.0.0.1:1", timeout_s=value)


@pytest.mark.parametrize("value", ["5", float("nan"), [1]])
def test_deadline_that_is_no_time_is_refused(value: Any) -> None:
    words = r"^deadline_s: got .*, expected a number, of seconds; correct it$"
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(BadRequestError, match=words):
        client.submit("x", deadline_s=value)
    assert not client._core.requests

    async def submit() -> None:
        async with AsyncClient("tcp://127.0.0.1:1") as client:
            with pytest.raises(BadRequestError, match=words):
                client.submit("x", deadline_s=value)
            assert not client._core.requests

    asyncio.run(submit())


def test_use_after_close_says_so() -> None:
    words = r"^the client of tcp://127.0.0.1:1 is closed: got a use of it, expected an open one; make another$"
    with Client("tcp://127.0.0.1:1") as client:
        stream = client.submit("x")
    for use in (lambda: client.submit("x"), lambda: client.generate("x"), client.health, client.stats, stream.result):
        with pytest.raises(ClosedError, match=words):
            use()
    stream.cancel()  # of no consequence, but no error either: a `with` block may end after its client
    with stream:
        pass


def test_close_ends_who_waits() -> None:
    async def run() -> None:
        client = AsyncClient("tcp://127.0.0.1:1")
        waiting = [asyncio.ensure_future(use) for use in (client.generate("x"), client.health())]
        await asyncio.sleep(0)  # they have begun
        await client.close()
        for ended in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE_S):
            assert isinstance(ended, ClosedError)
        with pytest.raises(ClosedError):
            client.submit("x")
        with pytest.raises(ClosedError):
            await client.stats()

    asyncio.run(run())


def test_submit_stream_finish(wire: Wire) -> None:
    state = wire.core.submit("hi", {"max_tokens": 3, "temperature": 0}, 0.0, stream=True, detokenize=True)
    (message,) = wire.take()
    assert isinstance(message, Submit) and message.prompt == "hi" and message.sampling.max_tokens == 3
    wire.receive(Tokens(message.id, 0, [5, 6], [-1.0, -2.0], "ab"))
    wire.receive(Tokens(message.id, 2, [7], [-3.0], "c"), finish(message.id, 3))
    completion = state.completion(list(state.chunks))
    assert (completion.text, completion.token_ids, completion.logprobs) == ("abc", [5, 6, 7], [-1.0, -2.0, -3.0])
    assert completion.finish_reason == "length" and not wire.core.is_busy


def test_unknown_sampling_field_is_refused_before_anything_is_sent(wire: Wire) -> None:
    with pytest.raises(ValueError, match=r"unknown field `temprature`.*expected fields out of temperature"):
        wire.core.submit("hi", {"temprature": 1}, 0.0, stream=True, detokenize=True)
    assert wire.take() == [] and not wire.core.is_busy


def test_lost_connection_resumes_under_a_new_id(wire: Wire) -> None:
    state = wire.core.submit([1, 2], {"max_tokens": 4}, 0.0, stream=True, detokenize=True)
    (first,) = wire.take()
    assert isinstance(first, Submit)
    old_id = first.id
    wire.receive(Tokens(old_id, 0, [5, 6], [-1.0, -1.0], "ab"))
    wire.core.tick(1.0)
    (alive,) = wire.take()
    assert isinstance(alive, Alive) and alive.ids == [old_id]
    wire.receive(AliveReply(unknown_ids=[old_id]), now=1.0)
    (again,) = wire.take()
    assert isinstance(again, Submit) and again.id != old_id and again.delivered_ids == [5, 6]
    wire.receive(AliveReply(unknown_ids=[old_id]))  # a second answer about the old id starts nothing
    wire.receive(Tokens(old_id, 2, [9], [-1.0], "stale"))  # still in the old connection's pipe
    assert wire.take() == []
    wire.receive(Tokens(again.id, 2, [7, 8], [-1.0, -1.0], "cd"), finish(again.id, 4))
    completion = state.completion(list(state.chunks))
    assert (completion.text, completion.token_ids) == ("abcd", [5, 6, 7, 8])  # I1


def test_submit_without_a_connection_goes_out_later(wire: Wire) -> None:
    wire.is_up = False
    wire.core.submit("hi", {}, 0.0, stream=True, detokenize=True)
    wire.core.tick(1.0)
    wire.is_up = True
    wire.core.tick(2.0)
    submit, alive = wire.take()
    assert isinstance(submit, Submit) and isinstance(alive, Alive) and alive.ids == [submit.id]


def test_silence_ends_everything(wire: Wire) -> None:
    state = wire.core.submit("hi", {}, 0.0, stream=True, detokenize=True)
    call = wire.core.ask(GetHealth, 0.0)
    for now in range(1, 10):
        wire.core.tick(float(now))
    assert state.failure is None
    wire.core.tick(10.5)
    assert isinstance(state.failure, ServerTimeoutError) and isinstance(call.failure, TimeoutError)
    assert "no word from test for 10.5 s" in str(state.failure)
    state = wire.core.submit("hi", {}, 100.0, stream=True, detokenize=True)  # silence before it does not count
    wire.core.tick(105.0)
    assert state.failure is None


def test_cancel_of_a_request_that_no_server_knows_ends_it(wire: Wire) -> None:
    state = wire.core.submit("hi", {}, 0.0, stream=True, detokenize=True)
    wire.core.cancel(state)
    submit, cancel = wire.take()
    assert isinstance(submit, Submit) and isinstance(cancel, Cancel) and cancel.id == submit.id
    wire.receive(AliveReply(unknown_ids=[submit.id]))
    assert wire.take() == [] and state.finish is not None and state.finish.reason == "cancelled"


def test_cancel_without_a_connection_goes_out_later(wire: Wire) -> None:
    state = wire.core.submit("hi", {}, 0.0, stream=True, detokenize=True)
    wire.is_up = False
    wire.core.cancel(state)
    wire.is_up = True
    wire.core.tick(1.0)
    assert [type(message) for message in wire.take()] == [Submit, Cancel, Alive]


def test_refusals_end_what_they_are_about(wire: Wire) -> None:
    state = wire.core.submit("hi", {}, 0.0, stream=True, detokenize=True)
    request_id = state.submit.id
    error = Error(request_id, "duplicate_id", "what", "got", "expected", "remedy", final=False)
    wire.receive(error)
    assert not state.is_ended
    wire.receive(Error(None, "bad_message", "what", "got", "expected", "remedy", final=False))
    wire.receive(Error(request_id, "busy", "what", "got", "expected", "remedy", final=True))
    assert isinstance(state.failure, RequestRefusedError) and state.failure.code == "busy"
    assert str(state.failure) == "what: got got, expected expected; remedy [busy]"


def test_gap_in_the_output_is_an_error(wire: Wire) -> None:
    state = wire.core.submit("hi", {}, 0.0, stream=True, detokenize=True)
    wire.receive(Tokens(state.submit.id, 1, [5], [-1.0], "a"))
    assert isinstance(state.failure, ClientError) and "output position 1" in str(state.failure)


def test_other_protocols_are_noticed(wire: Wire) -> None:
    for payload in (
        b"HTTP/1.1 400",
        msgspec.msgpack.encode({"type": "tokens"}),
        msgspec.msgpack.encode([{"type": "?"}]),
    ):
        with pytest.raises(ClientError, match="no message of this protocol"):
            wire.core.handle(payload, 0.0)


def test_new_fields_of_a_newer_server_are_ignored(wire: Wire) -> None:
    wire.core.handle(msgspec.msgpack.encode([{"type": "alive", "unknown_ids": [], "motd": "hello"}]), 0.0)


def test_fields_of_the_request_go_beside_the_sampling() -> None:
    sent: list[dict[str, object]] = []
    core = ClientCore(
        "there", lambda frame: bool(sent.append(msgspec.msgpack.decode(frame))) or True, timeout_s=5, now=0.0
    )
    fields = {
        "priority": -1,
        "timeout_s": 2.5,
        "cache_salt": "mine",
        "prefix_cache": False,
        "stop": ["x"],
        "top_logprobs": 2,
    }
    core.submit("a", fields, 0.0, stream=True, detokenize=True)
    assert sent[0]["sampling"] == {"stop": ["x"], "top_logprobs": 2}
    assert {name: sent[0][name] for name in ("priority", "timeout_s", "cache_salt", "prefix_cache")} == {
        name: fields[name] for name in ("priority", "timeout_s", "cache_salt", "prefix_cache")
    }
    with pytest.raises(ValueError, match="timeout_s"):
        core.submit("a", {"timeout_s": 0}, 0.0, stream=True, detokenize=True)


def test_what_one_message_raises_ends_its_request_and_no_other(wire: Wire) -> None:
    bad, good = (wire.core.submit("a", {"max_tokens": 2}, 0.0, stream=True, detokenize=True) for _ in range(2))
    first, second = (message.id for message in wire.take() if isinstance(message, Submit))

    def wake() -> None:
        raise OSError("no room")

    bad.wake = wake
    wire.receive(Tokens(first, 0, [5], [-1.0], "a"), Tokens(second, 0, [6], [-1.0], "b"), finish(second, 1))
    assert isinstance(bad.failure, ClientError) and "OSError('no room')" in str(bad.failure)
    assert good.finish is not None and good.output_ids == [6], "I3"
    assert not wire.core.is_busy


def test_request_that_cannot_be_resumed_does_not_keep_the_next_from_it(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (wire.core.submit("a", {"max_tokens": 2}, 0.0, stream=True, detokenize=True) for _ in range(2))
    first, second = (message.id for message in wire.take() if isinstance(message, Submit))
    send = wire.core._send

    def send_one(frame: bytes) -> bool:
        monkeypatch.setattr(wire.core, "_send", send)
        raise OSError("no room")

    monkeypatch.setattr(wire.core, "_send", send_one)
    wire.receive(AliveReply([first, second]))
    (resumed,) = wire.take()
    assert isinstance(resumed, Submit) and wire.core.requests == {resumed.id: good}
    assert isinstance(bad.failure, ClientError)


def test_reply_that_is_not_utf8_is_no_message_of_the_protocol(wire: Wire) -> None:
    frame = encode_server_messages([Tokens(1, 0, [], [], "text")]).replace(b"text", b"te\xfft")
    with pytest.raises(ClientError, match="no message of this protocol"):
        wire.core.handle(frame, 0.0)
