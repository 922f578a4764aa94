"""The interference lab: engines x placements x kinds of interference x intensities x loads, a cell each.

Intensity is threads per contested CPU; 0 is the isolated run that all others of its engine, placement and load are compared with. While a cell is
measured, the host's pressure, context switches, clocks and each engine process's CPU time are recorded, and the GPU's power. Processes that measure
an engine each, on GPUs of one host, may have a room in common (room.py): a cell then runs beside cells of the same interference alone.
Called by blinkimp/cli/lab.py; shown by interference_report.py. Test: pytest tests/host/test_lab_interference.py
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.bench.load_plan import LoadOptions
from blinkimp.bench.runner import Progress, run_load
from blinkimp.host.power import PowerSource
from blinkimp.lab.burner import KINDS, is_kind, missing_program
from blinkimp.lab.burner_pool import Burners
from blinkimp.lab.engines import EngineSpec, Placement, RunningEngine
from blinkimp.lab.host_monitor import difference, set_affinity, snapshot
from blinkimp.lab.room import Room
from blinkimp.lab.store import Store, difference_of, key_of
from blinkimp.lab.sweep import Point, parse_scenario

SETTLE_S: Final = 0.5  # between the interference's begin and the load's


@dataclass(frozen=True)
class Grid:
    """What is varied."""

    placements: Sequence[Placement]
    kinds: Sequence[str]
    intensities: Sequence[float]  # threads per contested CPU, or
    threads: Sequence[int]  # threads outright
    loads: Sequence[Point]
    duration_s: float
    warmup_s: float
    seed: int = 0
    ramp_s: float = 0.0  # of closed loops

    def disturbances(self, placement: Placement) -> Iterator[tuple[str, int]]:
        """(kind, threads), isolation first."""
        yield "none", 0
        num_cpus = len(placement.contested)
        counts = sorted({round(factor * num_cpus) for factor in self.intensities} | set(self.threads))
        for kind in self.kinds:
            for num_threads in counts:
                if num_threads > 0:
                    yield kind, num_threads


def parse_load(text: str) -> Point:
    """`r8:512x128` is 8 requests/s, `c16:1k1k` 16 users."""
    found = re.fullmatch(r"([rc])(\d+(?:\.\d+)?):(.+)", text)
    if not found or float(found[2]) <= 0:
        raise LoadError(
            f"load: got {text!r}, expected r<requests/s>:<lengths> or c<users>:<lengths>, such as r8:512x128 or c16:1k1k"
        )
    scenario = parse_scenario(found[3])
    return (
        Point(scenario, rate=float(found[2])) if found[1] == "r" else Point(scenario, concurrency=int(float(found[2])))
    )


def usable_kinds(kinds: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Those whose programs are here; the others are named."""
    usable = []
    for kind in kinds:
        if not is_kind(kind):
            raise LoadError(
                f"kind of interference: got {kind!r}, expected some of {', '.join(KINDS)}, or a mixture such as stream+bz2"
            )
        why = missing_program(kind)
        if why is None:
            usable.append(kind)
        else:
            say(f"interference {kind} is left out: {why}")
    return usable


@dataclass(frozen=True)
class CellPlan:
    """One cell before it is measured."""

    engine: EngineSpec
    placement: Placement
    kind: str
    num_threads: int
    load: Point

    @property
    def words(self) -> dict[str, Any]:
        return {
            "kind": "interference",
            "engine": self.engine.name,
            "placement": self.placement.name,
            "interference": self.kind,
            "threads": self.num_threads,
            "contested_cpus": len(self.placement.contested),
            "reserved_cpus": len(self.placement.reserved),
            "load": f"{self.load.scenario.name}, {self.load.name}",
        }

    @property
    def key(self) -> str:
        words = self.words
        return key_of(
            "interference", *(words[name] for name in ("engine", "placement", "interference", "threads", "load"))
        )

    @property
    def level(self) -> str:
        """Of a room: placement, kind and number of threads."""
        return f"{self.placement.name} {self.kind} {self.num_threads}"

    @property
    def label(self) -> str:
        words = self.words
        return f"{words['engine']}, {words['placement']}, {words['load']}, {words['threads']} threads of {words['interference']}"


def load_of(grid: Grid, point: Point) -> LoadOptions:
    """By duration in both loops, so that a slow engine does not make a cell longer."""
    return LoadOptions(
        rate=point.rate,
        concurrency=point.concurrency,
        duration_s=grid.duration_s,
        warmup_s=grid.warmup_s,
        ramp_s=0.0 if point.concurrency is None else grid.ramp_s,
        input_len=point.scenario.input_len,
        output_len=point.scenario.output_len,
        seed=grid.seed,
    )


def run_interference(
    engines: Sequence[EngineSpec],
    grid: Grid,
    store: Store,
    *,
    source: PowerSource | None = None,
    idle_w: float | None = None,
    start_timeout_s: float = 600.0,
    drain_s: float = 120.0,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = print,
    stop_after_s: float | None = None,
    room: Room | None = None,
) -> int:
    """Measures the cells that are not there yet; returns how many failed. stop_after_s: no cell begins later, nor waits for the room longer."""
    deadline = None if stop_after_s is None else time.monotonic() + stop_after_s
    plans = [
        CellPlan(engine, placement, kind, num_threads, load)
        for engine in engines
        for placement in grid.placements
        for kind, num_threads in grid.disturbances(placement)
        for load in grid.loads
    ]
    store.prepare()
    missing = []
    for plan in plans:
        if (before := store.get(plan.key)) is None:
            missing.append(plan)
        elif difference := difference_of(before, load_of(grid, plan.load).to_json()):
            say(f"{plan.key}: measured before{difference}")
    say(f"{len(plans)} cells, {len(plans) - len(missing)} of them measured before")
    own_cpus = os.sched_getaffinity(0)
    num_failed = num_done = 0
    try:
        for engine in engines:
            for placement in grid.placements:
                here = [plan for plan in missing if (plan.engine, plan.placement) == (engine, placement)]
                if not here or (deadline is not None and time.monotonic() > deadline):
                    continue
                # The engine starts on all CPUs: loading is not what is measured.
                set_affinity(os.getpid(), own_cpus)
                try:
                    with RunningEngine(engine, start_timeout_s) as running, Burners() as burners:
                        running.pin(placement)
                        set_affinity(os.getpid(), set(placement.reserved))
                        for plan in here:
                            left_s = math.inf if deadline is None else deadline - time.monotonic()
                            with (
                                contextlib.nullcontext(0) if room is None else room.enter(plan.level, left_s) as others
                            ):
                                if others is None or left_s < 0:
                                    break
                                progress("cells", len(plans) - len(missing) + num_done, len(plans))
                                cell = measure(plan, running, burners, grid, source, idle_w, drain_s, progress)
                            store.put(plan.key, cell)
                            say(line_of(plan, cell))
                            num_failed += "error" in cell
                            num_done += 1
                except LoadError as error:  # it did not start
                    num_failed += 1
                    say(f"{engine.name}, {placement.name}: {error}")
    finally:
        set_affinity(os.getpid(), own_cpus)
    if num_done < len(missing) and deadline is not None and time.monotonic() > deadline:
        say(
            f"stopped after {stop_after_s:g} s with {len(missing) - num_done} cells missing; the same command goes on with them"
        )
    return num_failed


def measure(
    plan: CellPlan,
    running: RunningEngine,
    burners: Burners,
    grid: Grid,
    source: PowerSource | None,
    idle_w: float | None,
    drain_s: float,
    progress: Progress,
) -> dict[str, Any]:
    """One cell: what it was, and its report or its error."""
    cell = plan.words
    kind = plan.kind if plan.num_threads else KINDS[0]
    try:
        with burners.burning(kind, plan.num_threads, set(plan.placement.contested)) as burner:
            time.sleep(SETTLE_S if plan.num_threads else 0.0)
            pids = list(running.processes)
            before = snapshot(pids)
            target = plan.engine.target()
            cell["report"] = asyncio.run(
                run_load(
                    load_of(grid, plan.load),
                    target,
                    progress=progress,
                    source=source,
                    idle_w=idle_w,
                    drain_s=drain_s,
                    floors=True,
                )
            )
            cell["host"] = difference(before, snapshot(pids))
        cell["interference_units_per_s"] = burner.units_per_s
        report = cell["report"]
        if (
            not report["completed"] and not report["num_cut"]
        ):  # cut off: it was too slow, and how slow at least is known
            raise LoadError(
                f"none of {report['failed']} requests completed: {next(iter(report['error_counts']), 'no words')}"
            )
    except LoadError as error:
        cell["error"] = str(error)
    return cell


def line_of(plan: CellPlan, cell: dict[str, Any]) -> str:
    if "error" in cell:
        return f"{plan.label}: failed: {cell['error']}"
    report = cell["report"]
    return (
        f"{plan.label}: TTFT p50 {report['median_ttft_floor_ms']:.1f} p99 {report['p99_ttft_floor_ms']:.1f} ms, "
        f"TPOT p99 {report['p99_tpot_floor_ms']:.2f} ms, {report['output_throughput']:.1f} tokens/s, {report['failed']} failed"
    )
