"""`blinkimp lab sweep` and `lab report` against a scripted server: cells, resumption, and the file that opens offline.

Run: pytest tests/host/test_lab_sweep.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blinkimp.cli import main
from tests.scripted_server import Script, scripted_server
from tests.support import PATIENCE_S, files_of_at_most, python_path

NUM_TRIES = 5
FLAGS = ["--scenarios", "8x3,16x2", "--concurrency", "1,2", "--rates", "20", "--duration", "0.5", "--warmup", "0.1"]


def test_a_sweep_goes_on_where_it_stopped_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, report = tmp_path / "cells", tmp_path / "report.html"
    script = Script(first_ms=2, gap_ms=1)
    with scripted_server("http", script) as address:
        sweep = ["lab", "sweep", "--url", address, "--label", "scripted", "--folder", str(folder), *FLAGS]
        assert main([*sweep[:-8], "--concurrency", "1", "--scenarios", "8x3"]) == 0
        assert len(list(folder.glob("*.cell.json"))) == 1
        num_before = len(script.prompts)
        assert main([*sweep, "--report", str(report)]) == 0
        assert "8x3, concurrency 1: measured before" in capsys.readouterr().out
        cells = [json.loads(path.read_text()) for path in folder.glob("*.cell.json")]
        assert len(cells) == 6 and all(cell["report"]["failed"] == 0 for cell in cells)
        num_closed = 10 * (1 + 2 + 2)  # of the five closed loops one was there: 8x3 with one user
        assert len(script.prompts) - num_before >= num_closed
        num_before = len(script.prompts)
        capsys.readouterr()
        assert main(sweep) == 0
        assert "with " not in capsys.readouterr().out
        assert main([*sweep, "--requests-per-user", "3", "--seed", "7"]) == 0
        assert (
            "16x2, concurrency 2: measured before, with num_requests 20 (asked for: 6), seed 0 (asked for: 7); remove the cell"
            in capsys.readouterr().out
        )
        assert len(script.prompts) == num_before  # everything was there
    text = report.read_text()
    assert text.count("<svg") == 2 * 5 and "http://127" not in text and "<script" not in text
    assert "8x3: frontier" in text and "16x2: TTFT p99 over users" in text


def test_a_sweep_stops_in_time_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server("zmq", Script(first_ms=2, gap_ms=1)) as address:
        sweep = ["lab", "sweep", "--connect", address, "--folder", str(tmp_path), *FLAGS]
        assert main([*sweep, "--stop-after", "0"]) == 0
        assert not list(tmp_path.iterdir()) and "goes on with 8x3, concurrency 1" in capsys.readouterr().out
        assert main([*sweep, "--stop-after", "3600"]) == 0
    assert len(list(tmp_path.glob("*.cell.json"))) == 6


def test_cells_of_another_server_are_not_taken_for_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--folder", str(tmp_path), "--scenarios", "8x2", "--concurrency", "1"]
    script = Script(first_ms=2, gap_ms=1)
    with scripted_server("zmq", script) as zmq_address, scripted_server("http", script) as http_address:
        assert main(["lab", "sweep", "--connect", zmq_address, *flags]) == 0
        (path,) = tmp_path.glob("*.cell.json")
        before = path.read_text()

        def refused(*target: str) -> str:
            capsys.readouterr()
            num_before = len(script.prompts)
            assert main(["lab", "sweep", *target, *flags, "--concurrency", "2,1"]) == 1
            assert len(script.prompts) == num_before, "before anything is measured"
            return capsys.readouterr().err

        said = refused("--url", http_address)
        assert "backend blinkimp-zmq (asked for: openai)" in said and f"address {zmq_address}" in said
        assert "give this one a --label of its own, or take another folder" in said
        assert "address" in refused("--connect", "tcp://127.0.0.1:1")
        assert "num_gpus 1 (asked for: 2)" in refused("--connect", zmq_address, "--num-gpus", "2")
        assert path.read_text() == before
        # As earlier versions wrote it.
        cell = json.loads(before)
        del cell["target"]
        path.write_text(json.dumps(cell))
        assert "backend blinkimp-zmq (asked for: openai)" in refused("--url", http_address)
        assert main(["lab", "sweep", "--connect", zmq_address, *flags]) == 0
        assert main(["lab", "sweep", "--url", http_address, "--label", "other", *flags]) == 0
        # An engine that was started anew has another address, and its label.
        assert main(["lab", "sweep", "--url", "http://127.0.0.1:1", "--label", "other", *flags]) == 0
        assert "asked for: mine" in refused("--url", http_address, "--label", "other", "--model-name", "mine")


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 in the middle of the second cell: the first one is whole, and is not measured again."""
    with scripted_server("http", Script(first_ms=50, gap_ms=1)) as address:
        sweep = ["lab", "sweep", "--url", address, "--folder", str(tmp_path), *FLAGS]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        for _ in range(NUM_TRIES):
            for path in tmp_path.iterdir():
                path.unlink()
            killed = subprocess.Popen(
                [sys.executable, "-m", "blinkimp", *sweep], env=environment, stdout=subprocess.DEVNULL
            )
            deadline = time.monotonic() + PATIENCE_S
            while not list(tmp_path.glob("*.cell.json")) and time.monotonic() < deadline:
                time.sleep(0.005)
            killed.kill()
            killed.wait()
            before = {path.name: path.read_text() for path in tmp_path.glob("*.cell.json")}
            if len(before) < 6:
                break  # else this process slept while all were measured: once more
        assert 0 < len(before) < 6
        assert main(sweep) == 0
    after = {path.name: path.read_text() for path in tmp_path.glob("*.cell.json")}
    assert len(after) == 6 and before.items() <= after.items()
    assert capsys.readouterr().out.count("measured before") == len(before)


def test_a_sweep_whose_server_refuses_fails_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "cells", tmp_path / "report.html"
    flags = ["--folder", str(folder), "--scenarios", "8x2", "--concurrency", "1"]
    with scripted_server("zmq", Script(fail_each=1)) as address:
        assert main(["lab", "sweep", "--connect", address, *flags]) == 1
    assert "failed: none of 10 requests completed: busy" in capsys.readouterr().out
    assert main(["lab", "report", "--folder", str(folder), "--out", str(out)]) == 0
    assert "none of 10 requests completed" in out.read_text()


def test_what_cannot_be_written_is_refused_before_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    script = Script()
    with scripted_server("zmq", script) as address:
        sweep = ["lab", "sweep", "--connect", address, "--scenarios", "8x2", "--concurrency", "1"]
        assert main([*sweep, "--folder", str(tmp_path / "file")]) == 1
        assert "file: cannot be written to (File exists); expected a folder" in capsys.readouterr().err
        for report in ("none/x.html", "file/x.md", ""):
            flags = ["--folder", str(tmp_path / "cells"), "--report", str(tmp_path / report)]
            assert main([*sweep, *flags]) == 1
            assert "cannot be written" in capsys.readouterr().err
    assert not script.prompts and not (tmp_path / "cells").exists()
    assert (
        main(["lab", "evidence", "--resume", str(tmp_path / "file"), "--engines", "persistent", "--model", "embedded"])
        == 1
    )
    assert "expected a folder" in capsys.readouterr().err
    assert main(["lab", "report", "--folder", str(tmp_path), "--out", str(tmp_path / "none" / "x.md")]) == 1
    assert "none/x.md: cannot be written" in capsys.readouterr().err


def test_a_cell_that_a_full_disk_refuses_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cells"
    with scripted_server("zmq", Script(gap_ms=1)) as address, files_of_at_most(1000):
        sweep = ["lab", "sweep", "--connect", address, "--scenarios", "8x2", "--concurrency", "1,2"]
        assert main([*sweep, "--folder", str(folder)]) == 1
    told = capsys.readouterr()
    assert "cell.json: cannot be written" in told.err and "make room" in told.err
    (cell,) = (json.loads(line) for line in told.out.splitlines())
    assert cell["report"]["completed"] == 10 and cell["key"].endswith("concurrency-1"), "no other is measured in vain"
    assert list(folder.iterdir()) == [], "no half of it either"


def test_a_sweep_on_no_gpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--url", "http://127.0.0.1:1", "--folder", str(tmp_path / "cells"), "--num-gpus", "-1"]
    assert main(["lab", "sweep", *flags]) == 1
    assert "got -1 GPUs; expected at least 1" in capsys.readouterr().err and not (tmp_path / "cells").exists()


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "report", "--folder", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 1
    assert "no cells" in capsys.readouterr().err
