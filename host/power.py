"""Power and energy of the GPUs by NVML, through libnvidia-ml.so.1 alone: no package to install.

    with PowerMeter(open_nvml()) as meter:          samples in a thread of its own
        begin_ns = time.monotonic_ns(); ...; end_ns = time.monotonic_ns()
    meter.energy_j(begin_ns, end_ns)                None when too short for the counter

NVML's energy counter advances in steps of up to 100 ms, so an interval below MIN_INTERVAL_S has no figure. On GPUs without the counter
the mean of the power samples takes its place. Called by tools/bench_step.py, tools/torch_baseline.py, tools/power_idle.py and
blinkimp/bench. Test: pytest tests/null/test_power.py
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

MIN_INTERVAL_S: Final = 0.25
PERIOD_S: Final = 0.02
SUCCESS: Final = 0
CLOCK_SM: Final = 1
CLOCK_MEMORY: Final = 2


class PowerError(RuntimeError):
    """NVML is missing or refuses; the message says what, got, expected, remedy."""


@dataclass(frozen=True)
class Reading:
    """What one GPU says at one moment."""

    power_w: float
    energy_j: float | None  # since the driver was loaded
    sm_clock_mhz: int
    memory_clock_mhz: int


class PowerSource(Protocol):
    """Where readings come from; the tests have one of their own."""

    name: str
    driver: str

    def read(self) -> Reading: ...


def visible_gpu() -> int | str:
    """The GPU that this process computes on: the first of CUDA_VISIBLE_DEVICES, an index or the beginning of a UUID; without it, GPU 0.

    NVML does not look at that variable, and counts GPUs as the bus does; the driver does so too, unless they are of several kinds.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    first = visible.split(",")[0].strip()
    if first.isdecimal():
        return int(first)
    if first.startswith("GPU-"):
        return first
    raise PowerError(
        f"CUDA_VISIBLE_DEVICES: got {visible!r}, expected an index or a GPU-... UUID (a part of a GPU, MIG-..., tells no power); "
        "run without energy figures"
    )


class Nvml:
    """One GPU, by its index or the beginning of its UUID, through libnvidia-ml.so.1. Raises PowerError where there is none."""

    def __init__(self, gpu: int | str) -> None:
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise PowerError(
                f"libnvidia-ml.so.1: got {error}, expected NVIDIA's driver library; install the driver, or run without energy figures"
            ) from error
        self._check(self._library.nvmlInit_v2(), "nvmlInit_v2")
        self._handle = self._by_index(gpu) if isinstance(gpu, int) else self._by_uuid(gpu)
        self.name = self._text("nvmlDeviceGetName", self._handle)
        self.driver = self._text("nvmlSystemGetDriverVersion")
        self._has_counter = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong()) is not None

    def _by_index(self, gpu_idx: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        call = "nvmlDeviceGetHandleByIndex_v2"
        self._check(self._library[call](ctypes.c_uint(gpu_idx), ctypes.byref(handle)), f"{call}({gpu_idx})")
        return handle

    def _by_uuid(self, begin: str) -> ctypes.c_void_p:
        num_gpus = ctypes.c_uint()
        self._check(self._library.nvmlDeviceGetCount_v2(ctypes.byref(num_gpus)), "nvmlDeviceGetCount_v2")
        uuids = []
        for gpu_idx in range(num_gpus.value):
            handle = self._by_index(gpu_idx)
            uuids.append(self._text("nvmlDeviceGetUUID", handle))
            if uuids[-1].startswith(begin):
                return handle
        raise PowerError(
            f"CUDA_VISIBLE_DEVICES: got {begin}, expected the beginning of one of {uuids}; see `nvidia-smi -L`"
        )

    def read(self) -> Reading:
        power_mw = self._ask("nvmlDeviceGetPowerUsage", ctypes.c_uint())
        if power_mw is None:
            raise PowerError(
                f"nvmlDeviceGetPowerUsage: {self.name} does not tell its power; expected it to; run without energy figures"
            )
        energy_mj = (
            self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong()) if self._has_counter else None
        )
        return Reading(
            power_mw / 1e3,
            None if energy_mj is None else energy_mj / 1e3,
            self._clock(CLOCK_SM),
            self._clock(CLOCK_MEMORY),
        )

    def _clock(self, which: int) -> int:
        value = ctypes.c_uint()
        status = self._library.nvmlDeviceGetClockInfo(self._handle, ctypes.c_int(which), ctypes.byref(value))
        return value.value if status == SUCCESS else 0

    def _ask(self, call: str, value: Any) -> int | None:
        """The number that a query of this GPU gives, or None where it does not know it."""
        return int(value.value) if self._library[call](self._handle, ctypes.byref(value)) == SUCCESS else None

    def _text(self, call: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(128)
        self._check(self._library[call](*arguments, buffer, ctypes.c_uint(len(buffer))), call)
        return buffer.value.decode()

    def _check(self, status: int, call: str) -> None:
        if status != SUCCESS:
            raise PowerError(f"{call}: got NVML status {status}, expected {SUCCESS}; check `nvidia-smi`")


def open_nvml() -> PowerSource | None:
    """The power source of the GPU that this process computes on, or None on a machine without one."""
    try:
        return Nvml(visible_gpu())
    except PowerError:
        return None


class PowerMeter:
    """Samples a source while inside `with`. Without a source every figure is None."""

    def __init__(
        self, source: PowerSource | None, *, period_s: float = PERIOD_S, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._source, self._period_s, self._clock_ns = source, period_s, clock_ns
        self._samples: list[tuple[int, Reading]] = []
        self._failure: PowerError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)

    def sample(self) -> None:
        """One reading, now."""
        if self._source is not None:
            reading = self._source.read()
            self._samples.append((self._clock_ns(), reading))

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._period_s):
                self.sample()
        except PowerError as error:  # raised again where figures are asked for
            self._failure = error

    def __enter__(self) -> Self:
        self.sample()
        if self._source is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._source is not None:
            self._thread.join()
            if self._failure is None:
                self.sample()

    def energy_j(self, begin_ns: int, end_ns: int) -> float | None:
        """Joules between two moments of the clock. None: no source, or too short an interval."""
        if self._failure is not None:
            raise self._failure
        if not self._samples or (end_ns - begin_ns) / 1e9 < MIN_INTERVAL_S:
            return None
        if self._samples[-1][0] < end_ns:  # the thread's next one is up to a period away
            self.sample()
        samples = sorted(self._samples, key=lambda sample: sample[0])
        at_ns = np.array([moment for moment, _ in samples], np.int64)
        counted = [reading.energy_j for _, reading in samples]
        if all(value is not None for value in counted):
            return counted_between(at_ns, np.array(counted, np.float64), begin_ns, end_ns)
        is_inside = (at_ns >= begin_ns) & (at_ns <= end_ns)
        power_w = np.array([reading.power_w for _, reading in samples])
        return float(power_w[is_inside].mean() * (end_ns - begin_ns) / 1e9) if is_inside.any() else None

    def power_w(self, begin_ns: int, end_ns: int) -> float | None:
        """Mean power between two moments."""
        energy_j = self.energy_j(begin_ns, end_ns)
        return None if energy_j is None else energy_j / ((end_ns - begin_ns) / 1e9)

    def samples(self) -> list[tuple[int, Reading]]:
        """(time, reading) so far."""
        return list(self._samples)


def counted_between(at_ns: NDArray[np.int64], energy_j: NDArray[np.float64], begin_ns: int, end_ns: int) -> float:
    """Joules between two moments out of readings of a counter that stands still between its steps.

    Only the readings right after a step are up to date, so the line is drawn through those, and goes on straight at its ends.
    """
    is_fresh = np.concatenate(([False], np.diff(energy_j) > 0))
    if is_fresh.sum() >= 2:
        at_ns, energy_j = at_ns[is_fresh], energy_j[is_fresh]

    def at(moment_ns: int) -> float:
        inside = float(np.interp(moment_ns, at_ns, energy_j))
        if len(at_ns) < 2 or at_ns[0] <= moment_ns <= at_ns[-1]:
            return inside
        one, two = (0, 1) if moment_ns < at_ns[0] else (-2, -1)
        slope = (energy_j[two] - energy_j[one]) / max(1, at_ns[two] - at_ns[one])
        return inside + float(slope) * (moment_ns - int(at_ns[0 if moment_ns < at_ns[0] else -1]))

    return at(end_ns) - at(begin_ns)


def per_token(energy_j: float | None, seconds: float, num_tokens: int, idle_w: float | None) -> dict[str, float | None]:
    """Joules a token as drawn, and what an idle GPU draws anyway subtracted.

    Nothing is subtracted where idling drew more than the load, by more than a meter's spread: then what was measured was not idling.
    """
    if energy_j is None or num_tokens == 0:
        return {"power_w": None, "j_per_token": None, "j_per_token_above_idle": None}
    power_w = energy_j / seconds
    above = None
    if idle_w is not None and idle_w <= 1.02 * power_w:
        above = round((power_w - idle_w) * seconds / num_tokens, 6)
    return {
        "power_w": round(power_w, 2),
        "j_per_token": round(energy_j / num_tokens, 6),
        "j_per_token_above_idle": above,
    }


def idle_power_w(source: PowerSource | None, seconds: float) -> float | None:
    """Mean power while this process does nothing for so long."""
    with PowerMeter(source) as meter:
        begin_ns = time.monotonic_ns()
        if source is not None:
            time.sleep(seconds)
        end_ns = time.monotonic_ns()
    return meter.power_w(begin_ns, end_ns)
