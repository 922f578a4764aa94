"""host/power.py: energy between two moments, from a counter or from power samples, and joules a token.

Run: pytest tests/null/test_power.py
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pytest

from blinkimp.host import power
from blinkimp.host.power import (
    MIN_INTERVAL_S,
    Nvml,
    PowerError,
    PowerMeter,
    Reading,
    idle_power_w,
    open_nvml,
    per_token,
    visible_gpu,
)
from tests.support import PATIENCE_S


class ScriptedGpu:
    """Draws 100 W up to 2 s of its clock and 400 W after that; a reading is taken at `now_s`."""

    name, driver = "scripted", "1.0"

    def __init__(self, has_counter: bool = True) -> None:
        self.has_counter = has_counter
        self.now_s = 0.0

    def clock_ns(self) -> int:
        return int(self.now_s * 1e9)

    def read(self) -> Reading:
        energy_j = 100 * min(self.now_s, 2.0) + 400 * max(0.0, self.now_s - 2.0)
        return Reading(100.0 if self.now_s < 2 else 400.0, energy_j if self.has_counter else None, 1980, 3201)


def metered(gpu: ScriptedGpu) -> PowerMeter:
    meter = PowerMeter(gpu, clock_ns=gpu.clock_ns)
    for tenth in range(41):
        gpu.now_s = tenth / 10
        meter.sample()
    return meter


@pytest.mark.parametrize("has_counter", [True, False])
def test_energy_between_two_moments_is_what_was_drawn_between_them(has_counter: bool) -> None:
    meter = metered(ScriptedGpu(has_counter))
    assert meter.energy_j(int(0.5e9), int(1.5e9)) == pytest.approx(100)
    assert meter.power_w(int(2.5e9), int(3.5e9)) == pytest.approx(400)
    if has_counter:  # moments between samples are interpolated
        assert meter.energy_j(int(1.55e9), int(2.25e9)) == pytest.approx(45 + 100)


def test_the_steps_of_a_coarse_counter_do_not_show() -> None:
    """It advances every 100 ms; readings come every 20 ms. 100 W up to 2 s, then 400 W: 50 + 400 J from 1.5 to 3 s."""

    class CoarseGpu(ScriptedGpu):
        def read(self) -> Reading:
            now_s, self.now_s = self.now_s, int(self.now_s * 10 + 1e-6) / 10
            reading, self.now_s = super().read(), now_s
            return reading

    gpu = CoarseGpu()
    meter = PowerMeter(gpu, clock_ns=gpu.clock_ns)
    for reading_idx in range(176):
        gpu.now_s = reading_idx * 0.02 + 0.003
        meter.sample()
    assert meter.energy_j(int(1.5e9), int(3e9)) == pytest.approx(450, rel=0.01)
    assert meter.energy_j(int(1.55e9), int(3.45e9)) == pytest.approx(45 + 580, rel=0.01)
    assert meter.energy_j(int(2.45e9), int(3.49e9)) == pytest.approx(416, rel=0.01)  # its end lies behind the last step


def test_an_interval_too_short_for_the_counter_has_no_figure() -> None:
    meter = metered(ScriptedGpu())
    assert meter.energy_j(int(1e9), int((1 + MIN_INTERVAL_S / 2) * 1e9)) is None


def test_without_a_source_there_are_no_figures_and_no_wait() -> None:
    with PowerMeter(None) as meter:
        began = time.monotonic()
    assert meter.energy_j(0, int(5e9)) is None and meter.samples() == []
    assert idle_power_w(None, 60.0) is None and time.monotonic() - began < 30


def test_a_failure_in_the_sampling_thread_is_raised_where_figures_are_asked_for() -> None:
    class Failing(ScriptedGpu):
        num_reads = 0

        def read(self) -> Reading:
            self.num_reads += 1
            if self.num_reads > 1:
                raise PowerError("gone")
            return super().read()

    gpu = Failing()
    with PowerMeter(gpu, period_s=0.001) as meter:
        deadline = time.monotonic() + PATIENCE_S
        while gpu.num_reads < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    with pytest.raises(PowerError, match="gone"):
        meter.energy_j(0, int(1e9))


def test_joules_a_token_with_and_without_what_an_idle_gpu_draws() -> None:
    """600 J in 2 s for 300 tokens beside 100 W of idleness: 2 J a token, of which (600 - 200) / 300 are the work's."""
    got = per_token(600.0, 2.0, 300, 100.0)
    assert got == {"power_w": 300.0, "j_per_token": 2.0, "j_per_token_above_idle": pytest.approx(4 / 3, abs=1e-6)}
    assert per_token(None, 2.0, 300, 100.0)["j_per_token"] is None
    assert per_token(600.0, 2.0, 300, None)["j_per_token_above_idle"] is None
    assert per_token(600.0, 2.0, 300, 690.0) == {
        "power_w": 300.0,
        "j_per_token": 2.0,
        "j_per_token_above_idle": None,
    }  # more than the load: not idling
    assert per_token(600.0, 2.0, 300, 301.0)["j_per_token_above_idle"] == pytest.approx(-1 / 150, abs=1e-6)


UUIDS = ("GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbcc3333-0000")


class FakeNvml:
    """libnvidia-ml.so.1 of three GPUs as far as it is called: `values` by call, a status other than 0 where there is none. A GPU's handle is
    one more than its index; the k-th draws k W more than `values` say."""

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values

    def __getitem__(self, call: str) -> Callable[..., int]:
        def ask(*arguments: Any) -> int:
            if call == "nvmlDeviceGetCount_v2":
                arguments[0]._obj.value = len(UUIDS)
            elif call == "nvmlDeviceGetHandleByIndex_v2":
                if arguments[0].value >= len(UUIDS):
                    return 2
                arguments[1]._obj.value = 1 + arguments[0].value
            elif call == "nvmlDeviceGetUUID":
                arguments[1].value = UUIDS[arguments[0].value - 1].encode()
            elif call in ("nvmlDeviceGetName", "nvmlSystemGetDriverVersion"):
                arguments[-2].value = b"GPU" if call == "nvmlDeviceGetName" else b"580.1"
            elif call == "nvmlDeviceGetClockInfo":
                call_and_clock = f"{call}{arguments[1].value}"
                arguments[-1]._obj.value = self.values.get(call_and_clock, 0)
                return 0 if call_and_clock in self.values else 3
            elif call in self.values:
                more = 1000 * (arguments[0].value - 1) if call == "nvmlDeviceGetPowerUsage" else 0
                arguments[-1]._obj.value = self.values[call] + more
            else:
                return 0 if call == "nvmlInit_v2" else 3
            return 0

        return ask

    __getattr__ = __getitem__


READINGS = {
    "nvmlDeviceGetPowerUsage": 350_500,
    "nvmlDeviceGetTotalEnergyConsumption": 12_345,
    "nvmlDeviceGetClockInfo1": 1980,
}


def nvml_of(values: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Nvml:
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: FakeNvml(values))
    return Nvml(0)


def test_nvml_gives_milliwatts_and_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = nvml_of(READINGS, monkeypatch)
    assert (nvml.name, nvml.driver) == ("GPU", "580.1")
    assert nvml.read() == Reading(350.5, 12.345, 1980, 0)  # this one does not tell its memory clock


def test_a_gpu_without_an_energy_counter_tells_its_power(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = nvml_of({"nvmlDeviceGetPowerUsage": 350_500}, monkeypatch)
    assert nvml.read() == Reading(350.5, None, 0, 0)


def test_a_gpu_that_tells_no_power_and_a_missing_library_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PowerError, match="does not tell its power"):
        nvml_of({}, monkeypatch).read()

    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(power.ctypes, "CDLL", missing)
    with pytest.raises(PowerError, match="expected NVIDIA's driver library"):
        Nvml(0)
    assert open_nvml() is None


@pytest.mark.parametrize(
    ("visible", "gpu_idx"),
    [
        (None, 0),
        ("0", 0),
        ("2", 2),
        (" 1,0", 1),
        (UUIDS[1], 1),
        (f"{UUIDS[2]},{UUIDS[0]}", 2),
        ("GPU-bbcc", 2),  # the driver takes the beginning of one
        ("", None),
        ("-1", None),
        ("3", None),
        ("GPU-dddd", None),
        ("MIG-aaaa1111-0000", None),
    ],
)
def test_the_power_is_that_of_the_gpu_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu_idx: int | None
) -> None:
    """None: this process sees no GPU, or a part of one."""
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: FakeNvml(READINGS))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    source = open_nvml()
    assert (None if source is None else source.read().power_w) == (None if gpu_idx is None else 350.5 + gpu_idx)


def test_a_gpu_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: FakeNvml(READINGS))
    with pytest.raises(PowerError, match=r"nvmlDeviceGetHandleByIndex_v2\(3\): got NVML status 2"):
        Nvml(3)
    with pytest.raises(PowerError, match=r"got GPU-dddd, expected the beginning of one of .*GPU-bbcc3333"):
        Nvml("GPU-dddd")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(PowerError, match="CUDA_VISIBLE_DEVICES: got '', expected an index"):
        visible_gpu()
