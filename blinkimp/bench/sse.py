"""HTTP/1.1 responses and server-sent events out of bytes as they come, without a copy more than needed.

A load client spends most of its time here, so this is the part of HTTP that streaming needs and no more: status, headers, chunked or counted
bodies, and events. Called by blinkimp/bench/openai_backend.py. Test: pytest tests/null/test_bench_sse.py
"""

from __future__ import annotations

from typing import Final

MAX_HEAD_BYTES: Final = 65536


class HttpError(ValueError):
    """Not HTTP/1.1 as this client speaks it."""


class ResponseParser:
    """feed() bytes of one response after the other; body bytes come back. reset() before the next response."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_done = False
        self._buffer = b""
        self._left: int | None = (
            None  # bytes of the body, or of the chunk, still to come; None: up to the connection's end
        )
        self._is_chunked = False
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`, chunk framing removed."""
        if not self.status:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise HttpError(f"head of more than {MAX_HEAD_BYTES} bytes")
                return b""
            head, data, self._buffer = self._buffer[:end], self._buffer[end + 4 :], b""
            self._read_head(head)
        if self._is_chunked:
            return self._unchunk(data)
        if self._left is None:
            return data
        body = data[: self._left]
        self._left -= len(body)
        self.is_done = self._left == 0
        return body

    def finish(self) -> None:
        """The connection has ended."""
        if self.status and not self._is_chunked and self._left is None:
            self.is_done = True

    @property
    def keeps_alive(self) -> bool:
        return self.is_done and self.headers.get("connection", "").lower() != "close"

    def _read_head(self, head: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        parts = lines[0].split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
            raise HttpError(f"status line {lines[0]!r}")
        self.status = int(parts[1])
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._is_chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if self._is_chunked:
            self._left = 0
        elif "content-length" in self.headers:
            self._left = int(self.headers["content-length"])
            self.is_done = self._left == 0

    def _unchunk(self, data: bytes) -> bytes:
        """`_left` counts the chunk's bytes and the line end behind them."""
        pieces = []
        data = self._buffer + data if self._buffer else data
        position = 0
        while position < len(data):
            if self._left:
                piece = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                # The last two of them are CR and LF.
                pieces.append(piece[: max(0, len(piece) - max(0, 2 - self._left))])
                continue
            end = data.find(b"\r\n", position)
            if end < 0:
                break
            line, position = data[position:end], end + 2
            if self._in_trailer:
                if not line:
                    self.is_done = True
                    break
                continue
            try:
                num_bytes = int(line.split(b";")[0], 16)
            except ValueError:
                raise HttpError(f"chunk size {line[:40]!r}") from None
            if num_bytes == 0:
                self._in_trailer = True
            else:
                self._left = num_bytes + 2
        self._buffer = data[position:]
        return b"".join(pieces)


class EventParser:
    """feed() body bytes; the data of each whole event comes back."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, body: bytes) -> list[bytes]:
        self._buffer += body
        if b"\r" in self._buffer:
            self._buffer = self._buffer.replace(b"\r\n", b"\n")
        if b"\n\n" not in self._buffer:
            return []
        *events, self._buffer = self._buffer.split(b"\n\n")
        found = []
        for event in events:
            lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found
