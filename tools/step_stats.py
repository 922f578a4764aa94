"""Spreads of samples, and what a measurement was made with: shared by the step benchmarks.

Called by tools/bench_step.py, torch_baseline.py, bench_arrival.py, bench_vllm.py and power_idle.py. Test: pytest tests/null/test_step_rows.py
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp import __version__
from blinkimp.host.power import PowerSource

ROOT = Path(__file__).resolve().parents[1]


def spread(samples_ns: NDArray[np.int64]) -> dict[str, float]:
    """Median, p10 and p90 in ms, and of how many."""
    p10, median, p90 = np.percentile(samples_ns, [10, 50, 90]) / 1e6
    return {
        "median_ms": round(median, 4),
        "p10_ms": round(p10, 4),
        "p90_ms": round(p90, 4),
        "n": len(samples_ns),
    }


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit_of_tree() -> str:
    """The commit that is measured; `-dirty` where the tree differs from it, `unknown` where there is no git."""
    head, changes = output_of("git", "rev-parse", "--short=10", "HEAD"), output_of("git", "status", "--porcelain")
    if not head:
        return "unknown"
    return head if changes == "" else f"{head}-dirty"


def header(tool: str, argv: Sequence[str] | None, commit: str | None, source: PowerSource | None) -> dict[str, Any]:
    """What every report of a measurement begins with."""
    return {
        "command": shlex.join(["python", f"tools/{tool}.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or commit_of_tree(),
        "gpu": None if source is None else source.name,
        "driver": None if source is None else source.driver,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "blinkimp": __version__},
    }


def save_report(report: dict[str, Any], path: Path | None) -> None:
    """Says nothing: for what there is so far, between rows of a table."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def write_report(report: dict[str, Any], path: Path | None) -> None:
    save_report(report, path)
    if path is not None:
        print(f"wrote {path}")


def finish(report: dict[str, Any], path: Path | None) -> int:
    """Writes a report that may have errors, and tells them. Returns the exit status."""
    write_report(report, path)
    for message in report["errors"]:
        print(f"error: {message}", file=sys.stderr)
    return 1 if report["errors"] else 0
