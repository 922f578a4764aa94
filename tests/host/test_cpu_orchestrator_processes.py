"""A host that schedules, as processes: who stands still when it is stopped, what ends when somebody dies, and a whole server.

Run: pytest tests/host/test_cpu_orchestrator_processes.py
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from blinkimp.client import Client
from blinkimp.host.device_protocol import DeviceError
from blinkimp.host.shared_memory import SHM_DIR
from blinkimp.ring_abi import EngineState, FinishReason
from tests.host import engine_scenarios as scenarios
from tests.host.engine_support import (
    HostProcess,
    PortClient,
    finished,
    process_state,
    running_engine,
    wait_for,
)
from tests.host.server_support import GREEDY, PROMPT, ServerProcess, Streams
from tests.support import PATIENCE_S


@pytest.mark.parametrize("orchestrator", ["cpu", "cpu-ahead"])
def test_a_stopped_host_says_no_token_and_goes_on_afterwards(tiny: Path, orchestrator: str) -> None:
    """The ablation is real: with orchestrator=gpu the same streams end while the host is stopped (test_faults.py)."""
    with (
        HostProcess(tiny, num_completions=1024, ingress_timeout_s=30.0, orchestrator=orchestrator) as host,
        PortClient(host.engine_name, 0) as client,
    ):
        expected = client.generate([0, 1], 400).tokens
        ids = [client.submit([i % 4, 1], 400) for i in range(32)]
        client.wait_begun(ids)
        os.kill(host.process.pid, signal.SIGSTOP)
        wait_for(lambda: process_state(host.process.pid) == "T", PATIENCE_S, "the host is stopped")
        time.sleep(0.05)
        client.poll()
        assert client.num_unfinished == 32, "the streams must still run when the host stops"
        before = host.status()
        time.sleep(0.5)
        assert client.poll() == 0 and host.status() == before, "somebody schedules although the host is stopped"
        assert process_state(host.device_pid) not in "TZX", "the device itself is awake"
        os.kill(host.process.pid, signal.SIGCONT)
        client.wait_all(PATIENCE_S)
        assert all(client.streams[i].end == finished(FinishReason.LENGTH) for i in ids)
        assert all(client.streams[i].tokens == expected for i in ids[::4])
        host.process.send_signal(signal.SIGTERM)
        assert host.wait(PATIENCE_S)[0] == 0


def test_killed_device_is_reported_and_ends_the_host(tiny: Path) -> None:
    with HostProcess(tiny, orchestrator="cpu") as host, PortClient(host.engine_name, 0) as client:
        client.wait_begun([client.submit([i], 400) for i in range(32)])
        os.kill(host.device_pid, signal.SIGKILL)
        returncode, stderr = host.wait(PATIENCE_S)
        assert returncode == 1
        assert "emulated device" in stderr and "SIGKILL" in stderr
        assert not list(SHM_DIR.glob(f"blinkimp.{host.engine_name}.*"))


def test_device_dies_with_a_killed_host(tiny: Path) -> None:
    with HostProcess(tiny, orchestrator="cpu") as host:
        host.process.kill()
        host.process.wait()
        wait_for(lambda: process_state(host.device_pid) in "XZ", PATIENCE_S, "the device is dead")


def test_sigterm_drains_the_host(tiny: Path) -> None:
    scenarios.sigterm_drains_the_host(tiny, orchestrator="cpu")


def test_a_stop_ends_what_runs(tiny: Path) -> None:
    with running_engine(tiny, orchestrator="cpu-ahead") as engine, PortClient(engine.config.engine_name, 0) as client:
        ids = [client.submit([i, 1], 400) for i in range(8)]
        client.wait_begun(ids)
        assert engine.halt() and engine.status()["state"] == EngineState.STOPPED
        client.wait_all(PATIENCE_S)
        assert {client.streams[i].end for i in ids} <= {finished(FinishReason.DRAINING), finished(FinishReason.LENGTH)}


def test_random_requests_leave_nothing_behind(tiny: Path) -> None:
    """Cancels, preemption, stop ids and full rings, from two ingresses."""
    scenarios.random_requests_leave_nothing_behind(tiny, 2500, orchestrator="cpu-ahead", num_threads=1)


def test_a_reader_that_stops_holds_up_nobody(tiny: Path) -> None:
    scenarios.reader_that_stops_holds_up_nobody_and_loses_nothing(tiny, orchestrator="cpu", num_threads=1)


def test_cancel_takes_effect_at_the_next_commit(tiny: Path) -> None:
    scenarios.cancel_takes_effect_at_the_next_commit(tiny, orchestrator="cpu", num_threads=1)


def test_parking_is_refused_by_name(tiny: Path) -> None:
    expected = pytest.raises(DeviceError, match=r"park_after_s is 2, expected 0 with orchestrator=cpu")
    with expected, running_engine(tiny, orchestrator="cpu", park_after_s=2):
        pass


def test_a_server_answers_over_zeromq_and_http_and_recovers(tmp_path: Path) -> None:
    with (
        running_engine("embedded", num_threads=1) as engine,
        PortClient(engine.config.engine_name, 0) as port,
    ):
        expected = port.generate(PROMPT, 24).tokens
    with ServerProcess(tmp_path, num_threads=1, orchestrator="cpu", http="127.0.0.1:0") as server:
        with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
            assert client.generate(PROMPT, max_tokens=24, **GREEDY).token_ids == expected
        server.wait_for_log("serves on", 2)
        text = complete(f"http://127.0.0.1:{server.http_port}", PROMPT, 24)
        assert text and any("scheduled by this process (cpu)" in line for line in server.log)
        streams = Streams(server.endpoints[0], 2, 400)
        streams.wait_begun()
        device_pid = server.pid_of("host.emulated_process")
        assert device_pid, server.pids
        os.kill(device_pid, signal.SIGKILL)
        (first, _), (second, _) = streams.join()
        assert first == second and len(first) == 400 and first[:24] == expected, "clients go on where they were"
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0


def complete(url: str, prompt: list[int], max_tokens: int) -> str:
    body = {"model": "embedded", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        answer = json.loads(reply.read())
    assert answer["usage"]["completion_tokens"] == max_tokens
    return str(answer["choices"][0]["text"])
