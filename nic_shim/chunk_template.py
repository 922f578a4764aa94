"""A stream's usual chunk, encoded once: what changes from token to token is put into its places.

Nearly every event of a stream differs from the one before in its text and its token ids alone. Building the reply's structs and encoding
them costs several times what encoding those two does. Used by nic_shim/http_completions.py and nic_shim/http_chat.py, whose slower path
writes all other chunks; both give the same bytes. Test: pytest tests/null/test_chunk_template.py
"""

from __future__ import annotations

import secrets
from typing import Final

import msgspec

# Stand in the template where the text and the ids go. Nobody who sends a request can know them.
TEXT_MARK: Final = secrets.token_hex(16)
IDS_MARK: Final = [secrets.randbits(63), secrets.randbits(63)]

_encode = msgspec.json.Encoder().encode


class ChunkTemplate:
    """Made of a chunk that was encoded with TEXT_MARK as its text and, where it has token ids, IDS_MARK as these."""

    def __init__(self, encoded: bytes) -> None:
        self._head, mark, rest = encoded.partition(_encode(TEXT_MARK))
        if not mark:
            raise ValueError(
                f"the template has no {TEXT_MARK!r}: got {encoded!r}; encode the chunk with that as its text"
            )
        self._middle, _, self._tail = rest.partition(_encode(IDS_MARK))

    def fill(self, text: str, token_ids: list[int]) -> bytes:
        """The chunk. Without ids in the template they are left out."""
        if self._tail:
            return b"%b%b%b%b%b" % (self._head, _encode(text), self._middle, _encode(token_ids), self._tail)
        return b"%b%b%b" % (self._head, _encode(text), self._middle)
