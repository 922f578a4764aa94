"""The evidence as tables and plots: latency under interference as multiples of the isolated run, a quiet machine, every figure, and the causes.

    write_evidence_report(Path("evidence"), Path("RESULTS.md"))        or .html; what was not run stands there as such

A folder of several runs, of processes that measured engines side by side, is taken as one.

TTFT counts from the intended time; TTFT and TPOT count requests that were cut off at a cell's end by how long they had waited (`_floor`, marked
with >=). Called by blinkimp/cli/evidence.py. Test: pytest tests/null/test_evidence_report.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.lab.evidence_figures import (
    LATENCIES,
    NOT_RUN,
    P99,
    TOKENS_PER_S,
    TOLERANCE,
    Cells,
    Group,
    again_of,
    by_load,
    figure,
    groups_of,
    interval,
    load_cells,
    main_groups,
    multiple,
    multiples,
    threads_of,
)
from blinkimp.lab.evidence_plan import RAMP_SHARE, EvidenceCell, EvidenceGrid, cells_of
from blinkimp.lab.evidence_state import folders_of, read_grid
from blinkimp.lab.evidence_summary import beside, noise, not_run, summary
from blinkimp.lab.evidence_traces import traced
from blinkimp.lab.pages import TABLE_MARK, Section, write_page
from blinkimp.lab.plots import Line, Plot, bar_plot, line_plot
from blinkimp.lab.store import Store
from blinkimp.lab.sweep import pareto_frontier


# ---- Sections --------------------------------------------------------------------------------------------------------
def notes_of(folder: Path) -> list[str]:
    """Paragraphs of NOTES.md in the folder: what the lab cannot know of a run, written by whoever made it. Lines of a table stay lines."""
    path = folder / "NOTES.md"
    parts = path.read_text().split("\n\n") if path.exists() else []
    return [
        part.strip() if part.strip().startswith(TABLE_MARK) else " ".join(part.split())
        for part in parts
        if part.strip()
    ]


def setting(grid: EvidenceGrid, cells: Cells, calls: Sequence[dict[str, Any]], notes: Sequence[str]) -> Section:
    """Where and how; how much of the plan is there."""
    num_planned, sending_s = len(cells_of(grid)), grid.seconds + grid.warmup_s
    words = [
        f"{len(cells)} of {num_planned} cells were measured, in {len(calls)} calls; the others stand under `Planned, and {NOT_RUN}`. "
        f"Each cell sends for {sending_s:g} s. With a rate the first {grid.warmup_s:g} s do not count; users of a closed loop begin one after the "
        f"other in the first {RAMP_SHARE * sending_s:g} s, and all their requests count. Interference is "
        f"`{grid.interference}`, one thread in turn of each.",
        f"{grid.num_cpus} CPUs: placement `reserved` keeps {grid.num_reserved} for the client and our ingress processes, which stand for a remote "
        "host and a network card, and leaves the others to the interference and to everything else, another server's front end among it; with "
        "`sharing` all of it is everywhere.",
        "TTFT counts from the time a request was meant to be sent. A figure with >= is a lower bound: requests were cut off when a cell's time was "
        "over, and count by how long they had waited. Output tokens/s of a closed loop are users x tokens of an answer / median time of one; with "
        "a rate, what arrived while requests were sent. `retained` is that against 0 threads: as long as an engine keeps up with a rate, all of it.",
    ]
    if any(call.get("side_by_side") for call in calls):
        words.append(
            "Engines were measured side by side, each on a GPU and CPUs of its own of one host: a cell only beside cells with as many interfering "
            "threads of their own. Memory bandwidth and the last-level cache are everyone's, so interference includes the neighbours'; pressure, "
            "switches/s and CPU MHz below are the host's."
        )
    words += notes
    names = ("date", "gpu", "driver", "cpus", "cpu_list", "kernel", "blinkimp", "commit", "idle_gpu_w")
    rows = [
        [*(call.get(name) for name in names), ", ".join(f"{s['engine']} {s['seconds']:.0f} s" for s in call["starts"])]
        for call in calls
    ]
    return Section("What was measured", (*names, "engine starts"), rows, words=words)


def claims(grid: EvidenceGrid, cells: Cells) -> list[Section]:
    """A table for each p99 and for tokens/s: the isolated run, and multiples of it for each number of threads; none where only isolated runs were
    planned."""
    if grid.threads == (0,):
        return []
    sections = [
        claim(
            grid,
            cells,
            f"Under interference: p99 {name}, multiples of the isolated run",
            f"{name} p99 ms, 0 threads",
            key,
        )
        for name, key in P99.items()
    ]
    sections[0] = replace_plots(sections[0], interference_plots(grid, cells))
    return [
        *sections,
        claim(grid, cells, "Under interference: output tokens/s retained", "tokens/s, 0 threads", TOKENS_PER_S),
    ]


def replace_plots(section: Section, plots: Sequence[Plot]) -> Section:
    return Section(section.title, section.headings, section.rows, plots, section.words)


def claim(grid: EvidenceGrid, cells: Cells, title: str, heading: str, key: str) -> Section:
    """Of every group and load of which an interfered cell is there. For p99s an interval where cells have what it needs."""
    levels = [threads for threads in grid.threads if threads > 0]
    is_latency = key in P99.values()
    has_intervals = is_latency and any("floors_ms" in cell["report"] for cell in cells.values())
    headings = [
        "engine",
        "over",
        "placement",
        "load",
        "requests",
        heading,
        "x at 0 again",
        *(f"x at {n}" for n in levels),
    ]
    rows = [
        [
            *claim_row(group, load, planned, levels, cells, key),
            *([interval_word(planned, level, cells, key) for level in levels] if has_intervals else []),
        ]
        for load, of_load in by_load(grid).items()
        for group, planned in groups_of(of_load).items()
        if any(cell.key in cells for cell in planned if cell.threads > 0)
    ]
    if is_latency:
        headings.append("within 5 %")
    if has_intervals:
        headings += [f"90 % at {level}" for level in levels]
    return Section(title, headings, rows, words=[INTERVAL_WORDS] if has_intervals else [])


INTERVAL_WORDS: Final = (
    "The last columns: 90 % of the multiples lie there when the requests of both cells are drawn again with replacement. It takes requests "
    "for independent of each other, which those that wait for the same prompt are not, so it is narrow rather than wide."
)


def interval_word(planned: Sequence[EvidenceCell], threads: int, cells: Cells, key: str) -> object:
    found = {cell.threads: cells.get(cell.key) for cell in planned}
    ends = interval(found.get(threads), found.get(0), key)
    return None if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def claim_row(
    group: Group, load: str, planned: Sequence[EvidenceCell], levels: Sequence[int], cells: Cells, key: str
) -> list[object]:
    """The last word is about the levels that were measured, and says which where some were not."""
    isolated = next((cells.get(cell.key) for cell in planned if cell.threads == 0), None)
    again = multiple(cells.get(again_of(planned[0]).key), isolated, key)
    times, missing = multiples(planned, levels, cells, key)
    is_latency = key in P99.values()

    def told(value: float | None) -> object:
        return value if value is None or is_latency else f"{value:.1%}"

    row: list[object] = [*group, load, NOT_RUN if isolated is None else isolated["report"]["completed"]]
    row += [figure(isolated, key), told(again), *(NOT_RUN if n in missing else told(times.get(n)) for n in levels)]
    if not is_latency:
        return row
    if any(value > TOLERANCE for value in times.values()):
        return [*row, "no"]
    return [*row, "-" if not times else f"yes, at {', '.join(map(str, times))}" if missing else "yes"]


def interference_plots(grid: EvidenceGrid, cells: Cells) -> list[Plot]:
    """Over HTTP in the first placement: at the most threads all loads side by side, and p99 against threads where an engine has levels between."""
    groups, most = main_groups(grid), grid.threads[-1]
    plots = []
    keys = {
        "p99 TTFT, multiple": P99["TTFT"],
        "p99 TPOT, multiple": P99["TPOT"],
        "output tokens/s, retained": TOKENS_PER_S,
    }
    for name, key in keys.items() if most else ():
        heights = {
            engine.name: [
                multiples(list(engines.get(engine.name, {}).values()), [most], cells, key)[0].get(most, 0.0)
                for engines in groups.values()
            ]
            for engine in grid.engines
        }
        if shown := {engine: values for engine, values in heights.items() if any(values)}:
            title = f"{most} interfering threads: {name}"
            plots.append(bar_plot(title, "of the isolated run", list(groups), shown, log_y=key != TOKENS_PER_S))
    for load, engines in groups.items():
        here = {name: [cell for cell in of.values() if cell.key in cells] for name, of in engines.items()}
        if max((len(measured) for measured in here.values()), default=0) < 3:
            continue
        for name, key in P99.items():
            lines = [
                Line(engine, [(float(cell.threads), cells[cell.key]["report"][key]) for cell in measured])
                for engine, measured in here.items()
            ]
            shown_lines = [line for line in lines if line.points]
            plots.append(line_plot(f"{load}: p99 {name}", "interfering threads", "ms", shown_lines, log_y=True))
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
        report[TOKENS_PER_S],
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
    kinds = [(engine.name, threads, number) for number, engine in enumerate(grid.engines) for threads in levels]

    def line_of(engine: str, threads: int, number: int, points: list[tuple[float, float]], is_frontier: bool) -> Line:
        frontier = pareto_frontier(points) if is_frontier else []
        return Line(f"{engine}, {threads} threads", points, frontier, color_idx=number, is_dashed=threads > 0)

    plots = []
    for name, key in P99.items():
        lines = [
            line_of(engine, threads, number, [(float(c.point.rate or 0), r[key]) for c, r in found], False)
            for engine, threads, number in kinds
            if len(found := reports(engine, threads, True)) > 1
        ]
        if lines:
            plots.append(line_plot(f"p99 {name} over rate", "requests/s", "ms", lines, log_x=True, log_y=True))
    lines = [
        line_of(engine, threads, number, points, True)
        for engine, threads, number in kinds
        if len(
            points := [
                (1e3 / r["median_tpot_floor_ms"], r[TOKENS_PER_S])
                for _, r in reports(engine, threads, False)
                if r["completed"]
            ]
        )
        > 1
    ]
    if lines:
        x_label = "interactivity, tokens/s for a user"
        plots.append(line_plot(f"{grid.closed_scenario.name}: frontier", x_label, "output tokens/s of a GPU", lines))
    return plots


def everything(grid: EvidenceGrid, cells: Cells) -> list[Section]:
    """A table for each load: every cell that was measured."""
    sections = []
    for load, of_load in by_load(grid, with_again=True).items():
        rows = [
            [
                cell.engine,
                cell.transport,
                cell.placement,
                threads_of(cell),
                *figures_of_report(cells[cell.key]["report"]),
            ]
            for cell in of_load
            if cell.key in cells
        ]
        if rows:
            sections.append(Section(load, ("engine", "over", "placement", "threads", *REPORT_HEADINGS), rows))
    return sections


CAUSE_HEADINGS: Final = (
    *("engine", "over", "placement", "load", "threads", "CPU pressure", "memory pressure", "switches/s", "engine CPUs"),
    *(
        "engine's involuntary switches/s",
        "client late p99 ms",
        "tokens a piece",
        "CPU MHz",
        "GPU MHz",
        "GPU W",
        "interference/s",
    ),
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
                    report["mean_chunk_tokens"],
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
    """Returns how many cells are in it. Raises LoadError where there is no run in the folder, OutputError where it cannot be
    written."""
    folders = folders_of(folder)
    grid = read_grid(folders)
    cells = load_cells(folders, grid)
    if not cells:
        raise LoadError(f"{folder}: no cell was measured yet; expected some; run without --report first")
    calls = [call for each in folders for call in json.loads((each / "calls.json").read_text())]
    sections = [summary(grid, cells), *noise(grid, cells), setting(grid, cells, calls, notes_of(folder))]
    sections += claims(grid, cells)
    sections += [
        quiet(grid, cells),
        *([beside(grid, cells)] if len(grid.engines) > 1 else []),
        *everything(grid, cells),
        causes(grid, cells),
        *traced(grid, cells),
    ]
    sections += [*not_run(grid, cells), *failures(folders)]
    write_page(title, sections, path)
    return len(cells)
