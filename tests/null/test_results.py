"""What stands in tools/results against what is made of it: the evidence page, its plots, the README's rows, commands without a machine's paths.

Run: pytest tests/null/test_results.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blinkimp.lab.evidence_report import write_evidence_report
from blinkimp.lab.plots import Plot
from blinkimp.lab.report import write_report
from blinkimp.lab.store import Store
from tests.support import ROOT

RESULTS = ROOT / "tools" / "results"
EVIDENCE = RESULTS / "evidence"
TRACED = RESULTS / "evidence_traced"
IN_TURN = RESULTS / "evidence_in_turn"
IN_STEP = RESULTS / "evidence_in_step"
IN_STEP_BEFORE = RESULTS / "evidence_in_step_before"
SAME_GPU = RESULTS / "evidence_same_gpu"
LEVELS = RESULTS / "evidence_levels"
LEVELS_IN_STEP = RESULTS / "evidence_levels_in_step"
TRACED_LONGER = RESULTS / "evidence_traced_longer"
FOLDERS = [EVIDENCE, TRACED, TRACED_LONGER, IN_TURN, IN_STEP, IN_STEP_BEFORE, SAME_GPU, LEVELS, LEVELS_IN_STEP]
ISOLATED = [IN_TURN, SAME_GPU]  # without levels of interference: no plots over them
MAX_PLOT_BYTES = 200_000
MAX_EVIDENCE_BYTES = 2_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_evidence_page_is_what_its_cells_say(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots by name alone: drawing them takes seconds, and text may come out otherwise with another matplotlib."""
    for name in ("line_plot", "bar_plot"):
        monkeypatch.setattr(
            f"blinkimp.lab.evidence_report.{name}", lambda title, *of_plot, **how: Plot(title, "<svg></svg>")
        )
    page = tmp_path / "RESULTS.md"
    write_evidence_report(folder, page)
    name = folder.relative_to(ROOT)
    remedy = f"run: python -m blinkimp lab evidence --resume {name} --report {name}/RESULTS.md"
    assert page.read_text() == (folder / "RESULTS.md").read_text(), remedy
    made, there = ({path.name for path in plots.glob("*")} for plots in (tmp_path / "RESULTS", folder / "RESULTS"))
    assert made == there, remedy
    assert made or folder in ISOLATED, "plots are over levels of interference"


@pytest.mark.parametrize("name", ["interference", "sweep"])
def test_a_report_of_cells_is_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; the title is the page's first line."""
    for plot in ("interference_report.line_plot", "interference_report.bar_plot", "report.line_plot"):
        monkeypatch.setattr(f"blinkimp.lab.{plot}", lambda title, *of_plot, **how: Plot(title, "<svg></svg>"))
    folder, page = RESULTS / name, tmp_path / "RESULTS.md"
    there = (folder / "RESULTS.md").read_text()
    title = there.splitlines()[0].removeprefix("# ")
    write_report([Store(folder)], page, title)
    remedy = f"run: python -m blinkimp lab report --folder tools/results/{name} --out tools/results/{name}/RESULTS.md --title '{title}'"
    assert page.read_text() == there, remedy
    assert {path.name for path in (tmp_path / "RESULTS").glob("*")} == {
        path.name for path in (folder / "RESULTS").glob("*")
    }, remedy


def test_plots_are_small_and_drawn() -> None:
    folders = [
        *(folder for folder in FOLDERS if (folder / "RESULTS").exists()),
        RESULTS / "interference",
        RESULTS / "sweep",
    ]
    plots = [path for folder in folders for path in (folder / "RESULTS").iterdir()]
    assert plots and all(path.suffix == ".svg" and path.stat().st_size < MAX_PLOT_BYTES for path in plots)
    assert all(path.read_text().count("<path") > 5 for path in plots)
    assert sum(path.stat().st_size for path in EVIDENCE.rglob("*") if path.is_file()) < MAX_EVIDENCE_BYTES


def test_the_readmes_rows_of_the_evidence_stand_in_a_page() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Under interference\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    pages = [line for folder in (EVIDENCE, IN_STEP) for line in (folder / "RESULTS.md").read_text().splitlines()]
    assert len(rows) > 3 and not [row for row in rows if row not in pages]


def test_commands_name_no_machines_paths() -> None:
    files = sorted(RESULTS.rglob("*.json"))
    assert len(files) > 50
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if (match := re.search(r"[\"' =](/(tmp|root|home|opt|work|mnt|usr)/[^\"' ]*)", path.read_text()))
    ]
    assert not found, "\n".join(found)
