"""tools/step_table.py: a line for each row, with vLLM's time beside it where there is one.

Run: pytest tests/null/test_step_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import load_tool

tool = load_tool("step_table")


def side(median_ms: float) -> dict[str, Any]:
    times = {"median_ms": median_ms, "p10_ms": median_ms - 0.1, "p90_ms": median_ms + 0.1, "n": 9}
    rates = {"ratio_to_limit": 1.1, "achieved_tb_per_s": 4.2, "achieved_tflop_per_s": 100.0}
    return {"device": times, "client": times, "j_per_token": 2.5, "j_per_token_above_idle": 2.25, **rates}


def test_each_row_is_a_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "d1@1024", "blinkimp": side(4.0), "torch": side(5.0), "limit_ms": 3.3, "speedup_over_torch": 1.25},
        {"name": "p128", "torch": side(8.0)},
    ]
    report = {
        "gpu": "H200",
        "driver": "580",
        "commit": "abc",
        "date": "now",
        "idle": {"gpu_w": 70.0, "engine_w": 120.0},
    }
    step, vllm = tmp_path / "step.json", tmp_path / "vllm.json"
    step.write_text(json.dumps({**report, "rows": rows}))
    vllm.write_text(json.dumps({"rows": [{"name": "d1@1024", "vllm": {"client": {"median_ms": 6.0}}}]}))
    assert tool.main([str(step), "--vllm", str(vllm)]) == 0
    first, _, heading, rule, *lines = capsys.readouterr().out.splitlines()
    assert "H200, driver 580, commit abc" in first and "idle GPU 70 W, idle engine 120 W" in first
    assert len({line.count("|") for line in (heading, rule, *lines)}) == 1 and len(lines) == 2
    got = dict(zip(tool.HEADINGS, (cell.strip() for cell in lines[0].strip("| ").split("|")), strict=True))
    assert got[""] == "decode, batch 1, context 1024" and got["vLLM / blinkimp"] == "1.50"
    assert (got["blinkimp"], got["torch"], got["vLLM"], got["limit"]) == ("4.00", "5.00", "6.00", "3.30")
    assert got["p10 - p90"] == "3.90 - 4.10" and got["J/token"] == "2.5000"
    assert (got["above idle"], got["torch's above idle"]) == ("2.2500", "2.2500")


def test_what_is_no_report_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "none.json"):
        assert tool.main([str(tmp_path / name)]) == 1
        assert "expected a report of bench_step" in capsys.readouterr().err
