"""Text to token ids and back: a checkpoint's tokenizer.json, and detokenisation one token at a time.

Called by nic_shim/zmq_ingress.py and the command line. Test: pytest tests/null/test_tokenizer.py

Invariants of IncrementalDetokenizer
I1  Half a character is never emitted: text that may still change is held back until the tokens that complete it.
I2  The pieces, joined, are what decoding all tokens at once gives, less an incomplete character at the very end. Where the decoder takes
    back what was given (one broken byte makes U+FFFD of every byte token beside it), that stands, and what follows comes none the less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream

from blinkimp.host.checkpoint import read_eos_ids
from blinkimp.host.model_config import UnsupportedModelError
from blinkimp.nic_shim.token_bytes import TokenBytes

REPLACEMENT = "\ufffd"  # what an incomplete or invalid byte sequence decodes to
CONTEXT_TOKENS = 8  # of the prompt: some decoders treat the first token of a text in a way of its own (leading space)
# A character has at most four bytes, so a run this long that never ends on a character boundary is not text. It bounds the cost of
# a step, which decodes all that is held back.
MAX_HELD_TOKENS = 64
MAX_HALF_TOKENS = 8  # of half a character; with special tokens in between, which have no text
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
        try:
            self.eos_ids = read_eos_ids(self.path.parent)  # those of the engine
        except UnsupportedModelError as error:
            raise TokenizerError(str(error)) from error
        self.token_bytes = TokenBytes(self)
        self.anchor_ids = self._anchor_ids()

    def _anchor_ids(self) -> list[int]:
        """A plain letter: text behind it is decoded as in the middle of a text, whatever stood there (a space in front is kept)."""
        try:
            return [int(token) for token in self.encode("a", add_special_tokens=False)]
        except Exception:  # the binding raises plain Exception: a vocabulary without the letter
            return []

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
            context = tokenizer.anchor_ids
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
            return self._settle()
        if piece is None:
            return self._settle() if len(self._held) >= MAX_HELD_TOKENS else ""
        self._settled, self._held = self._held, []
        return piece

    def finish(self) -> str:
        """What is held back and whole; an incomplete character at the end is left out (I1)."""
        return self._settle()

    def _settle(self) -> str:
        """The text of what is held, but for half a character at its end, which is held on; decoding goes on from a plain place."""
        decode, anchor = self._tokenizer.decode, self._tokenizer.anchor_ids
        whole, half, is_cut = self._split_held()
        for base in (self._settled, anchor, []):  # the second: what was given is taken back, but stands (I2)
            before, text = decode(base), decode([*base, *whole])
            if text.startswith(before):
                break
        piece = text[len(before) :]
        self._settled, self._held = anchor, half
        self._stream = DecodeStream(ids=anchor, skip_special_tokens=True)
        for token in half:
            self._stream.step(self._tokenizer.hf, token)
        return piece.removesuffix(REPLACEMENT) if is_cut else piece

    def _split_held(self) -> tuple[list[int], list[int], bool]:
        """The held tokens: those of whole characters, and those of half a character at the end. True: the last of the first ends in one."""
        token_bytes = self._tokenizer.token_bytes
        num_bytes, num_half = token_bytes.num_unfinished(self._held), 0
        while num_bytes > 0 and num_half < min(len(self._held), MAX_HALF_TOKENS):
            num_half += 1
            num_bytes -= len(token_bytes.of(self._held[-num_half]) or b"")
        if (
            num_bytes
        ):  # one token ends a character and begins the next, or special tokens stand in between: it is given up
            return self._held, [], True
        num_whole = len(self._held) - num_half
        return self._held[:num_whole], self._held[num_whole:], False


def chat_prompt(messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
    """A plain conversation as text, for checkpoints without a chat template: one tagged paragraph a message, and the next one's tag."""
    tags = {"system": "System", "user": "User", "assistant": "Assistant"}
    paragraphs = []
    for message in messages:
        role = message.get("role", "")
        if role not in tags or not isinstance(message.get("content"), str):
            raise ValueError(
                f"chat message {dict(message)!r} cannot be used; expected role ({', '.join(tags)}) and content (text); correct it"
            )
        paragraphs.append(f"{tags[role]}: {message['content'].strip()}\n\n")
    return "".join(paragraphs) + ("Assistant:" if add_generation_prompt else "")
