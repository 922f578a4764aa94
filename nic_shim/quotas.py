"""How often a caller may ask: a token bucket for each, whether it is an API key over HTTP, a CURVE key or a connection over ZeroMQ.

Called by nic_shim/http_gate.py and nic_shim/message_handler.py, each from one thread. Test: pytest tests/null/test_quotas.py

Invariants
I1  A bucket that is full again is forgotten sooner or later, so callers that come once cost nothing; nobody gains by being forgotten.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

MOST_BUCKETS: Final = 512  # beyond it the full ones are looked for: 200 bytes each


class RateLimiter:
    """rate_per_s requests of each caller, and bursts of at most `burst`."""

    def __init__(self, rate_per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._clock = clock
        self._buckets: dict[bytes, tuple[float, float]] = {}  # what is left, and when that was
        self._sweep_above = MOST_BUCKETS

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def wait_s(self, caller: bytes) -> int:
        """0: the request may come in and is counted. Else the seconds, at least 1, until one may."""
        now = self._clock()
        left = self._left(caller, now)
        if left < 1.0:
            self._buckets[caller] = (left, now)
            return max(1, math.ceil((1.0 - left) / self.rate_per_s))
        self._buckets[caller] = (left - 1.0, now)
        if len(self._buckets) > self._sweep_above:
            self._forget_full(now)
        return 0

    def _left(self, caller: bytes, now: float) -> float:
        left, at = self._buckets.get(caller, (float(self.burst), now))
        return min(float(self.burst), left + (now - at) * self.rate_per_s)

    def _forget_full(self, now: float) -> None:
        """I1. As many new callers come before the next look as this one has kept: it costs each of them a constant."""
        self._buckets = {
            caller: bucket for caller, bucket in self._buckets.items() if self._left(caller, now) < self.burst
        }
        self._sweep_above = max(MOST_BUCKETS, 2 * len(self._buckets))
