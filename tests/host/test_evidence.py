"""`blinkimp lab evidence`: calls that go on where another stopped or was killed, engines that fail, and our engine over both transports.

Run: pytest tests/host/test_evidence.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blinkimp.cli import main
from blinkimp.lab.evidence import MIN_DRAIN_S, Call
from blinkimp.lab.evidence_plan import DRAIN_S, STOP_S
from blinkimp.lab.evidence_state import end_leftover, start_time
from blinkimp.lab.room import Room
from tests.host.test_lab_room import Visitor
from tests.support import PATIENCE_S, python_path, undisturbed

# An OpenAI-compatible server on a given port, as a process: what --vllm-command starts.
SERVER = """
import asyncio, sys
from tests.scripted_server import Script, serve_http

async def main():
    script = Script(first_ms=2, gap_ms=1)
    server = await asyncio.start_server(lambda r, w: serve_http(script, r, w), "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""
NUM_TRIES = 5
LOADS = ["--rates", "40", "--users", "2", "--open-lengths", "8x3", "--closed-lengths", "8x3", "--device", "emulated"]
LENGTH = ["--seconds", "0.3", "--warmup", "0.1", "--threads", "0", "--placements", "sharing", "--model", "embedded"]


@pytest.fixture(autouse=True)
def _python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())


def scripted(tmp_path: Path) -> list[str]:
    (tmp_path / "server.py").write_text(SERVER)
    return ["--engines", "vllm", "--vllm-command", f"{sys.executable} {tmp_path}/server.py {{port}}"]


def cells_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.cell.json")}


def test_a_call_that_was_killed_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 after the first cell: its engine is left behind; the next call ends it, and measures only what is missing."""
    folder = tmp_path / "evidence"
    flags = ["lab", "evidence", "--resume", str(folder), *LOADS, *LENGTH, "--rates", "20,40,60", *scripted(tmp_path)]
    for _ in range(NUM_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        call = subprocess.Popen([sys.executable, "-m", "blinkimp", *flags], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while not cells_in(folder) and time.monotonic() < deadline:
            time.sleep(0.005)
        call.kill()
        call.wait()
        if len(cells_in(folder)) < 6:
            break  # else this process slept while all were measured: once more
        end_leftover(folder, print)
    left, before = json.loads((folder / "engine.json").read_text()), cells_in(folder)
    assert start_time(left["pid"]) == left["started"] and 0 < len(before) < 6
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "ending engine vllm" in said and f"6 cells, {len(before)} of them measured before" in said
    assert start_time(left["pid"]) != left["started"] and not (folder / "engine.json").exists()
    after = cells_in(folder)
    assert len(after) == 6 and before.items() <= after.items()
    assert main(flags) == 0
    assert "6 of 6 cells measured; all done" in capsys.readouterr().out and cells_in(folder) == after
    calls = json.loads((folder / "calls.json").read_text())
    assert len(calls) == 2 and [start["engine"] for start in calls[1]["starts"]] == ["vllm"]
    report = tmp_path / "RESULTS.md"
    assert main(["lab", "evidence", "--resume", str(folder), "--report", str(report)]) == 0
    assert "6 of 6 cells were measured" in report.read_text()


def test_sigterm_ends_the_engine_too(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    flags = ["--resume", str(folder), *LOADS, *LENGTH, "--seconds", "10", *scripted(tmp_path)]
    # Seconds of a closed loop: a faster server would use up its requests before their end, on a machine that keeps pace.
    (tmp_path / "server.py").write_text(SERVER.replace("first_ms=2", "first_ms=50"))
    call = subprocess.Popen(
        [sys.executable, "-m", "blinkimp", "lab", "evidence", *flags], stdout=subprocess.PIPE, text=True
    )
    assert call.stdout is not None
    said: list[str] = []
    while not said or "is up" not in said[-1]:
        said.append(call.stdout.readline())
        assert said[-1], f"the call has ended: {''.join(said)}"
    left = json.loads((folder / "engine.json").read_text())
    call.send_signal(signal.SIGTERM)
    assert call.wait(PATIENCE_S) == 128 + signal.SIGTERM
    call.stdout.close()
    assert start_time(left["pid"]) != left["started"]


def test_an_engine_that_does_not_start_leaves_the_others_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours cannot start with such a flag; the peer is measured all the same, and the call says that something failed."""
    folder = tmp_path / "evidence"
    flags = ["lab", "evidence", "--resume", str(folder), *LOADS, *LENGTH, *scripted(tmp_path)]
    assert main([*flags, "--engines", "persistent,vllm", "--serve-flags=--nothing-of-the-kind"]) == 1
    said = capsys.readouterr().out
    assert "persistent: its command ended with status 2" in said.replace("engine persistent: its", "persistent: its")
    assert "unrecognized arguments: --nothing-of-the-kind" in said  # the end of its log
    assert len(cells_in(folder)) == 4


def test_cells_measured_otherwise_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["lab", "evidence", "--resume", str(tmp_path / "evidence"), *LOADS, *LENGTH, *scripted(tmp_path)]
    assert main([*flags, "--budget-s", "1"]) == 0  # nothing fits
    assert main([*flags, "--seconds", "5"]) == 1
    assert "seconds 0.3 -> 5.0; expected the same" in capsys.readouterr().err


@undisturbed
def test_an_engine_too_slow_to_finish_is_measured_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is answered before 2 s, and a cell ends after 0.5: what is known is a lower bound, and the server is quiet before the next."""
    for name, seconds in (("DRAIN_S", 0.1), ("MIN_DRAIN_S", 0.1), ("QUIET_S", 0.0)):
        monkeypatch.setattr(f"blinkimp.lab.evidence.{name}", seconds)
    folder, flags = tmp_path / "evidence", scripted(tmp_path)
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "server.py").write_text(SERVER.replace("first_ms=2", "first_ms=2000"))
    assert main(["lab", "evidence", "--resume", str(folder), *LOADS, *LENGTH, *flags]) == 0
    cells = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.cell.json")]
    assert len(cells) == 4  # of the closed loop, too, in which nobody gets to a second request
    for cell in cells:
        report = cell["report"]
        assert "error" not in cell and report["completed"] == 0 and report["num_cut"] > 0
        assert report["p99_ttft_floor_ms"] >= 100


def test_our_engine_is_measured_over_both_transports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a transport is warmed up right before its first cell: one without a cell in this call is not."""
    folder, own_cpus, events = tmp_path / "evidence", os.sched_getaffinity(0), []
    warm_up, measure = Call._warm_up, Call._measure
    monkeypatch.setattr(
        Call, "_warm_up", lambda call, spec: events.append(f"warm {spec.address[:4]}") or warm_up(call, spec)
    )
    monkeypatch.setattr(
        Call, "_measure", lambda call, cell, *rest: events.append(cell.transport) or measure(call, cell, *rest)
    )
    flags = ["--engines", "persistent", "--serve-flags=--num-threads=1"]
    assert main(["lab", "evidence", "--resume", str(folder), *LOADS, *LENGTH, *flags, "--users", ""]) == 0
    assert os.sched_getaffinity(0) == own_cpus
    assert events == ["warm http", "http", "http", "warm tcp:", "zmq"]
    cells = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.cell.json")]
    assert {(cell["transport"], cell["report"]["backend"]) for cell in cells} == {
        ("http", "openai"),
        ("zmq", "blinkimp-zmq"),
    }
    for cell in cells:
        assert cell["report"]["completed"] > 0 and cell["report"]["failed"] == 0
        assert cell["host"]["processes"] and cell["tier"] <= 8 and cell["wall_s"] > 0.4


def test_a_trace_of_each_cell_says_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of both orchestrators, and of the cell alone: what the engine did before is not in it."""
    folder = tmp_path / "evidence"
    flags = ["lab", "evidence", "--resume", str(folder), *LOADS, *LENGTH, "--users", "", "--transports", "http"]
    assert main([*flags, "--engines", "persistent,cpu", "--serve-flags=--num-threads=1", "--trace"]) == 0
    cells = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.cell.json")]
    assert {cell["engine"] for cell in cells} == {"persistent", "cpu"}
    for cell in cells:
        trace, num_asked = cell["trace"], cell["report"]["num_prompts"]
        assert trace["requests"]["num"] >= num_asked and trace["requests"]["num_finished"] < 3 * num_asked
        assert trace["requests"]["phases_ms"]["prefill"]["n"] > 0 and trace["trace"]["lost"]["device"] == 0
        assert trace["trace"]["clock_error_us"] is not None and trace["steps"]["num"] > 0
        # Times of ops are of every 64th step, and none with the host's scheduling.
        assert not trace["ops"] or cell["engine"] == "persistent"
    assert len(list((folder / "traces").glob("*.trace"))) == len(cells)
    capsys.readouterr()
    assert main([*flags, "--engines", "persistent"]) == 1
    assert "is_traced True -> False; expected the same" in capsys.readouterr().err
    report = tmp_path / "RESULTS.md"
    assert main(["lab", "evidence", "--resume", str(folder), "--report", str(report)]) == 0
    assert "## Causes: where the time went" in report.read_text()


def test_last_answers_are_not_waited_for_beyond_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor while the engine is to be stopped in it."""
    drains = []

    def measured(*arguments: object) -> dict[str, object]:
        drains.append(arguments[-2])
        return {"error": "not measured"}

    monkeypatch.setattr("blinkimp.lab.evidence.measure", measured)
    monkeypatch.setattr("blinkimp.lab.evidence.QUIET_S", 0.0)
    flags = ["lab", "evidence", "--resume", str(tmp_path / "evidence"), *LOADS, *LENGTH, *scripted(tmp_path)]
    assert main([*flags, "--budget-s", "600"]) == 1 and drains == [DRAIN_S] * 4
    drains.clear()
    monkeypatch.setattr("blinkimp.lab.evidence.DRAIN_S", 1e6)
    assert main([*flags, "--budget-s", "600"]) == 1
    assert len(drains) == 4 and all(MIN_DRAIN_S < drain < 600 - STOP_S - 0.4 for drain in drains)


def test_a_cell_that_another_level_keeps_out_is_left_to_a_later_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blinkimp.lab.evidence.STOP_S", 600.0)  # so that there is no time to wait
    folder, room = tmp_path / "evidence", tmp_path / "room"
    flags = ["lab", "evidence", "--resume", str(folder), "--room", str(room), *LOADS, *LENGTH, *scripted(tmp_path)]
    with Room(room).enter("64", 0.0):
        assert main(flags) == 0
    said = capsys.readouterr().out
    assert said.count("too late; others measured another level") == 4 and "0 of 4 cells measured" in said
    assert main(flags) == 0 and len(cells_in(folder)) == 4


def test_while_others_measure_another_level_cells_of_that_level_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a cell waits, and there is no time to wait here: so the cells that found the room taken come last."""
    room = tmp_path / "room"
    flags = ["lab", "evidence", "--room", str(room), *LOADS, *LENGTH, *scripted(tmp_path)]
    flags += ["--threads", "0,1", "--interference", "arithmetic"]
    monkeypatch.setattr(Call, "_patience_s", lambda *_: 0.0)

    def is_too_late(folder: str, level: int) -> list[bool]:
        """Cell by cell, in the order in which they were measured or given up."""
        other = Visitor(room, level)
        assert other.said() == "0" and main([*flags, "--resume", str(tmp_path / folder)]) == 0
        other.leave()
        lines = [line for line in capsys.readouterr().out.splitlines() if "threads" in line]
        return ["too late" in line for line in lines if "too late" in line or "TTFT" in line]

    # Two loads without interference and each again; then the two with 1 thread, which found the room taken.
    assert is_too_late("evidence", 0) == [False, False, False, False, True, True]
    assert is_too_late("evidence", 1) == [False, False]
    assert is_too_late("other", 1)[0], "a cell whose isolated run is not there does not go before it"


def test_processes_side_by_side_make_one_page(tmp_path: Path) -> None:
    """Two calls at once, each of an engine in a folder of its own, meet in a room: all is measured, and the page has both."""
    both, begun = tmp_path / "evidence", []
    for idx, engine in enumerate(("persistent", "vllm")):
        flags = ["--resume", str(both / f"{idx}-{engine}"), "--room", str(both / "room"), *LOADS, *LENGTH]
        flags += ["--threads", "0,1", "--interference", "arithmetic", "--users", "", "--transports", "http"]
        flags += [*scripted(tmp_path), "--engines", engine, "--serve-flags=--num-threads=1"]
        begun.append(subprocess.Popen([sys.executable, "-m", "blinkimp", "lab", "evidence", *flags]))
    assert [process.wait(PATIENCE_S) for process in begun] == [0, 0]
    assert json.loads((both / "room").read_text()) == []
    page = tmp_path / "RESULTS.md"
    assert main(["lab", "evidence", "--resume", str(both), "--report", str(page)]) == 0
    text = page.read_text()
    assert "6 of 6 cells were measured, in 2 calls" in text and "side by side" in text
    assert "| persistent | http | sharing |" in text and "| vllm | http | sharing |" in text
