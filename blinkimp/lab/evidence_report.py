"""The evidence as tables and plots: latency under interference as multiples of the isolated run, a quiet machine, every figure, and the causes.

    write_evidence_report(Path("evidence"), Path("RESULTS.md"))        or .html; what was not run stands there as such

A folder of several runs, of processes that measured engines side by side, is taken as one.

TTFT counts from the intended time; TTFT and TPOT count requests that were cut off at a cell's end by how long they had waited (`_floor`, marked
with >=). Called by blinkimp/cli/evidence.py. Test: pytest tests/null/test_evidence_report.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.lab.evidence_plan import RAMP_SHARE, EvidenceCell, EvidenceGrid, cells_of
from blinkimp.lab.evidence_state import folders_of, read_grid
from blinkimp.lab.pages import Section, html_of, write_markdown
from blinkimp.lab.plots import Line, Plot, line_plot
from blinkimp.lab.store import Store
from blinkimp.lab.sweep import pareto_frontier

NOT_RUN: Final = "not run"
TOLERANCE: Final = 1.05  # the goal: p99 within 5 % of isolated
P99: Final = {"TTFT": "p99_ttft_floor_ms", "TPOT": "p99_tpot_floor_ms"}
LATENCIES: Final = {
    f"{name} {statistic}": f"{key}_{metric}_floor_ms"
    for name, metric in (("TTFT", "ttft"), ("TPOT", "tpot"))
    for statistic, key in (("p50 ms", "median"), ("p99", "p99"), ("p99.9", "p99.9"))
}

Cells = Mapping[str, dict[str, Any]]  # by key
Group = tuple[str, str, str]  # engine, transport, placement


def load_cells(folders: Sequence[Path], grid: EvidenceGrid) -> dict[str, dict[str, Any]]:
    stores = [Store(folder / "cells") for folder in folders]
    return {
        cell.key: found for cell in cells_of(grid) for store in stores if (found := store.get(cell.key)) is not None
    }


def by_load(grid: EvidenceGrid, *, with_again: bool = False) -> dict[str, list[EvidenceCell]]:
    """Planned cells of each load, in the order of a table: engines, transports, placements, threads."""
    order = [engine.name for engine in grid.engines]

    def place(cell: EvidenceCell) -> tuple[int, str, int, int, bool]:
        placement_idx = grid.placements.index(cell.placement)
        return order.index(cell.engine), cell.transport, placement_idx, cell.threads, cell.is_again

    cells = sorted((cell for cell in cells_of(grid) if with_again or not cell.is_again), key=place)
    return {
        f"{point.scenario.name}, {point.name}": [cell for cell in cells if cell.point == point] for point in grid.points
    }


def groups_of(cells: Sequence[EvidenceCell]) -> dict[Group, list[EvidenceCell]]:
    groups: dict[Group, list[EvidenceCell]] = {}
    for cell in cells:
        groups.setdefault((cell.engine, cell.transport, cell.placement), []).append(cell)
    return groups


def figure(found: dict[str, Any] | None, key: str) -> object:
    """A latency; with >= where requests were cut off, so that it is a lower bound."""
    if found is None:
        return NOT_RUN
    value = found["report"][key]
    return f">= {value:,.2f}" if found["report"]["num_cut"] else value


def threads_of(cell: EvidenceCell) -> str:
    return f"{cell.threads} again" if cell.is_again else str(cell.threads)


def multiple(found: dict[str, Any] | None, isolated: dict[str, Any] | None, key: str) -> float | None:
    if found is None or isolated is None or not isolated["report"][key]:
        return None
    return float(found["report"][key] / isolated["report"][key])


# ---- Sections --------------------------------------------------------------------------------------------------------
def setting(grid: EvidenceGrid, cells: Cells, calls: Sequence[dict[str, Any]]) -> Section:
    """Where and how; how much of the plan is there."""
    num_planned, sending_s = len(cells_of(grid)), grid.seconds + grid.warmup_s
    words = [
        f"{len(cells)} of {num_planned} cells were measured, in {len(calls)} calls; the others stand as `{NOT_RUN}`. "
        f"Each cell sends for {sending_s:g} s. With a rate the first {grid.warmup_s:g} s do not count; users of a closed loop begin one after the "
        f"other in the first {RAMP_SHARE * sending_s:g} s, and all their requests count. Interference is "
        f"`{grid.interference}`, one thread in turn of each. {grid.num_cpus} CPUs: placement `reserved` keeps {grid.num_reserved} for the client "
        "and our ingress processes and leaves the others to everything else; with `sharing` all of it is everywhere.",
        "TTFT counts from the time a request was meant to be sent. A figure with >= is a lower bound: requests were cut off when a cell's time was "
        "over, and count by how long they had waited. `retained` is tokens/s while requests were sent, against 0 threads. `0 again` is a second run "
        "without interference: by so much do two runs of the same differ.",
    ]
    if any(call.get("side_by_side") for call in calls):
        words.append(
            "Engines were measured side by side, each on a GPU and CPUs of its own of one host: a cell only beside cells with as many interfering "
            "threads of their own. Memory bandwidth and the last-level cache are everyone's, so interference includes the neighbours'; pressure, "
            "switches/s and CPU MHz below are the host's."
        )
    names = ("date", "gpu", "driver", "cpus", "cpu_list", "kernel", "blinkimp", "commit", "idle_gpu_w")
    rows = [
        [*(call.get(name) for name in names), ", ".join(f"{s['engine']} {s['seconds']:.0f} s" for s in call["starts"])]
        for call in calls
    ]
    return Section("What was measured", (*names, "engine starts"), rows, words=words)


def claim_row(
    group: Group, load: str, planned: Sequence[EvidenceCell], levels: Sequence[int], cells: Cells
) -> list[object]:
    """p99 of TTFT and TPOT isolated, then as multiples for each number of threads, what is retained, and whether the goal is met at all of them."""
    wanted = {cell.threads for cell in planned}
    found = {cell.threads: cells.get(cell.key) for cell in planned}
    isolated = found.get(0)
    again = cells.get(replace(planned[0], threads=0, is_again=True).key)

    def told(value: object, threads: int) -> object:
        return value if value is not None else NOT_RUN if threads in wanted else None

    row: list[object] = [*group, load]
    within: list[bool | None] = []
    for key in P99.values():
        times = {threads: multiple(found.get(threads), isolated, key) for threads in levels}
        within += [None if value is None else value <= TOLERANCE for n, value in times.items() if n in wanted]
        row += [figure(isolated, key), multiple(again, isolated, key)]
        row += [told(value, threads) for threads, value in times.items()]
    for threads in levels:
        left = multiple(found.get(threads), isolated, "steady_output_throughput")
        row.append(told(None if left is None else f"{left:.1%}", threads))
    return [*row, "no" if False in within else "-" if None in within else "yes"]


def claim(grid: EvidenceGrid, cells: Cells) -> Section:
    """Of every group and load of which an interfered cell is there."""
    levels = [threads for threads in grid.threads if threads > 0]
    headings = ["engine", "over", "placement", "load"]
    for name in P99:
        headings += [f"{name} p99 ms, 0 threads", "x at 0 again", *(f"x at {threads}" for threads in levels)]
    headings += [*(f"retained at {threads}" for threads in levels), "within 5 %"]
    rows = [
        claim_row(group, load, planned, levels, cells)
        for load, of_load in by_load(grid).items()
        for group, planned in groups_of(of_load).items()
        if any(cell.key in cells for cell in planned if cell.threads > 0)
    ]
    return Section("Under interference: multiples of the isolated run", headings, rows, interference_plots(grid, cells))


def interference_plots(grid: EvidenceGrid, cells: Cells) -> list[Plot]:
    """p99 against threads, a plot for each load of which some engine has more than its isolated cell, over HTTP, first placement."""
    plots = []
    for load, of_load in by_load(grid).items():
        here = [c for c in of_load if c.transport == "http" and c.placement == grid.placements[0] and c.key in cells]
        if not any(cell.threads > 0 for cell in here):
            continue
        for name, key in P99.items():
            lines = [
                Line(e.name, [(float(c.threads), cells[c.key]["report"][key]) for c in here if c.engine == e.name])
                for e in grid.engines
            ]
            shown = [line for line in lines if line.points]
            plots.append(line_plot(f"{load}: p99 {name}", "interfering threads", "ms", shown, log_y=True))
    return plots


def quiet(grid: EvidenceGrid, cells: Cells) -> Section:
    """Isolated cells over HTTP in the first placement: engines side by side, and how they scale."""
    rows: list[list[object]] = []
    for load, of_load in by_load(grid).items():
        for cell in of_load:
            if cell.threads == 0 and cell.transport == "http" and cell.placement == grid.placements[0]:
                report = cells[cell.key]["report"] if cell.key in cells else None
                rows.append([load, cell.engine, *figures_of_report(report)])
    headings = ("load", "engine", *REPORT_HEADINGS)
    return Section("A quiet machine", headings, rows, scaling_plots(grid, cells))


REPORT_HEADINGS: Final = (
    *LATENCIES,
    *("output tokens/s", "J/token", "J/token above idle", "completed", "not completed"),
)


def figures_of_report(report: dict[str, Any] | None) -> list[object]:
    if report is None:
        return [NOT_RUN, *["-"] * (len(REPORT_HEADINGS) - 1)]
    energy = report["gpu_energy"]
    return [
        *(figure({"report": report}, key) for key in LATENCIES.values()),
        report["steady_output_throughput"],
        *(
            energy[name] if energy[name] is None else f"{energy[name]:.4f}"
            for name in ("j_per_token", "j_per_token_above_idle")
        ),
        report["completed"],
        report["failed"],
    ]


def scaling_plots(grid: EvidenceGrid, cells: Cells) -> list[Plot]:
    """Latency against the rate, and throughput against interactivity, isolated and at the most threads."""

    def reports(engine: str, threads: int, is_open: bool) -> list[tuple[EvidenceCell, dict[str, Any]]]:
        return [
            (cell, cells[cell.key]["report"])
            for of_load in by_load(grid).values()
            for cell in of_load
            if (cell.engine, cell.threads, cell.transport) == (engine, threads, "http")
            and cell.placement == grid.placements[0]
            and (cell.point.rate is not None) == is_open
            and cell.key in cells
        ]

    levels = sorted({0, grid.threads[-1]})
    plots = []
    for name, key in P99.items():
        lines = [
            Line(f"{engine.name}, {threads} threads", [(float(c.point.rate or 0), r[key]) for c, r in found])
            for engine in grid.engines
            for threads in levels
            if len(found := reports(engine.name, threads, True)) > 1
        ]
        if lines:
            plots.append(line_plot(f"p99 {name} over rate", "requests/s", "ms", lines, log_x=True, log_y=True))
    lines = []
    for engine in grid.engines:
        for threads in levels:
            points = [
                (r["inferencex"]["median_intvty"], r["inferencex"]["tput_per_gpu"])
                for _, r in reports(engine.name, threads, False)
                if r["completed"]
            ]
            if len(points) > 1:
                lines.append(Line(f"{engine.name}, {threads} threads", points, pareto_frontier(points)))
    if lines:
        x_label = "interactivity, tokens/s for a user"
        plots.append(line_plot(f"{grid.closed_scenario.name}: frontier", x_label, "tokens/s per GPU", lines))
    return plots


def everything(grid: EvidenceGrid, cells: Cells) -> list[Section]:
    """A table for each load: every planned cell."""
    sections = []
    for load, of_load in by_load(grid, with_again=True).items():
        rows: list[list[object]] = []
        for cell in of_load:
            found = cells.get(cell.key)
            words = [cell.engine, cell.transport, cell.placement, threads_of(cell)]
            rows.append([*words, *figures_of_report(None if found is None else found["report"])])
        sections.append(Section(load, ("engine", "over", "placement", "threads", *REPORT_HEADINGS), rows))
    return sections


CAUSE_HEADINGS: Final = (
    *("engine", "over", "placement", "load", "threads", "CPU pressure", "memory pressure", "switches/s", "engine CPUs"),
    *("engine's involuntary switches/s", "client late p99 ms", "CPU MHz", "GPU MHz", "GPU W", "interference/s"),
)


def causes(grid: EvidenceGrid, cells: Cells) -> Section:
    """What the host went through in each cell: why a latency is what it is."""
    rows: list[list[object]] = []
    for load, of_load in by_load(grid, with_again=True).items():
        for cell in of_load:
            if (found := cells.get(cell.key)) is None:
                continue
            host, report = found["host"], found["report"]
            pressure = [host["pressure"].get(f"{resource} some") for resource in ("cpu", "memory")]
            done = found["interference_units_per_s"] or {}
            rows.append(
                [
                    *(cell.engine, cell.transport, cell.placement, load, threads_of(cell)),
                    *(None if share is None else f"{share:.1%}" for share in pressure),
                    host["context_switches_per_s"],
                    sum(process["cpu_share"] for process in host["processes"]),
                    sum(process["involuntary_per_s"] for process in host["processes"]),
                    report["p99_send_delay_ms"],
                    host["mean_clock_mhz"],
                    report["gpu_energy"]["sm_clock_mhz"],
                    report["gpu_energy"]["power_w"],
                    ", ".join(f"{kind} {units:.3g}" for kind, units in done.items()) or None,
                ]
            )
    return Section("Causes: what the host went through", CAUSE_HEADINGS, rows)


def failures(folders: Sequence[Path]) -> list[Section]:
    failed = [cell for folder in folders for cell in Store(folder / "cells") if "error" in cell]
    names = ("engine", "transport", "placement", "load", "threads", "error")
    rows = [[cell.get(name) for name in names] for cell in failed]
    return [Section("Failed", names, rows)] if failed else []


def write_evidence_report(folder: Path, path: Path, title: str = "Evidence") -> int:
    """Returns how many cells are in it. Raises LoadError where there is no run in the folder."""
    folders = folders_of(folder)
    grid = read_grid(folders)
    cells = load_cells(folders, grid)
    if not cells:
        raise LoadError(f"{folder}: no cell was measured yet; expected some; run without --report first")
    calls = [call for each in folders for call in json.loads((each / "calls.json").read_text())]
    sections = [setting(grid, cells, calls), claim(grid, cells), quiet(grid, cells)]
    sections += [*everything(grid, cells), causes(grid, cells), *failures(folders)]
    if path.suffix == ".md":
        write_markdown(title, sections, path)
    else:
        path.write_text(html_of(title, sections))
    return len(cells)
