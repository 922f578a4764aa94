"""What stops, dies and hangs, and who notices: processes of an engine without ingresses. Test: pytest tests/host/test_faults.py"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host import emulated_device
from blinkimp.host.child_process import ChildProcess
from blinkimp.host.device_protocol import DeviceError
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.engine import Engine, EngineFaultError
from blinkimp.host.parking import Doorbell, WakeThread
from blinkimp.host.shared_memory import SHM_DIR, engine_is_alive, open_engine_page, open_queue_pair
from blinkimp.host.watchdog import Symptom, Watchdog
from blinkimp.ring_abi import EngineState, FaultCode, FinishReason
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
    process_state,
    running_engine,
    wait_for,
)
from tests.support import PATIENCE_S, ROOT


def test_32_streams_finish_while_the_host_is_stopped(tiny: Path) -> None:
    streams_finish_while_the_host_is_stopped(tiny)


def test_killed_ingress_frees_its_pages_and_disturbs_nobody(tiny: Path) -> None:
    killed_ingress_frees_its_pages_and_disturbs_nobody(tiny, num_threads=1)


def test_killed_device_is_reported_and_ends_the_host(tiny: Path) -> None:
    with HostProcess(tiny) as host:
        os.kill(host.device_pid, signal.SIGKILL)
        returncode, stderr = host.wait(PATIENCE_S)
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
        returncode, stderr = host.wait(PATIENCE_S)
        assert returncode == 1
        assert "INTEGRITY" in stderr and "kSitePageCount" in stderr and "expected 0x200, seen 0x1ff" in stderr


def test_device_dies_with_a_killed_host_and_the_name_is_free_again(tiny: Path) -> None:
    with HostProcess(tiny, num_threads=1) as host:
        host.process.kill()
        host.process.wait()
        wait_for(lambda: process_state(host.device_pid) in "XZ", PATIENCE_S, "the device is dead")
        assert not engine_is_alive(host.engine_name)
        with (
            running_engine(tiny, engine_name=host.engine_name, num_threads=1) as engine,
            PortClient(engine.config.engine_name, 0) as client,
        ):
            assert client.generate([1, 2, 3], 20).end == finished(FinishReason.LENGTH)


def test_device_killed_in_the_middle_of_a_line_is_an_error_and_no_trace_of_the_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bk_torn.py").write_text(
        'import os, signal\nos.write(1, b\'{"stage":"wei\')\nos.kill(os.getpid(), signal.SIGKILL)\n'
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(
        emulated_device, "ChildProcess", lambda name, module, **options: ChildProcess(name, "bk_torn", **options)
    )
    with pytest.raises(DeviceError, match="was killed by SIGKILL"):
        Engine(engine_config(tiny, num_threads=1)).start()
    assert not [record for record in caplog.records if record.exc_info], "half a line is told with a traceback"


def test_hanging_device_is_seen_by_its_heartbeat(tiny: Path) -> None:
    config = engine_config(tiny, num_threads=1)
    with running_engine(tiny, engine_name=config.engine_name, num_threads=1) as engine:
        assert isinstance(engine.device, EmulatedDevice)
        with open_engine_page(config.engine_name) as page:
            watchdog = Watchdog(page, engine.device, stall_timeout_s=2.0)
            for _ in range(20):
                assert watchdog.check() is None
                time.sleep(0.05)
            os.kill(engine.device.pid, signal.SIGSTOP)
            try:
                deadline = time.monotonic() + PATIENCE_S
                while (verdict := watchdog.check()) is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                os.kill(engine.device.pid, signal.SIGCONT)
            assert verdict.symptom == Symptom.HEARTBEAT_STALL and "hangs" in verdict.text
            while watchdog.check() is not None:
                assert time.monotonic() < deadline, "it beats again"
                time.sleep(0.05)
            del watchdog


def test_sigterm_drains_the_host(tiny: Path) -> None:
    sigterm_drains_the_host(tiny)


def test_parked_device_that_cannot_go_on_is_a_fault(tiny: Path) -> None:
    def resume() -> None:
        raise RuntimeError("cuLaunchCooperativeKernel: got CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE")

    engine = Engine(engine_config(tiny, num_threads=1))
    engine.start()
    try:
        with open_engine_page(engine.config.engine_name, writable=True) as page:
            os.kill(engine.device.pid, signal.SIGSTOP)  # type: ignore[attr-defined]  # its state word is ours now
            status = page.view(abi.ENGINE_PAGE)["status"]
            with open_queue_pair(engine.config.engine_name, 0) as queue_pair:
                status["state"] = EngineState.PARKED
                engine._wake = WakeThread(Doorbell(page, [queue_pair]), resume)
                engine.check()
                ingress = queue_pair.view(abi.QUEUE_PAIR)["ingress"]
                ingress["epoch"] = 1  # somebody attaches
                wait_for(lambda: engine._wake.failure is not None, PATIENCE_S, "the relaunch fails")  # type: ignore[union-attr]
                with pytest.raises(EngineFaultError, match="COOPERATIVE_LAUNCH_TOO_LARGE") as caught:
                    engine.check()
                assert caught.value.verdict is not None and caught.value.verdict.symptom == Symptom.CUDA_ERROR
                engine._wake.close()
                del ingress
            del status
        engine.abandon()
    finally:
        engine.stop()
    assert not list(SHM_DIR.glob(f"blinkimp.{engine.config.engine_name}.*"))
