"""Keys, rates and outstanding choices. Run: pytest tests/null/test_http_gate.py"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from blinkimp.nic_shim.http_errors import HttpError
from blinkimp.nic_shim.http_gate import ANYBODY, ApiKeyError, Gate, read_keys
from blinkimp.nic_shim.ingress_limits import HttpLimits
from blinkimp.nic_shim.quotas import RateLimiter


def test_without_keys_anybody_may_come() -> None:
    gate = Gate([], HttpLimits())
    assert gate.is_open and gate.caller_of(None) == ANYBODY == gate.caller_of("Bearer whatever")


def test_keys_are_told_apart_and_others_refused() -> None:
    gate = Gate(["first-key", "second-key"], HttpLimits())
    assert gate.caller_of("Bearer first-key") != gate.caller_of("bearer  second-key")
    for header in (None, "", "Bearer", "Bearer first", "Basic first-key", "first-key", "Bearer \udcff"):
        with pytest.raises(HttpError) as caught:
            gate.caller_of(header)
        assert caught.value.status == 401
    assert gate.num_refused == 7


def test_who_asks_too_often_is_told_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_clock = functools.partial(RateLimiter, clock=lambda: 1000.0)
    monkeypatch.setattr("blinkimp.nic_shim.http_gate.RateLimiter", stopped_clock)
    gate = Gate([], HttpLimits(max_requests_per_s=0.01, burst_requests=3))
    for _ in range(3):
        gate.count_request(ANYBODY)
    with pytest.raises(HttpError, match="too many requests a second") as caught:
        gate.count_request(ANYBODY)
    assert caught.value.status == 429 and caught.value.retry_after_s == 100
    gate.count_request(b"another")
    assert gate.num_refused == 1


def test_outstanding_choices_come_back_to_zero() -> None:
    gate = Gate([], HttpLimits(max_outstanding=4))
    gate.enter(ANYBODY, 3)
    with pytest.raises(HttpError, match="3 running and 2 new"):
        gate.enter(ANYBODY, 2)
    gate.enter(b"another", 4)
    gate.leave(ANYBODY, 3)
    gate.enter(ANYBODY, 4)
    gate.leave(ANYBODY, 4)
    gate.leave(b"another", 4)
    assert gate.num_outstanding == 0


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLINKIMP_API_KEY", raising=False)
    assert read_keys("") == []
    path = tmp_path / "keys"
    path.write_text("# comment\n  one-long-key \n\ntwo-long-key\n")
    path.chmod(0o644)  # whatever the umask
    with pytest.raises(ApiKeyError, match="chmod 600"):
        read_keys(str(path))
    path.chmod(0o600)
    assert read_keys(str(path)) == ["one-long-key", "two-long-key"]
    monkeypatch.setenv("BLINKIMP_API_KEY", "from-environment, and-another-one")
    assert read_keys(str(path))[:2] == ["from-environment", "and-another-one"]
    path.write_text("short\n")
    with pytest.raises(ApiKeyError, match="fewer than 8"):
        read_keys(str(path))
    path.write_text("# none\n")
    with pytest.raises(ApiKeyError, match="holds none"):
        read_keys(str(path))
    with pytest.raises(ApiKeyError, match="cannot be read"):
        read_keys(str(tmp_path / "missing"))
