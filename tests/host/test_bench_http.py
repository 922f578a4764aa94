"""The HTTP load bench runs, and counts what really arrives.

Run: pytest tests/host/test_bench_http.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.http_support import scripted
from tests.support import ROOT, load_tool

TOOL = ROOT / "tools" / "bench_http.py"


def test_every_token_is_counted_once(tmp_path: Path) -> None:
    bench = load_tool("bench_http")
    bench.MAX_TOKENS = 50
    with scripted(tmp_path, step_s=0.002) as served:
        result = bench.run_streams(served.http.port, 4, 2.0)
        assert result.num_requests > 4 and result.num_events > 0
        # Requests at the edges of the measured time are counted in part.
        assert abs(result.num_tokens - 50 * result.num_requests) <= 2 * 4 * 50
        served.http.wait_until_idle()


def test_the_bench_runs_from_the_command_line() -> None:
    command = [sys.executable, str(TOOL), "--streams", "8", "--seconds", "2", "--rate", "400"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=ROOT).stdout
    assert output.count("tokens/s in") == 2 and "us a token" in output
