"""`blinkimp lab interference` on the emulated device: cells, pinning, isolated beside interfered, the report.

Run: pytest tests/host/test_lab_interference.py
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.cli import main
from blinkimp.lab.engines import EngineSpec, RunningEngine, placement_of
from blinkimp.lab.evidence_state import start_time
from blinkimp.lab.interference_report import compared
from tests.host.engine_support import wait_for
from tests.scripted_server import Script, scripted_server
from tests.support import PATIENCE_S, hear_signals, python_path


@pytest.fixture(autouse=True)
def _python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())


def serve_command(endpoint: str) -> str:
    flags = ["--device", "emulated", "--bind", endpoint, "--engine-name", f"lab-{secrets.token_hex(3)}"]
    return shlex.join(
        [sys.executable, "-m", "blinkimp", "serve", *flags, "--num-threads", "1", "--log-level", "warning"]
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: none can be reserved")
def test_an_engine_is_measured_with_and_without_interference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = tmp_path / "cells", tmp_path / "report.html"
    endpoint = f"ipc://{tmp_path}/ingress"
    flags = ["--folder", str(folder), "--loads", "r10:16x4", "--kinds", "arithmetic,syscall", "--threads", "2"]
    flags += [
        "--placements",
        "reserved",
        "--reserved-cpus",
        "1",
        "--duration",
        "1",
        "--warmup",
        "0",
        "--report",
        str(report),
    ]
    command = ["lab", "interference", *flags, "--engine", "persistent", endpoint, serve_command(endpoint)]
    own_cpus = os.sched_getaffinity(0)
    assert main(command) == 0
    assert os.sched_getaffinity(0) == own_cpus
    cells = {cell["interference"]: cell for path in folder.glob("*.json") if (cell := json.loads(path.read_text()))}
    assert set(cells) == {"none", "arithmetic", "syscall"}
    for name, cell in cells.items():
        assert cell["report"]["completed"] > 0 and cell["report"]["failed"] == 0
        names = {process["name"] for process in cell["host"]["processes"]}
        assert len(names) >= 1 and cell["host"]["context_switches_per_s"] > 0
        assert (cell["interference_units_per_s"] is None) == (name == "none")
        against = compared(cell, cells["none"])
        assert against["ttft"] is not None and against["retained"] is not None
        # None: all tokens of every request came to a client that slept in one message.
        assert name != "none" or against in (
            {"ttft": 1, "tpot": 1, "retained": 1},
            {"ttft": 1, "tpot": None, "retained": 1},
        )
    text = report.read_text()
    assert text.count("<svg") == 3 + 2 and "placement reserved (1 CPUs for client and ingress" in text
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 cells, 3 of them measured before" in said and "asked for" not in said
    assert main([*command, "--seed", "7"]) == 0
    assert capsys.readouterr().out.count("measured before, with seed 0 (asked for: 7); remove the cell") == 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: none can be reserved")
def test_ingress_and_device_get_the_reserved_cpus_and_the_host_the_others(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/ingress"
    placement = placement_of("reserved", 1, os.sched_getaffinity(0))
    with RunningEngine(EngineSpec("persistent", endpoint, serve_command(endpoint)), PATIENCE_S) as engine:
        engine.pin(placement)
        cpus_of = {command: os.sched_getaffinity(pid) for pid, command in engine.processes.items()}
    ingress = [cpus for command, cpus in cpus_of.items() if "zmq_ingress" in command]
    device = [cpus for command, cpus in cpus_of.items() if "emulated_process" in command]
    assert ingress == device == [set(placement.reserved)]
    assert [cpus for command, cpus in cpus_of.items() if " serve " in command] == [set(placement.contested)]


def test_a_server_that_runs_already_is_measured_as_it_is(tmp_path: Path) -> None:
    with scripted_server("http", Script(first_ms=2, gap_ms=1)) as address:
        flags = ["--folder", str(tmp_path), "--loads", "c2:8x2", "--kinds", "bz2", "--threads", "1"]
        flags += ["--placements", "sharing", "--duration", "0.5", "--warmup", "0"]
        command = ["lab", "interference", *flags, "--engine", "scripted", address]
        assert main([*command, "--stop-after", "0"]) == 0 and not list(tmp_path.glob("*.json"))
        assert main(command) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2


@contextlib.contextmanager
def occupied(room: Path, level: str) -> Iterator[None]:
    """Another process is in the room, as its entry says."""
    other = subprocess.Popen(["sleep", "600"])
    room.write_text(json.dumps([{"pid": other.pid, "started": start_time(other.pid), "level": level}]))
    try:
        yield
    finally:
        other.kill()
        other.wait()


def test_a_cell_waits_for_a_room_that_has_another_interference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = tmp_path / "room"
    with scripted_server("http", Script(first_ms=2, gap_ms=1)) as address:
        flags = ["--folder", str(tmp_path / "cells"), "--loads", "c2:8x2", "--kinds", "bz2", "--threads", "1"]
        flags += ["--placements", "sharing", "--duration", "0.5", "--warmup", "0", "--room", str(room)]
        command = ["lab", "interference", *flags, "--engine", "scripted", address]
        with occupied(room, "sharing stream 1"):
            assert main([*command, "--stop-after", "0.2"]) == 0 and not list((tmp_path / "cells").glob("*.json"))
            assert "stopped after 0.2 s with 2 cells missing" in capsys.readouterr().out
        with occupied(room, "sharing none 0"):
            assert main([*command, "--stop-after", "2"]) == 0
            assert [path.name.split("__")[3] for path in (tmp_path / "cells").glob("*.json")] == ["none"]
        assert main(command) == 0 and json.loads(room.read_text()) == []
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2


def test_an_engine_that_does_not_start_is_explained() -> None:
    spec = EngineSpec("broken", "tcp://127.0.0.1:1", f"{sys.executable} -c 'raise SystemExit(3)'")
    with pytest.raises(LoadError, match="ended with status 3"), RunningEngine(spec, PATIENCE_S):
        pass
    with (
        pytest.raises(LoadError, match="expected a command that can be run"),
        RunningEngine(EngineSpec("x", "tcp://127.0.0.1:1", "/none"), 1),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_lab_that_is_ended_takes_its_engine_with_it(tmp_path: Path, number: signal.Signals) -> None:
    pid_file = tmp_path / "pid"
    engine = shlex.join(["sh", "-c", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 600"])
    flags = ["--folder", str(tmp_path / "cells"), "--kinds", "arithmetic", "--threads", "1", "--placements", "sharing"]
    command = [
        sys.executable,
        "-m",
        "blinkimp",
        "lab",
        "interference",
        *flags,
        "--engine",
        "x",
        "tcp://127.0.0.1:1",
        engine,
    ]
    with (tmp_path / "log").open("w") as log:
        lab = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=hear_signals)
    try:
        wait_for(pid_file.exists, PATIENCE_S, "the engine is started")
        lab.send_signal(number)
        assert lab.wait(PATIENCE_S) == 128 + number, (tmp_path / "log").read_text()
        assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()
    finally:
        lab.kill()
