"""What stops, dies and hangs, and who notices: processes of an engine without ingresses. Test: pytest tests/host/test_faults.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.shared_memory import SHM_DIR, engine_is_alive, open_engine_page
from blinkimp.host.watchdog import Watchdog
from blinkimp.ring_abi import FaultCode, FinishReason
from tests.host.engine_support import (
    HostProcess,
    PortClient,
    assert_all_pages_are_back,
    engine_config,
    finished,
    make_tiny_checkpoint,
    running_engine,
    wait_for,
)
from tests.support import ROOT

# Owns a queue pair, starts requests, reads nothing: they fill the completion ring and hold pages until somebody takes them away.
VICTIM = """
import sys, time
from tests.host.engine_support import PortClient
client = PortClient(sys.argv[1], 1)
for i in range(8):
    client.submit([i, i + 1, i + 2], 400)
print("submitted", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def process_state(pid: int) -> str:
    """R, S, T (stopped), Z (dead, not reaped), or X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_32_streams_finish_while_the_host_is_stopped(tiny: Path) -> None:
    with HostProcess(tiny, num_completions=16384) as host, PortClient(host.engine_name, 0) as client:
        expected = client.generate([0, 1], 400).tokens
        ids = [client.submit([i % 4, 1], 400) for i in range(32)]
        wait_for(
            lambda: client.poll() >= 0 and all(client.streams[i].tokens for i in ids), 30, "every stream has begun"
        )
        os.kill(host.process.pid, signal.SIGSTOP)
        wait_for(lambda: process_state(host.process.pid) == "T", 5, "the host is stopped")
        client.poll()
        assert client.num_unfinished == 32, "the streams must still run when the host stops"
        client.wait_all(120)
        late = client.generate([3, 2, 1], 50)  # a request that begins after the stop
        assert process_state(host.process.pid) == "T", "the host ran in between"
        assert all(client.streams[i].end == finished(FinishReason.LENGTH) for i in ids)
        assert all(client.streams[i].tokens == expected for i in ids[::4])
        assert late.end == finished(FinishReason.LENGTH)
        os.kill(host.process.pid, signal.SIGCONT)
        time.sleep(0.3)
        assert host.process.poll() is None, "the watchdog must not blame the device for the host's own pause"
        host.process.send_signal(signal.SIGTERM)
        assert host.wait(30) == (0, "")


def test_killed_ingress_frees_its_pages_and_disturbs_nobody(tiny: Path) -> None:
    with HostProcess(tiny, num_completions=64, num_threads=1) as host, PortClient(host.engine_name, 0) as client:
        expected = client.generate([9, 8, 7], 300).tokens
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", VICTIM, host.engine_name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as victim:
            assert victim.stdout is not None and victim.stdout.readline() == "submitted\n"
            wait_for(lambda: host.status()["num_running"] == 8, 10, "the victim's requests run")
            wait_for(lambda: host.status()["credit_stalls"] > 0, 10, "the victim's ring is full")
            assert host.status()["num_pages_used"] >= 8
            stream = client.streams[client.submit([9, 8, 7], 300)]
            wait_for(lambda: client.poll() >= 0 and len(stream.tokens) > 0, 10, "our stream runs beside it")
            assert stream.end is None
            victim.kill()
        died_at = time.monotonic()
        while stream.end is None:
            client.poll(0.05)
        assert stream.tokens == expected
        while host.status()["ingress_drops"] == 0:
            assert client.generate([9, 8, 7], 300).tokens == expected
            assert time.monotonic() - died_at < 2.0, "a dead ingress must be noticed within 2 s"
        wait_for(lambda: host.status()["num_pages_used"] == 0, 0.5, "the dead ingress's pages are free")
        assert time.monotonic() - died_at < 2.0
        status = host.status()
        assert_all_pages_are_back(status)
        assert status["finished_cancelled"] == 8 and status["num_queue_pairs_attached"] == 1
        with PortClient(host.engine_name, 1) as successor:  # the place can be taken again
            assert successor.generate([9, 8, 7], 300).tokens == expected


def test_killed_device_is_reported_and_ends_the_host(tiny: Path) -> None:
    with HostProcess(tiny) as host:
        os.kill(host.device_pid, signal.SIGKILL)
        returncode, stderr = host.wait(20)
        assert returncode == 1
        assert "emulated device" in stderr and "SIGKILL" in stderr and "restart the engine" in stderr
        assert not list(SHM_DIR.glob(f"blinkimp.{host.engine_name}.*"))


def test_fault_record_of_the_device_ends_the_host_with_its_words(tiny: Path) -> None:
    with HostProcess(tiny) as host:
        with open_engine_page(host.engine_name, writable=True) as page:
            fault = page.view(abi.ENGINE_PAGE)["fault"]
            fault["site"], fault["expected"], fault["seen"] = 10, 512, 511
            fault["code"] = FaultCode.INTEGRITY
            del fault
        returncode, stderr = host.wait(30)
        assert returncode == 1
        assert "INTEGRITY" in stderr and "kSitePageCount" in stderr and "expected 0x200, seen 0x1ff" in stderr


def test_device_dies_with_a_killed_host_and_the_name_is_free_again(tiny: Path) -> None:
    with HostProcess(tiny, num_threads=1) as host:
        host.process.kill()
        host.process.wait()
        wait_for(lambda: process_state(host.device_pid) in "XZ", 5, "the device is dead")
        assert not engine_is_alive(host.engine_name)
        with (
            running_engine(tiny, engine_name=host.engine_name, num_threads=1) as engine,
            PortClient(engine.config.engine_name, 0) as client,
        ):
            assert client.generate([1, 2, 3], 20).end == finished(FinishReason.LENGTH)


def test_hanging_device_is_seen_by_its_heartbeat(tiny: Path) -> None:
    config = engine_config(tiny, num_threads=1)
    with running_engine(tiny, engine_name=config.engine_name, num_threads=1) as engine:
        assert isinstance(engine.device, EmulatedDevice)
        with open_engine_page(config.engine_name) as page:
            watchdog = Watchdog(page, engine.device, stall_timeout_s=0.5)
            for _ in range(20):
                assert watchdog.check() is None
                time.sleep(0.05)
            os.kill(engine.device.pid, signal.SIGSTOP)
            try:
                deadline = time.monotonic() + 10
                while (report := watchdog.check()) is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                os.kill(engine.device.pid, signal.SIGCONT)
            assert "heartbeat stands" in report and "hangs" in report
            time.sleep(0.1)
            assert watchdog.check() is None, "it beats again"
            del watchdog


def test_sigterm_drains_the_host(tiny: Path) -> None:
    with HostProcess(tiny, num_completions=16384) as host, PortClient(host.engine_name, 0) as client:
        ids = [client.submit([i], 400) for i in range(32)]
        wait_for(
            lambda: client.poll() >= 0 and all(client.streams[i].tokens for i in ids), 30, "every stream has begun"
        )
        assert client.num_unfinished == 32
        host.process.send_signal(signal.SIGTERM)
        client.wait_all(60)
        assert all(client.streams[i].end == finished(FinishReason.LENGTH) for i in ids), "nothing was cut short"
        assert host.wait(30) == (0, "")
