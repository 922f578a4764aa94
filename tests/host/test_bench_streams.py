"""The load bench on a small load: every token that the engine committed in its window arrives once, with a latency that can be.

Run: pytest tests/host/test_bench_streams.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import PATIENCE_S, ROOT, python_path

TOOL = ROOT / "tools" / "bench_streams.py"
NUM_STREAMS = 16


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a run that was long enough for this machine, or of the longest one."""
    path = tmp_path_factory.mktemp("load") / "load.json"
    for seconds in (1.5, 6, 24):
        found = measured(path, seconds)
        (run,) = found["runs"]["both"]
        if all(is_enough(run[transport]) for transport in ("zmq", "http")):
            break
    return found


def is_enough(figures: Any) -> bool:
    """More requests than streams at once, so that streams end and others begin, and latencies of which there are quantiles."""
    return figures["requests"] > NUM_STREAMS and figures["latency_samples"] > 100


def measured(path: Path, seconds: float) -> Any:
    command = [
        sys.executable,
        str(TOOL),
        "--transport",
        "both",
        "--streams",
        str(NUM_STREAMS),
        "--connections",
        "3",
        "--rate",
        "800",
    ]
    command += ["--seconds", str(seconds), "--tokens", "16", "--json", str(path)]
    subprocess.run(
        command, check=True, timeout=4 * PATIENCE_S, cwd=ROOT, env={**os.environ, "PYTHONPATH": python_path()}
    )
    return json.loads(path.read_text())


@pytest.mark.parametrize("transport", ["zmq", "http"])
def test_both_transports_are_measured(result: Any, transport: str) -> None:
    (run,) = result["runs"]["both"]
    figures = run[transport]
    assert is_enough(figures), figures
    assert figures["tokens_per_s"] > 0 and figures["tokens_per_event"] >= 1
    latency = figures["added_latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"] < 60_000
    assert run["trace_events_lost"] == 0 and run["step_us"] == 20_000


def test_every_process_is_watched(result: Any) -> None:
    (run,) = result["runs"]["both"]
    assert (
        set(run["memory"])
        == set(run["cpu_percent"])
        == {"supervisor", "engine", "device", "zmq ingress", "http ingress"}
    )
    assert all(figures["anonymous_mb_last"] > 1 for figures in run["memory"].values())
    shared = {name: figures["shared_mb_last"] for name, figures in run["memory"].items()}
    assert min(shared["device"], shared["zmq ingress"], shared["http ingress"]) > 0, (
        "the rings that they share are told apart"
    )


def test_the_figures_say_where_they_are_from(result: Any) -> None:
    assert result["machine"]["num_cpus"] > 0 and "bench_streams.py --transport both" in result["command"]
    assert result["commit"] and result["date"].startswith("20")


def test_a_bad_load_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--transport", "smoke-signals"]
    got = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)
    assert got.returncode == 2 and "invalid choice" in got.stderr
