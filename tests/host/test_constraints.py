"""Structured output on the emulated device: 50 schemas, expressions and choices through the HTTP ingress; every output parses and validates.

Run: pytest tests/host/test_constraints.py
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import Constraint
from tests.http_support import EMBEDDED, HttpServer, embedded
from tests.ingress_support import wait_until
from tests.json_schemas import SCHEMAS
from tests.support import PATIENCE_S

PROMPT = "value = "


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with embedded(constraint_slots=4, max_batch=16) as (http, _):
        yield http
        http.wait_until_idle()


def outputs(server: HttpServer, n: int, seed: int, **fields: Any) -> list[str]:
    """What the model says at temperature 1; every choice must end by itself."""
    reply = server.complete(PROMPT, n=n, seed=seed, max_tokens=900, **fields)
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}, reply["choices"]
    return [choice["text"] for choice in reply["choices"]]


def test_there_are_fifty_schemas_and_all_are_valid() -> None:
    assert len(SCHEMAS) >= 50
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_output_of_fifty_schemas_parses_and_validates(server: HttpServer) -> None:
    """Side by side, so that more constraints wait than there are slots."""

    def one(idx: int) -> list[str]:
        format_ = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMAS[idx]}}
        return outputs(server, 2, idx, response_format=format_)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(len(SCHEMAS))))
    for schema, pair in zip(SCHEMAS, texts, strict=True):
        for text in pair:
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker)


def test_json_object_is_an_object_of_bounded_depth(server: HttpServer) -> None:
    """Its strings are of any length, so a small model may run on to max_tokens."""
    reply = server.complete(PROMPT, n=16, seed=3, max_tokens=400, response_format={"type": "json_object"})
    whole = [choice["text"] for choice in reply["choices"] if choice["finish_reason"] == "stop"]
    assert len(whole) >= 8
    assert all(isinstance(json.loads(text), dict) for text in whole)


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-c]{1,4}", "(yes|no), [A-Z][a-z]{0,5}\\.", "[^a-z]{2,6}", "é{2}日本?"])
def test_an_expression_is_matched_whole(server: HttpServer, pattern: str) -> None:
    for fields in ({"guided_regex": pattern}, {"structured_outputs": {"regex": pattern}}):
        for text in outputs(server, 3, 5, **fields):
            assert re.fullmatch(pattern, text), text


def test_a_choice_is_one_of_the_choices(server: HttpServer) -> None:
    choices = ["nega", "positive", "negative", "neutral (.*)"]
    texts = outputs(server, 16, 11, guided_choice=choices)
    assert set(texts) <= set(choices) and len(set(texts)) > 1


def test_a_stream_and_logprobs_under_a_constraint(server: HttpServer) -> None:
    fields = {"prompt": PROMPT, "guided_regex": "[0-9]{4}", "seed": 1, "max_tokens": 20, "logprobs": 2}
    events = server.post("/v1/completions", {**fields, "stream": True}).events
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert re.fullmatch("[0-9]{4}", text) and text == server.complete(**fields)["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"guided_regex": "(a"}, 400, "cannot be compiled"),
        ({"guided_choice": []}, 400, "at least one"),
        ({"guided_choice": ["a", ""]}, 400, "not empty"),
        ({"guided_json": "{"}, 400, "not JSON"),
        ({"guided_json": {"type": "object", "minProperties": 1}}, 400, "minProperties is not supported"),
        ({"guided_json": {"type": "string", "pattern": "^.*$"}}, 400, "quote"),
        ({"guided_json": {"$ref": "#"}}, 400, "recursive"),
        ({"guided_regex": "[a-z]{70000}"}, 422, "states"),
        ({"guided_json": {"type": "string", "maxLength": 1200}}, 422, "bytes"),
        ({"guided_regex": "x" * 300_000}, 422, "at most"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    server: HttpServer, fields: dict[str, Any], status: int, words: str
) -> None:
    reply = server.post("/v1/completions", {"prompt": PROMPT, **fields})
    error = reply.json["error"]
    assert reply.status == status, error
    assert error["code"] == ("bad_constraint" if status == 400 else "constraint_too_large")
    # A slow machine gives up before it knows how large the automaton would be.
    assert words in error["message"] or (status == 422 and "takes more than" in error["message"]), error


def test_a_compilation_that_takes_too_long_holds_nobody_up(server: HttpServer) -> None:
    outputs(server, 1, 1, guided_choice=["known", "constraint"])
    replies: list[Any] = []
    bomb = {"prompt": PROMPT, "guided_regex": "([0-9]{1000}){500}"}
    patience_s = 2 * PATIENCE_S
    thread = threading.Thread(target=lambda: replies.append(server.post("/v1/completions", bomb, timeout_s=patience_s)))
    thread.start()
    num_served = 0
    while not replies and num_served < 20:
        assert server.complete(PROMPT, max_tokens=4)["choices"]
        assert outputs(server, 1, 1, guided_choice=["known", "constraint"])
        num_served += not replies
    assert num_served > 0, "others are served while the bomb burns"
    thread.join(patience_s)
    # Too many states, too much memory or too much time: which of them is first is the machine's business.
    assert replies[0].status == 422 and replies[0].json["error"]["code"] == "constraint_too_large"
    assert outputs(server, 1, 1, guided_choice=["a", "b"]), "a new worker compiles"


def test_a_request_whose_time_is_over_before_its_constraint_is_compiled_ends(server: HttpServer) -> None:
    bomb = {"guided_regex": "([a-z]{1000}){500}", "timeout": 0.01, "n": 2}
    choices = server.complete(PROMPT, **bomb)["choices"]
    assert [(choice["finish_reason"], choice["text"]) for choice in choices] == [("timeout", "")] * 2
    (event, *_) = server.post("/v1/completions", {"prompt": PROMPT, "stream": True, **bomb}).events
    assert event["choices"][0]["finish_reason"] == "timeout"


@dataclass
class HeldIngress:
    """A ZeroMQ ingress whose compiler is at the constraint HELD until the test lets it go on. begun: what it has begun to compile."""

    ingress: ZmqIngress
    endpoint: str
    begun: queue.Queue[str]
    may_go_on: threading.Event


HELD = "held"


@pytest.fixture
def held(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldIngress]:
    begun: queue.Queue[str] = queue.Queue()
    may_go_on = threading.Event()
    real_compile = ConstraintCompiler._compile

    def compile_when_allowed(compiler: ConstraintCompiler, constraint: Constraint, key: bytes) -> Any:
        begun.put(str(constraint.value))
        assert constraint.value != HELD or may_go_on.wait(PATIENCE_S)
        return real_compile(compiler, constraint, key)

    monkeypatch.setattr(ConstraintCompiler, "_compile", compile_when_allowed)
    ingress = ZmqIngress(server.engine_name, 1, "tcp://127.0.0.1:*", Tokenizer(EMBEDDED))
    endpoint = ingress.start()
    try:
        yield HeldIngress(ingress, endpoint, begun, may_go_on)
    finally:
        may_go_on.set()
        ingress.stop()
        assert ingress.join(PATIENCE_S)


def regex(value: str) -> dict[str, Any]:
    return {"max_tokens": 50, "constraint": {"kind": "regex", "value": value}}


def test_slow_constraints_of_one_connection_hold_up_no_other(held: HeldIngress) -> None:
    with Client(held.endpoint, timeout_s=PATIENCE_S) as client, Client(held.endpoint, timeout_s=PATIENCE_S) as slow:
        assert client.generate(PROMPT, **regex("[0-9]{2}")).text.isdecimal()
        assert held.begun.get(timeout=PATIENCE_S) == "[0-9]{2}"
        streams = [slow.submit(PROMPT, **regex(value)) for value in (HELD, "cancelled", "second", "third")]
        assert held.begun.get(timeout=PATIENCE_S) == HELD
        assert client.generate(" " * 5000 + "x", max_tokens=1).num_output_tokens == 1, "a long prompt"
        assert client.generate(PROMPT, **regex("[0-9]{2}")).text.isdecimal(), "a constraint that is known"
        streams[1].cancel()
        assert streams[1].result().finish_reason == "cancelled", "at once, not in its turn"
        new = client.submit(PROMPT, **regex("[a-c]{3}"))
        wait_until(lambda: held.ingress.handler.num_preparing == 4, "three slow ones and a new one wait")
        held.may_go_on.set()
        assert re.fullmatch("[a-c]{3}", new.result().text)
        assert [streams[idx].result().text for idx in (0, 2, 3)] == [HELD, "second", "third"]
    assert [held.begun.get_nowait() for _ in range(3)] == ["[a-c]{3}", "second", "third"]


def test_a_request_whose_time_is_over_ends_while_its_constraint_waits(held: HeldIngress) -> None:
    with Client(held.endpoint, timeout_s=PATIENCE_S) as client:
        stream = client.submit(PROMPT, **regex(HELD))
        assert held.begun.get(timeout=PATIENCE_S) == HELD
        late = [client.submit(PROMPT, timeout_s=0.05, **regex(value)) for value in (HELD, "late")]
        for done in (one.result() for one in late):
            assert (done.finish_reason, done.num_output_tokens) == ("timeout", 0)
        assert held.ingress.handler.num_preparing == 1, "the first has no deadline"
        held.may_go_on.set()
        assert stream.result().text == HELD
        assert client.generate(PROMPT, timeout_s=PATIENCE_S, **regex("after")).text == "after"
    assert held.begun.get_nowait() == "after" and held.begun.empty(), "nobody waited for the other"


def test_a_client_that_has_gone_has_nothing_compiled(held: HeldIngress) -> None:
    with Client(held.endpoint, timeout_s=PATIENCE_S) as client:
        stream = client.submit(PROMPT, **regex(HELD))
        assert held.begun.get(timeout=PATIENCE_S) == HELD
        with Client(held.endpoint, timeout_s=PATIENCE_S) as goner:
            goner.submit(PROMPT, **regex("gone"))
            wait_until(lambda: held.ingress.handler.num_preparing == 2, "its constraint waits")
        wait_until(lambda: held.ingress.handler.num_preparing == 1, "it is known to have gone")
        held.may_go_on.set()
        assert stream.result().text == HELD
        assert client.generate(PROMPT, **regex("after")).text == "after"
    assert held.begun.get_nowait() == "after" and held.begun.empty()


def test_the_zeromq_ingress_has_the_same_constraints(server: HttpServer) -> None:
    ingress = ZmqIngress(server.engine_name, 1, "tcp://127.0.0.1:*", Tokenizer(EMBEDDED))
    endpoint = ingress.start()
    try:
        with Client(endpoint, timeout_s=PATIENCE_S) as client:
            schema = json.dumps(SCHEMAS[0])
            done = client.generate(PROMPT, max_tokens=900, constraint={"kind": "json_schema", "value": schema})
            jsonschema.validate(json.loads(done.text), SCHEMAS[0])
            choices = [{"kind": "choice", "value": [f"a{i}", f"b{i}"]} for i in range(12)]
            streams = [client.submit(PROMPT, max_tokens=50, constraint=choice) for choice in choices]
            texts = ["".join(stream.text_pieces()) for stream in streams]
            assert all(text in (f"a{i}", f"b{i}") for i, text in enumerate(texts)), texts
            with pytest.raises(RequestRefusedError, match="cannot be compiled") as caught:
                client.generate(PROMPT, constraint={"kind": "regex", "value": "(a"})
            assert caught.value.code == "bad_constraint"
    finally:
        ingress.stop()
        assert ingress.join(PATIENCE_S)
