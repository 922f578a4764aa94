"""tools/ops_report.py: the layout of a report is read back as it was, and the table sets variants beside torch.

Run: pytest tests/null/test_ops_report.py
"""

from __future__ import annotations

import json
import sys

import pytest

from blinkimp.host.model_config import parse_config
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from ops_report import costs, figures_of, joules_above_idle, layout, resolution, table
from ops_timing import Figures
from step_rows import SHAPES, Row

MODEL = parse_config(SHAPES["llama-3-8b"])
ROWS = [Row("decode", 64, 1024), Row("prefill", 1, 1024)]
OURS = Figures(ms=2.0, sustained_ms=2.5, joules=1.5, watts=600.0, sm_clock_mhz=1500.0, counter_step_s=0.1)
THEIRS = Figures(ms=1.6, sustained_ms=2.0, joules=1.2, watts=600.0, sm_clock_mhz=1600.0, counter_step_s=0.02)
BURST = Figures(ms=0.004)


def results() -> dict[str, dict[str, dict[str, Figures]]]:
    return {
        "base": {row.name: {"all": OURS, "down": OURS, "sample": BURST} for row in ROWS},
        "wide": {row.name: {"all": OURS, "down": THEIRS, "sample": BURST} for row in ROWS},
        "torch": {row.name: {"down": THEIRS} for row in ROWS},
    }


def test_a_report_is_read_back_as_it_was() -> None:
    report = json.loads(json.dumps(layout(results(), 80.0)))
    assert {variant: figures_of(report, variant) for variant in report["ms"]} == results()
    assert report["ms"]["base"]["d64@1024"] == {"all": 2.0, "down": 2.0, "sample": 0.004}
    assert report["joules"]["base"]["p1024"] == {"all": 1.5, "down": 1.5, "sample": None}
    assert report["joules_above_idle"]["torch"]["p1024"]["down"] == pytest.approx(1.2 - 80 * 0.002)
    assert report["idle_w"] == 80.0


def test_joules_above_idle_need_joules_and_an_idle_power() -> None:
    assert joules_above_idle(OURS, 100.0) == pytest.approx(1.25)
    assert joules_above_idle(BURST, 100.0) is None and joules_above_idle(OURS, None) is None


def test_the_table_sets_variants_beside_torch() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(MODEL, ROWS, results()).splitlines()]
    head, _, *body = lines
    assert [cells[:3] for cells in body[:6]] == [
        ["d64@1024", part, variant] for part in ("all", "down", "sample") for variant in ("base", "wide")
    ]
    assert len(body) == 12 and {len(cells) for cells in lines} == {len(head)} and body[6][0] == "p1024"
    down = dict(zip(head, body[2], strict=True))
    # 32 matrices of 4,096 x 14,336 at 64 rows: 240.5 GFLOP, and 3.76 GB at 4.6 TB/s
    assert (down["burst ms"], down["TFLOP/s"], down["limit ms"]) == ("2.0000", "120.3", "0.8170")
    assert (down["sustained ms"], down["J"], down["W"], down["MHz"]) == ("2.5000", "1.5000", "600", "1500")
    assert (down["torch burst ms"], down["torch sustained ms"], down["torch J"]) == ("1.6000", "2.0000", "1.2000")
    assert (down["ms / torch"], down["J / torch"]) == ("1.25", "1.25")
    sample = dict(zip(head, body[4], strict=True))
    assert [sample[name] for name in ("limit ms", "TFLOP/s", "J", "torch J", "J / torch")] == ["-"] * 5


def test_a_table_without_torch_or_of_torch_alone_has_no_columns_beside() -> None:
    alone = {"torch": results()["torch"]}
    ours = {"base": results()["base"]}
    assert "torch J" not in table(MODEL, ROWS, ours) and "torch J" not in table(MODEL, ROWS, alone)
    assert len(table(MODEL, ROWS, alone).splitlines()) == 2 + 2


def test_a_row_that_one_variant_lacks_is_left_out() -> None:
    found = results()
    del found["wide"]["p1024"], found["torch"]["p1024"]
    lines = table(MODEL, ROWS, found).splitlines()
    assert len(lines) == 2 + 6 + 3 and lines[-2].endswith("| - | - | - | - | - | - |")


def test_the_resolution_is_the_coarsest_counters() -> None:
    words = resolution(results(), 0.6)
    assert words is not None and words.startswith("energy counter: at most 100 ms") and "1.7 % off" in words
    assert resolution({"base": {"p1024": {"sample": BURST}}}, 0.6) is None


def test_costs_stand_beside_the_figures() -> None:
    of_row = costs(MODEL, ROWS, ["all", "sample"])["d64@1024"]
    assert of_row["sample"] == {"bytes": 0, "operations": 0, "limit_ms": 0.0}
    assert of_row["all"]["limit_ms"] == pytest.approx(5.13, abs=0.01)
