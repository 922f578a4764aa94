#!/usr/bin/env python3
"""A Markdown table out of what tools/bench_step.py and tools/bench_vllm.py have written, for the README and device/PERFORMANCE.md.

    python tools/step_table.py tools/results/step.json [--vllm tools/results/vllm.json]

Times are medians in ms: blinkimp's and torch's by the device's clock, vLLM's at the client. Test: pytest tests/null/test_step_table.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from step_rows import parse_row  # noqa: E402  (the path above comes first)

HEADINGS = (
    *("", "blinkimp", "p10 - p90", "client", "torch", "vLLM", "limit", "blinkimp / limit", "torch / blinkimp", "vLLM / blinkimp"),
    *("TB/s", "TFLOP/s", "J/token", "above idle", "torch's J/token", "torch's above idle"),
)  # fmt: skip


def text_of(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def energy_of(side: Mapping[str, Any] | None) -> tuple[str, str]:
    """J/token as drawn, and without what an idle GPU draws."""
    if side is None:
        return "-", "-"
    return text_of(side["j_per_token"], 4), text_of(side["j_per_token_above_idle"], 4)


def line_of(row: Mapping[str, Any], vllm: Mapping[str, Any] | None) -> str:
    ours, theirs = row.get("blinkimp"), row.get("torch")
    ours_ms = None if ours is None else ours["device"]["median_ms"]
    vllm_ms = None if vllm is None else vllm["client"]["median_ms"]
    cells = [
        parse_row(row["name"]).label,
        text_of(ours_ms),
        "-" if ours is None else f"{ours['device']['p10_ms']:.2f} - {ours['device']['p90_ms']:.2f}",
        text_of(None if ours is None else ours["client"]["median_ms"]),
        text_of(None if theirs is None else theirs["device"]["median_ms"]),
        text_of(vllm_ms),
        text_of(row.get("limit_ms")),
        text_of(None if ours is None else ours.get("ratio_to_limit")),
        text_of(row.get("speedup_over_torch")),
        text_of(None if ours_ms is None or vllm_ms is None else vllm_ms / ours_ms),
        text_of(None if ours is None else ours.get("achieved_tb_per_s")),
        text_of(None if ours is None else ours.get("achieved_tflop_per_s"), 0),
        *energy_of(ours),
        *energy_of(theirs),
    ]
    return f"| {' | '.join(cells)} |"


def table_of(report: Mapping[str, Any], vllm: Mapping[str, Any] | None) -> str:
    """The table, under a line that says what it was measured on."""
    of_vllm = {} if vllm is None else {row["name"]: row["vllm"] for row in vllm["rows"]}
    idle = report["idle"]
    power = (
        ""
        if idle["gpu_w"] is None
        else f"; idle GPU {idle['gpu_w']:.0f} W, idle engine {text_of(idle['engine_w'], 0)} W"
    )
    lines = [
        f"{report['gpu']}, driver {report['driver']}, commit {report['commit']}, {report['date']}{power}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(line_of(row, of_vllm.get(row["name"])) for row in report["rows"]),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON of tools/bench_step.py")
    parser.add_argument("--vllm", type=Path, help="JSON of tools/bench_vllm.py")
    arguments = parser.parse_args(argv)
    try:
        report = json.loads(arguments.report.read_text())
        vllm = None if arguments.vllm is None else json.loads(arguments.vllm.read_text())
        print(table_of(report, vllm))
    except (OSError, ValueError, KeyError) as error:
        print(
            f"step_table: got {error!r}, expected a report of bench_step (and of bench_vllm); check the files",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
