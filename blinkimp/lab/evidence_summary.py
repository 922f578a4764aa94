"""The first words of the evidence page: what came out at both ends of the interference, whether the goal is met, how far two runs of the same
differ, and where an engine is behind another on a quiet machine.

All of it is computed, so it says what the cells say, in whoever's favour. Called by blinkimp/lab/evidence_report.py.
Test: pytest tests/null/test_evidence_report.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from blinkimp.lab.evidence_figures import (
    NOT_RUN,
    P99,
    TOKENS_PER_S,
    TOLERANCE,
    Cells,
    again_of,
    by_load,
    groups_of,
    main_groups,
    multiple,
    multiples,
)
from blinkimp.lab.evidence_plan import EvidenceCell, EvidenceGrid, cells_of
from blinkimp.lab.pages import Section

MARGIN: Final = 1.01  # of two engines on a quiet machine: less is no difference
SUMMARY_LATENCIES: Final = {
    "TTFT p50 ms": "median_ttft_floor_ms",
    "TTFT p99 ms": P99["TTFT"],
    "TPOT p50 ms": "median_tpot_floor_ms",
    "TPOT p99 ms": P99["TPOT"],
}


def summary(grid: EvidenceGrid, cells: Cells) -> Section:
    """No interference -> the most of it, of loads of which an engine has both; isolated runs alone where no interference was planned."""
    most = grid.threads[-1]
    rows: list[list[object]] = []
    for load, engines in main_groups(grid).items():
        for engine, planned in engines.items():
            ends = [cells.get(planned[threads].key) for threads in sorted({0, most}) if threads in planned]
            found = [cell for cell in ends if cell is not None]
            if len(found) < len({0, most}):
                continue
            reports = [cell["report"] for cell in found]
            row: list[object] = [load, engine]
            row += [" -> ".join(bounded(report, key) for report in reports) for key in SUMMARY_LATENCIES.values()]
            row.append(" -> ".join(f"{report[TOKENS_PER_S]:,.0f}" for report in reports))
            left = multiple(found[-1], found[0], TOKENS_PER_S) if most else None
            joules = [report["gpu_energy"]["j_per_token"] for report in reports]
            row.append(None if None in joules else " -> ".join(f"{value:.3g}" for value in joules))
            row += [None if left is None else f"{left:.1%}", ", ".join(str(report["completed"]) for report in reports)]
            rows.append(row)
    headings = ("load", "engine", *SUMMARY_LATENCIES, "output tokens/s", "J/token", "retained", "requests")
    levels = f"Without interference -> with {most} interfering threads" if most else "Without interference"
    words = [
        f"{levels}, each engine on a GPU and {grid.num_cpus} CPUs; over HTTP, placement "
        f"`{grid.placements[0]}`. Each figure is of one run of {grid.seconds + grid.warmup_s:g} s, and of as many requests as the last column "
        "says: of fewer than 102 requests a p99 lies between the two slowest, and of fewer than 1,002 a p99.9 does.",
        *goal_words(grid, cells),
    ]
    return Section("In short", headings, rows, words=words)


def bounded(report: Mapping[str, Any], key: str) -> str:
    """Three or four digits."""
    value = report[key]
    return f"{'>= ' if report['num_cut'] else ''}{value:,.{2 if value < 20 else 1 if value < 1000 else 0}f}"


def goal_words(grid: EvidenceGrid, cells: Cells) -> list[str]:
    """For each engine, in how many loads p99 stays within the tolerance, at the levels that were measured, and the worst of them."""
    levels = [threads for threads in grid.threads if threads > 0]
    told = []
    for engine in grid.engines:
        for name, key in P99.items():
            worst: dict[str, float] = {}
            num_whole = 0
            for load, engines in main_groups(grid).items():
                times, missing = multiples(list(engines.get(engine.name, {}).values()), levels, cells, key)
                if times:
                    worst[load] = max(times.values())
                    num_whole += not missing
            if worst:
                load = max(worst, key=lambda load: worst[load])
                good = sum(value <= TOLERANCE for value in worst.values())
                told.append(
                    f"{engine.name}, {name}: in {good} of {len(worst)} loads ({num_whole} of them measured at every level); "
                    f"worst {worst[load]:.2f} x, {load}"
                )
    return [f"p99 within {TOLERANCE - 1:.0%} of the isolated run. {'. '.join(told)}."] if told else []


def noise(grid: EvidenceGrid, cells: Cells) -> list[Section]:
    """Both isolated runs of loads that have two."""
    rows: list[list[object]] = []
    for cell in cells_of(grid):
        if cell.is_again or cell.threads or {cell.key, again_of(cell).key} - set(cells):
            continue
        pair = [cells[cell.key]["report"], cells[again_of(cell).key]["report"]]
        row: list[object] = [cell.load, cell.engine, cell.transport, cell.placement]
        row += [" and ".join(bounded(report, key) for report in pair) for key in SUMMARY_LATENCIES.values()]
        rows.append([*row, " and ".join(f"{report[TOKENS_PER_S]:,.0f}" for report in pair)])
    headings = ("load", "engine", "over", "placement", *SUMMARY_LATENCIES, "output tokens/s")
    words = [
        "Both without interference, minutes apart. A smaller change than that tells nothing; other loads were not run twice."
    ]
    return [Section("How far two runs of the same differ", headings, rows, words=words)] if rows else []


# ---- A quiet machine -------------------------------------------------------------------------------------------------
COMPARED: Final = {**SUMMARY_LATENCIES, "tokens/s": TOKENS_PER_S, "J/token": ""}


def compared(report: Mapping[str, Any], key: str) -> float | None:
    value = report[key] if key else report["gpu_energy"]["j_per_token"]
    return None if value is None else float(value)


def beside(grid: EvidenceGrid, cells: Cells) -> Section:
    """The first engine's isolated figures as multiples of every other's."""
    first = grid.engines[0].name
    rows: list[list[object]] = []
    behind: dict[str, dict[str, dict[str, float]]] = {engine.name: {} for engine in grid.engines[1:]}
    for load, engines in main_groups(grid).items():
        for other in behind:
            pair = [cells.get(engines[name][0].key) for name in (first, other) if name in engines]
            if len(pair) < 2 or None in pair:
                continue
            ours, theirs = (found["report"] for found in pair if found is not None)
            row: list[object] = [load, other]
            for name, key in COMPARED.items():
                mine, its = compared(ours, key), compared(theirs, key)
                if mine is None or not its:
                    row.append(None)
                    continue
                row.append(mine / its)
                worse = its / max(mine, 1e-9) if name == "tokens/s" else mine / its
                if worse > MARGIN:
                    behind[other].setdefault(name, {})[load] = worse
            rows.append(row)
    words = [f"{first}'s figures as multiples of the other's, without interference: less is better but for tokens/s."]
    for other, names in behind.items():
        loads = [str(row[0]) for row in rows if row[1] == other]
        told = [
            f"{name} ({len(worse)} of {len(loads)} loads, most {max(worse.values()) - 1:.0%} at {max(worse, key=lambda load: worse[load])})"
            for name, worse in names.items()
        ]
        if loads:
            words.append(f"{first} is behind {other} by more than {MARGIN - 1:.0%} in {', '.join(told) or 'nothing'}.")
    return Section(f"A quiet machine: {first} beside the others", ("load", "beside", *COMPARED), rows, words=words)


# ---- What is missing -------------------------------------------------------------------------------------------------
def not_run(grid: EvidenceGrid, cells: Cells) -> list[Section]:
    """What was planned and is not there, a row for each engine, transport and placement."""
    lacking: dict[tuple[str, str, str], list[str]] = {}
    for load, of_load in by_load(grid).items():
        for group, planned in groups_of(of_load).items():
            if levels := missing_levels(planned, cells):
                lacking.setdefault(group, []).append(f"{load}: {', '.join(levels)}")
    order = {engine.name: idx for idx, engine in enumerate(grid.engines)}
    rows = [[*group, "; ".join(loads)] for group, loads in sorted(lacking.items(), key=lambda item: order[item[0][0]])]
    headings = ("engine", "over", "placement", "loads, and their numbers of threads")
    return [Section(f"Planned, and {NOT_RUN}", headings, rows)] if rows else []


def missing_levels(planned: Sequence[EvidenceCell], cells: Cells) -> list[str]:
    return [str(cell.threads) for cell in planned if cell.key not in cells]
