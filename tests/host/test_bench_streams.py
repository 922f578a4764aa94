"""The load bench on a small load: every token that the engine committed in its window arrives once, with a latency that can be.

Run: pytest tests/host/test_bench_streams.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support import PATIENCE_S, ROOT, load_tool, python_path

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


ANSWERS = [
    b'HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 22\r\n\r\n{"error":"no engine"}\n\n',
    b'HTTP/1.1 200 OK\r\n\r\ndata: {"token_ids":[7,8]}\n\ndata: [DONE]\n\n',
]


def test_a_stream_that_is_refused_for_the_moment_is_asked_for_again() -> None:
    """A machine that stands still for seconds makes an ingress take its engine for lost: no reason to give up ten minutes' work."""
    clients = load_tool("stream_clients")

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for text in ANSWERS:
                connection.recv(1 << 16)
                connection.sendall(text)
            connection.recv(1 << 16)  # the next request, or the client's end

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer, args=(listener,), daemon=True)
        server.start()
        plan = clients.Plan(
            transport="http", address=f"127.0.0.1:{listener.getsockname()[1]}", num_streams=1, num_connections=1, seconds=PATIENCE_S,
            least_tokens=2, most_tokens=2, sample_period=1, seed=1, output="", most_requests=1,
        )  # fmt: skip
        recorder = clients.run(plan)
        server.join(PATIENCE_S)
    assert (recorder.num_requests, recorder.num_refused, recorder.num_tokens) == (1, 1, 2)
