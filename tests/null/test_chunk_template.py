"""Chunks filled into a template are, byte for byte, those that the reply's types encode to.

Run: pytest tests/null/test_chunk_template.py
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blinkimp.nic_shim.chunk_template import IDS_MARK, TEXT_MARK, ChunkTemplate
from blinkimp.nic_shim.http_chat import ChatShape
from blinkimp.nic_shim.http_completions import CompletionShape
from blinkimp.nic_shim.http_types import ChatMessage, ChatRequest, CompletionRequest, StreamOptions
from blinkimp.protocol import Tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"return_token_ids": True},
    {"stream_options": StreamOptions(include_usage=True)},
    {"return_token_ids": True, "stream_options": StreamOptions(include_usage=True)},
]


def shape_of(kind: str, options: dict[str, Any]) -> Any:
    names: Any = None  # of tokens: for log-probabilities only
    if kind == "chat":
        chat = ChatRequest(messages=[ChatMessage(role="user", content="x")], **options)
        return ChatShape("id", 'a "model"', chat, names, echo="", prompt_ids=[1])
    body = CompletionRequest(prompt="x", **options)
    return CompletionShape("id", 'a "model"', body, names, echoes=["", "", ""], prompt_ids=[[1]] * 3)


def encoded(shape: Any, choice_idx: int, tokens: Tokens) -> bytes:
    """The way of all other chunks."""
    whole: bytes
    if isinstance(shape, ChatShape):
        whole = shape._encoded(choice_idx, tokens, None, None)
    else:
        whole = shape._chunk([shape._choice(choice_idx, tokens, None)], None)
    return whole


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_template_says_what_the_types_say(kind: str, options: dict[str, Any]) -> None:
    shape = shape_of(kind, options)

    @given(st.integers(0, 2), st.text(max_size=8), st.lists(st.integers(0, 2**32 - 1), max_size=4))
    def check(choice_idx: int, text: str, ids: list[int]) -> None:
        tokens = Tokens(choice_idx, 0, ids, [-1.0] * len(ids), text)
        got = shape.chunk(choice_idx, [tokens], None)
        assert got == encoded(shape, choice_idx, tokens)
        assert json.loads(got)["choices"][0]["index"] == choice_idx

    check()


def test_a_template_without_a_place_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match="the template has no"):
        ChunkTemplate(msgspec.json.encode({"text": "other", "ids": IDS_MARK}))
    assert ChunkTemplate(msgspec.json.encode({"text": TEXT_MARK})).fill('"', [1]) == b'{"text":"\\""}'
