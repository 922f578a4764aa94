"""The bytes that each token of a tokenizer stands for.

Called by nic_shim/tokenizer.py, nic_shim/http_logprobs.py and nic_shim/constraint_worker.py. Test: pytest tests/null/test_http_logprobs.py

Rule: byte-level tokenizers (GPT-2's alphabet) map each character of a piece back to a byte; SentencePiece-like ones write a space as
U+2581 and single bytes as <0xNN>. Special tokens stand for no text.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blinkimp.nic_shim.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + idx): byte for idx, byte in enumerate(others)})
    return alphabet


class TokenBytes:
    """Bytes and text of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        hf = tokenizer.hf
        self._is_byte_level = _has_kind(hf.decoder, "ByteLevel") or _has_kind(hf.pre_tokenizer, "ByteLevel")
        added = hf.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._added = {token: entry.content for token, entry in added.items()}
        self._cache: dict[int, bytes] = {}

    def of(self, token: int) -> bytes | None:
        """The token's bytes; None for a special token and for an id that is not in the vocabulary."""
        if token in self.special_ids:
            return None
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.hf.id_to_token(token)
        if piece is None:
            return None
        if self._is_byte_level:
            alphabet = byte_alphabet()
            try:
                return bytes(alphabet[character] for character in piece)
            except KeyError:
                return str(piece).encode()
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace(SPACE, " ").encode()

    def num_unfinished(self, tokens: Sequence[int]) -> int:
        """How many bytes at the end begin a character that is not complete. Bytes that cannot become one do not count."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(self.of(token) or b"" for token in tokens))
        return len(decoder.getstate()[0])

    def shown(self, token: int) -> bytes:
        """As of(), with a special token by its name: what a log-probability record says."""
        known = self._cache.get(token)
        if known is None:
            value = self.of(token)
            if value is None:
                value = (self._tokenizer.hf.id_to_token(token) or f"<{token}>").encode()
            known = self._cache[token] = value
        return known

    def text(self, token: int) -> str:
        return self.shown(token).decode(errors="replace")


def _has_kind(part: Any, kind: str) -> bool:
    """Whether a pre-tokenizer or decoder of the binding, or one in its sequence, is of this kind."""
    return part is not None and _is_in(json.loads(part.__getstate__()), kind)


def _is_in(part: object, kind: str) -> bool:
    if isinstance(part, dict):
        return part.get("type") == kind or any(_is_in(value, kind) for value in part.values())
    return isinstance(part, list) and any(_is_in(value, kind) for value in part)
