"""Requests of many prompts and many choices: a refused one has cost nothing, an admitted one does once for each prompt what its choices share.

Run: pytest tests/null/test_http_many_choices.py
"""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blinkimp.nic_shim import http_app, http_completions
from blinkimp.nic_shim.http_completions import CompletionShape
from blinkimp.nic_shim.http_response import PART_BYTES, Choice
from blinkimp.nic_shim.http_types import MAX_CHOICES, MAX_PROMPTS, CompletionRequest, PromptTokensDetails, Usage
from blinkimp.nic_shim.token_bytes import TokenBytes
from blinkimp.nic_shim.tokenizer import CONTEXT_TOKENS, Tokenizer
from blinkimp.protocol import Tokens
from tests.ingress_support import write_byte_tokenizer
from tests.null.test_request_cycles import ask, http_api, scope_of

PROMPT_IDS = [99] * 1000
MOST_BYTES = 32 << 20  # the body, decoded: 3 MB. One list of ids for each of its choices: 260 MB
MAX_OUTSTANDING = 1024  # http_api's quota


class Work:
    """What the tokenizer was asked to do; short decodes, each detokenizer's look at the end of its prompt, are left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_encoded = 0
        self.num_decoded = 0
        self.threads: set[threading.Thread] = set()
        encode, decode, decode_batch = Tokenizer.encode, Tokenizer.decode, Tokenizer.decode_batch

        def counted_encode(tokenizer: Tokenizer, text: str, **options: Any) -> Any:
            self.num_encoded += len(text) > CONTEXT_TOKENS
            return encode(tokenizer, text, **options)

        def counted_decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
            self._count([ids])
            return decode(tokenizer, ids)

        def counted_batch(tokenizer: Tokenizer, batch: Sequence[Sequence[int]]) -> list[str]:
            self._count(batch)
            return decode_batch(tokenizer, batch)

        monkeypatch.setattr(Tokenizer, "encode", counted_encode)
        monkeypatch.setattr(Tokenizer, "decode", counted_decode)
        monkeypatch.setattr(Tokenizer, "decode_batch", counted_batch)

    def _count(self, batch: Sequence[Sequence[int]]) -> None:
        num_long = sum(len(ids) > CONTEXT_TOKENS for ids in batch)
        self.num_decoded += num_long
        if num_long:
            self.threads.add(threading.current_thread())


def statuses_of(folder: Path, *bodies: dict[str, Any]) -> list[int]:
    with http_api(folder) as app, asyncio.Runner() as runner:
        return [runner.run(ask(app, "/v1/completions", msgspec.json.encode(body))) for body in bodies]


@pytest.mark.parametrize("fields", [{"echo": True}, {"return_token_ids": True}, {"echo": True, "logprobs": 0}])
def test_choices_beyond_the_quota_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    work = Work(monkeypatch)
    texts = {"prompt": ["x" * 1000] * MAX_PROMPTS, "n": MAX_CHOICES, **fields}
    body = {"prompt": [PROMPT_IDS] * MAX_PROMPTS, "n": MAX_CHOICES, "max_tokens": 1, **fields}
    tracemalloc.start()
    try:
        assert statuses_of(tmp_path, body, texts) == [429, 429]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (work.num_encoded, work.num_decoded) == (0, 0)
    assert peak_bytes < MOST_BYTES


def test_an_echo_is_decoded_once_for_each_prompt_and_not_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(monkeypatch)
    num_prompts = MAX_OUTSTANDING // MAX_CHOICES
    body = {"prompt": [PROMPT_IDS] * num_prompts, "n": MAX_CHOICES, "max_tokens": 2, "echo": True}
    assert statuses_of(tmp_path, body) == [200]
    assert work.num_decoded == num_prompts
    assert threading.main_thread() not in work.threads


def test_long_bodies_and_texts_are_not_worked_on_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, threads, decode = Work(monkeypatch), [], http_app.decode_body

    def decode_body(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return decode(*arguments)

    monkeypatch.setattr(http_app, "decode_body", decode_body)
    with http_api(tmp_path) as app, asyncio.Runner() as runner:
        for num_tokens in (10, 30_000):
            payload = msgspec.json.encode({"tokens": [99] * num_tokens})
            assert runner.run(ask(app, "/detokenize", payload)) == 200
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
    assert work.num_decoded == 2 and len(work.threads) == 2, "the short one is decoded at once"


def test_choices_of_a_request_that_fails_are_given_back(tmp_path: Path) -> None:
    """They count from the start, so each way to fail must give them back: here as many as the quota has."""
    full = {"prompt": [[5, 6]] * (MAX_OUTSTANDING // MAX_CHOICES), "n": MAX_CHOICES, "max_tokens": 2}
    wrong = [
        {"max_tokens": 5000},
        {"structured_outputs": {"regex": "(("}},
        {"guided_regex": "a", "guided_choice": ["b"]},
    ]
    assert statuses_of(tmp_path, *({**full, **fields} for fields in wrong), full) == [400, 400, 400, 200]


# ---- Replies ---------------------------------------------------------------------------------------------------------
SHOWING = {
    "prompt": [PROMPT_IDS] * (MAX_OUTSTANDING // MAX_CHOICES), "n": MAX_CHOICES, "max_tokens": 2, "echo": True, "return_token_ids": True,
}  # fmt: skip
ONE_CHOICE_BYTES = 8192  # 1000 ids and as many characters, and what is around them


async def parts_of(app: Any, body: dict[str, Any], *, num_read: int = 1 << 30) -> list[bytes]:
    """The writes of a reply's body, for a client that goes away when it has read so many."""
    payload, parts = msgspec.json.encode(body), []
    coming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    coming.put_nowait({"type": "http.request", "body": payload, "more_body": False})

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            if len(parts) == num_read:
                coming.put_nowait({"type": "http.disconnect"})
                await asyncio.sleep(0)  # as a client that reads slowly: the others have their turn
                await asyncio.sleep(0)

    await app(scope_of("/v1/completions", payload), coming.get, send)
    return parts


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_made_as_it_is_read(tmp_path: Path, stream: bool) -> None:
    """Each of 1024 choices says its prompt of 1000 tokens: never more than a part at once."""
    with http_api(tmp_path) as app, asyncio.Runner() as runner:
        parts = runner.run(parts_of(app, {**SHOWING, "stream": stream}))
        read = runner.run(parts_of(app, {**SHOWING, "stream": stream}, num_read=2))
    reply = b"".join(parts)
    assert len(reply) > 10 * PART_BYTES
    openings = [part for part in parts if b"prompt_token_ids" in part]
    assert max(map(len, openings)) < PART_BYTES + ONE_CHOICE_BYTES
    assert len(read) <= 3 < len(parts), "who has gone away is not written for"
    if not stream:
        choices = msgspec.json.decode(reply)["choices"]
        assert [choice["index"] for choice in choices] == list(range(MAX_OUTSTANDING))
        assert all(choice["prompt_token_ids"] == PROMPT_IDS and len(choice["token_ids"]) == 2 for choice in choices)


def test_scores_of_a_prompt_are_made_once_and_stand_in_each_of_its_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = http_completions.prompt_logprobs
    monkeypatch.setattr(
        http_completions, "prompt_logprobs", lambda first, *rest: made.append(first) or make(first, *rest)
    )
    body = CompletionRequest(prompt="", n=3, echo=True, logprobs=0)
    names = TokenBytes(Tokenizer(write_byte_tokenizer(tmp_path)))
    shape = CompletionShape("id", "m", body, names, echoes=["abc", "de"], prompt_ids=[[99, 100, 101], [102, 103]])
    shape.take_scores([Tokens(0, 1, [100, 101], [-1.0, -2.0], ""), Tokens(0, 1, [103], [-3.0], "")])
    assert made == [99, 102]
    output = Tokens(0, 0, [104], [-4.0], "x")
    choices = [Choice(idx // 3, 3 - idx // 3, messages=[output]) for idx in range(6)]
    pieces = list(shape.whole(choices, Usage(5, 6, 11, PromptTokensDetails(0))))
    assert len(pieces) == 7, "a choice at a time, and the end"
    shown = msgspec.json.decode(b"".join(pieces))["choices"]
    assert [choice["text"] for choice in shown] == ["abcx"] * 3 + ["dex"] * 3
    assert [choice["logprobs"]["token_logprobs"] for choice in shown] == [[None, -1, -2, -4]] * 3 + [[None, -3, -4]] * 3
    assert [choice["logprobs"]["text_offset"] for choice in shown] == [[0, 1, 2, 3]] * 3 + [[0, 1, 2]] * 3
