"""tools/bench_arrival.py: which gaps are steady and which stand beside the arrival, and a run on the emulated device.

Run: pytest tests/host/test_bench_arrival.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support import load_tool, undisturbed

tool = load_tool("bench_arrival")
EMULATED = ["--device", "emulated"]


def times(device_ms: list[list[float]], accepted_ms: float = 0.0) -> object:
    device = (np.array(device_ms) * 1e6).astype(np.int64)
    accepted = np.full(len(device_ms), int(accepted_ms * 1e6), np.int64)
    return tool.Times(accepted - 1_000_000, accepted, device, device + 500_000)


def test_the_worst_gap_is_one_that_touches_the_arrival() -> None:
    """Steps of 5 ms; the newcomer is taken at 22 ms and has its first token at 60 ms, between which steps take 12 and 26 ms."""
    streams = times([[1, 5, 10, 15, 20, 32, 58, 63, 68], [5, 10, 15, 20, 32, 58, 63, 68, 73]])
    got = tool.gaps_of(streams, times([[60]], accepted_ms=22))
    assert (got["steady_tpot_ms"], got["worst_gap_ms"], got["ratio"]) == (5.0, 26.0, 5.2)
    assert got["newcomer_ttft_ms"] == 38.0 and got["newcomer_client_ttft_ms"] == 39.5
    assert got["steady_tpot_after_ms"] == 5.0
    assert got["num_steps_beside"] == 3  # the one under way at 22 ms, and those that end at 58 and 63


def test_streams_that_end_before_the_newcomer_begins_are_no_measurement() -> None:
    streams = times([[1, 5, 10, 15, 20, 32]])
    with pytest.raises(tool.BenchError, match="too short"):
        tool.gaps_of(streams, times([[60]], accepted_ms=22))


@undisturbed
def test_a_smaller_budget_spreads_the_prompt_over_more_steps(tmp_path: Path) -> None:
    """Counted in steps by the device's own stamps: how long a step takes is the machine's business. A client that sleeps for thirty of
    them comes too late to meet the streams: then once more."""
    out = tmp_path / "arrival.json"
    batch, prompt = 3, 512
    flags = ["--shape", "embedded", "--batch", str(batch), "--context", "256", "--prompt", str(prompt)]
    # 4 leaves one row of a step to the prompt. The streams' own prompts at that pace: the first would end before the newcomer begins.
    assert tool.main([*EMULATED, *flags, "--budgets", "4,16,256", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["errors"] == [] and report["prompt"] == prompt and len(report["budgets"]) == 3
    for row in report["budgets"]:
        fewest = prompt // row["budget"]  # were each step the newcomer's alone
        most = -(-prompt // (row["budget"] - batch))  # with the streams' rows taken out of it
        steps = row["worst"]["num_steps_beside"]
        # Besides: a step under way at the arrival, one that was planned before it, and one that ends beside the first token.
        assert fewest <= steps <= most + 3, f"budget {row['budget']}: {steps} steps, expected {fewest} to {most + 3}"
    assert [row["budget"] for row in report["budgets"]] == [4, 16, 256]


SMALL = ["--shape", "embedded", "--batch", "2", "--context", "32", "--prompt", "64", "--repeats", "1"]


@undisturbed
def test_a_budget_that_cannot_be_measured_leaves_the_others_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streams end long before the prompt is through."""
    planned = tool.num_stream_tokens
    monkeypatch.setattr(
        tool, "num_stream_tokens", lambda arguments, budget: 50 if budget == 8 else planned(arguments, budget)
    )
    out = tmp_path / "arrival.json"
    assert tool.main([*EMULATED, *SMALL, "--budgets", "3,8,16", "--out", str(out)]) == 1
    report, printed = json.loads(out.read_text()), capsys.readouterr()
    assert [sorted(row) for row in report["budgets"]] == [
        ["budget", "runs", "wall_s", "worst"],
        ["budget", "error", "wall_s"],
        ["budget", "runs", "wall_s", "worst"],
    ]
    assert "     8  not measured" in printed.out
    for words in ("budget 8: ", "expected some, some, and at least 0", "streams of 50 tokens", "a larger budget"):
        assert words in printed.err
    assert len(report["errors"]) == 1


@undisturbed
def test_figures_are_written_before_the_next_budget_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, planned = tmp_path / "arrival.json", tool.measure

    def ends_from_outside(bench: object, arguments: object, budget: int, num_runs: int) -> object:
        if budget == 3:
            raise KeyboardInterrupt
        return planned(bench, arguments, budget, num_runs)

    monkeypatch.setattr(tool, "measure", ends_from_outside)
    with pytest.raises(KeyboardInterrupt):
        tool.main([*EMULATED, *SMALL, "--budgets", "8,3", "--out", str(out)])
    assert [row["budget"] for row in json.loads(out.read_text())["budgets"]] == [8]


def test_requests_that_still_run_end_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step_requests.Client.settle", lambda client: False)
    out = tmp_path / "arrival.json"
    assert tool.main([*EMULATED, *SMALL, "--budgets", "8,16", "--timeout", "0", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["budgets"] == [] and len(report["errors"]) == 2
    printed = capsys.readouterr().err
    assert "its requests still run; expected an idle engine" in printed and "no figures of budgets [8, 16]" in printed


def test_a_client_settles_after_a_run_that_was_given_up(tmp_path: Path) -> None:
    """The next run finds nothing of it: neither its completions nor its rows."""
    with tool.EngineBench("embedded", "emulated", 256, {"max_batch": 4}, 60.0, None) as bench:
        bench.client._timeout_s = 0.0
        with pytest.raises(tool.BenchError, match="raise --timeout"):
            bench.client.run("given up", [tool.Wave(3, 32, 100)])
        assert bench.client.settle()
        bench.client._timeout_s = 60.0
        (times,) = bench.client.run("after it", [tool.Wave(2, 16, 4)])
        assert times.device.shape == (2, 4) and times.device.all()


@pytest.mark.parametrize("budgets", ["16", "8,64", "8193", ""])
def test_budgets_that_leave_no_row_for_the_prompt_are_refused(budgets: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--batch", "16", "--budgets", budgets])
    assert "expected numbers above --batch (16)" in capsys.readouterr().err
