"""What stops, dies and hangs, and who notices: processes of an engine without ingresses. Test: pytest tests/host/test_faults.py"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.shared_memory import SHM_DIR, engine_is_alive, open_engine_page
from blinkimp.host.watchdog import Symptom, Watchdog
from blinkimp.ring_abi import FaultCode, FinishReason
from tests.host.engine_scenarios import (
    killed_ingress_frees_its_pages_and_disturbs_nobody,
    sigterm_drains_the_host,
    streams_finish_while_the_host_is_stopped,
)
from tests.host.engine_support import (
    HostProcess,
    PortClient,
    engine_config,
    finished,
    make_tiny_checkpoint,
    process_state,
    running_engine,
    wait_for,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_32_streams_finish_while_the_host_is_stopped(tiny: Path) -> None:
    streams_finish_while_the_host_is_stopped(tiny)


def test_killed_ingress_frees_its_pages_and_disturbs_nobody(tiny: Path) -> None:
    killed_ingress_frees_its_pages_and_disturbs_nobody(tiny, num_threads=1)


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
                while (verdict := watchdog.check()) is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                os.kill(engine.device.pid, signal.SIGCONT)
            assert verdict.symptom == Symptom.HEARTBEAT_STALL and "hangs" in verdict.text
            time.sleep(0.1)
            assert watchdog.check() is None, "it beats again"
            del watchdog


def test_sigterm_drains_the_host(tiny: Path) -> None:
    sigterm_drains_the_host(tiny)
