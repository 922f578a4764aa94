"""Cells of an evidence folder and the figures that its page is made of: multiples of the isolated run, lower bounds, tokens/s.

Called by blinkimp/lab/evidence_report.py and evidence_summary.py. Test: pytest tests/null/test_evidence_report.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from blinkimp.lab.evidence_plan import EvidenceCell, EvidenceGrid, cells_of
from blinkimp.lab.store import Store

NOT_RUN: Final = "not run"
TOLERANCE: Final = 1.05  # the goal: p99 within 5 % of isolated
P99: Final = {"TTFT": "p99_ttft_floor_ms", "TPOT": "p99_tpot_floor_ms"}
NUM_REDRAWN: Final = 2000
TOKENS_PER_S: Final = "tokens_per_s"  # as tokens_per_s() says
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
        cell.key: with_tokens_counted(found)
        for cell in cells_of(grid)
        for store in stores
        if (found := store.get(cell.key)) is not None
    }


def with_tokens_counted(cell: dict[str, Any]) -> dict[str, Any]:
    """Reports without `mean_chunk_tokens` are of a client that took a piece over HTTP for a token in what arrived while it sent; a server that is
    behind packs several into one. How many pieces there were follows from the mean gap: gaps add up to the last piece minus the first."""
    report = dict(cell["report"])
    if "mean_chunk_tokens" not in report:
        report["mean_chunk_tokens"] = None
        if report["completed"] and report["mean_itl_ms"]:
            pieces_a_request = 1 + (report["mean_e2el_ms"] - report["mean_ttft_ms"]) / report["mean_itl_ms"]
            report["mean_chunk_tokens"] = report["total_output_tokens"] / report["completed"] / pieces_a_request
        if report["backend"] == "openai":
            report["steady_output_throughput"] *= report["mean_chunk_tokens"] or 1.0
    return {**cell, "report": {**report, TOKENS_PER_S: tokens_per_s(report)}}


def tokens_per_s(report: Mapping[str, Any]) -> float:
    """Output tokens. Of a closed loop whose requests all completed: users x tokens of a request / median time of one (Little's law), into which
    neither the begin, when users come one after the other, nor the end, when they go, enters. Else what arrived while requests were sent."""
    users = report["load"]["concurrency"]
    if users is not None and report["completed"] and not report["failed"]:
        return float(users * report["total_output_tokens"] / report["completed"] / (report["median_e2el_ms"] / 1e3))
    return float(report["steady_output_throughput"])


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


def main_groups(grid: EvidenceGrid) -> dict[str, dict[str, dict[int, EvidenceCell]]]:
    """By load, engine and threads: over HTTP in the first placement, where every engine is measured."""
    return {
        load: {
            engine: {cell.threads: cell for cell in cells}
            for (engine, transport, placement), cells in groups_of(of_load).items()
            if (transport, placement) == ("http", grid.placements[0])
        }
        for load, of_load in by_load(grid).items()
    }


def again_of(cell: EvidenceCell) -> EvidenceCell:
    """The second isolated run of a cell's engine and load; only the middle loads have one."""
    return replace(cell, threads=0, is_again=True)


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


def interval(found: dict[str, Any] | None, isolated: dict[str, Any] | None, key: str) -> tuple[float, float] | None:
    """Within which 90 % of the multiples lie when the requests of both cells are drawn again with replacement (the percentile bootstrap; Efron 1979).
    None: a cell is missing, has no request, or is older than the latencies of each request (`floors_ms`) that this needs; or a p99 drawn of the
    isolated ones is 0, as TPOT is where all tokens of a request came at once: as multiple(), there is no ratio."""
    name = key.removeprefix("p99_").removesuffix("_ms")
    values = [
        np.array(cell["report"].get("floors_ms", {}).get(name, [])) for cell in (found, isolated) if cell is not None
    ]
    if len(values) < 2 or not all(len(each) for each in values):
        return None
    random = np.random.default_rng(0)
    drawn = [np.percentile(random.choice(each, (NUM_REDRAWN, len(each))), 99, axis=1) for each in values]
    if not drawn[1].all():
        return None
    low, high = np.percentile(drawn[0] / drawn[1], [5, 95])
    return float(low), float(high)


def multiples(
    planned: Sequence[EvidenceCell], levels: Sequence[int], cells: Cells, key: str
) -> tuple[dict[int, float], list[int]]:
    """Of one engine, transport, placement and load: (by threads, those of `levels` that are missing still)."""
    found = {cell.threads: cells.get(cell.key) for cell in planned if cell.threads == 0 or cell.threads in levels}
    times = {n: value for n in levels if (value := multiple(found.get(n), found.get(0), key)) is not None}
    return times, [n for n in levels if n in found and n not in times]
