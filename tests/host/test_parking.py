"""Parking: an idle engine leaves, and comes back when it is wanted, with everything where it was. Run: pytest tests/host/test_parking.py"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host import gpu_device, parking
from blinkimp.host.device_protocol import DeviceError
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.gpu_driver import GpuProperties
from blinkimp.host.parking import Doorbell, WakeThread
from blinkimp.host.shared_memory import EngineRegions, QueuePairGeometry, create_engine_regions
from blinkimp.host.watchdog import Watchdog
from blinkimp.ring_abi import EngineCommand, EngineState
from tests.host.engine_support import PortClient, running_engine, wait_for
from tests.support import PATIENCE_S

PARK_S = 0.15


@contextlib.contextmanager
def regions_of(num_queue_pairs: int) -> Iterator[EngineRegions]:
    """Shared memory of an engine that nobody runs."""
    name, geometry = f"parking-{secrets.token_hex(4)}", QueuePairGeometry(16, 16, 4096)
    regions = create_engine_regions(
        name, num_queue_pairs=num_queue_pairs, geometry=geometry, max_context=64, vocab_size=100
    )
    try:
        yield regions
    finally:
        regions.unlink()


def test_a_parked_engine_serves_as_if_nothing_had_happened(tiny: Path) -> None:
    """Q1, Q2: tokens, attached ingresses, ids, counters; requests, pings and cancels wake it; again and again."""
    with running_engine(tiny, park_after_s=PARK_S) as engine, PortClient(engine.config.engine_name, 0) as client:
        expected = client.generate([1, 2, 3], 15).tokens
        for turn in range(4):
            wait_for(lambda: engine.status()["state"] == EngineState.PARKED, PATIENCE_S, "the engine parks")
            status = engine.status()
            assert status["num_running"] == status["num_waiting"] == status["num_finishing"] == 0
            assert status["num_queue_pairs_attached"] == 1, "nobody lost the connection"
            engine.check()
            if turn == 2:
                client.port.try_ping(5, 6)
                wait_for(lambda: client.poll() > 0, PATIENCE_S, "the ping is answered")
            assert client.generate([1, 2, 3], 15).tokens == expected
        wait_for(lambda: engine.status()["finished_length"] == 5, PATIENCE_S, "the last one is counted")
        assert engine.status()["requests_accepted"] == 5
        ids = [client.submit([1, 2, 3], 15) for _ in range(8)]
        client.wait_all(PATIENCE_S)
        assert all(client.streams[i].tokens == expected for i in ids)
        engine.check()


def test_an_attach_wakes_it_and_a_long_nap_costs_nobody_the_connection(tiny: Path) -> None:
    with running_engine(tiny, park_after_s=PARK_S, ingress_timeout_s=2.0) as engine:
        wait_for(lambda: engine.status()["state"] == EngineState.PARKED, PATIENCE_S, "the engine parks")
        with PortClient(engine.config.engine_name, 0) as client:
            expected = client.generate([4, 5], 5).tokens
            wait_for(lambda: engine.status()["state"] == EngineState.PARKED, PATIENCE_S, "the engine parks")
            time.sleep(2.5)  # the heartbeat timeout and more, with nobody looking
            assert client.generate([4, 5], 5).tokens == expected
            assert engine.status()["ingress_drops"] == 0


def test_a_parked_engine_obeys_new_limits_and_parks_again(tiny: Path) -> None:
    with running_engine(tiny, park_after_s=PARK_S) as engine:
        for max_running in (3, 4):
            wait_for(lambda: engine.status()["state"] == EngineState.PARKED, PATIENCE_S, "the engine parks")
            assert engine.tune(max_running=max_running)["max_running"] == max_running
        assert engine.status()["tuning_generation"] == 2


def test_a_parked_engine_stops_and_drains(tiny: Path) -> None:
    with running_engine(tiny, park_after_s=PARK_S) as engine:
        assert isinstance(engine.device, EmulatedDevice)
        pid = engine.device.pid
        wait_for(lambda: engine.status()["state"] == EngineState.PARKED, PATIENCE_S, "the engine parks")
        assert engine.drain(PATIENCE_S)
        assert engine.halt(), "it ends by itself"
        assert engine.status()["state"] == EngineState.STOPPED
        assert not Path(f"/proc/{pid}").exists()


def test_it_does_not_park_unless_asked(tiny: Path) -> None:
    with running_engine(tiny) as engine:
        time.sleep(0.5)
        assert engine.status()["state"] == EngineState.RUNNING


def test_what_rings() -> None:
    """A submission of an attached ingress, an attach, a detach, new limits, a command; not what an ingress of the past left behind."""
    with regions_of(2) as regions:
        doorbell = Doorbell(regions.engine_page, regions.queue_pairs)
        words = regions.queue_pairs[1].view(abi.QUEUE_PAIR)[0]
        page = regions.engine_page.view(abi.ENGINE_PAGE)[0]
        assert not doorbell.is_parked() and not doorbell.rings()
        page["status"]["state"] = EngineState.PARKED
        assert doorbell.is_parked()
        words["ingress"]["epoch"] = 1
        assert doorbell.rings(), "attach"
        words["director"]["epoch"] = 1
        assert not doorbell.rings()
        words["ingress"]["submission_producer_pos"] = 3
        assert doorbell.rings(), "submission"
        words["director"]["submission_consumer_pos"] = 3
        assert not doorbell.rings()
        words["ingress"]["epoch"] = 2
        assert doorbell.rings(), "detach"
        words["director"]["epoch"] = 2
        words["ingress"]["submission_producer_pos"] = 9
        assert not doorbell.rings(), "nobody is attached"
        page["control"]["tuning_generation"] = 1
        assert doorbell.rings(), "limits"
        page["status"]["tuning_generation"] = 1
        assert not doorbell.rings()
        page["control"]["command"] = EngineCommand.DRAIN
        assert doorbell.rings(), "command"


class RecordingContext:
    """A GPU's context that does nothing; says what it was asked for."""

    properties = GpuProperties("Recorded H200", (9, 0), 3, 8 << 30, 13000)

    def __init__(self, device_idx: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, call: str) -> Callable[..., Any]:
        def record(*arguments: Any, **named: Any) -> Any:
            self.calls.append((call, *arguments, *named.items()))
            return {
                "create_stream": "stream",
                "load_kernel": "kernel",
                "register_host": arguments[:1] and arguments[0],
            }.get(call)

        return record


def test_a_parked_gpu_is_launched_again_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token after an idle time waits for what resume() does: two entries of the stream, in order, and no look at its end."""
    monkeypatch.setattr(gpu_device, "GpuContext", RecordingContext)
    device = gpu_device.GpuDevice()
    params = np.zeros(1, abi.ENGINE_PARAMS)
    params["grid_words"] = 0x5000
    monkeypatch.setattr(gpu_device, "allocate_engine", lambda *_: params)
    with pytest.raises(DeviceError, match=r"resume\(\) before start"):
        device.resume()
    with regions_of(1) as regions:
        times = {"ingress_timeout_ns": 1, "spin_budget_ns": 2, "parked_after_ns": 3}
        launch: Any = SimpleNamespace(regions=regions, model=None, sizes=None, **times)
        shape: Any = SimpleNamespace(kind="portable", shared_memory_bytes=1 << 10, num_threads=384)
        kernel: Any = SimpleNamespace(cubin=b"")
        model: Any = SimpleNamespace(dims=None, ops=None)
        device._launch(launch, shape, kernel, model)
        context: Any = device._context
        first = context.calls[-1]
        assert first[0] == "launch" and ("stream", "stream") in first and ("cooperative", True) in first
        context.calls.clear()
        device.resume()
        assert context.calls == [
            ("make_current",),
            ("start_fill", 0x5000, 0, abi.GRID_WORDS_BYTES, "stream"),
            first,
        ]


class StoppedDevice:
    def is_alive(self) -> bool:
        return True

    def fault(self) -> str | None:
        return None


def test_the_host_wakes_a_gpu_and_the_watchdog_lets_it_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU's host does, with a device that only counts."""
    with regions_of(1) as regions:
        page = regions.engine_page.view(abi.ENGINE_PAGE)[0]
        words = regions.queue_pairs[0].view(abi.QUEUE_PAIR)[0]
        resumed, is_wanted = threading.Event(), threading.Event()
        naps: list[float] = []  # of the wake thread, in order
        naps_before_ring: list[int] = []
        naps_before_resume: list[int] = []

        def nap(duration_s: float) -> None:
            """An ingress attaches while the wake thread sleeps, so that it must see it at its very next look."""
            naps.append(duration_s)
            if is_wanted.is_set() and page["status"]["state"] == EngineState.PARKED:
                is_wanted.clear()
                naps_before_ring.append(len(naps))
                words["ingress"]["epoch"] += 1
            time.sleep(duration_s)

        def resume() -> None:
            naps_before_resume.append(len(naps))
            page["status"]["state"] = EngineState.RUNNING
            words["director"]["epoch"] = words["ingress"]["epoch"]
            resumed.set()

        monkeypatch.setattr(parking, "time", SimpleNamespace(sleep=nap))

        now = [0.0]
        watchdog = Watchdog(regions.engine_page, StoppedDevice(), stall_timeout_s=5, clock=lambda: now[0])
        page["status"]["state"] = EngineState.PARKED
        for _ in range(100):
            now[0] += 0.4
            assert watchdog.check() is None, "a parked device has no heartbeat"
        wake = WakeThread(Doorbell(regions.engine_page, regions.queue_pairs), resume)
        assert not resumed.wait(0.1)
        for _ in range(5):
            num_before = len(naps)  # the nap of now may be one that began while the device ran
            wait_for(lambda: len(naps) >= num_before + 2, PATIENCE_S, "it looks at a parked device")  # noqa: B023  waited for here
            is_wanted.set()
            assert resumed.wait(PATIENCE_S)
            resumed.clear()
            page["status"]["state"] = EngineState.PARKED
        wake.close()
        assert naps_before_resume == naps_before_ring and len(naps_before_ring) == 5, "at the next look"
        assert {naps[idx - 1] for idx in naps_before_ring} == {parking.PARKED_LOOK_S}, "while parked it looks often"
        assert parking.PARKED_LOOK_S <= 0.001
