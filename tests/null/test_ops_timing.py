"""tools/ops_timing.py on a clock of its own: what a launch costs is left out, a rested GPU's time and a hot one's are told apart, joules and watts.

Run: pytest tests/null/test_ops_timing.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

from blinkimp.host.power import Reading
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from ops_timing import Figures, Settings, TimingError, burst_unit_s, measure_loads, rough_unit_s


@dataclass
class Bench:
    """A GPU that does units of work, its clock and its power: units take twice as long once it has worked for hot_after_s without a pause."""

    unit_s: float
    launch_s: float = 50e-6
    hot_after_s: float = 1e9
    per_step: float = 32.0
    max_units: int = 1 << 17
    name: str = "bench"
    driver: str = "1.0"
    counter_period_s: float = 0.0  # of the energy counter: 0, it never stands still
    now_s: float = 0.0
    worked_s: float = 0.0  # since the last pause
    busy_s: float = 0.0
    prepared: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    num_begun: int = 0

    def now_ns(self) -> int:
        return round(self.now_s * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.worked_s = 0.0

    def begin(self) -> None:
        self.num_begun += 1

    def prepare(self, num_units: int) -> None:
        assert num_units <= self.max_units
        self.prepared.append(num_units)

    def run(self, num_units: int) -> None:
        assert num_units <= self.prepared[-1]
        self.ran.append(num_units)
        cool_units = min(num_units, max(0, round((self.hot_after_s - self.worked_s) / self.unit_s)))
        seconds = (2 * num_units - cool_units) * self.unit_s
        self.now_s += self.launch_s + seconds
        self.worked_s += seconds
        self.busy_s += seconds

    def read(self) -> Reading:
        energy_j = 100 * (self.now_s - self.busy_s) + 700 * self.busy_s
        return Reading(700.0, energy_j, 1400, 3201)


@pytest.mark.parametrize("unit_us", [5, 60, 900, 3000, 7000])
def test_a_burst_is_what_units_take_without_the_launch(unit_us: int) -> None:
    bench = Bench(unit_us / 1e6, hot_after_s=0.03)
    assert burst_unit_s(bench, Settings(), bench) == pytest.approx(unit_us / 1e6, rel=1e-6)
    bursts = bench.ran[-6:]
    assert bursts == [bursts[0], bursts[0] // 2] * 3 and 0.7 < bursts[0] * bench.unit_s / 0.025 < 1.3


def test_a_unit_longer_than_a_burst_is_measured_less_an_empty_run() -> None:
    bench = Bench(0.24, per_step=1, launch_s=0.01)
    assert burst_unit_s(bench, Settings(), bench) == pytest.approx(0.24, rel=1e-6)
    assert bench.ran[-6:] == [1, 0] * 3


def test_one_run_that_something_disturbed_does_not_count() -> None:
    class Disturbed(Bench):
        num_pauses = 0

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            self.num_pauses += 1

        def run(self, num_units: int) -> None:
            super().run(num_units)
            self.now_s += 0.5 if self.num_pauses in (3, 6) else 0.0  # of one long burst and of one short one

    bench = Disturbed(20e-6)
    assert burst_unit_s(bench, Settings(), bench) == pytest.approx(20e-6, rel=1e-6)
    assert bench.now_s > 1


def test_bursts_that_contradict_each_other_are_an_error() -> None:
    class Contrary(Bench):
        def run(self, num_units: int) -> None:
            super().run(num_units)
            self.now_s += 0.1 if self.ran[-2:-1] == [2 * num_units] else 0.0

    bench = Contrary(25e-6 / 2)
    with pytest.raises(
        TimingError, match=r"bursts of \d+ and \d+ units: got 24\.\d+ and 112\.\d+ ms, expected the first"
    ):
        burst_unit_s(bench, Settings(), bench)


def test_the_rough_time_of_short_units_is_not_the_launchs() -> None:
    bench = Bench(5e-6, per_step=1, launch_s=50e-6)
    assert rough_unit_s(bench, bench) == pytest.approx(5e-6, rel=0.15)
    assert bench.max_units >= max(bench.prepared) > 50


def test_a_long_run_tells_the_time_of_a_hot_gpu_and_its_energy() -> None:
    bench = Bench(20e-6, hot_after_s=0.1)
    figures = measure_loads({"qkv": bench}, Settings(), bench, bench)["qkv"]
    step_s = 32 * 40e-6
    assert figures.ms == pytest.approx(32 * 0.02, rel=1e-3)
    assert figures.sustained_ms == pytest.approx(step_s * 1e3, rel=1e-3)
    assert figures.watts == pytest.approx(700, rel=2e-3)
    assert figures.joules == pytest.approx(700 * step_s, rel=2e-3)
    assert bench.num_begun == 2  # before its bursts, and before it goes on


def test_as_many_runs_as_the_seconds_take() -> None:
    bench = Bench(5e-6, per_step=1, max_units=20_000)  # 0.1 s
    measure_loads({"sample": bench}, Settings(), bench, bench)
    assert len(bench.ran) > 8 and sum(bench.ran[-7:]) * 5e-6 >= 0.6
    assert len(set(bench.ran[-7:])) == 1
    long = Bench(0.24, per_step=1)
    figures = measure_loads({"all": long}, Settings(), long, long)["all"]
    assert long.ran[-1] == 3 and figures.sustained_ms == pytest.approx(240, rel=1e-3)


def test_loads_rest_before_their_bursts_and_all_bursts_come_first() -> None:
    events: list[str] = []

    class Noted(Bench):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            events.append("pause")

        def run(self, num_units: int) -> None:
            super().run(num_units)
            events.append("run" if num_units * self.unit_s < 0.05 else "long run")

    bench = Noted(20e-6)
    measure_loads({"one": bench, "two": bench}, Settings(), None, bench)
    assert events[0] == "pause" and events.count("pause") == 1 + 2 * 7
    assert events.count("long run") == 2 * 2  # warm-in and what counts
    first = events.index("long run")
    assert "pause" not in events[first:] and events[:first].count("pause") == 15


def test_without_seconds_there_are_bursts_alone_and_without_a_source_no_joules() -> None:
    bench = Bench(20e-6)
    assert measure_loads({"qkv": bench}, Settings(seconds=0), bench, bench)["qkv"] == Figures(ms=pytest.approx(0.64))
    assert max(bench.ran) * bench.unit_s < 0.05
    figures = measure_loads({"qkv": bench}, Settings(), None, bench)["qkv"]
    assert figures.sustained_ms == pytest.approx(0.64, rel=1e-3)
    assert (figures.joules, figures.watts, figures.sm_clock_mhz, figures.counter_step_s) == (None,) * 4


def test_an_interval_too_short_for_the_counter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds: got 0.1, expected at least 0.25"):
        Settings(seconds=0.1)
