"""`blinkimp trace`, as a user runs it: a served model, a recording of it, and everything that can be made of that.

Run: pytest tests/host/test_cli_trace.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from blinkimp.cli import main
from blinkimp.client import Client
from blinkimp.ring_abi import LEAST_TRACE_EVENTS, TraceKind
from blinkimp.trace.figures import PHASES
from blinkimp.trace.file import Metadata, TraceFile, TraceFileWriter
from tests.host.engine_support import make_tiny_checkpoint, running_engine
from tests.ingress_support import end_process, start_process, wait_until, write_byte_tokenizer
from tests.null.test_trace_figures import make_file
from tests.support import PATIENCE_S, python_path

MAX_TOKENS = 16


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of twelve requests through a ZeroMQ ingress, one of them cancelled. It is as long as this machine needs for them."""
    folder = tmp_path_factory.mktemp("trace")
    make_tiny_checkpoint(folder)
    tokenizer = write_byte_tokenizer(folder)
    path = folder / "run.trace"
    options: dict[str, Any] = {"trace_events": LEAST_TRACE_EVENTS, "trace_op_period": 8}
    with running_engine(folder, **options) as engine:
        name = engine.config.engine_name
        process, endpoint = start_process(name, tokenizer, 0)
        try:
            for seconds in (3, 15, 75):
                path.unlink(missing_ok=True)
                failures: list[BaseException] = []
                clients = threading.Thread(target=_ask, args=(endpoint, path, failures))
                clients.start()
                assert main(["trace", "record", "--engine-name", name, "--seconds", str(seconds), "-o", str(path)]) == 0
                are_recorded = not clients.is_alive()
                clients.join()
                assert not failures, failures
                if are_recorded:
                    break
            assert are_recorded, f"twelve requests take more than {seconds} s"
        finally:
            end_process(process)
    return path


def _ask(endpoint: str, path: Path, failures: list[BaseException]) -> None:
    """Once the recorder is there."""
    try:
        wait_until(path.exists, "the recorder has begun")
        with Client(endpoint, timeout_s=PATIENCE_S) as client:
            streams = [client.submit([3 + i, 5], max_tokens=MAX_TOKENS, ignore_eos=True) for i in range(11)]
            for stream in streams:
                assert stream.result().num_output_tokens == MAX_TOKENS
            stream = client.submit([9], max_tokens=400, ignore_eos=True)
            next(iter(stream))
            stream.cancel()
            for _ in stream:
                pass
    except BaseException as error:
        failures.append(error)


def test_stats(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "stats", str(recorded), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    requests = figures["requests"]
    reasons = requests["by_reason"]
    assert requests["num"] == 12 and reasons["length"] + reasons.get("cancelled", 0) == 12  # a cancel may come too late
    assert figures["trace"]["clock_error_us"] is not None
    for name in PHASES:
        assert requests["phases_ms"][name]["n"] >= 11, name
    assert requests["ttft_ms"]["p50"] > 0 and figures["steps"]["num"] > MAX_TOKENS
    # What the samples say of a busy engine: test_trace_recorder.py. A fast one is idle again before the next.
    assert figures["occupancy"]["running"]["max"] >= 0 and "attention" in figures["ops"]["by_kind"]
    assert main(["trace", "stats", str(recorded)]) == 0
    text = capsys.readouterr().out
    for words in ("gap to the next", "hand-over", "gate_up", "qp0 completions", "aligned within", "TTFT"):
        assert words in text


def test_timeline(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The cancelled one, which may well be the slowest, has no `ended`: its client did not want its end.
    events = TraceFile(recorded).events
    whole = int(events["request_id"][events["kind"] == int(TraceKind.ENDED)][0])
    assert main(["trace", "timeline", str(recorded), "--request", hex(whole), "--tokens"]) == 0
    text = capsys.readouterr().out
    for words in ("received", "claimed", "polled", "queued", "prompt rows", "streamed", "ended", "ingress 0"):
        assert words in text
    assert main(["trace", "timeline", str(recorded), "--slowest", "1"]) == 0
    assert "finish drained" in capsys.readouterr().out
    assert main(["trace", "timeline", str(recorded), "--request", "0x7"]) == 1
    assert "--slowest" in capsys.readouterr().err


def test_exports(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.null.test_trace_exports import check_format, exported

    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    command = ["trace", "export", str(recorded), "--perfetto", str(tmp_path / "run.json"), "--gzip"]
    assert main([*command, "--parquet", str(tmp_path / "run.parquet")]) == 0
    document = exported(tmp_path / "run.json.gz")
    check_format(document)
    pids = {event["pid"] for event in document["traceEvents"] if event["ph"] in "Xi"}
    assert pids == {1, 2, 3, 4} and document["otherData"]["lost_events"] == 0
    assert f"{len(TraceFile(recorded).events)} rows" in capsys.readouterr().out
    assert main(["trace", "export", str(recorded)]) == 1
    assert "expected --perfetto" in capsys.readouterr().err


def test_a_trace_does_not_differ_from_itself(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "diff", str(recorded), str(recorded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_tokens"] is True and found["remarks"] == []
    assert [row["name"] for row in found["requests"]] == [*PHASES, "a request's life"]
    assert all(row["change_ms"] == 0 for name in ("requests", "steps", "ops", "figures") for row in found[name])
    assert main(["trace", "diff", str(recorded), str(recorded)]) == 0
    assert "the same, request by request" in capsys.readouterr().out


def test_record_takes_the_engine_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As top and tune do: the flag, else the environment, else the file. Nobody is called so; the error says who was looked for."""
    record = ["trace", "record", "-o", str(tmp_path / "a.trace")]
    (tmp_path / "settings.toml").write_text('engine_name = "of-the-file"\n')
    monkeypatch.setenv("BLINKIMP_CONFIG", str(tmp_path / "settings.toml"))
    assert main(record) == 1
    assert "of-the-file" in capsys.readouterr().err
    monkeypatch.setenv("BLINKIMP_ENGINE_NAME", "of-the-environment")
    assert main(record) == 1
    assert "of-the-environment" in capsys.readouterr().err
    assert main([*record, "--engine-name", "of-the-flag"]) == 1
    assert "of-the-flag" in capsys.readouterr().err


def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "stats", str(tmp_path / "none")]) == 1
    assert "check the name" in capsys.readouterr().err
    assert main(["trace", "record", "--engine-name", "nobody-is-called-so", "-o", str(tmp_path / "a")]) == 1
    assert "--trace-events" in capsys.readouterr().err
    for seconds in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit, match="2"):
            main(["trace", "record", "--seconds", seconds, "-o", str(tmp_path / "a")])
        assert f"got '{seconds}', expected seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["timeline", "--slowest", "0"], ["timeline", "--slowest", "-3"], ["export", "--max-events", "-1"]]
)
def test_none_of_something_is_wrong_usage(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make_file(path := tmp_path / "a.trace")
    with pytest.raises(SystemExit, match="2"):
        main(["trace", *flags, str(path)])
    assert f"argument {flags[1]}: got '{flags[2]}', expected a whole number from 1" in capsys.readouterr().err


def test_a_trace_without_requests_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TraceFileWriter(tmp_path / "a.trace") as writer:
        writer.finish(Metadata(), 1)
    assert main(["trace", "timeline", str(tmp_path / "a.trace"), "--slowest", "3"]) == 1
    assert "has no request from its begin to its end" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["trace", "stats"], ["trace", "stats", "--json"], ["trace", "timeline", "--slowest", "1"]]
)
def test_an_output_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, command: list[str]) -> None:
    """Whatever command it is of: blinkimp/cli/__init__.py."""
    make_file(path := tmp_path / "a.trace")
    environment = {**os.environ, "PYTHONPATH": python_path()}
    told = [sys.executable, "-m", "blinkimp", *command, str(path)]
    with open("/dev/full", "w") as full:
        found = subprocess.run(told, env=environment, check=False, text=True, stdout=full, stderr=subprocess.PIPE)
    assert found.returncode == 1
    assert found.stderr.startswith("blinkimp trace: stdout: cannot be written (No space left on device)")
    assert found.stderr.count("\n") == 1
    read_end, write_end = os.pipe()
    os.close(read_end)  # as `| head` that has seen enough
    found = subprocess.run(told, env=environment, check=False, text=True, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert found.returncode in (1, 141) and found.stderr == ""  # 1: where rich has printed it
