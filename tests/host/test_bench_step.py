"""tools/bench_step.py as a whole, on the emulated device and with torch on the CPU.

Run: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from tests.support import PATIENCE_S, ROOT, load_tool, undisturbed

sys.path.insert(0, str(ROOT / "tools"))

from step_requests import BenchError, Client, Times, Wave

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


def test_a_row_that_times_out_leaves_the_others_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests run when the next row begins: they are cancelled, and their tokens are nobody else's."""
    run = Client.run

    def without_time(client: Client, what: str, waves: list[Wave]) -> list[Times]:
        is_late = waves[0].batch == 16
        monkeypatch.setattr(client, "_timeout_s", 0.0 if is_late else PATIENCE_S)
        return run(client, what, waves)

    monkeypatch.setattr(Client, "run", without_time)
    out = tmp_path / "step.json"
    assert bench_step.main([*FLAGS, "--rows", "d16@400,p8,p12", "--only", "blinkimp", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert len(report["errors"]) == 1 and "of 16 requests ended" in report["errors"][0]
    assert [row["name"] for row in report["rows"]] == ["p8", "p12"]
    assert "raise --timeout" in capsys.readouterr().err


def test_a_run_does_not_count_completions_of_the_run_before() -> None:
    with bench_step.EngineBench("embedded", "emulated", 512, {"max_batch": 4}, 0.0, None) as bench:
        with pytest.raises(BenchError, match="raise --timeout"):
            bench.client.run("given up", [Wave(3, 32, 200)])
        bench.client._timeout_s = PATIENCE_S
        # The prompt tokens of both runs come to one sum, which is not what this is about.
        bench.client._expect_undisturbed = lambda *_: None  # type: ignore[method-assign]
        (times,) = bench.client.run("beside it", [Wave(1, 16, 300)])
        assert times.device.shape == (1, 300) and times.device.all()
