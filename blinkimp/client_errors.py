"""What the clients raise; each message says what, got, expected, remedy.

Raised by blinkimp/client_core.py and client_request.py, told to callers by blinkimp/client.py and async_client.py.
Test: pytest tests/null/test_client_core.py
"""

from __future__ import annotations

from blinkimp.protocol import Error


class ClientError(RuntimeError):
    """Something went wrong between this client and the server; the message says what, got, expected, remedy."""


class RequestRefusedError(ClientError):
    """The server refused or gave up a request. `error` holds its words, `error.code` is for programs."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.what}: got {error.got}, expected {error.expected}; {error.remedy} [{error.code}]")
        self.error = error
        self.code = error.code


class EndpointError(ClientError, ValueError):
    """An address that cannot be one of a server."""


class ClosedError(ClientError):
    """The client was closed."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(f"the client of {endpoint} is closed: got a use of it, expected an open one; make another")


class BadRequestError(ClientError, ValueError):
    """A field that the protocol does not have, or not with this value; nothing was sent."""


class ServerTimeoutError(ClientError, TimeoutError):
    """The server was silent for too long."""
