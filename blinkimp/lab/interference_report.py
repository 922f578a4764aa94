"""What interference did, as tables and plots: each run beside the isolated one of the same engine, placement and load.

Called by blinkimp/lab/report.py. Test: pytest tests/null/test_lab_report.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from blinkimp.lab.pages import Section, by
from blinkimp.lab.plots import Line, Plot, bar_plot, line_plot

# Figure of a report -> its name in tables. Floors: from the intended time, and requests that were cut off count by how long they had waited.
LATENCIES: Final = {
    "median_ttft_floor_ms": "TTFT p50 ms",
    "p99_ttft_floor_ms": "TTFT p99",
    "p99.9_ttft_floor_ms": "TTFT p99.9",
    "median_tpot_floor_ms": "TPOT p50",
    "p99_tpot_floor_ms": "TPOT p99",
    "p99.9_tpot_floor_ms": "TPOT p99.9",
}
HEADINGS: Final = (
    *(
        "engine",
        "interference",
        "threads",
        *LATENCIES.values(),
        "x TTFT p99",
        "x TPOT p99",
        "tokens/s",
        "retained",
        "tokens/J",
        "the same above idle",
    ),
    *("client late p99 ms", "CPU pressure", "switches/s", "engine CPUs", "CPU MHz", "GPU MHz", "GPU W", "failed"),
)


def isolated_of(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(c["engine"], c["placement"], c["load"]): c for c in cells if c["threads"] == 0}


def ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def compared(cell: dict[str, Any], isolated: dict[str, Any] | None) -> dict[str, float | None]:
    """Of one run against the isolated one: p99 TTFT and TPOT as multiples, and the share of the throughput that is left."""
    if isolated is None:
        return {"ttft": None, "tpot": None, "retained": None}
    here, there = cell["report"], isolated["report"]
    return {
        "ttft": ratio(here["p99_ttft_floor_ms"], there["p99_ttft_floor_ms"]),
        "tpot": ratio(here["p99_tpot_floor_ms"], there["p99_tpot_floor_ms"]),
        "retained": ratio(here["steady_output_throughput"], there["steady_output_throughput"]),
    }


def row_of(cell: dict[str, Any], isolated: dict[str, Any] | None) -> list[object]:
    report, host, against = cell["report"], cell["host"], compared(cell, isolated)
    joules, above = (report["gpu_energy"][name] for name in ("j_per_token", "j_per_token_above_idle"))
    return [
        cell["engine"],
        cell["interference"],
        cell["threads"],
        *(report[key] for key in LATENCIES),
        against["ttft"],
        against["tpot"],
        report["steady_output_throughput"],
        None if against["retained"] is None else f"{against['retained']:.1%}",
        None if not joules else 1 / joules,
        None if not above else 1 / above,
        report["p99_send_delay_ms"],
        None if (share := host["pressure"].get("cpu some")) is None else f"{share:.1%}",
        host["context_switches_per_s"],
        sum(process["cpu_share"] for process in host["processes"]),
        host["mean_clock_mhz"],
        report["gpu_energy"]["sm_clock_mhz"],
        report["gpu_energy"]["power_w"],
        report["failed"],
    ]


def interference_sections(cells: Sequence[dict[str, Any]]) -> list[Section]:
    """A section for each load and placement."""
    isolated = isolated_of(cells)
    sections = []
    for load, of_load in by(cells, "load").items():
        for placement, here in by(of_load, "placement").items():
            here = sorted(
                here,
                key=lambda cell: (
                    cell["engine"],
                    cell["interference"] != "none",
                    cell["interference"],
                    cell["threads"],
                ),
            )
            base = {cell["engine"]: isolated.get((cell["engine"], placement, load)) for cell in here}
            rows = [row_of(cell, base[cell["engine"]]) for cell in here]
            first = here[0]
            cpus = f"{first['reserved_cpus']} CPUs for client and ingress, {first['contested_cpus']} contested"
            if placement == "sharing":
                cpus = f"all of it on the same {first['contested_cpus']} CPUs"
            title = f"{load}, placement {placement} ({cpus})"
            sections.append(Section(title, HEADINGS, rows, plots_of(here, base)))
    return sections


def plots_of(cells: Sequence[dict[str, Any]], base: dict[str, dict[str, Any] | None]) -> list[Plot]:
    """Per metric: its multiple of the isolated run against the threads, the worst kind of each count; then, at the most threads, each kind beside
    isolation: what is retained, latencies of each engine, tokens/J."""
    plots: list[Plot] = []
    disturbed = [cell for cell in cells if cell["threads"] > 0 and base[cell["engine"]] is not None]
    if not disturbed:
        return []
    for metric in ("ttft", "tpot"):
        lines = []
        for engine, its in by(disturbed, "engine").items():
            points = [(0.0, 1.0)]
            for threads, same in by(its, "threads").items():
                found = [value for cell in same if (value := compared(cell, base[engine])[metric]) is not None]
                points += [(float(threads), max(found))] if found else []
            lines.append(Line(engine, points))
        title = f"p99 {metric.upper()}, worst kind of interference"
        plots.append(line_plot(title, "interfering threads", "multiple of the isolated run", lines, log_y=True))
    most = max(cell["threads"] for cell in disturbed)
    kinds = list(by(disturbed, "interference"))
    bars: dict[str, list[float]] = {}
    for engine, its in by(disturbed, "engine").items():
        left = {c["interference"]: compared(c, base[engine])["retained"] or 0.0 for c in its if c["threads"] == most}
        bars[engine] = [100 * left.get(kind, 0.0) for kind in kinds]
    plots.append(bar_plot(f"throughput retained at {most} threads", "% of the isolated run", kinds, bars))
    return plots + latency_bars(cells, base, kinds, most) + energy_bars(cells, base, kinds, most)


def beside_isolated(
    engine: str, cells: Sequence[dict[str, Any]], base: dict[str, dict[str, Any] | None], most: int
) -> dict[str, dict[str, Any]]:
    """Reports of an engine by kind of interference at the most threads, and `isolated`."""
    found = {c["interference"]: c["report"] for c in cells if (c["engine"], c["threads"]) == (engine, most)}
    isolated = base[engine]
    return found if isolated is None else {"isolated": isolated["report"], **found}


def latency_bars(
    cells: Sequence[dict[str, Any]], base: dict[str, dict[str, Any] | None], kinds: Sequence[str], most: int
) -> list[Plot]:
    plots, groups = [], ["isolated", *kinds]
    for engine in base:
        reports = beside_isolated(engine, cells, base, most)
        for name, metric in (("TTFT", "ttft_floor"), ("TPOT", "tpot_floor")):
            bars = {
                word: [reports[group][f"{key}_{metric}_ms"] if group in reports else 0.0 for group in groups]
                for word, key in (("p50", "median"), ("p99", "p99"), ("p99.9", "p99.9"))
            }
            plots.append(bar_plot(f"{engine}: {name} at {most} threads", "ms", groups, bars, log_y=True))
    return plots


def energy_bars(
    cells: Sequence[dict[str, Any]], base: dict[str, dict[str, Any] | None], kinds: Sequence[str], most: int
) -> list[Plot]:
    """None on a machine whose power nobody tells."""
    groups = ["isolated", *kinds]
    bars: dict[str, list[float]] = {}
    for engine in base:
        joules = {
            kind: report["gpu_energy"]["j_per_token"]
            for kind, report in beside_isolated(engine, cells, base, most).items()
            if report["gpu_energy"]["j_per_token"]
        }
        if joules:
            bars[engine] = [1 / joules[group] if group in joules else 0.0 for group in groups]
    return [bar_plot(f"energy at {most} threads", "tokens/J", groups, bars)] if bars else []
