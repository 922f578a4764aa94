"""The token bucket of each caller. Run: pytest tests/null/test_quotas.py"""

from __future__ import annotations

from blinkimp.nic_shim.quotas import MOST_BUCKETS, RateLimiter


def test_the_bucket_refills() -> None:
    now = [100.0]
    limiter = RateLimiter(2.0, 3, lambda: now[0])
    assert [limiter.wait_s(b"a") for _ in range(5)] == [0, 0, 0, 1, 1]
    assert limiter.wait_s(b"another") == 0
    now[0] += 0.5
    assert [limiter.wait_s(b"a") for _ in range(2)] == [0, 1]
    now[0] += 1000
    assert [limiter.wait_s(b"a") for _ in range(4)] == [0, 0, 0, 1]


def test_the_wait_is_long_enough() -> None:
    now = [0.0]
    limiter = RateLimiter(0.1, 1, lambda: now[0])
    assert limiter.wait_s(b"a") == 0
    now[0] += 2.0
    wait_s = limiter.wait_s(b"a")
    assert wait_s == 8
    now[0] += wait_s
    assert limiter.wait_s(b"a") == 0


def test_callers_that_came_once_are_forgotten_and_those_in_debt_are_not() -> None:
    now = [0.0]
    limiter = RateLimiter(1.0, 2, lambda: now[0])
    for idx in range(10 * MOST_BUCKETS):
        if idx % MOST_BUCKETS == 0:
            limiter.wait_s(b"greedy")
        limiter.wait_s(idx.to_bytes(4))
        now[0] += 0.01
    assert limiter.num_buckets <= MOST_BUCKETS + 1
    assert [limiter.wait_s(b"greedy") for _ in range(4)] == [0, 0, 1, 1]
    assert [limiter.wait_s(idx.to_bytes(4)) for idx in range(3 * MOST_BUCKETS)] == [0] * (3 * MOST_BUCKETS)
    assert limiter.wait_s(b"greedy") == 1, "however many others come"
