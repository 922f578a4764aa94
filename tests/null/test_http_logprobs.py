"""Log-probability records, and the bytes of tokens. Covers nic_shim/http_logprobs.py and nic_shim/token_bytes.py.

Run: pytest tests/null/test_http_logprobs.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from blinkimp.config import Config, model_folder
from blinkimp.nic_shim.http_logprobs import MIN_LOGPROB, chat_logprobs, completion_logprobs
from blinkimp.nic_shim.token_bytes import TokenBytes
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.protocol import Tokens
from tests.ingress_support import write_byte_tokenizer


@pytest.fixture
def names(tmp_path: Path) -> TokenBytes:
    return TokenBytes(Tokenizer(write_byte_tokenizer(tmp_path)))


def test_bytes_of_the_embedded_tokenizer_join_to_the_text() -> None:
    tokenizer = Tokenizer(model_folder(Config()))
    names = TokenBytes(tokenizer)
    text = "naïve café 😀\n\tdef f(x): return 日本"
    assert b"".join(names.of(token) or b"?" for token in tokenizer.encode(text).tolist()).decode() == text
    assert names.of(0) is None and names.of(10**6) is None
    assert names.shown(0) == b"<|endoftext|>"


def test_a_chat_record_names_bytes_and_alternatives(names: TokenBytes) -> None:
    half = next(token for token in range(2, 258) if names.of(token) == b"\xc3")
    letter = next(token for token in range(2, 258) if names.of(token) == b"A")
    tokens = Tokens(
        0,
        0,
        [letter, half],
        [-0.5, float("-inf")],
        "A",
        [[(letter, -0.5), (half, -1.0)], [(half, -2.0), (letter, -3.0)]],
    )
    first, second = chat_logprobs(tokens, names, 1).content
    assert (first.token, first.logprob, first.bytes) == ("A", -0.5, [65]) and len(first.top_logprobs) == 1
    assert (second.token, second.logprob, second.bytes) == ("\ufffd", MIN_LOGPROB, [0xC3])


def test_a_completion_record_has_offsets_and_the_chosen_token(names: TokenBytes) -> None:
    a, b, c = (next(token for token in range(2, 258) if names.of(token) == text) for text in (b"a", b"b", b"c"))
    tokens = Tokens(0, 0, [a, b], [-0.5, -4.0], "ab", [[(a, -0.5), (c, -1.0)], [(c, -0.1), (a, -2.0)]])
    record = completion_logprobs(tokens, names, 2, 7)
    assert record.tokens == ["a", "b"] and record.text_offset == [7, 8] and record.token_logprobs == [-0.5, -4.0]
    assert record.top_logprobs is not None
    assert list((record.top_logprobs[0] or {}).items()) == [("a", -0.5), ("c", -1.0)]
    assert list((record.top_logprobs[1] or {}).items()) == [("c", -0.1), ("a", -2.0), ("b", -4.0)]
    assert completion_logprobs(tokens, names, 0, 0).top_logprobs is None
