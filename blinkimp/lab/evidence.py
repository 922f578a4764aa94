"""One command for the whole evidence: engines behind the same client, loads, interference, placements; in calls of limited length, resumable.

    run_evidence(Setup(...), Path("evidence"), budget_s=540)        and the same again, until nothing is missing

The folder holds grid.json (what is wanted), cells/ (a JSON each, written when measured), calls.json (machine, versions, starts of engines) and
logs/ of the engines. Several processes may measure an engine each, on GPUs of one host, with a folder each and a room in common (room.py).
Every engine serves a model of the same shape; ours over HTTP and over ZeroMQ at once, so that one start serves both.
Order and estimates: evidence_plan.py; tables: evidence_report.py. Called by blinkimp/cli/evidence.py. Test: pytest tests/host/test_evidence.py
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import platform
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from blinkimp import __version__
from blinkimp.bench.errors import LoadError
from blinkimp.bench.load_plan import LoadOptions
from blinkimp.bench.runner import Progress, run_load
from blinkimp.host.power import PowerSource, idle_power_w
from blinkimp.lab.burner_pool import Burners
from blinkimp.lab.cell_trace import CellTrace
from blinkimp.lab.engines import EngineSpec, Placement, RunningEngine, placement_of
from blinkimp.lab.evidence_plan import (
    DRAIN_S,
    RAMP_SHARE,
    STOP_S,
    EvidenceCell,
    EvidenceGrid,
    cells_of,
    estimate_s,
    next_action,
)
from blinkimp.lab.evidence_state import Calls, end_leftover, start_time, write_grid
from blinkimp.lab.host_monitor import read_text, set_affinity
from blinkimp.lab.interference import CellPlan, Grid, measure
from blinkimp.lab.room import Room
from blinkimp.lab.store import Store, write_json
from blinkimp.lab.sweep import Point
from blinkimp.outputs import make_folder

IDLE_S: Final = 2.0
WARM_UP_S: Final = 4.0  # of load on a new engine, not counted: lazily made parts of it, and clocks
WARM_UP_USERS: Final = 8
QUIET_S: Final = 2.0  # after requests that were cut off, before the server is asked whether it is done with them
QUIET_TIMEOUT_S: Final = 60.0
MIN_DRAIN_S: Final = 5.0
MIN_START_S: Final = 30.0
PORTS: Final = (20000, 32000)


@dataclass(frozen=True)
class Setup:
    """Everything that a call needs besides the folder. Commands may hold {model}, {port} (HTTP) and {zmq_port}."""

    grid: EvidenceGrid
    commands: Mapping[str, str]  # by engine
    model: str
    vocab_size: int
    source: PowerSource | None = None
    commit: str = ""
    room: Room | None = None  # shared with processes that measure other engines at the same time
    traced: Mapping[str, str] = field(default_factory=dict)  # --engine-name of engines whose cells get a trace
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the machine, for calls.json


# ---- A call ----------------------------------------------------------------------------------------------------------
def free_port() -> int:
    """One below the range out of which the kernel gives ports to connections: an engine binds it seconds later, and nobody takes it meanwhile."""
    candidates = random.sample(range(*PORTS), 100)
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LoadError(f"ports: 100 of {PORTS[0]} to {PORTS[1]} were tried and are all taken; expected one to be free")


class Call:
    """One call: engines come and go, cells are measured, until the budget or the cells are used up."""

    def __init__(
        self, setup: Setup, folder: Path, budget_s: float, say: Callable[[str], None], progress: Progress
    ) -> None:
        self.setup, self.grid, self.folder = setup, setup.grid, folder
        self.store, self.calls = Store(folder / "cells"), Calls(folder)
        self.num_failed = 0
        self._deadline = time.monotonic() + budget_s
        self._say, self._progress = say, progress
        self._cpus = os.sched_getaffinity(0)
        self._placements = {
            name: placement_of(name, self.grid.num_reserved, self._cpus) for name in self.grid.placements
        }
        self._done: set[str] = set()  # of this call: a cell that fails is not tried twice in it
        self._broken: set[str] = set()  # engines that did not start, or died, in this call
        self._idle_w: float | None = None
        self._burners = Burners()  # they outlive engines

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    def missing(self) -> list[EvidenceCell]:
        return [
            cell
            for cell in cells_of(self.grid)
            if cell.key not in self._done and cell.engine not in self._broken and self.store.get(cell.key) is None
        ]

    def run(self) -> None:
        self._idle_w = idle_power_w(self.setup.source, IDLE_S)  # before any engine is there
        begun = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "cpus": len(self._cpus),
            "cpu_list": ranges_of(self._cpus),
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "side_by_side": self.setup.room is not None,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "blinkimp": __version__,
            "commit": self.setup.commit,
            "gpu": None if self.setup.source is None else self.setup.source.name,
            "driver": None if self.setup.source is None else self.setup.source.driver,
            "idle_gpu_w": self._idle_w,
            "commands": dict(self.setup.commands),
            **self.setup.facts,
        }
        self.calls.begin(begun)
        try:
            with self._burners:
                while (engine := self._next(None).engine) is not None:
                    set_affinity(os.getpid(), self._cpus)  # an engine starts on all: loading is not what is measured
                    self._serve(engine)
        finally:
            set_affinity(os.getpid(), self._cpus)

    def _next(self, running: str | None) -> Any:
        return next_action(
            self.missing(),
            running,
            self.left_s,
            lambda cell: estimate_s(self.grid, cell),
            lambda name: self.calls.start_s(name, self.grid.engine(name).start_s),
        )

    def _serve(self, name: str) -> None:
        """One engine's life: start and cells, and before a cell what it needs: a warm transport, an engine that is done with what was cut off."""
        ports = {"{port}": str(free_port()), "{zmq_port}": str(free_port()), "{model}": self.setup.model}
        command = self.setup.commands[name]
        for word, value in ports.items():
            command = command.replace(word, value)
        addresses = {"http": f"http://127.0.0.1:{ports['{port}']}", "zmq": f"tcp://127.0.0.1:{ports['{zmq_port}']}"}
        transports = self.grid.engine(name).transports
        specs = {t: EngineSpec(name, addresses[t], command, self.setup.vocab_size) for t in transports}
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._say(f"{self.left_s:.0f} s left; starting {name}: {command}")
        began = time.monotonic()
        try:
            with RunningEngine(specs[transports[0]], max(MIN_START_S, self.left_s), log) as running:
                assert running.pid is not None
                words = {"engine": name, "pid": running.pid, "started": start_time(running.pid)}
                write_json(self.folder / "engine.json", {**words, "host": socket.gethostname()})
                first = next(cell for cell in self.missing() if cell.engine == name).transport
                self._warm_up(specs[first])
                warm, is_quiet = {first}, True
                self.calls.add_start(name, time.monotonic() - began)
                self._say(f"{name} is up after {time.monotonic() - began:.0f} s")
                while (cell := self._next(name).cell) is not None:
                    spec = specs[cell.transport]
                    if not is_quiet:
                        self._wait_until_quiet(spec)
                        is_quiet = True
                    elif cell.transport not in warm:
                        self._warm_up(spec)
                        warm.add(cell.transport)
                    else:
                        is_quiet = self._measure_in_room(cell, spec, running)
                    if running.has_ended:
                        raise LoadError(f"engine {name} has ended in the middle of it; its messages stand in {log}")
        except LoadError as error:
            self._broken.add(name)
            self.num_failed += 1
            self._say(f"{name}: {error}\n{tail(log)}")
        finally:
            (self.folder / "engine.json").unlink(missing_ok=True)

    def _warm_up(self, spec: EngineSpec) -> None:
        scenario = self.grid.open_scenario
        options = LoadOptions(
            concurrency=WARM_UP_USERS,
            duration_s=min(WARM_UP_S, self.grid.seconds),
            input_len=scenario.input_len,
            output_len=scenario.output_len,
            seed=self.grid.seed + 1,
        )
        asyncio.run(run_load(options, spec.target(), drain_s=QUIET_TIMEOUT_S))

    def _cell_for(self, room: Room, cell: EvidenceCell) -> EvidenceCell:
        """The cell, or where the room has another level now, the first missing one of that level over the same transport: better than to wait.
        One whose isolated run is there, so that a call that ends early leaves none without what it is held against."""
        level = room.level()
        if level is None or level == str(cell.threads):
            return cell
        for other in self.missing():
            is_served = (other.engine, other.transport) == (cell.engine, cell.transport)
            isolated = replace(other, threads=0, is_again=False)
            has_isolated = other == isolated or self.store.get(isolated.key) is not None
            if str(other.threads) == level and is_served and has_isolated and self._patience_s(other) >= 0:
                return other
        return cell

    def _measure_in_room(self, cell: EvidenceCell, spec: EngineSpec, running: RunningEngine) -> bool:
        """As _measure()."""
        room = self.setup.room
        if room is None:
            return self._measure(cell, spec, running)
        for waits in (False, True):  # a look and an entry are two: who finds the room taken meanwhile looks again
            cell = self._cell_for(room, cell)
            with room.enter(str(cell.threads), self._patience_s(cell) if waits else 0.0) as others:
                if others is not None:
                    return self._measure(cell, spec, running)
        self._done.add(cell.key)  # a later call's
        self._say(f"{self.left_s:5.0f} s left  {cell.label}: too late; others measured another level until now")
        return True

    def _patience_s(self, cell: EvidenceCell) -> float:
        """How long it may wait; negative where it does not fit into the call any more."""
        return self.left_s - estimate_s(self.grid, cell) - STOP_S

    def _measure(self, cell: EvidenceCell, spec: EngineSpec, running: RunningEngine) -> bool:
        """False: the engine may still be at work on requests that were cut off."""
        began = time.monotonic()
        placement = self._placements[cell.placement]
        running.pin(placement)
        set_affinity(os.getpid(), set(placement.reserved))
        self._progress("cells", len(cells_of(self.grid)) - len(self.missing()), len(cells_of(self.grid)))
        sending_s = self.grid.seconds + self.grid.warmup_s
        plan = CellPlan(spec, placement, self.grid.interference if cell.threads else "none", cell.threads, cell.point)
        with self._trace_of(cell) as trace:
            measured = measure(
                plan,
                running,
                self._burners,
                loads_by_duration(self.grid, placement, cell.point),
                self.setup.source,
                self._idle_w,
                max(MIN_DRAIN_S, min(DRAIN_S, self.left_s - sending_s - STOP_S)),
                self._progress,
            )
            if trace is not None and "error" not in measured:
                measured["trace"] = trace.figures()
        seconds = time.monotonic() - began
        measured |= {
            "kind": "evidence",
            "transport": cell.transport,
            "tier": cell.tier,
            "wall_s": round(seconds, 2),
            "call": len(self.calls.all) - 1,
        }
        self.store.put(cell.key, measured)
        self.calls.add_cell(cell.key, seconds)
        self._done.add(cell.key)
        self.num_failed += "error" in measured
        self._say(f"{self.left_s:5.0f} s left  {cell.label}: {words_of(measured)}")
        return "error" not in measured and not measured["report"]["num_cut"]

    def _trace_of(self, cell: EvidenceCell) -> contextlib.AbstractContextManager[CellTrace | None]:
        if cell.engine not in self.setup.traced:
            return contextlib.nullcontext()
        return CellTrace(self.setup.traced[cell.engine], self.folder / "traces" / f"{cell.key}.trace")

    def _wait_until_quiet(self, spec: EngineSpec) -> None:
        """What was cut off must be off the engine before the next cell: a short request's answer says so."""
        time.sleep(QUIET_S)
        options = LoadOptions(concurrency=1, num_requests=1, input_len=8, output_len=2, seed=self.grid.seed + 2)
        report = asyncio.run(run_load(options, spec.target(), drain_s=QUIET_TIMEOUT_S, idle_w=0.0))
        if not report["completed"]:
            raise LoadError(f"engine {spec.name}: no answer to a short request within {QUIET_TIMEOUT_S:g} s")


def ranges_of(cpus: set[int]) -> str:
    """`0-15,32` of numbers, as taskset takes them."""
    ordered = sorted(cpus)
    begins = [cpu for cpu in ordered if cpu - 1 not in cpus]
    ends = [cpu for cpu in ordered if cpu + 1 not in cpus]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))


def loads_by_duration(grid: EvidenceGrid, placement: Placement, point: Point) -> Grid:
    """What measure() takes the length of a load from. In a closed loop all requests count: a server so slow that no user gets to a second one within
    the cell is measured, too. Users begin one after the other, or all would wait for each other's prompts."""
    sending_s = grid.seconds + grid.warmup_s
    if point.concurrency is None:
        return Grid([placement], [], [], [], [], sending_s, grid.warmup_s, grid.seed)
    return Grid([placement], [], [], [], [], sending_s, 0.0, grid.seed, ramp_s=RAMP_SHARE * sending_s)


def words_of(cell: Mapping[str, Any]) -> str:
    if "error" in cell:
        return f"failed: {cell['error']}"
    report = cell["report"]
    return (
        f"TTFT p50 {report['median_ttft_floor_ms']:.1f} p99 {report['p99_ttft_floor_ms']:.1f} ms, TPOT p99 {report['p99_tpot_floor_ms']:.2f} ms, "
        f"{report['steady_output_throughput']:.0f} tokens/s, {report['completed']} completed, {report['failed']} not; {cell['wall_s']:.0f} s"
    )


def tail(path: Path, num_lines: int = 15) -> str:
    return "\n".join(f"  | {line}" for line in read_text(path).splitlines()[-num_lines:])


def run_evidence(
    setup: Setup,
    folder: Path,
    *,
    budget_s: float,
    say: Callable[[str], None] = print,
    progress: Progress = lambda *_: None,
) -> tuple[int, Sequence[EvidenceCell]]:
    """One call. Returns how many failed, and what is missing still."""
    make_folder(folder)
    write_grid(folder, setup.grid)
    end_leftover(folder, say)
    call = Call(setup, folder, budget_s, say, progress)
    num_all, num_missing = len(cells_of(setup.grid)), len(call.missing())
    say(f"{num_all} cells, {num_all - num_missing} of them measured before; {budget_s:g} s for this call")
    if num_missing:
        call.run()
    left = [cell for cell in cells_of(setup.grid) if call.store.get(cell.key) is None]
    say(f"{num_all - len(left)} of {num_all} cells measured; {'all done' if not left else 'the same command goes on'}")
    return call.num_failed, left
