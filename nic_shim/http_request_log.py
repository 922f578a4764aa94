"""Around the HTTP API: every request has an id, is counted, and leaves one line in the log.

    app = RequestLog(api.app(), slot)      an ASGI application around another; slot() is this ingress's slot of the metrics

A request's id is the client's X-Request-Id where that is sane, else one of ours; it goes back in every reply's header. Who runs a generation
logs it (http_response.py, with tokens and times); the other requests are logged here where they were refused. /health, /ready, /metrics and
the documents are neither counted nor logged, as with vLLM. Called by nic_shim/http_ingress.py. Test: pytest tests/host/test_http_log.py
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blinkimp.host.metrics_memory import HTTP_HANDLERS, word
from blinkimp.logs import log_event

log = logging.getLogger("blinkimp.http")

MAX_ID_CHARS: Final = 64
CLOSED_STATUS: Final = 499  # for the log: the client went before it had an answer
_HEADER: Final = b"x-request-id"
_NOT_COUNTED: Final = frozenset({"/health", "/ready", "/metrics", "/openapi.json", "/docs"})
_WORDS: Final = {
    (handler, column): word(f"http_{column} {handler}")
    for handler in HTTP_HANDLERS
    for column in ("2xx", "4xx", "5xx", "seconds")
}


def request_id_of(scope: Scope) -> str:
    """The client's own id, or a new one."""
    for name, value in scope["headers"]:
        if name == _HEADER:
            given: str = value.decode("latin-1")
            if 0 < len(given) <= MAX_ID_CHARS and given.isascii() and given.replace("-", "").replace("_", "").isalnum():
                return given
    return secrets.token_hex(16)


def handler_of(path: str) -> str:
    if path in HTTP_HANDLERS:
        return path
    return "/v1/models" if path.startswith("/v1/models/") else "none"


class RequestLog:
    """In the scope's state: request_id; error_code of a refusal; is_logged where somebody else has written the line."""

    def __init__(self, app: ASGIApp, slot: Callable[[], Any]) -> None:
        self._app = app
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        state: dict[str, Any] = scope.setdefault("state", {})
        request_id = state["request_id"] = request_id_of(scope)
        status = CLOSED_STATUS

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not any(name == _HEADER for name, _ in message["headers"]):
                    message = {**message, "headers": [*message["headers"], (_HEADER, request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            path: str = scope["path"]
            if path not in _NOT_COUNTED:
                seconds = time.monotonic() - began
                self._count(handler_of(path), status, seconds)
                if status >= 400 and not state.get("is_logged"):
                    log_event(
                        log, logging.INFO, "request", request_id=request_id, transport="http", path=path[:200],
                        status=status, error=state.get("error_code"), e2e_s=round(seconds, 6),
                    )  # fmt: skip

    def _count(self, handler: str, status: int, seconds: float) -> None:
        slot = self._slot()
        column = "2xx" if status < 400 else "4xx" if status < 500 else "5xx"
        slot[_WORDS[handler, column]] += 1.0
        slot[_WORDS[handler, "seconds"]] += seconds
