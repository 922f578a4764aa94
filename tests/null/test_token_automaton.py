"""Token automata: their language over a small vocabulary is the expression's, and JSON's is JSON.

Run: pytest tests/null/test_token_automaton.py
"""

from __future__ import annotations

import json
import random
import re

import pytest

from blinkimp.nic_shim.byte_automaton import PatternError, byte_automaton, json_object_automaton
from blinkimp.nic_shim.constraint_table import ConstraintTable, ConstraintTooLargeError
from blinkimp.nic_shim.token_automaton import TokenTrie, deepest_json_object, token_table

EOS = 0
TOKENS = {1 + byte: bytes([byte]) for byte in range(256)} | {
    257 + idx: text.encode()
    for idx, text in enumerate(["ab", "abc", "12", '{"', '": ', "true", "\u00e9", "null}", "[[", ", "])
}
VOCAB = 300  # ids from 267 on have no bytes
TRIE = TokenTrie(TOKENS)


def table_of(pattern: str, max_bytes: int = 1 << 20) -> ConstraintTable:
    return token_table(byte_automaton(pattern), TRIE, VOCAB, [EOS], max_bytes)


def random_text(table: ConstraintTable, rng: random.Random, most_tokens: int) -> tuple[bytes, bool]:
    """A walk; True where it came to the end."""
    state, text = 0, b""
    for _ in range(most_tokens):
        token = rng.choice(table.allowed_tokens(state).tolist())
        if token == EOS or (EOS in table.allowed_tokens(state) and rng.random() < 0.5):
            return text, True
        text += TOKENS[token]
        following = table.next_state(state, token)
        assert following is not None
        state = following
    return text, False


@pytest.mark.parametrize(
    "pattern", ["(ab|abc)*[0-9]{2}", "a?b*", "[^a]{1,3}", "\u00e9+", '"([a-z]|\\\\n){0,20}"', "ab|abc|12"]
)
def test_walks_match_the_expression(pattern: str) -> None:
    table, rng = table_of(pattern), random.Random(1)
    ended = 0
    for _ in range(200):
        text, is_whole = random_text(table, rng, 40)
        ended += is_whole
        if is_whole:
            assert re.fullmatch(pattern, text.decode(), flags=re.DOTALL), text
    assert ended > 20


@pytest.mark.parametrize("pattern", ["(ab|abc)*[0-9]{2}", "a?b*", "ab|abc|12"])
def test_every_cut_of_a_matching_text_is_allowed(pattern: str) -> None:
    table = table_of(pattern)
    for text in (b"ababc12", b"12", b"abb", b"a", b"abc", b"", b"ab"):
        reached = {(0, 0)}
        for at in range(len(text)):
            for position, state in list(reached):
                if position == at:
                    for token, piece in TOKENS.items():
                        following = table.next_state(state, token)
                        if text.startswith(piece, at) and following is not None:
                            reached.add((at + len(piece), following))
        ends = {EOS in table.allowed_tokens(state) for position, state in reached if position == len(text)}
        assert (True in ends) == (re.fullmatch(pattern, text.decode()) is not None), text
        assert len(ends) <= 1, "the cut makes no difference"


def test_json_objects_parse() -> None:
    table, rng = token_table(json_object_automaton(3), TRIE, VOCAB, [EOS], 1 << 20), random.Random(2)
    whole = [text for text, ended in (random_text(table, rng, 300) for _ in range(200)) if ended]
    assert len(whole) > 50 and any(b"[" in text for text in whole)
    for text in whole:
        assert isinstance(json.loads(text.decode()), dict)


def test_json_takes_what_json_is() -> None:
    table = token_table(json_object_automaton(3), TRIE, VOCAB, [EOS], 1 << 20)

    def accepts(text: str) -> bool:
        state: int | None = 0
        for byte in text.encode():
            state = table.next_state(state, 1 + byte)
            if state is None:
                return False
        return EOS in table.allowed_tokens(state)

    for value in ({}, {"a": 1}, {"a": [1, -2.5e10, "x\n\u00e9", True, None], "b": {"c": []}}, {"": [[]]}):
        assert accepts(json.dumps(value, ensure_ascii=False)) and accepts(
            json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        )
    for text in ("[]", "{]", '{"a"}', '{"a": 01}', '{"a": [[[]]]}', "{} ", '{"a":1,}', '{"a": "\x01"}', '{"a": +1}'):
        assert not accepts(text), text


def test_the_deepest_that_fits_is_taken() -> None:
    sizes = [
        deepest_json_object(TRIE, VOCAB, [EOS], max_bytes, 6).num_states for max_bytes in (20_000, 80_000, 1 << 20)
    ]
    assert sizes == sorted(set(sizes))
    with pytest.raises(ConstraintTooLargeError):
        deepest_json_object(TRIE, VOCAB, [EOS], 2000, 6)


def test_refusals() -> None:
    with pytest.raises(PatternError, match="cannot be compiled"):
        byte_automaton("(a")
    with pytest.raises(ConstraintTooLargeError, match="bytes"):
        table_of("[a-z]{900}", 1 << 12)
    only_a = TokenTrie({1: b"a"})
    with pytest.raises(PatternError, match="no text of this model's tokens"):
        token_table(byte_automaton("ab"), only_a, 4, [EOS], 1 << 16)
