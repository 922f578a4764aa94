"""tools/bench_trace.py: a small run of each part, and its arithmetic. Run: pytest tests/host/test_bench_trace.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import load_tool

bench_trace = load_tool("bench_trace")


def test_analysis_of_a_made_up_trace(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["--events", "40000", "--batch", "8", "--runs", "1", "--folder", str(tmp_path), "--commit", "abc"]
    assert bench_trace.main([*flags, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["analysis"]
    assert 40_000 <= found["num_events"] < 42_000 and found["num_requests"] % 8 == 0
    assert found["scan"]["million_events_per_s"] > 0 and found["stats"]["best_s"] > 0
    assert not list(tmp_path.glob("*.trace")), "it is removed"


def test_parts_make_the_trace_that_one_would() -> None:
    shape = bench_trace.Shape(batch=4, output_tokens=5)
    whole = bench_trace.make_trace(1000, shape)
    first = bench_trace.make_trace(300, shape)
    second = bench_trace.make_trace(1000, shape, first_wave=bench_trace.num_waves_of(first, shape))
    assert whole.tobytes().startswith(first.tobytes())
    assert (first.tobytes() + second.tobytes()).startswith(whole.tobytes())


def test_overhead_on_the_emulated_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    flags = [
        "--device",
        "emulated",
        "--shape",
        "embedded",
        "--rows",
        "d1@32",
        "--rounds",
        "1",
        "--tokens",
        "8",
        "--modes",
        "recorder",
    ]
    assert bench_trace.main([*flags, "--commit", "abc", "--out", str(out)]) == 0
    table = json.loads(out.read_text())["overhead"]["rows"]["d1@32"]
    assert set(table) == {"off", "recorder"}
    assert all(entry["median_ms"] > 0 and entry["cpu_ms"] >= 0 for entry in table.values())
    assert "d1@32, recorder: median_ms" in capsys.readouterr().out


def test_overheads_are_ratios_of_a_round() -> None:
    row = bench_trace.Row("decode", 1, 8)
    rounds = [
        {mode: {row.name: {"median_ms": base * (1.02 if mode == "on" else 1.0)}} for mode in bench_trace.MODES}
        for base in (1.0, 5.0, 2.0)
    ]
    entry = bench_trace.compare_modes(rounds, [row])[row.name]
    assert entry["on"]["median_ms overhead_percent"] == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert entry["off"] == {"median_ms": 2.0}


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(SystemExit):
        bench_trace.main([])


def test_a_kernel_without_the_traces_code_is_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_trace.main(["--device", "emulated", "--modes", "without"])
    assert "expected it: the emulated device has one kernel" in capsys.readouterr().err
    assert bench_trace.parse_arguments(["--device", "gpu"]).modes == list(bench_trace.MODES)
    assert "without" not in bench_trace.parse_arguments(["--device", "emulated"]).modes
