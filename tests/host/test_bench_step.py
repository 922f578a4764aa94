"""tools/bench_step.py as a whole, on the emulated device and with torch on the CPU.

Run: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support import load_tool, undisturbed

bench_step = load_tool("bench_step")
FLAGS = ["--device", "emulated", "--shape", "embedded", "--tokens", "6", "--energy-s", "0.05"]


@undisturbed
def test_a_run_measures_both_sides(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more where the client slept between the requests of a batch: then too few steps had all of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torch's threads spin for each other where the cores are busy
    out = tmp_path / "step.json"
    flags = ["--rows", "d1@40,d3@44,p32", "--torch-backend", "none", "--commit", "abc", "--out", str(out)]
    assert bench_step.main([*FLAGS, *flags]) == 0
    report = json.loads(out.read_text())
    assert report["errors"] == [] and report["commit"] == "abc"
    load = report["engine"]["load"]
    assert load["weights_gb_per_s"] > 0 and load["start_s"] >= load["weights_s"] > 0
    assert 0 < report["engine"]["ping"]["p10_us"] <= report["engine"]["ping"]["median_us"]
    assert report["engine"]["memory_plan"]["sizes"]["num_pages"] > 0
    assert [row["name"] for row in report["rows"]] == ["d1@40", "d3@44", "p32"]
    for row in report["rows"]:
        for side in ("blinkimp", "torch"):
            times = row[side]["device"]
            assert 0 < times["p10_ms"] <= times["median_ms"] <= times["p90_ms"] and times["n"] >= 6
            assert row[side]["j_per_token"] is None and "limit_ms" not in row  # no GPU
        assert row["speedup_over_torch"] > 0
    for row in report["rows"][:2]:
        assert row["blinkimp"]["num_steps"] >= 6
        # Prompts are shortened so that the measured steps attend to what the row says, not more.
        assert row["blinkimp"]["mean_context"] == pytest.approx(row["context"], rel=0.06)
    # The client's time spans the device's: ACK and token lie between its submission and its sight of the token.
    prefill = report["rows"][2]["blinkimp"]
    assert 0 < prefill["device"]["median_ms"] < prefill["client"]["median_ms"] < math.inf
    assert "d3@44" in capfd.readouterr().out


def test_a_row_that_cannot_run_is_an_error_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    flags = ["--rows", "d1@40,d65@64,p8", "--only", "blinkimp", "--out", str(out)]
    assert bench_step.main([*FLAGS, *flags]) == 1
    report = json.loads(out.read_text())
    assert len(report["errors"]) == 1 and "expected a batch of at most 64" in report["errors"][0]
    assert [row["name"] for row in report["rows"]] == ["d1@40", "p8"]
    assert "expected a batch of at most 64" in capsys.readouterr().err
