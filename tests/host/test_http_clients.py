"""Clients of others against the HTTP ingress: the `openai` package (sync, async, streams, logprobs, n, seed, stop, errors) and curl.

Run: pytest tests/host/test_http_clients.py
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest

from tests.http_support import MODEL, HttpServer, embedded
from tests.support import PATIENCE_S

PROMPT = "def read_file(path):"
GREEDY = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with embedded() as (http, _):
        yield http
        http.wait_until_idle()


@pytest.fixture
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion_with_logprobs_n_seed_and_stop(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, n=2, logprobs=0, extra_body=GREEDY
    )
    assert len(reply.choices) == 2 and reply.choices[0].text == reply.choices[1].text
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and "".join(logprobs.tokens) == reply.choices[0].text
    assert reply.usage is not None and reply.usage.completion_tokens == 24
    sampled = [
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, seed=5).choices[0].text for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
    stop = reply.choices[0].text[5:8]
    cut = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == reply.choices[0].text.partition(stop)[0]


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Code."}, {"role": "user", "content": "import"}]
    reply = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=10, temperature=0, logprobs=True, extra_body=GREEDY
    )  # type: ignore[arg-type,call-overload]
    text = reply.choices[0].message.content
    content = reply.choices[0].logprobs.content
    assert len(content) == 10 and "".join(entry.token for entry in content) == text
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=10, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body=GREEDY,
    )  # type: ignore[arg-type,call-overload]  # fmt: skip
    pieces, usage = [], None
    for chunk in stream:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(pieces) == text and usage is not None and usage.completion_tokens == 10


def test_completion_stream_of_two_choices(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in client.completions.create(
        model=MODEL, prompt=[PROMPT, PROMPT], max_tokens=8, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts[0] == texts[1] != "" and set(reasons.values()) == {"length"}


def test_async_streams_side_by_side(server: HttpServer) -> None:
    async def one(client: openai.AsyncOpenAI, idx: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=f"x{idx} = ", max_tokens=20, stream=True, temperature=0
        )
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE_S
        ) as client:
            return await asyncio.gather(*(one(client, idx % 4) for idx in range(16)))

    texts = asyncio.run(all_of_them())
    assert all(texts) and texts[:4] == texts[4:8] == texts[12:]


def test_a_closed_stream_is_cancelled(client: openai.OpenAI, server: HttpServer) -> None:
    before = server.status()["finished_cancelled"]
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1800, stream=True, extra_body=GREEDY)
    next(iter(stream))
    stream.close()
    assert server.wait_until_idle()["finished_cancelled"] == before + 1


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="unknown field") as caught:
        client.completions.create(model=MODEL, prompt="x", best_of=2)
    assert caught.value.param == "best_of" and caught.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", max_tokens=9999)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: HttpServer) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True})
    command = [
        "curl",
        "-sSN",
        "--fail",
        f"{server.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    text = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2])
    assert text == server.complete(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
