"""One connection of the HTTP ingress: uvicorn's, with a limit on the time without a byte while a request is awaited.

uvicorn closes a connection that idles behind a reply, no other: one that says nothing, or half a request, would stand for ever and count
against max_connections. Called by nic_shim/http_ingress.py. Test: pytest tests/host/test_http_slow_requests.py

Rule    The clock runs while the client's next byte is what everything waits for. It does not while a request runs (whatever is pipelined
        behind it), while we do not read, nor behind a reply: there uvicorn's own limit holds.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from blinkimp.nic_shim.admission import larger_limit
from blinkimp.nic_shim.http_errors import HttpError

_HEAD: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"


class TimedProtocol(HttpToolsProtocol):
    """read_timeout_s: for the next byte."""

    def __init__(self, *arguments: Any, read_timeout_s: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._read_timeout_s = read_timeout_s
        self._read_at = self.loop.time()  # the last byte came, or began to be awaited
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._read_timeout_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read_at = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._read_at = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        """Once a connection in so many seconds, not at each byte."""
        left_s = self._read_at + self._read_timeout_s - self.loop.time()
        if left_s <= 0 and self._is_awaited() and not self.transport.is_closing():
            self._time_out()
            return
        self._timer = self.loop.call_later(left_s if left_s > 0 else self._read_timeout_s, self._look)

    def _is_awaited(self) -> bool:
        if self.flow.read_paused or self.pipeline or self.timeout_keep_alive_task is not None:
            return False
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _time_out(self) -> None:
        self._timer = None
        if self._has_begun():
            error = HttpError(
                408,
                f"the request is not complete: got no byte for {self._read_timeout_s:g} s, expected the rest; send it again, or "
                + larger_limit("read_timeout_s"),
                code="request_timeout",
            )
            body = msgspec.json.encode(error.body())
            self.transport.write(_HEAD % (len(body), body))
        self.transport.close()

    def _has_begun(self) -> bool:
        """A request of which nothing has been answered."""
        if self.cycle is None or self.cycle.scope is not self.scope:
            return self.scope is not None  # within the head
        return not self.cycle.response_started


def timed_protocol(read_timeout_s: float) -> Any:
    """What uvicorn makes for each connection."""
    return partial(TimedProtocol, read_timeout_s=read_timeout_s)
