"""Every field that HTTP.md says works changes what it is there to change: what holds with it does not hold without it.

The embedded model on the emulated device, with a chat template. Run: pytest tests/host/test_http_effects.py
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blinkimp.nic_shim.tokenizer import Tokenizer
from tests.host.engine_support import running_engine
from tests.host.test_http_table import CHAT, COMPLETIONS, SCHEMA, SHORT, WORKS
from tests.http_support import EMBEDDED, MODEL, HttpServer, Reply, http_ingress, scripted

PROMPT = "def read_file(path):"
MESSAGES = [{"role": "user", "content": "import"}, {"role": "assistant", "content": "os"}]
TEMPLATE = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}{{ mood }}{% if add_generation_prompt %}<assistant>{% endif %}"
CACHED_PROMPT = [9 + idx % 300 for idx in range(200)]
TOKENIZER = Tokenizer(EMBEDDED)
EOS = TOKENIZER.eos_ids[0]
ZEBRA, TIGER = (TOKENIZER.encode(word).tolist()[-1] for word in (" zebra", " tiger"))

GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 5}
SAMPLED = {"temperature": 1.0, "ignore_eos": True, "seed": 7, "max_tokens": 32}
TO_EOS = {"temperature": 0.0, "logit_bias": {str(EOS): 100}, "max_tokens": 6}

Holds = Callable[[Reply], bool]


@dataclass
class Case:
    """A field's value, what holds with it and not without it, and the other fields of both requests. None: any other output."""

    value: Any
    holds: Holds | None
    beside: dict[str, Any] = field(default_factory=lambda: dict(GREEDY))
    apis: tuple[str, ...] = (CHAT, COMPLETIONS)


def choice_of(reply: Reply) -> Any:
    return reply.json["choices"][0]


def text_of(reply: Reply) -> str:
    choice = choice_of(reply)
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def ids_of(reply: Reply) -> list[int]:
    ids: list[int] = choice_of(reply)["token_ids"]
    return ids


def prompt_of(reply: Reply) -> str:
    """The text of the prompt's ids; a chat has them in the reply, a completion in the choice."""
    ids = reply.json.get("prompt_token_ids") or choice_of(reply)["prompt_token_ids"]
    return str(TOKENIZER.hf.decode(ids, skip_special_tokens=False))


def num_output(number: int) -> Holds:
    return lambda reply: reply.json["usage"]["completion_tokens"] == number


def num_cached(number: int) -> Holds:
    return lambda reply: reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] == number


def says(pattern: str) -> Holds:
    return lambda reply: re.fullmatch(pattern, text_of(reply)) is not None


def is_greedy(server: HttpServer) -> Holds:
    def holds(reply: Reply) -> bool:
        likeliest = server.post(COMPLETIONS, {"prompt": PROMPT, **SAMPLED, "temperature": 0.0})
        return text_of(reply) == text_of(likeliest)

    return holds


def cases(server: HttpServer) -> dict[str, Case]:
    completions, chat = (COMPLETIONS,), (CHAT,)
    ids = ids_of(server.post(COMPLETIONS, {"prompt": PROMPT, **GREEDY, "max_tokens": 8, "return_token_ids": True}))
    greedy = TOKENIZER.decode(ids)
    shown = {**GREEDY, "return_token_ids": True}
    cached = {**GREEDY, "prompt": CACHED_PROMPT}
    animals = {**GREEDY, "max_tokens": 40, "logit_bias": {str(ZEBRA): 100, str(TIGER): 80}, "return_token_ids": True}
    yes_no = {"choice": ["yes", "no"]}
    record = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    json_text = r'\{\s*"a"\s*:\s*-?\d+\s*\}'
    return {
        "messages": Case([{"role": "user", "content": "bread"}], lambda reply: "<user>bread<" in prompt_of(reply), shown, chat),
        "prompt": Case("bread", lambda reply: prompt_of(reply) == "bread", shown, completions),
        "max_tokens": Case(3, num_output(3)),
        "max_completion_tokens": Case(3, num_output(3), GREEDY, chat),
        "temperature": Case(0.0, is_greedy(server), {**SAMPLED, "temperature": None}, completions),
        "top_p": Case(1e-6, is_greedy(server), SAMPLED, completions),
        "top_k": Case(1, is_greedy(server), SAMPLED, completions),
        "min_p": Case(1.0, is_greedy(server), SAMPLED, completions),
        "seed": Case(8, None, SAMPLED),
        "repetition_": Case(100.0, lambda reply: len(set(ids_of(reply))) == 100, {**shown, "max_tokens": 100}, completions),
        "presence_": Case(2.0, None, SAMPLED),
        "frequency_penalty": Case(2.0, lambda reply: TIGER in ids_of(reply), animals, completions),
        "logit_bias": Case({str(ZEBRA): 100}, lambda reply: ids_of(reply) == [ZEBRA] * 5, shown),
        "stop": Case([greedy[5:9]], lambda reply: text_of(reply) == greedy[:5], {**GREEDY, "max_tokens": 8}, completions),
        "stop_token_ids": Case([ids[3]], lambda reply: choice_of(reply)["stop_reason"] == ids[3], {**GREEDY, "max_tokens": 8}, completions),
        "ignore_eos": Case(True, num_output(6), TO_EOS),
        "min_tokens": Case(3, num_output(4), TO_EOS),
        "n": Case(3, lambda reply: len(reply.json["choices"]) == 3),
        "logprobs": Case(True, lambda reply: len(choice_of(reply)["logprobs"]["content"][0]["bytes"]) > 0, shown, chat),
        "top_logprobs": Case(
            20, lambda reply: len(choice_of(reply)["logprobs"]["content"][0]["top_logprobs"]) == 20, {**shown, "logprobs": True}, chat
        ),
        "echo": Case(
            True, lambda reply: text_of(reply).startswith((PROMPT, "os")), {**GREEDY, "max_tokens": 2, "add_generation_prompt": False}
        ),
        "stream": Case(True, lambda reply: reply.headers["content-type"].startswith("text/event-stream"), GREEDY),
        "stream_options": Case(
            {"include_usage": True}, lambda reply: reply.events[-1].get("usage") is not None, {**GREEDY, "stream": True}
        ),
        "return_token_ids": Case(True, lambda reply: len(ids_of(reply)) == 5 and prompt_of(reply) != "", GREEDY),
        "cache_salt": Case("tenant", num_cached(0), cached, completions),
        "prefix_cache": Case(False, num_cached(0), cached, completions),
        "timeout": Case(0.001, lambda reply: choice_of(reply)["finish_reason"] == "timeout", {**GREEDY, "max_tokens": 300}),
        "response_format": Case(record, says(json_text), {"temperature": 0.0, "max_tokens": 40}),
        "guided_json": Case(SCHEMA, says(json_text), {"temperature": 0.0, "max_tokens": 40}),
        "guided_regex": Case("[ab]{3}", says("[ab]{3}")),
        "guided_choice": Case(["yes", "no"], says("yes|no")),
        "structured_outputs": Case(yes_no, says("yes|no")),
        "add_generation_prompt": Case(False, lambda reply: prompt_of(reply).endswith("os"), shown, chat),
        "chat_template_kwargs": Case({"mood": "glad"}, lambda reply: "osglad<" in prompt_of(reply), shown, chat),
    }  # fmt: skip


ELSEWHERE = {"model", "priority", "user"}  # below, and tests/host/test_http_log.py


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with (
        running_engine("embedded", constraint_slots=2) as engine,
        http_ingress(engine.config.engine_name, folder) as http,
    ):
        yield http
        http.wait_until_idle()


@pytest.fixture(scope="module")
def every_case(server: HttpServer) -> dict[str, Case]:
    server.complete(CACHED_PROMPT, max_tokens=1)
    return cases(server)


def test_every_field_that_works_is_here(every_case: dict[str, Case]) -> None:
    assert set(every_case) | ELSEWHERE == set(WORKS)


@pytest.mark.parametrize("name", [name for name in WORKS if name not in ELSEWHERE])
def test_a_field_has_its_effect(server: HttpServer, every_case: dict[str, Case], name: str) -> None:
    case = every_case[name]
    for api in case.apis:
        body = {"messages": MESSAGES} if api == CHAT else {"prompt": PROMPT}
        beside = {key: value for key, value in case.beside.items() if api == CHAT or key != "add_generation_prompt"}
        without = server.post(api, {**body, **beside})
        with_it = server.post(api, {**body, **beside, SHORT.get(name, name): case.value})
        assert without.status == with_it.status == 200, (without.body, with_it.body)
        if case.holds is None:
            again = server.post(api, {**body, **beside})
            assert text_of(without) == text_of(again) != text_of(with_it), api
        else:
            assert case.holds(with_it), (api, with_it.body)
            assert not holds_without(case.holds, without), (api, without.body)


def holds_without(holds: Holds, reply: Reply) -> bool:
    """What the field brings may not be in the reply at all."""
    try:
        return holds(reply)
    except (KeyError, TypeError):
        return False


def test_the_model_is_the_one_that_is_served(server: HttpServer) -> None:
    for api in (CHAT, COMPLETIONS):
        body = {"messages": MESSAGES, "prompt": PROMPT, "max_tokens": 1}
        del body["prompt" if api == CHAT else "messages"]
        assert server.post(api, {**body, "model": MODEL}).json["model"] == MODEL
        assert server.post(api, {**body, "model": "another"}).status == 404


def test_a_priority_goes_to_the_engine(tmp_path: Path) -> None:
    """What the engine makes of it: tests/host/test_scheduling.py."""
    with scripted(tmp_path) as both:
        for priority in (None, -5, 7):
            both.http.complete("x", max_tokens=1, priority=priority)
            assert both.http.post(CHAT, {"messages": MESSAGES, "max_tokens": 1, "priority": priority}).status == 200
        seen = [int(request.entry["priority"]) for request in both.director.queue_pairs[0].seen]
        assert seen == [0, 0, -5, -5, 7, 7]
