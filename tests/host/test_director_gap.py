"""tools/director_gap.py on the emulated device, and its arithmetic. Run: pytest tests/host/test_director_gap.py"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import TraceKind
from tests.support import load_tool, undisturbed

director_gap = load_tool("director_gap")


@undisturbed
def test_a_run_on_the_emulated_device(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Once more where the client slept between the requests of a batch: then fewer steps had all of them."""
    out = tmp_path / "gap.json"
    flags = ["--device", "emulated", "--shape", "embedded", "--batches", "1,4", "--steps", "24", "--pings", "40"]
    assert director_gap.main([*flags, "--commit", "abc", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["gaps"]] == [1, 4]
    for row in report["gaps"]:
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p99_us"] <= row["max_us"] and row["n"] >= 20
    poll = report["poll"]
    assert poll["if_earliest"]["n"] == 40 and poll["offset_known_within_us"] >= 0
    assert 0 <= poll["if_earliest"]["p10_us"] <= poll["if_latest"]["p10_us"] <= poll["round_trip"]["max_us"]
    assert "gap b4" in capfd.readouterr().out


def test_gaps_are_of_full_steps_in_a_row() -> None:
    events = np.zeros(7, abi.TRACE_EVENT)
    for event, (kind, step, time_ns, seqs) in zip(
        events,
        [
            (TraceKind.STEP_START, 0, 1000, 1), (TraceKind.STEP_END, 0, 2000, 0), (TraceKind.STEP_START, 1, 2500, 2),
            (TraceKind.STEP_END, 1, 9000, 0), (TraceKind.STEP_START, 2, 10200, 2), (TraceKind.STEP_END, 2, 11000, 0),
            (TraceKind.STEP_START, 3, 19000, 1),
        ], strict=True,
    ):  # fmt: skip
        event["kind"], event["step"], event["time_ns"] = int(kind), step, time_ns
        event["argument"] = seqs << 32 | seqs
    assert director_gap.gaps_us(events, 2).tolist() == [1.2]


NO_SIGHTS = np.zeros(0, np.int64)


def test_clock_offset_is_bounded_from_both_sides() -> None:
    """The device's clock is 1,000,000 ns ahead; polls come 2 to 5 us after the commit, PONGs 1 us after the poll."""
    committed = np.arange(4, dtype=np.int64) * 100_000
    delays = np.array([2000, 5000, 4000, 2000])
    polled = committed + delays + 1_000_000
    poll = director_gap.poll_us(
        director_gap.Moments(committed, committed + delays + 1000, polled, NO_SIGHTS, NO_SIGHTS)
    )
    assert poll["offset_known_within_us"] == pytest.approx(3.0, abs=0.01)
    assert poll["if_earliest"]["median_us"] == pytest.approx(1.0, abs=0.01)
    assert poll["if_latest"]["median_us"] == pytest.approx(4.0, abs=0.01) and poll["round_trip"]["median_us"] == 4.0


def test_the_status_page_bounds_the_clocks_closer() -> None:
    """Its clock is seen 0.2 us after it was stamped."""
    committed = np.arange(4, dtype=np.int64) * 100_000
    delays = np.array([2000, 5000, 4000, 2000])
    polled = committed + delays + 1_000_000
    stamped = polled + 30_000
    sighted = stamped - 1_000_000 + 200
    poll = director_gap.poll_us(director_gap.Moments(committed, committed + delays + 1000, polled, stamped, sighted))
    assert poll["offset_known_within_us"] == pytest.approx(2.2, abs=0.05)
    assert poll["if_latest"]["median_us"] == pytest.approx(3.2, abs=0.05)


def test_clocks_that_contradict_each_other_are_told() -> None:
    committed = np.arange(4, dtype=np.int64) * 100_000
    polled = committed + 1_000_000 + np.array([2000, 12_000, 2000, 11_000])
    with pytest.raises(director_gap.BenchError, match="ran apart"):
        director_gap.poll_us(director_gap.Moments(committed, committed + 3000, polled, NO_SIGHTS, NO_SIGHTS))


@pytest.mark.parametrize("flags", [["--batches", "x"], ["--batches", "0"], ["--batches", "257"], ["--steps", "1"]])
def test_bad_arguments_are_refused(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        director_gap.parse_arguments(flags)
    assert "expected" in capfd.readouterr().err
