"""tools/client_rate.py: every token is counted on both transports, and a token's cost is that of a client that keeps up.

Run: pytest tests/host/test_client_rate.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import load_tool

# 40,000 tokens/s on one core leave 25 us for each. CPU time is what is compared, which a busy machine hardly changes; ten times it all the same.
MOST_US_A_TOKEN = 250


def test_every_token_is_counted_and_cheap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool, out = load_tool("client_rate"), tmp_path / "client.json"
    assert tool.main(["--rate", "8000", "--streams", "16", "--seconds", "0.5", "--out", str(out)]) == 0
    http, zmq = json.loads(out.read_text())["rows"]
    assert (http["transport"], zmq["transport"]) == ("http", "zmq")
    for row in (http, zmq):
        assert row["tokens"] == 16 * 250 and row["failed"] == 0
        assert 0 < row["client_us_a_token"] < MOST_US_A_TOKEN
        assert row["tokens_per_s_a_core"] == pytest.approx(1e6 / row["client_us_a_token"], rel=0.01)
    assert http["events_a_read"] > 0.9 and zmq["events_a_read"] is None
    assert "one core takes" in capsys.readouterr().out
