"""Detokenisation one token at a time: whole characters only (I1), and nothing lost or doubled (I2).

Run: pytest tests/null/test_tokenizer.py
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from blinkimp.host.checkpoint import read_eos_ids
from blinkimp.nic_shim.token_bytes import byte_alphabet
from blinkimp.nic_shim.tokenizer import (
    MAX_HELD_TOKENS,
    REPLACEMENT,
    IncrementalDetokenizer,
    Tokenizer,
    TokenizerError,
    chat_prompt,
)
from tests.ingress_support import write_byte_tokenizer, write_metaspace_tokenizer

TEXTS = [
    "hello",
    "naïve café",
    "😀😁",
    "👨‍👩‍👧 family",
    "日本語のテキスト",
    "",
    "a\ufffdb",
    "e\u0301",
    " leading",
    "tab\tnew\n",
]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def merged_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with merges, some of which join the end of one character with the start of the next."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["日本語 日本 本語 😀😁😀 naïve café the then there"] * 20, trainer)
    path = tmp_path_factory.mktemp("merged") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def metaspace_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace")))


def pieces(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("which", ["byte_tokenizer", "merged_tokenizer"])
def test_text_comes_back_in_whole_characters(text: str, which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text).tolist()
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    assert all(REPLACEMENT not in piece for piece in got) or REPLACEMENT in text


@pytest.mark.parametrize("which", ["byte_tokenizer", "merged_tokenizer"])
def test_a_character_cut_by_the_end_is_left_out(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode("abc ").tolist() + Tokenizer.encode(tokenizer, "€").tolist()[:1]
    got = pieces(tokenizer, ids)
    assert "".join(got).startswith("abc ") and REPLACEMENT not in "".join(got)


def test_half_a_character_is_never_emitted(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("x😀y").tolist()
    assert pieces(byte_tokenizer, ids) == ["x", "", "", "", "😀", "y", ""]


def test_invalid_bytes_are_replaced_once_they_are_certain(byte_tokenizer: Tokenizer) -> None:
    emoji, letters = byte_tokenizer.encode("😀").tolist(), byte_tokenizer.encode("ab").tolist()
    ids = emoji[:2] + letters
    assert "".join(pieces(byte_tokenizer, ids)) == byte_tokenizer.decode(ids) == f"{REPLACEMENT}ab"


def test_garbage_is_cheap_and_does_not_stick(byte_tokenizer: Tokenizer) -> None:
    stray = byte_tokenizer.encode("é").tolist()[1]  # a continuation byte
    ids = [stray] * (10 * MAX_HELD_TOKENS) + byte_tokenizer.encode("then text 😀").tolist()
    assert "".join(pieces(byte_tokenizer, ids)).endswith("then text 😀")


def test_special_tokens_have_no_text(byte_tokenizer: Tokenizer) -> None:
    ids = [0, *byte_tokenizer.encode("ab").tolist(), 1]
    assert "".join(pieces(byte_tokenizer, ids)) == "ab"


def test_unknown_ids_do_no_harm(byte_tokenizer: Tokenizer) -> None:
    ids = [999_999, *byte_tokenizer.encode("ab").tolist()]
    assert "".join(pieces(byte_tokenizer, ids)) == "ab"


def test_first_token_keeps_its_space_after_a_prompt(metaspace_tokenizer: Tokenizer) -> None:
    ids = metaspace_tokenizer.encode("abc the def").tolist()
    for cut in range(1, len(ids)):
        before = metaspace_tokenizer.decode(ids[:cut])
        assert before + "".join(pieces(metaspace_tokenizer, ids[cut:], ids[:cut])) == "abc the def"


def test_byte_fallback_characters(metaspace_tokenizer: Tokenizer) -> None:
    ids = metaspace_tokenizer.encode("a 😀 é b").tolist()
    got = pieces(metaspace_tokenizer, ids)
    assert "".join(got) == "a 😀 é b" and all(REPLACEMENT not in piece for piece in got)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40), cut=st.integers(0, 200))
def test_any_text_from_any_cut(merged_tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = merged_tokenizer.encode(text).tolist()[:cut]
    whole = merged_tokenizer.decode(ids)
    joined = "".join(pieces(merged_tokenizer, ids))
    assert whole.startswith(joined) and set(whole[len(joined) :]) <= {REPLACEMENT}  # I2
    assert not joined.endswith(REPLACEMENT) or joined == whole or REPLACEMENT in text


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 257), max_size=200))
def test_any_tokens_never_fail(byte_tokenizer: Tokenizer, ids: list[int]) -> None:
    joined = "".join(pieces(byte_tokenizer, ids))
    whole = byte_tokenizer.decode(ids)
    said = bytes(
        byte_alphabet()[character] for token in ids if token > 1 for character in byte_tokenizer.hf.id_to_token(token)
    )
    is_cut = bool(said) and said.decode(errors="replace") != codecs.getincrementaldecoder("utf-8")("replace").decode(
        said
    )
    assert joined == (whole.removesuffix(REPLACEMENT) if is_cut else whole)  # I2


@pytest.mark.parametrize(
    "text", ["\ufffd", "x\ufffd", "x\ufffd\ufffd", "\ufffd" * MAX_HELD_TOKENS, "é" + "\ufffd" * 200 + "é"]
)
@pytest.mark.parametrize("which", ["byte_tokenizer", "merged_tokenizer", "metaspace_tokenizer"])
def test_a_replacement_character_that_was_said_is_text(text: str, which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    assert "".join(pieces(tokenizer, tokenizer.encode(text).tolist())) == text
    assert "".join(pieces(tokenizer, tokenizer.encode(text + "€").tolist()[:-1])) == text


def test_bytes_that_are_no_character_take_nothing_with_them(metaspace_tokenizer: Tokenizer) -> None:
    """A broken byte beside a newline, which is a byte token too: the decoder takes the newline back."""
    newline, broken, letter, word = map(metaspace_tokenizer.hf.token_to_id, ["<0x0A>", "<0xE6>", "b", "▁the"])
    prompt_ids = metaspace_tokenizer.encode("a").tolist()
    assert pieces(metaspace_tokenizer, [newline, broken, letter, word], prompt_ids) == [
        "\n",
        "",
        f"{REPLACEMENT}b",
        " the",
        "",
    ]
    assert pieces(metaspace_tokenizer, [newline, broken], prompt_ids) == ["\n", "", ""]  # it may still become one


@settings(deadline=None, max_examples=300)
@given(
    symbols=st.lists(
        st.sampled_from(["<0x0A>", "<0xE6>", "<0xFF>", "<0xC3>", "<0xA9>", "b", "▁", "▁the"]), max_size=150
    )
)
def test_any_bytes_leave_the_words_alone(metaspace_tokenizer: Tokenizer, symbols: list[str]) -> None:
    prompt_ids, ids = (
        metaspace_tokenizer.encode("a").tolist(),
        [metaspace_tokenizer.hf.token_to_id(one) for one in symbols],
    )
    words = [symbol.replace("▁", " ") for symbol in symbols if not symbol.startswith("<")]
    joined = "".join(pieces(metaspace_tokenizer, ids, prompt_ids))
    assert "".join(character for character in joined if character in " bthe") == "".join(words)


def test_a_prompt_that_ends_in_half_a_character(metaspace_tokenizer: Tokenizer) -> None:
    half, word = metaspace_tokenizer.encode("€").tolist()[:2], metaspace_tokenizer.hf.token_to_id("▁the")
    assert pieces(metaspace_tokenizer, [word, word], half) == [" the", " the", ""]


def test_special_tokens_without_end_are_cheap(byte_tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    for token in [byte_tokenizer.encode("é").tolist()[0], *([0] * (10 * MAX_HELD_TOKENS))]:
        detokenizer.push(token)
        assert len(detokenizer._held) < MAX_HELD_TOKENS


def test_missing_and_broken_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"no tokenizer at .*tokenizer\.json; expected .*; give its folder or file"
    ):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"cannot be read: .*; expected a tokenizer\.json"):
        Tokenizer(tmp_path)


def test_eos_ids_are_those_of_the_engine(tmp_path: Path) -> None:
    """Where the two disagree, the engine ends a request and the ingress does not, or the other way round."""
    write_byte_tokenizer(tmp_path)
    assert Tokenizer(tmp_path).eos_ids == (), "a tokenizer alone has none"
    for in_config in (None, 2, [3, 4]):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": in_config}))
        for in_generation_config in ("no file", None, 7, [], [7, 9, 7]):
            path = tmp_path / "generation_config.json"
            path.unlink(missing_ok=True)
            if in_generation_config != "no file":
                path.write_text(json.dumps({"eos_token_id": in_generation_config}))
            found = Tokenizer(tmp_path).eos_ids
            assert found == read_eos_ids(tmp_path, 10), (in_config, in_generation_config)
            if in_generation_config == []:
                assert found == (), "an empty list says that there is none"
    for content, words in (
        ("broken", "invalid JSON"),
        ('{"eos_token_id": "7"}', "eos_token_id: got '7', expected a tok"),
    ):
        path.write_text(content)
        with pytest.raises(TokenizerError, match=words):
            Tokenizer(tmp_path)


def test_chat_prompt() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}]
    assert chat_prompt(messages) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    assert chat_prompt(messages, add_generation_prompt=False) == "System: Be brief.\n\nUser: Hi\n\n"
    with pytest.raises(ValueError, match="expected role"):
        chat_prompt([{"role": "robot", "content": "x"}])


def test_special_tokens_in_text_are_recognised(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("</s>").tolist() == [1]
