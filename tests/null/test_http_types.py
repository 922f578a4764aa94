"""The HTTP API's types: limits are the ABI's, OpenAPI is generated from them, HTTP.md names every field.

Covers nic_shim/http_types.py, nic_shim/http_fields.py, nic_shim/http_openapi.py, nic_shim/http_schemas.py.
Run: pytest tests/null/test_http_types.py
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

from blinkimp import protocol, ring_abi
from blinkimp.nic_shim.admission import prompt_problem
from blinkimp.nic_shim.http_errors import HttpError
from blinkimp.nic_shim.http_fields import (
    GenerationDefaults,
    check_combinations,
    constraint_of,
    decode_body,
    prompts_of,
    read_generation_defaults,
    sampling_of,
)
from blinkimp.nic_shim.http_openapi import OPERATIONS, docs_page, openapi_document
from blinkimp.nic_shim.http_types import ChatMessage, ChatRequest, CompletionRequest
from tests.support import ROOT

DOCUMENT = openapi_document(vocab_size=258, max_context=64, model_names=("m",))


@dataclass
class Limits:
    """Of the model that DOCUMENT speaks of."""

    max_context: int = 64
    vocab_size: int = 258


def keeps_to_the_document(name: str, body: dict[str, Any]) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": json.loads(DOCUMENT)["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(body))


def completion(**fields: object) -> CompletionRequest:
    return decode_body(msgspec.json.encode({"prompt": "x", **fields}), CompletionRequest)


def test_limits_are_the_abis() -> None:
    assert protocol.MAX_TOP_LOGPROBS == ring_abi.MAX_TOP_LOGPROBS
    assert protocol.MAX_LOGIT_BIAS == ring_abi.MAX_LOGIT_BIAS
    assert len(completion(logit_bias={str(token): 1 for token in range(512)}).logit_bias or {}) == 512
    with pytest.raises(HttpError, match="logit_bias"):
        completion(logit_bias={str(token): 1 for token in range(513)})


def test_defaults_are_vllms_and_the_checkpoints() -> None:
    plain = sampling_of(completion(), GenerationDefaults(), max_tokens=16, num_top_logprobs=0)
    assert plain == protocol.Sampling()
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    own = sampling_of(completion(top_p=0.5, top_k=-1, seed=-1), defaults, max_tokens=3, num_top_logprobs=2)
    assert (own.temperature, own.top_p, own.top_k, own.min_p, own.repetition_penalty) == (0.6, 0.5, 0, 0.1, 1.1)
    assert (own.seed, own.max_tokens, own.top_logprobs) == (2**64 - 1, 3, 2)


def test_generation_config_is_read(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "eos_token_id": [1, 2], "max_new_tokens": 9}))
    assert read_generation_defaults(tmp_path) == GenerationDefaults(temperature=0.7, max_new_tokens=9)
    for text in ("{", '{"temperature": "hot"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be used"):
            read_generation_defaults(tmp_path)


def test_null_counts_as_absent() -> None:
    names = [name for name in CompletionRequest.__struct_fields__ if name != "prompt"]
    assert completion(**dict.fromkeys(names)) == completion()


def test_what_changes_nothing_is_taken_and_the_rest_refused_by_name() -> None:
    from_clients = {
        "best_of": 1,
        "suffix": None,
        "use_beam_search": False,
        "skip_special_tokens": True,
        "length_penalty": 1.0,
    }
    assert completion(**from_clients, logit_bias={"5": 1}) == completion(logit_bias={"5": 1})
    assert completion(best_of=3, n=3) == completion(n=3)
    for name, value in (
        ("best_of", 2),
        ("best_of", True),
        ("suffix", "x"),
        ("skip_special_tokens", False),
        ("tools", []),
        ("x", None),
    ):
        with pytest.raises(
            HttpError, match=f"unknown field in the message: got '{name}', expected one of cache_salt, echo"
        ):
            completion(**{**from_clients, name: value})


def test_a_whole_number_may_have_a_point() -> None:
    """JSON Schema's integers, and vLLM's, are whole numbers however they are written."""
    body = b'{"prompt": [[5.0, 6], [7e0]], "max_tokens": 1.6e1, "seed": -2.0, "n": 2.0, "temperature": 1, "stop_token_ids": [3.0]}'
    plain = (
        b'{"prompt": [[5, 6], [7]], "max_tokens": 16, "seed": -2, "n": 2, "temperature": 1.0, "stop_token_ids": [3]}'
    )
    assert decode_body(body, CompletionRequest) == decode_body(plain, CompletionRequest)
    assert completion(n=2.0, guided_json={"const": 1.0}).guided_json == {"const": 1.0}
    for fields, words in (
        ({"n": 1.5}, "got 1.5, expected int"),
        ({"seed": 1e300}, "got 1e+300"),
        ({"n": 0.0}, "got 0,"),
    ):
        with pytest.raises(HttpError, match=re.escape(words)):
            completion(**fields)


def test_a_reply_can_be_sent_back_as_it_came() -> None:
    reply = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    body = {"messages": [{"role": "user", "content": "x"}, reply], "store": False, "tools": None}
    decoded = decode_body(msgspec.json.encode(body), ChatRequest)
    assert decoded.messages[1] == ChatMessage(role="assistant", content="a")


def test_nested_problems_name_what_may_stand_there() -> None:
    for body, words in (
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "got 'tool', expected one of assistant, developer, system, user",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "got 'image_url', expected one of text"),
        (
            {"messages": [{"role": "user", "contents": "x"}]},
            "unknown field in messages[0]: got 'contents', expected one of content, name",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"grammar": "x"}},
            "expected one of choice, json, json_object, regex",
        ),
    ):
        with pytest.raises(HttpError) as caught:
            decode_body(msgspec.json.encode(body), ChatRequest)
        assert words in caught.value.message, caught.value.message


def test_kinds_of_prompts() -> None:
    assert prompts_of(completion(prompt=[1, 2])) == [[1, 2]]
    assert prompts_of(completion(prompt=["a", "b"])) == ["a", "b"]
    assert prompts_of(completion(prompt=[[1], [2, 3]])) == [[1], [2, 3]]


def test_constraints_by_every_name() -> None:
    schema = {"type": "null"}
    text = '{"type":"null"}'
    for fields, kind, value in (
        ({"guided_json": schema}, "json_schema", text),
        ({"guided_json": text}, "json_schema", text),
        ({"structured_outputs": {"json": schema}}, "json_schema", text),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            "json_schema",
            text,
        ),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
    ):
        found = constraint_of(completion(**fields))
        assert found is not None and (found.kind, found.value) == (kind, value)
    assert constraint_of(completion(response_format={"type": "text"})) is None


def test_openapi_holds_every_operation_and_resolves() -> None:
    document = json.loads(DOCUMENT)
    for path, method, *_ in OPERATIONS:
        unread = document["paths"][path][method]["responses"]["408"]
        assert "headers" not in unread and unread["content"]["application/json"]["schema"]["$ref"].endswith(
            "/ErrorReply"
        )
    for reference in {part.split('"')[0] for part in DOCUMENT.decode().split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"], reference
    assert docs_page(DOCUMENT).count("<h2>") == len(OPERATIONS)


CHOICE = {"guided_choice": ["a"]}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {}}}


@pytest.mark.parametrize(
    ("fields", "is_right"),
    [
        ({}, True),
        ({"prompt": ["a", ""]}, True),
        ({"prompt": [0, 257]}, True),
        ({"prompt": [[0], [257]]}, True),
        ({"prompt": [258]}, False),
        ({"prompt": [[0], []]}, False),
        ({"prompt": []}, False),
        ({"prompt": ["a", 1]}, False),
        ({"prompt": ["a"] * 257}, False),
        ({"prompt": [1] * 63, "max_tokens": 1}, True),
        ({"prompt": [1] * 64, "max_tokens": 1}, False),
        ({"max_tokens": 63}, True),
        ({"max_tokens": 64}, False),
        ({"max_tokens": 0}, False),
        ({"max_tokens": 0, "echo": True}, True),
        ({"stop_token_ids": [258]}, False),
        ({"logit_bias": {"0": 1, "257": -1}}, True),
        ({"logit_bias": {"258": 1}}, False),
        ({"logit_bias": {"007": 1}}, False),
        ({"seed": 2**64 - 1}, True),
        ({"seed": 2**64}, False),
        ({"n": 2.0}, True),
        ({"stream_options": {}}, False),
        ({"stream_options": {}, "stream": True}, True),
        ({"stream_options": None, "stream": False}, True),
        ({**CHOICE, "guided_regex": None, "response_format": {"type": "text"}, "structured_outputs": {}}, True),
        ({**CHOICE, "guided_regex": "a"}, False),
        ({**CHOICE, "response_format": SCHEMA}, False),
        ({**CHOICE, "structured_outputs": {"json_object": False}}, True),
        ({**CHOICE, "structured_outputs": {"json_object": True}}, False),
        ({"structured_outputs": {"json_object": True, "regex": "a"}}, False),
        ({"response_format": SCHEMA}, True),
        ({"response_format": {"type": "json_schema"}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": None}}, False),
    ],
)
def test_openapi_and_the_server_take_the_same_completions(fields: dict[str, Any], is_right: bool) -> None:
    body = {"prompt": "x", **fields}
    assert keeps_to_the_document("CompletionRequest", body) == is_right
    try:
        decoded = completion(**body)
        check_combinations(decoded)
        constraint_of(decoded)
        max_tokens = 1 if decoded.max_tokens is None else max(1, decoded.max_tokens)
        sampling = sampling_of(decoded, GenerationDefaults(), max_tokens=max_tokens, num_top_logprobs=0)
        problems = [
            prompt_problem(0, np.array([1] if isinstance(prompt, str) else prompt, np.uint32), sampling, Limits())
            for prompt in prompts_of(decoded)
        ]
        is_taken = problems == [None] * len(problems)
    except HttpError:
        is_taken = False
    assert is_taken == is_right


@pytest.mark.parametrize(
    ("name", "body", "is_right"),
    [
        ("ChatRequest", {"top_logprobs": 0}, True),
        ("ChatRequest", {"top_logprobs": 1}, False),
        ("ChatRequest", {"top_logprobs": 1, "logprobs": True}, True),
        ("ChatRequest", {"chat_template_kwargs": {"x": 1}}, True),
        ("ChatRequest", {"chat_template_kwargs": {"messages": []}}, False),
        ("TokenizeRequest", {"prompt": ""}, True),
        ("TokenizeRequest", {"messages": [], "prompt": None}, True),
        ("TokenizeRequest", {}, False),
        ("TokenizeRequest", {"prompt": "x", "messages": []}, False),
        ("DetokenizeRequest", {"tokens": [257]}, True),
        ("DetokenizeRequest", {"tokens": [258]}, False),
        ("StructuredOutputs", {"choice": []}, False),
        ("StructuredOutputs", {"choice": ["a", ""]}, False),
    ],
)
def test_openapi_says_which_fields_go_together(name: str, body: dict[str, Any], is_right: bool) -> None:
    if name == "ChatRequest":
        body = {"messages": [{"role": "user", "content": "x"}], **body}
    assert keeps_to_the_document(name, body) == is_right


def test_every_field_and_endpoint_is_documented() -> None:
    text = (ROOT / "nic_shim" / "HTTP.md").read_text()
    short = {"repetition_penalty": "repetition_", "presence_penalty": "presence_"}
    for struct in (CompletionRequest, ChatRequest):
        for name in struct.__struct_fields__:
            assert short.get(name, name) in text, name
    for path, *_ in OPERATIONS:
        assert path.partition("{")[0].rstrip("/") in text, path
