"""Text to token ids and back: a checkpoint's tokenizer.json, and detokenisation one token at a time.

Called by nic_shim/zmq_ingress.py and the command line. Test: pytest tests/null/test_tokenizer.py

Invariants of IncrementalDetokenizer
I1  Half a character is never emitted: text that may still change is held back until the tokens that complete it.
I2  The pieces, joined, are what decoding all tokens at once gives, less an incomplete character at the very end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"  # what an incomplete or invalid byte sequence decodes to
CONTEXT_TOKENS = 8  # of the prompt: some decoders treat the first token of a text in a way of its own (leading space)
# A character has at most four bytes, so a run this long that never ends on a character boundary is not text. It bounds the cost of
# a step, which decodes all that is held back.
MAX_HELD_TOKENS = 64
USER_SPEAKS = "\n\nUser:"  # what ends a reply where the checkpoint has no chat template (chat_prompt)


class TokenizerError(RuntimeError):
    """A tokenizer cannot be loaded; the message says what, got, expected, remedy."""


class Tokenizer:
    """A checkpoint's tokenizer. `path` is tokenizer.json or the folder that holds it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.path /= "tokenizer.json"
        if not self.path.is_file():
            raise TokenizerError(
                f"no tokenizer at {self.path}; expected a tokenizer.json (Hugging Face `tokenizers` format); give its folder or file"
            )
        try:
            self.hf: HfTokenizer = HfTokenizer.from_file(str(self.path))
        except Exception as error:  # the binding raises plain Exception
            raise TokenizerError(
                f"{self.path} cannot be read: {error}; expected a tokenizer.json of the `tokenizers` library; fetch the file again"
            ) from error
        self.vocab_size: int = self.hf.get_vocab_size(with_added_tokens=True)
        self.eos_ids = read_eos_ids(self.path.parent)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.uint32]:
        """Token ids of `text`, by default with the special tokens that the checkpoint puts around it."""
        # encode_batch, not encode: it releases the GIL, and others stream meanwhile.
        return np.asarray(self.hf.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.hf.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """The text of each; for long ones, as it releases the GIL, and decode() does not."""
        texts: list[str] = self.hf.decode_batch(batch, skip_special_tokens=True)
        return texts


class IncrementalDetokenizer:
    """Text of one request's output, token by token (I1, I2)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        context = [int(token) for token in prompt_ids[-CONTEXT_TOKENS:]]
        # A prompt that ends in half a character cannot be continued from here: its end would be emitted as ours.
        if context and tokenizer.decode(context).endswith(REPLACEMENT):
            context = []
        self._settled = context  # the tokens of the last piece that was emitted: what decoding goes on from
        self._held: list[int] = []  # tokens after them, whose text is not emitted yet
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while it does not."""
        self._held.append(token)
        try:
            piece: str | None = self._stream.step(self._tokenizer.hf, token)
        except (
            Exception
        ):  # "Invalid prefix": the decoder changed its mind about text already given (a broken byte sequence)
            return self._restart()
        if piece is None:
            return self._restart() if len(self._held) >= MAX_HELD_TOKENS else ""
        self._settled, self._held = self._held, []
        return piece

    def finish(self) -> str:
        """What is held back and whole; an incomplete character at the end is left out (I1)."""
        return self._restart()

    def _restart(self) -> str:
        """Emits the whole characters of what is held and goes on from nothing."""
        before = self._tokenizer.decode(self._settled)
        text = self._tokenizer.decode([*self._settled, *self._held])
        self._settled, self._held = [], []
        self._stream = DecodeStream(skip_special_tokens=True)
        return text[len(before) :].rstrip(REPLACEMENT) if text.startswith(before) else ""


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The checkpoint's end-of-sequence ids: generation_config.json, else config.json, else none."""
    for name in ("generation_config.json", "config.json"):
        try:
            config = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
        eos = config.get("eos_token_id") if isinstance(config, dict) else None
        if isinstance(eos, int):
            return (eos,)
        if isinstance(eos, list) and eos and all(isinstance(token, int) for token in eos):
            return tuple(eos)
    return ()


def chat_prompt(messages: Sequence[Mapping[str, str]]) -> str:
    """A plain conversation as text, for checkpoints without a chat template: one tagged paragraph a message."""
    tags = {"system": "System", "user": "User", "assistant": "Assistant"}
    paragraphs = []
    for message in messages:
        role = message.get("role", "")
        if role not in tags or not isinstance(message.get("content"), str):
            raise ValueError(
                f"chat message {dict(message)!r} cannot be used; expected role ({', '.join(tags)}) and content (text); correct it"
            )
        paragraphs.append(f"{tags[role]}: {message['content'].strip()}\n\n")
    return "".join(paragraphs) + "Assistant:"
