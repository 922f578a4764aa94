"""Errors of the HTTP API: OpenAI's envelope around this project's words (what, got, expected, remedy).

Called by nic_shim/http_*.py. Test: pytest tests/host/test_http_errors.py
"""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.responses import Response

from blinkimp.nic_shim.http_types import ErrorBody, ErrorReply
from blinkimp.protocol import Error

RETRY_AFTER_S: Final = 1

# ErrorCode -> status, and the code where OpenAI has a name of its own for it.
_STATUS: Final = {
    "bad_message": 400,
    "bad_sampling": 400,
    "prompt_empty": 400,
    "prompt_too_long": 400,
    "bad_token": 400,
    "bad_prompt": 400,
    "bad_constraint": 400,
    "constraint_too_large": 422,
    "too_large": 413,
    "too_many_requests": 429,
    "busy": 429,
    "draining": 503,
    "engine_lost": 503,
}
_OPENAI_CODES: Final = {"prompt_too_long": "context_length_exceeded", "too_many_requests": "rate_limit_exceeded"}
_TYPES: Final = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """An answer other than 2xx."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s or (RETRY_AFTER_S if status in (429, 503) else 0)

    def body(self) -> ErrorReply:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorReply(ErrorBody(message=self.message, type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        headers = {"retry-after": str(self.retry_after_s)} if self.retry_after_s else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(msgspec.json.encode(self.body()), self.status, headers, "application/json")


def http_error_of(error: Error) -> HttpError:
    """What an error of the ingress or of the engine is over HTTP."""
    message = f"{error.what}: got {error.got}, expected {error.expected}; {error.remedy}"
    return HttpError(_STATUS.get(error.code, 500), message, code=_OPENAI_CODES.get(error.code, error.code))


def bad_field(field: str | None, what: str, got: str, expected: str, remedy: str) -> HttpError:
    """400, naming the field."""
    return HttpError(400, f"{what}: got {got}, expected {expected}; {remedy}", code="invalid_value", param=field)
