"""The tables of HTTP.md, row by row against a server: what works is answered, what is refused is a 400 that names the field.

Run: pytest tests/host/test_http_table.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.http_support import HttpServer, embedded
from tests.support import ROOT

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [
    {"role": "system", "content": "a"},
    {"role": "developer", "content": "b"},
    {"role": "user", "content": "x = "},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

# A value that is not the default, for each field of a row; where it stands only in one of the two APIs, that one's path.
WORKS: dict[str, tuple[Any, ...]] = {
    "model": ("test-model",), "messages": (MESSAGES, CHAT), "prompt": ([[5, 6]], COMPLETIONS), "max_tokens": (3,),
    "max_completion_tokens": (3, CHAT), "temperature": (0.5,), "top_p": (0.5,), "top_k": (5,), "min_p": (0.1,), "seed": (-3,),
    "repetition_": (1.1,), "presence_": (0.5,), "frequency_penalty": (0.5,), "logit_bias": ({"50": -100},), "stop": (["a"] * 16,),
    "stop_token_ids": ([5, 6],), "ignore_eos": (True,), "min_tokens": (2,), "n": (3,), "logprobs": (True, CHAT),
    "top_logprobs": (20, CHAT), "echo": (True,), "stream": (True,), "stream_options": ({"include_usage": True},), "user": ("me",),
    "return_token_ids": (True,), "priority": (-5,), "cache_salt": ("tenant",), "timeout": (30.0,), "prefix_cache": (False,),
    "response_format": ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},), "guided_json": (SCHEMA,),
    "guided_regex": ("[ab]{3}",), "guided_choice": (["yes", "no"],), "structured_outputs": ({"choice": ["yes", "no"]},),
    "add_generation_prompt": (False, CHAT), "chat_template_kwargs": ({"enable_thinking": False}, CHAT),
}  # fmt: skip
SHORT = {"repetition_": "repetition_penalty", "presence_": "presence_penalty"}
BESIDE: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
REFUSED: dict[str, Any] = {
    "best_of": 2, "suffix": "x", "use_beam_search": True, "prompt_logprobs": 1, "bad_words": ["x"], "allowed_token_ids": [5],
    "logits_processors": ["x"], "prompt_embeds": "x", "skip_special_tokens": False, "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 3, "add_special_tokens": False, "continue_final_message": True, "tools": [], "tool_choice": "auto",
    "functions": [], "guided_grammar": "root ::= x", "chat_template": "x", "documents": [{}],
}  # fmt: skip
REFUSED_WITHIN: dict[str, dict[str, Any]] = {
    "images": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "audio": {"audio": {"voice": "x", "format": "wav"}},
    "structural_tag": {"response_format": {"type": "structural_tag"}},
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of HTTP.md."""
    text = (ROOT / "nic_shim" / "HTTP.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def fields_of(state: str) -> list[str]:
    return [name for cells in rows("Fields") if cells[1] == state for name in cells[0].split(", ")]


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with embedded() as (http, _):
        yield http
        http.wait_until_idle()


def test_every_row_has_a_state() -> None:
    assert {cells[1] for cells in rows("Fields")} == {"works", "refused"}
    assert set(fields_of("works")) == set(WORKS)
    assert set(fields_of("refused")) == set(REFUSED) | set(REFUSED_WITHIN)


@pytest.mark.parametrize("name", WORKS)
def test_a_field_that_works(server: HttpServer, name: str) -> None:
    value, *path = WORKS[name]
    for api in path or (CHAT, COMPLETIONS):
        body = {"messages": MESSAGES} if api == CHAT else {"prompt": "x = "}
        reply = server.post(api, {**body, "max_tokens": 4, **BESIDE.get(name, {}), SHORT.get(name, name): value})
        assert reply.status == 200, reply.body


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_WITHIN])
def test_a_field_that_is_refused(server: HttpServer, name: str) -> None:
    fields = REFUSED_WITHIN.get(name) or {name: REFUSED[name]}
    reply = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 4, **fields})
    error = reply.json["error"]
    assert reply.status == 400 and error["param"] == next(iter(fields)), error
    assert "expected one of" in error["message"]
    if name in REFUSED:
        assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 4, name: None}).status == 200


def test_the_endpoints(server: HttpServer) -> None:
    body = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]}, COMPLETIONS: {"prompt": "x", "max_tokens": 2}}
    body[CHAT] = {"messages": MESSAGES, "max_tokens": 2}
    num_seen = 0
    for first, state, *_ in rows("Endpoints"):
        if state == "404":
            assert server.get("/ping").status == 404
            for path in re.findall(r"/v1/\w+", first):
                assert server.post(path, {"input": "x"}).status == 404
        elif state == "works":
            method, _, paths = first.partition(" ")
            for path in paths.replace("{id}", "test-model").split(", "):
                assert server.request(method, path, body.get(path)).status == 200, path
                num_seen += 1
    assert num_seen == 12
    assert "access-control-allow-origin" not in server.get("/v1/models", headers={"origin": "http://x"}).headers
