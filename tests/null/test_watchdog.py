"""What the watchdog calls a fault, and what not. Test: pytest tests/null/test_watchdog.py"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import EngineRegions, QueuePairGeometry, create_engine_regions
from blinkimp.host.watchdog import Symptom, Verdict, Watchdog, describe_fault, fault_site_names
from tests.support import ROOT


class FakeDevice:
    def __init__(self) -> None:
        self.alive = True
        self.reason: str | None = None

    def is_alive(self) -> bool:
        return self.alive

    def fault(self) -> str | None:
        return self.reason


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A watchdog over a real engine page, a device and a clock of the test's."""

    def __init__(self, regions: EngineRegions) -> None:
        self.page: Any = regions.engine_page.view(abi.ENGINE_PAGE)
        self.device, self.clock = FakeDevice(), FakeClock()
        self.watchdog = Watchdog(regions.engine_page, self.device, stall_timeout_s=2.0, clock=self.clock)
        self.page["status"]["state"] = abi.EngineState.RUNNING

    def beat(self) -> None:
        self.page["status"]["heartbeat"] += 1

    def look_for(self, duration_s: float, *, beating: bool) -> Verdict | None:
        for _ in range(round(duration_s / 0.1)):
            self.clock.now += 0.1
            if beating:
                self.beat()
            if verdict := self.watchdog.check():
                return verdict
        return None


@pytest.fixture
def bench() -> Iterator[Bench]:
    regions = create_engine_regions(
        f"test-{uuid.uuid4().hex[:12]}",
        num_queue_pairs=1,
        geometry=QueuePairGeometry(2, 2, 4096),
        max_context=1,
        vocab_size=1,
    )
    yield Bench(regions)
    regions.unlink()


def test_beating_heart_is_well(bench: Bench) -> None:
    assert bench.look_for(60, beating=True) is None


def test_heart_that_stands_still_is_reported_after_the_timeout(bench: Bench) -> None:
    bench.look_for(1, beating=True)
    assert bench.look_for(1.8, beating=False) is None
    verdict = bench.look_for(1.0, beating=False)
    assert verdict is not None and verdict.symptom == Symptom.HEARTBEAT_STALL
    assert "heartbeat stands" in verdict.text and "RUNNING" in verdict.text


def test_host_that_was_stopped_for_an_hour_blames_nobody(bench: Bench) -> None:
    bench.look_for(1, beating=True)
    bench.clock.now += 3600  # SIGSTOP ... SIGCONT: one look, an old heartbeat at first
    assert bench.watchdog.check() is None
    assert bench.look_for(1.0, beating=False) is None, "a device that was frozen with us gets time to beat again"
    assert bench.look_for(5.0, beating=True) is None


def test_fault_record_is_decoded_with_the_name_of_its_site(bench: Bench) -> None:
    site, name = next(iter(fault_site_names().items()))
    fault = bench.page["fault"]
    fault["site"], fault["expected"], fault["seen"], fault["step"] = site, 0x10, 0x11, 42
    fault["code"] = abi.FaultCode.INTEGRITY
    verdict = bench.watchdog.check()
    assert verdict is not None and verdict.symptom == Symptom.FAULT_RECORD
    for part in ("INTEGRITY", name, "expected 0x10", "seen 0x11", "step 42"):
        assert part in verdict.text


def test_unknown_codes_and_sites_are_shown_as_numbers(bench: Bench) -> None:
    bench.page["fault"]["code"], bench.page["fault"]["site"] = 99, 9999
    text = describe_fault(bench.page["fault"][0])
    assert "unknown fault code 99" in text and "site 9999" in text


def test_fault_sites_are_those_of_the_header() -> None:
    names = fault_site_names()
    assert len(names) >= 10 and all(name.startswith("kSite") for name in names.values())
    assert "kSitePageCount" in names.values() and "kSiteGridBarrier" in names.values()
    in_code = set(re.findall(r"\bkSite\w+", (ROOT / "device" / "fault.cuh").read_text()))
    assert set(names.values()) == in_code, "two sites of one number: a report would name the wrong wait"


def test_dead_device_is_reported_with_its_reason(bench: Bench) -> None:
    bench.device.alive, bench.device.reason = False, "emulated device (process 7) was killed by SIGKILL"
    verdict = bench.watchdog.check()
    assert verdict is not None and verdict.symptom == Symptom.DEVICE_DEATH
    assert "killed by SIGKILL" in verdict.text and "RUNNING" in verdict.text


def test_lost_context_is_told_from_a_dead_process(bench: Bench) -> None:
    bench.device.alive, bench.device.reason = (
        False,
        "cuStreamQuery: got CUDA_ERROR_LAUNCH_FAILED, expected CUDA_SUCCESS",
    )
    verdict = bench.watchdog.check()
    assert verdict is not None and verdict.symptom == Symptom.CUDA_ERROR and "LAUNCH_FAILED" in verdict.text


def test_record_of_a_fault_explains_more_than_the_death_it_led_to(bench: Bench) -> None:
    bench.page["fault"]["code"], bench.page["fault"]["site"] = abi.FaultCode.SPIN_EXPIRED, 100
    bench.device.alive, bench.device.reason = (
        False,
        "cuStreamQuery: got CUDA_ERROR_LAUNCH_FAILED, expected CUDA_SUCCESS",
    )
    verdict = bench.watchdog.check()
    assert verdict is not None and verdict.symptom == Symptom.FAULT_RECORD and "kSiteGridBarrier" in verdict.text


def test_state_word_of_a_broken_device_harms_nobody(bench: Bench) -> None:
    bench.page["status"]["state"] = 99
    bench.device.alive = False
    verdict = bench.watchdog.check()
    assert verdict is not None and "unknown (99)" in verdict.text


def test_device_that_stopped_in_order_is_no_fault(bench: Bench) -> None:
    bench.page["status"]["state"] = abi.EngineState.STOPPED
    bench.device.alive = False
    assert bench.watchdog.check() is None
