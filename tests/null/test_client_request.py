"""What callers may give the clients: prompts and fields of every kind, and that what is refused leaves nothing behind.

Run: pytest tests/null/test_client_request.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blinkimp.client_errors import BadRequestError
from blinkimp.client_request import submit_of
from blinkimp.protocol import Constraint, decode_client_message
from tests.null.test_client_core import Wire

HALF_A_PAIR = "a\ud800"  # a lone surrogate: no UTF-8


def refuse(words: str, prompt: Any, **sampling: Any) -> None:
    wire = Wire()
    with pytest.raises(BadRequestError, match=words):
        wire.core.submit(prompt, sampling, 0.0, stream=True, detokenize=True)
    assert not wire.core.is_busy and not wire.sent, "R1: nothing is registered, nothing is sent"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (r"stop\[1\]", {"stop": ["x", HALF_A_PAIR]}),
        ("cache_salt", {"cache_salt": HALF_A_PAIR}),
        (r"constraint\.value", {"constraint": {"kind": "regex", "value": HALF_A_PAIR}}),
        (r"constraint\.value\[0\]", {"constraint": {"kind": "choice", "value": [HALF_A_PAIR]}}),
        (r"constraint\.value", {"constraint": Constraint("regex", HALF_A_PAIR)}),
        ("seed", {"seed": 2**70}),
    ],
)
def test_value_that_cannot_be_encoded_is_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    refuse(rf"^{name}: got .*expected text that is UTF-8, and numbers of at most 64 bits; correct it$", "x", **fields)


def test_text_that_is_not_utf8_is_refused() -> None:
    refuse(r"^prompt: got 'a\\ud800' .*expected text that is UTF-8", HALF_A_PAIR)
    refuse(r"^sampling: got .*expected names that are UTF-8", "x", **{HALF_A_PAIR: 1})
    refuse(r"^sampling: got .*expected names that are UTF-8", "x", constraint={HALF_A_PAIR: 1})


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"abc", r"^prompt: got b'abc' \(bytes\), expected text, or token ids \(ints of 0 to 4294967295\); correct it$"),
        (bytearray(b"abc"), r"\(bytearray\), expected text"),
        (None, r"^prompt: got None \(NoneType\), expected text"),
        (5, r"^prompt: got 5 \(int\), expected text"),
        ({1: 2}, r"\(dict\), expected text"),
        ({1, 2}, r"\(set\), expected text"),
        (["a"], r"^prompt\[0\]: got 'a', expected text, or token ids"),
        ([1, 1.0], r"^prompt\[1\]: got 1\.0, expected"),
        ([True], r"^prompt\[0\]: got True, expected"),
        ([2**70], r"^prompt\[0\]: got 1180591620717411303424, expected"),
        ([2**32], r"^prompt\[0\]: got 4294967296, expected"),
        ([7, -1], r"^prompt\[1\]: got -1, expected"),
        (np.array([1.0]), r"^prompt\[0\]: got .*1\.0.*, expected"),
        (np.array([[1, 2]]), r"^prompt\[0\]: got .*, expected"),
    ],
)  # fmt: skip
def test_prompt_that_is_none_is_refused(prompt: Any, words: str) -> None:
    refuse(words, prompt)


@pytest.mark.parametrize(
    "prompt",
    [[1, 2, 3], (1, 2, 3), range(1, 4), np.array([1, 2, 3], np.uint32), np.array([1, 2, 3]), [np.int64(1), 2, 3]],
)
def test_token_ids_of_any_integer_type(prompt: Any) -> None:
    submit, frame = submit_of(1, prompt, {"max_tokens": 2}, stream=True, detokenize=False)
    assert submit.prompt == [1, 2, 3] and decode_client_message(frame) == submit


def test_flags_of_another_type_are_refused() -> None:
    with pytest.raises(BadRequestError, match=r"^stream: got 'no', expected bool, got str; correct it$"):
        submit_of(1, "x", {}, stream="no", detokenize=True)  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match=r"^logit_bias: got \{-1: 1\}, expected int >= 0; correct it$"):
        submit_of(1, "x", {"logit_bias": {-1: 1}}, stream=True, detokenize=True)
