"""`blinkimp bench` as a user runs it.

Run: pytest tests/host/test_cli_bench.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blinkimp.bench.load_plan import read_trace
from blinkimp.bench.report import error_lines
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


def test_the_file_of_a_load_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the load: nobody is asked."""
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text('{"at_s": 0.0, "input_tokens": 4, "output_tokens": 2}\n')
    target = ["bench", "--url", "http://127.0.0.1:1", "--trace", str(trace)]
    for flags in (["--out", str(trace)], ["--save-trace", str(trace)], ["--out", str(out), "--save-trace", str(out)]):
        assert main([*target, *flags]) == 1
        assert "the same file as" in capsys.readouterr().err
    assert main(["bench", "--trace", str(trace), "--save-trace", str(trace)]) == 1
    assert "at_s" in trace.read_text() and not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate", "1", "--num-requests", "1"], "--connect or --url"),
        (["--url", "http://127.0.0.1:1", "--num-requests", "1"], "--rate, --concurrency or --trace"),
        (["--url", "http://127.0.0.1:1", "--rate", "1"], "--num-requests or --duration"),
        (["--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1", "--goodput", "x"], "NAME:MILLISECONDS"),
        (["--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1"], "check that it runs"),
        (
            ["--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1", "--num-gpus", "0"],
            "got 0 GPUs; expected at least 1",
        ),
        (
            ["--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1", "--out", "/nowhere/x"],
            "/nowhere/x: cannot be written",
        ),
        (["--rate", "1", "--num-requests", "1", "--save-trace", "/nowhere/x"], "/nowhere/x: cannot be written"),
        (["--replay", "x", "--duration", "9"], "got --duration with --replay"),
        (["--rate", "1", "--num-requests", "1", "--time-scale", "2"], "got --time-scale with --rate"),
        (["--trace", "x", "--input-len", "512", "--range-ratio", "1"], "got --input-len with --trace"),
        (["--trace", "x", "--ramp", "9", "--burstiness", "2"], "got --ramp, --burstiness with --trace"),
        (["--concurrency", "1", "--num-requests", "1", "--burstiness", "2"], "got --burstiness with --concurrency"),
    ],
)
def test_a_load_that_cannot_be_is_explained(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 1
    assert words in capsys.readouterr().err


def test_figures_that_cannot_be_written_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full says so at the end only: as a disk does that fills meanwhile."""
    flags = ["--concurrency", "1", "--num-requests", "2", "--input-len", "4", "--output-len", "2", "--out", "/dev/full"]
    with scripted_server("zmq", Script()) as address:
        assert main(["bench", "--connect", address, *flags]) == 1
    told = capsys.readouterr()
    assert "/dev/full: cannot be written (No space left on device)" in told.err
    assert "2 requests completed" in told.out and json.loads(told.out.splitlines()[-1])["completed"] == 2


def test_load_of_which_all_failed_shows_why_and_no_latencies(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_lines({"id 17 is wrong": 2, "id 99 is wrong": 3, "lost": 1}) == [
        "failed 5 times: id 17 is wrong",
        "failed 1 times: lost",
    ]
    assert error_lines(dict.fromkeys("abcdefg", 1))[-1] == "failed 2 times in other ways; --out has them"
    with scripted_server("http", Script(fail_each=1)) as address:
        assert main(["bench", "--url", address, "--concurrency", "2", "--num-requests", "4", "--input-len", "4"]) == 1
    printed = capsys.readouterr().out
    assert (
        "0 requests completed, 4 failed" in printed
        and "failed 4 times: status 503" in printed
        and "TTFT" not in printed
    )


@pytest.mark.parametrize("vocab_size", [0, 50])
def test_prompts_are_of_ids_that_the_server_has(vocab_size: int) -> None:
    script = Script(gap_ms=1, vocab_size=vocab_size)
    with scripted_server("http", script) as address:
        flags = ["--concurrency", "2", "--num-requests", "4", "--input-len", "100", "--output-len", "2"]
        assert main(["bench", "--url", address, *flags]) == 0
    ids = {token for prompt in script.prompts for token in prompt}
    assert (vocab_size or 32000) * 0.9 < max(ids) < (vocab_size or 32000)
