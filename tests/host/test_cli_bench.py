"""`blinkimp bench` as a user runs it.

Run: pytest tests/host/test_cli_bench.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blinkimp.bench.load_plan import read_trace
from blinkimp.cli import main
from tests.scripted_server import Script, scripted_server


def test_a_load_is_measured_printed_written_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "load.json", tmp_path / "trace.jsonl"
    flags = ["--output-len", "2", "--input-len", "6", "--lengths", "range", "--goodput", "ttft:60000", "tpot:60000"]
    with scripted_server("http", Script(gap_ms=2)) as address:
        sent = ["--url", address, "--rate", "50", "--num-requests", "20", "--label", "scripted"]
        assert main(["bench", *sent, *flags, "--out", str(out), "--save-trace", str(trace), "--details"]) == 0
        report = json.loads(out.read_text())
        printed = capsys.readouterr().out
        assert "20 requests completed, 0 failed" in printed and "TTFT, from the intended time" in printed
        assert report["completed"] == report["good_requests"] == 20 and report["model_id"] == "scripted"
        assert report["inferencex"]["framework"] == "scripted" and report["inferencex"]["median_intvty"] > 0
        assert [line.input_tokens for line in read_trace(trace)] == report["input_lens"]
        assert main(["bench", "--url", address, "--trace", str(trace), "--out", str(out)]) == 0
    again = json.loads(out.read_text())
    assert again["completed"] == 20 and again["total_input_tokens"] == report["total_input_tokens"]


def test_a_synthetic_trace_is_made_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    flags = ["--lengths", "sharegpt", "--rate", "8", "--num-requests", "300", "--save-trace", str(trace)]
    assert main(["bench", *flags]) == 0 and f"wrote {trace}" in capsys.readouterr().out
    lines = read_trace(trace)
    assert len(lines) == 300 and len({line.output_tokens for line in lines}) > 100
    times = [line.at_s for line in lines if line.at_s is not None]
    assert times == sorted(times) and len(times) == 300


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate", "1", "--num-requests", "1"], "--connect or --url"),
        (["--url", "http://127.0.0.1:1", "--num-requests", "1"], "--rate, --concurrency or --trace"),
        (["--url", "http://127.0.0.1:1", "--rate", "1"], "--num-requests or --duration"),
        (["--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1", "--goodput", "x"], "NAME:MILLISECONDS"),
        (["--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1"], "check that it runs"),
    ],
)
def test_a_load_that_cannot_be_is_explained(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 1
    assert words in capsys.readouterr().err
