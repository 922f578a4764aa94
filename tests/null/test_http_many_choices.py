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

from blinkimp.nic_shim.http_types import MAX_CHOICES, MAX_PROMPTS
from blinkimp.nic_shim.tokenizer import CONTEXT_TOKENS, Tokenizer
from tests.null.test_request_cycles import ask, http_api

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
            self.num_encoded += 1
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


def test_choices_of_a_request_that_fails_are_given_back(tmp_path: Path) -> None:
    """They count from the start, so each way to fail must give them back: here as many as the quota has."""
    full = {"prompt": [[5, 6]] * (MAX_OUTSTANDING // MAX_CHOICES), "n": MAX_CHOICES, "max_tokens": 2}
    wrong = [
        {"max_tokens": 5000},
        {"structured_outputs": {"regex": "(("}},
        {"guided_regex": "a", "guided_choice": ["b"]},
    ]
    assert statuses_of(tmp_path, *({**full, **fields} for fields in wrong), full) == [400, 400, 400, 200]
