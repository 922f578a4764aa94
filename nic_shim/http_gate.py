"""Who may come in, and how much of it: API keys, requests a second, choices running at once.

Called by nic_shim/http_app.py, on the event loop. Test: pytest tests/null/test_http_gate.py

Invariants
I1  A key is compared in constant time, with every key, whether or not one has matched.
I2  The count of a key's running choices is back at 0 when its requests have ended, however they ended.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blinkimp.nic_shim.http_errors import HttpError
from blinkimp.nic_shim.ingress_limits import HttpLimits
from blinkimp.nic_shim.quotas import RateLimiter

KEY_VARIABLE: Final = "BLINKIMP_API_KEY"
ANYBODY: Final = b""  # the caller where no keys are asked for


class ApiKeyError(ValueError):
    """The API keys cannot be read; the message says what, got, expected, remedy."""


class Gate:
    """Admits requests. The limits are of each API key; of all callers together where there are no keys."""

    def __init__(self, keys: Sequence[str], limits: HttpLimits) -> None:
        self._digests = [_digest(key) for key in keys]
        self._limits = limits
        self._rate = RateLimiter(limits.max_requests_per_s, limits.burst_requests)
        self._outstanding: dict[bytes, int] = {}  # choices that run, by caller
        self.num_outstanding = 0  # of all callers
        self.num_refused = 0

    @property
    def is_open(self) -> bool:
        return not self._digests

    def caller_of(self, authorization: str | None) -> bytes:
        """Who asks, by the Authorization header. Raises HttpError 401."""
        if not self._digests:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them (I1)
        if scheme.lower() != "bearer" or not any(matches):
            self.num_refused += 1
            got = "no Authorization header" if authorization is None else "a key that is not known"
            raise HttpError(
                401,
                f"the API key is missing or wrong: got {got}, expected `Authorization: Bearer KEY`; ask the operator for a key",
                code="invalid_api_key",
            )
        return digest

    def count_request(self, caller: bytes) -> None:
        """Raises HttpError 429 where the caller asks too often."""
        limits, wait_s = self._limits, self._rate.wait_s(caller)
        if wait_s:
            self.num_refused += 1
            raise HttpError(
                429,
                f"too many requests a second: got more than {limits.max_requests_per_s:g} with bursts of {limits.burst_requests}, "
                "expected fewer; slow down, or raise --max-requests-per-s",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )

    def enter(self, caller: bytes, num_choices: int) -> None:
        """Counts choices, before any work is done for them; leave() must follow. Raises HttpError 429."""
        num_running, limit = self._outstanding.get(caller, 0), self._limits.max_outstanding
        if num_running + num_choices > limit:
            self.num_refused += 1
            raise HttpError(
                429,
                f"too many choices at once: got {num_running} running and {num_choices} new, expected at most {limit}; "
                "wait for some to finish, or raise --max-outstanding",
                code="rate_limit_exceeded",
            )
        self._outstanding[caller] = num_running + num_choices
        self.num_outstanding += num_choices

    def leave(self, caller: bytes, num_choices: int) -> None:
        self._outstanding[caller] -= num_choices
        self.num_outstanding -= num_choices


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: str) -> list[str]:
    """Keys of the file (one a line; `#` begins a comment) and of BLINKIMP_API_KEY. Raises ApiKeyError."""
    keys = [key for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    if path:
        try:
            mode = os.stat(path).st_mode
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ApiKeyError(
                f"API keys: {path} cannot be read ({why}); expected a text file with one key a line; check --api-key-file"
            ) from None
        if mode & 0o077:
            raise ApiKeyError(
                f"API keys: {path} has mode {mode & 0o777:o}, expected 600: others on this machine could read it; run `chmod 600 {path}`"
            )
        own = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not own:
            raise ApiKeyError(f"API keys: {path} holds none, expected one a line; without a file anybody may ask")
        keys += own
    short = [key for key in keys if len(key.strip()) < 8]
    if short:
        raise ApiKeyError(
            f"API keys: {len(short)} have fewer than 8 characters; expected longer ones; `openssl rand -hex 24` makes one"
        )
    return [key.strip() for key in keys]
