"""Tables and plots of the cells of lab runs: one HTML file that opens offline, or Markdown with plots beside it.

    write_report([store, ...], Path("report.html"))         or report.md

Called by blinkimp/cli/lab.py. Test: pytest tests/null/test_lab_report.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.lab.interference_report import interference_sections
from blinkimp.lab.pages import Section, by, write_page
from blinkimp.lab.plots import Line, Plot, line_plot
from blinkimp.lab.store import Store
from blinkimp.lab.sweep import pareto_frontier

# ---- Sweeps ----------------------------------------------------------------------------------------------------------
SWEEP_HEADINGS: Final = (
    *(
        "engine",
        "load",
        "requests/s",
        "output tokens/s",
        "tokens/s/GPU",
        "TTFT p50 ms",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
    ),
    *("E2EL p99", "tokens/s for a user (p50)", "J/token", "J/token above idle", "failed"),
)


def sweep_row(cell: dict[str, Any]) -> list[object]:
    figures = cell["report"]
    load = f"{cell['concurrency']} users" if cell["concurrency"] is not None else f"{cell['rate']:g}/s"
    return [
        cell["engine"],
        load,
        figures["request_throughput"],
        figures["output_throughput"],
        figures["inferencex"]["tput_per_gpu"],
        *(figures[key] for key in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_e2el_ms")),
        figures["inferencex"].get("median_intvty"),
        figures["gpu_energy"]["j_per_token"],
        figures["gpu_energy"]["j_per_token_above_idle"],
        figures["failed"],
    ]


def sweep_sections(cells: Sequence[dict[str, Any]]) -> list[Section]:
    """A section for each scenario: throughput against interactivity, and latency against load."""
    sections = []
    for scenario, of_scenario in by(cells, "scenario").items():
        of_scenario = sorted(
            of_scenario, key=lambda cell: (cell["engine"], cell["concurrency"] or 0, cell["rate"] or 0)
        )
        plots: list[Plot] = []
        closed = [cell for cell in of_scenario if cell["concurrency"] is not None]
        opened = [cell for cell in of_scenario if cell["rate"] is not None]
        if closed:
            lines = []
            for engine, its in by(closed, "engine").items():
                found = [
                    (c["report"]["inferencex"]["median_intvty"], c["report"]["inferencex"]["tput_per_gpu"]) for c in its
                ]
                lines.append(Line(engine, found, pareto_frontier(found)))
            plots.append(
                line_plot(f"{scenario}: frontier", "interactivity, tokens/s for a user", "tokens/s per GPU", lines)
            )
        for group, word, x_label in ((closed, "concurrency", "users"), (opened, "rate", "requests/s")):
            for metric, statistic in (("ttft", "p99"), ("tpot", "p99")) if group else ():
                lines = [
                    Line(engine, [(float(c[word]), c["report"][f"{statistic}_{metric}_ms"]) for c in its])
                    for engine, its in by(group, "engine").items()
                ]
                title = f"{scenario}: {metric.upper()} {statistic} over {x_label}"
                plots.append(line_plot(title, x_label, "ms", lines, log_x=True, log_y=metric == "ttft"))
        rows = [sweep_row(cell) for cell in of_scenario]
        sections.append(Section(scenario, SWEEP_HEADINGS, rows, plots))
    return sections


# ---- The file --------------------------------------------------------------------------------------------------------
def sections_of(cells: Sequence[dict[str, Any]]) -> list[Section]:
    measured = [cell for cell in cells if "error" not in cell]
    sections = sweep_sections([cell for cell in measured if cell["kind"] == "sweep"])
    sections += interference_sections([cell for cell in measured if cell["kind"] == "interference"])
    failed = [cell for cell in cells if "error" in cell]
    if failed:
        told = ("error", "kind", "report", "host")
        rows = [[", ".join(f"{k} {v}" for k, v in cell.items() if k not in told), cell["error"]] for cell in failed]
        sections.append(Section("Failed", ("cell", "error"), rows))
    return sections


def write_report(stores: Sequence[Store], path: Path, title: str = "blinkimp lab") -> int:
    """Returns how many cells are in it. Raises LoadError where there is none, OutputError where it cannot be written."""
    cells = [cell for store in stores for cell in store]
    if not cells:
        folders = ", ".join(str(store.folder) for store in stores)
        raise LoadError(
            f"report: no cells in {folders}; expected results of `blinkimp lab sweep` or `lab interference`; check the folder"
        )
    sections = sections_of(cells)
    write_page(title, sections, path)
    return len(cells)
