"""Time and energy of some work that can be repeated at will: a burst on a rested GPU, and a run so long that power and clock have settled.

    figures = measure_loads({"qkv": load, ...}, Settings(), open_nvml())      -> Figures by name

Burst: runs of about 25 ms, each after a pause; the time of one less that of one of half as many units leaves the launch out. Sustained: after a
warm-in, --seconds of it without a pause, and the joules that NVML's counter shows between begin and end. The counter moves in steps of up to
0.1 s: Figures.counter_step_s says what was seen, and the energy before the last step is taken to go on as it was.
Called by tools/ops_engine.py and tools/torch_ops.py. Test: pytest tests/null/test_ops_timing.py
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from blinkimp.host.power import MIN_INTERVAL_S, PowerMeter, PowerSource

CALIBRATION_S: Final = 0.004  # a run at least so long says what a unit takes; the launch is 1 % of it


class TimingError(RuntimeError):
    """Figures would mean nothing; the message says what, got, expected, remedy."""


class Load(Protocol):
    """Work in equal units: a part's ops, whole programs, replays of a graph."""

    per_step: float  # units that a step has
    max_units: int  # in one run

    def begin(self) -> None:
        """Brings about the state that the work is done in."""

    def prepare(self, num_units: int) -> None:
        """Room for runs of up to so many units."""

    def run(self, num_units: int) -> None:
        """Returns when they are done. 0: what a run costs without any."""


class Clock(Protocol):
    """Time; the tests have one of their own."""

    def now_ns(self) -> int: ...

    def sleep(self, seconds: float) -> None: ...


class WallClock:
    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Settings:
    seconds: float = 0.6  # that energy is taken over; 0: bursts alone
    burst_s: float = 0.025
    num_bursts: int = 3
    pause_s: float = 0.05  # before each burst
    rest_s: float = 0.3  # before a row's bursts: what ran before was long
    warm_s: float = 0.2  # before the seconds that count

    def __post_init__(self) -> None:
        if self.seconds and self.seconds < MIN_INTERVAL_S:
            raise ValueError(
                f"seconds: got {self.seconds:g}, expected at least {MIN_INTERVAL_S} for the energy counter, or 0 for bursts alone"
            )

    def load_s(self) -> float:
        """About what one load takes."""
        bursts_s = self.num_bursts * (2 * self.pause_s + 1.5 * self.burst_s)
        return bursts_s + self.pause_s + 0.03 + (self.warm_s + 1.1 * self.seconds + 0.03 if self.seconds else 0.0)


@dataclass(frozen=True)
class Figures:
    """Of one part of one step. None: not measured."""

    ms: float  # of a burst
    sustained_ms: float | None = None
    joules: float | None = None
    watts: float | None = None
    sm_clock_mhz: float | None = None
    counter_step_s: float | None = None  # the longest between two steps of the energy counter


def run_s(load: Load, num_units: int, clock: Clock) -> float:
    begin_ns = clock.now_ns()
    load.run(num_units)
    return (clock.now_ns() - begin_ns) / 1e9


def rough_unit_s(load: Load, clock: Clock) -> float:
    """Seconds of a unit, to choose the length of runs by. Short: a hot GPU's unit would make the bursts too short."""
    num_units, seconds = 1, 0.0
    load.prepare(num_units)
    load.run(num_units)  # warms up
    while True:
        seconds = run_s(load, num_units, clock)
        if seconds >= CALIBRATION_S or num_units == load.max_units:
            return seconds / num_units
        num_units = min(load.max_units, math.ceil(1.2 * num_units * CALIBRATION_S / max(seconds, 1e-6)))
        load.prepare(num_units)


def units_for(seconds: float, unit_s: float, load: Load) -> int:
    return max(1, min(load.max_units, round(seconds / unit_s)))


def burst_unit_s(load: Load, settings: Settings, clock: Clock) -> float:
    """Seconds of a unit on a rested GPU."""
    clock.sleep(settings.pause_s)
    num_long = units_for(settings.burst_s, rough_unit_s(load, clock), load)
    num_short = num_long // 2
    load.prepare(num_long)
    times: dict[int, list[float]] = {num_long: [], num_short: []}
    for _ in range(settings.num_bursts):
        for num_units, seconds in times.items():
            clock.sleep(settings.pause_s)
            seconds.append(run_s(load, num_units, clock))
    long_s, short_s = (statistics.median(times[num_units]) for num_units in (num_long, num_short))
    if long_s <= short_s:
        raise TimingError(
            f"bursts of {num_long} and {num_short} units: got {long_s * 1e3:.3f} and {short_s * 1e3:.3f} ms, expected the first to take longer; "
            "something else runs on this GPU or on its CPU: look at nvidia-smi and top, and measure again"
        )
    return (long_s - short_s) / (num_long - num_short)


def counter_step_s(meter: PowerMeter) -> float | None:
    """The longest time between two readings that show more energy than the one before."""
    moments_ns = [
        at_ns
        for (_, before), (at_ns, reading) in itertools.pairwise(meter.samples())
        if before.energy_j is not None and reading.energy_j is not None and reading.energy_j > before.energy_j
    ]
    return max((later - earlier for earlier, later in itertools.pairwise(moments_ns)), default=0) / 1e9 or None


def sustain(load: Load, unit_s: float, settings: Settings, source: PowerSource | None, clock: Clock) -> Figures:
    """Runs one behind the other for as long as asked. Figures.ms is the burst's, as given."""
    wanted = max(1, math.ceil(1.05 * settings.seconds / unit_s))  # a unit may take less than in a burst
    num_runs = math.ceil(wanted / load.max_units)
    num_units = math.ceil(wanted / num_runs)
    load.prepare(num_units)
    with PowerMeter(source, clock_ns=clock.now_ns) as meter:
        load.run(min(num_units, units_for(settings.warm_s, unit_s, load)))
        begin_ns = clock.now_ns()
        for _ in range(num_runs):
            load.run(num_units)
        end_ns = clock.now_ns()
    seconds = (end_ns - begin_ns) / 1e9
    step_s = seconds / (num_runs * num_units) * load.per_step
    watts = meter.power_w(begin_ns, end_ns)
    clocks = [reading.sm_clock_mhz for at_ns, reading in meter.samples() if begin_ns <= at_ns <= end_ns]
    return Figures(
        ms=unit_s * load.per_step * 1e3,
        sustained_ms=step_s * 1e3,
        joules=None if watts is None else watts * step_s,
        watts=watts,
        sm_clock_mhz=statistics.fmean(clocks) if any(clocks) else None,
        counter_step_s=counter_step_s(meter),
    )


def measure_loads(
    loads: Mapping[str, Load], settings: Settings, source: PowerSource | None, clock: Clock | None = None
) -> dict[str, Figures]:
    """All bursts first, then all that goes on: so one rest is enough."""
    clock = clock or WallClock()
    clock.sleep(settings.rest_s)
    unit_s = {}
    for name, load in loads.items():
        load.begin()
        unit_s[name] = burst_unit_s(load, settings, clock)
    if not settings.seconds:
        return {name: Figures(ms=unit_s[name] * load.per_step * 1e3) for name, load in loads.items()}
    figures = {}
    for name, load in loads.items():
        load.begin()
        figures[name] = sustain(load, unit_s[name], settings, source, clock)
    return figures
