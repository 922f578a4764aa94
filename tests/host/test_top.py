"""`blinkimp top`: figures of a live server out of shared memory, while its host is stopped too; what it says where there is none.

Run: pytest tests/host/test_top.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blinkimp.cli.top_screen import bar, count, duration, render, spark
from blinkimp.cli.top_snapshot import Watcher, running_engines
from blinkimp.client import Client
from blinkimp.host.power import PowerError, Reading
from blinkimp.host.shared_memory import SHM_DIR, SharedMemoryError
from tests.fake_director import FakeDirector
from tests.host.engine_support import process_state, wait_for
from tests.host.server_support import GREEDY, ServerProcess
from tests.host.terminal_support import Terminal
from tests.ingress_support import engine_name
from tests.support import PATIENCE_S, ROOT, python_path

PROMPT = [17, 33, 260, 9]


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blinkimp", "top", "--interval", "0.1", *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "110"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=PATIENCE_S, check=False
    )


def snapshot(name: str) -> dict[str, Any]:
    done = top("--engine-name", name, "--once", "--json")
    assert done.returncode == 0 and not done.stderr, done
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP here")
def test_a_live_server_whose_host_is_stopped(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, max_batch=8) as server:
        name = server.config.engine_name
        with Client(server.config.bind, timeout_s=PATIENCE_S) as client:
            for num_tokens in (5, 7):
                assert len(list(client.submit(PROMPT, max_tokens=num_tokens, **GREEDY).tokens())) == num_tokens
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: process_state(server.process.pid) == "T", PATIENCE_S, "the host is stopped")
            seen = snapshot(name)
            words = top("--engine-name", name, "--once")
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
    assert (
        seen["engine"]["name"] == name
        and seen["engine"]["state"] == "running"
        and seen["engine"]["device"] == "emulated"
    )
    assert seen["engine"]["model"] == "embedded" and seen["engine"]["fault"] is None
    assert seen["batch"] == {"running": 0, "waiting": 0, "finishing": 0, "max_batch": 8, "max_running": 8}
    assert seen["totals"]["output_tokens"] == 12 and seen["totals"]["prompt_tokens"] == 8
    assert seen["totals"]["finished"]["length"] == 2 and seen["totals"]["requests_accepted"] == 2
    assert seen["prefix_cache"] == {"query_tokens": 8, "hit_tokens": 0, "hit_rate": 0.0}
    pages = seen["pages"]
    assert pages["used"] == 0 and pages["free"] + pages["cached"] == pages["total"] > 0
    first, *others = seen["queue_pairs"]
    assert first["protocol"] == "zmq" and first["is_attached"] and first["owner_pid"] > 0 and first["outstanding"] == 0
    assert all(pair["owner_pid"] == 0 and pair["protocol"] is None for pair in others)
    assert seen["gpu"] is None
    assert (
        words.returncode == 0
        and name in words.stdout
        and "0 of 8" in words.stdout
        and f"zmq {first['owner_pid']}" in words.stdout
    )


def test_rates_are_of_the_time_between_two_looks() -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director:
        director.paused = True
        watcher = Watcher(director.regions.engine_name)
        assert watcher.look()["rates"]["output_tokens_per_s"] == 0.0, "nothing lies between"
        status = director.regions.engine_page.view(_engine_page())["status"][0]
        status["output_tokens"], status["prompt_tokens"], status["finished_eos"], status["step"] = 300, 50, 2, 30
        rates = watcher.look()["rates"]
        seconds = rates["interval_s"]
        assert rates["output_tokens_per_s"] > 0 and seconds >= 0
        for name, num in {"prompt_tokens_per_s": 50, "requests_finished_per_s": 2, "steps_per_s": 30}.items():
            assert rates[name] / rates["output_tokens_per_s"] == pytest.approx(num / 300, rel=0.01), name


def _engine_page() -> Any:
    from blinkimp import ring_abi as abi

    return abi.ENGINE_PAGE


def test_an_engine_that_is_started_anew_has_no_negative_rates() -> None:
    name = engine_name()
    with FakeDirector(name, vocab_size=258) as director:
        director.regions.engine_page.view(_engine_page())["status"][0]["output_tokens"] = 1000
        watcher = Watcher(name)
        watcher.look()
    with pytest.raises(SharedMemoryError, match="no engine named"):
        watcher.look()
    with FakeDirector(name, vocab_size=258):
        assert set(watcher.look()["rates"].values()) == {0.0}


def test_rings_and_who_has_them() -> None:
    from blinkimp.nic_shim.queue_pair import QueuePairPort, sampling_record

    with FakeDirector(engine_name(), vocab_size=258, num_queue_pairs=2) as director:
        director.queue_pairs[1].hold_acks = True
        port = QueuePairPort.open(director.regions.engine_name, 1)
        port.attach(PATIENCE_S)
        try:
            import numpy as np

            for request_id in (1, 2, 3):
                port.try_submit(request_id, np.array([5, 6], np.uint32), sampling_record(), max_tokens=4)
            watcher = Watcher(director.regions.engine_name)
            free, held = watcher.look()["queue_pairs"]
            assert (free["owner_pid"], free["is_attached"], free["submissions_used"]) == (0, False, 0)
            assert (held["owner_pid"], held["is_attached"], held["submissions_used"]) == (os.getpid(), True, 3)
            assert held["protocol"] == "?", "no ingress has said what it is"
        finally:
            port.close()


def test_the_power_of_a_gpu_and_the_lack_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        name, driver = "GPU", "1"
        fails = False

        def read(self) -> Reading:
            if self.fails:
                raise PowerError("gone")
            return Reading(412.0, None, 1980, 2619)

    source = Source()
    monkeypatch.setattr("blinkimp.cli.top_snapshot.open_nvml", lambda: source)
    from blinkimp.host.metrics_memory import new_about

    with FakeDirector(engine_name(), vocab_size=258, about=new_about("m", "gpu", max_batch=4)) as director:
        watcher = Watcher(director.regions.engine_name)
        seen = watcher.look()
        assert seen["gpu"] == {"name": "GPU", "power_w": 412.0, "sm_clock_mhz": 1980, "memory_clock_mhz": 2619}
        assert "412 W" in shown(seen)
        source.fails = True
        assert watcher.look()["gpu"] is None


def shown(seen: dict[str, Any], columns: int = 110) -> str:
    console = Console(width=columns, force_terminal=False)
    with console.capture() as capture:
        console.print(render(seen, (1.0, 5.0, 3.0), columns=columns))
    return capture.get()


@pytest.mark.parametrize("columns", [79, 80, 100, 101, 110])
def test_all_of_it_fits_a_terminal_of_24_lines(columns: int) -> None:
    with FakeDirector(engine_name(), vocab_size=258, num_queue_pairs=4) as director:
        seen = Watcher(director.regions.engine_name).look()
    held = {"owner_pid": 4194304, "owner": "python3", "is_attached": True, "protocol": "http", "outstanding": 1024}
    seen["queue_pairs"][0] |= held | {"num_submissions": 1024, "num_completions": 8192, "tokens_per_s": 41234.5}
    seen["queue_pairs"][1] |= held | {"owner": None}
    lines = shown(seen, columns).splitlines()
    assert len(lines) <= 23 and max(map(len, lines)) <= columns and "…" not in "".join(lines)
    assert any("─ batch ─" in line and "─ pages ─" in line for line in lines), "two panels in a row"
    (row,) = (line for line in lines if line.startswith("0 "))
    assert "http 4194304" in row and "1,024" not in row and "0/8192" in row and "41,234" in row
    (row,) = (line for line in lines if line.startswith("1 "))
    assert "gone 4194304" in row


def test_a_dumb_terminal_gets_one_look() -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director:
        command = [sys.executable, "-m", "blinkimp", "top", "--interval", "0.1", "--engine-name"]
        status, said = Terminal([*command, director.regions.engine_name], with_stdout=True, term="dumb").end()
    assert status == 0 and "─ batch ─" in said and "\x1b[" not in said, said


def test_a_fault_and_a_silent_engine_are_seen() -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director:
        watcher = Watcher(director.regions.engine_name)
        fault = director.regions.engine_page.view(_engine_page())["fault"][0]
        fault["code"], fault["site"], fault["expected"], fault["seen"], fault["step"] = 2, 7, 16, 17, 99
        seen = watcher.look()
    assert "fault integrity at site 7: expected 0x10, seen 0x11, step 99" in shown(seen)
    seen["engine"] |= {"state": "running", "heartbeat_age_s": 3.0}
    assert "none for 3.0 s" in shown(seen)


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--once", "--engine-name", "there-is-none"], 1, "no engine named 'there-is-none' runs"),
        (["--engine-name", "there-is-none"], 1, "no engine named 'there-is-none' runs"),
        (["--json"], 2, "add --once"),
        (["--once", "--interval", "0"], 2, "0.05 to 3600"),
        (["--once", "--engine-name", "Bad Name"], 1, "engine_name"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], status: int, complaint: str) -> None:
    done = top(*arguments)
    assert done.returncode == status and complaint in done.stderr and "Traceback" not in done.stderr, done


def test_an_engine_whose_host_was_killed_does_not_run() -> None:
    name = engine_name()
    script = (
        "import os, sys; from blinkimp.host import shared_memory as shm\n"
        "geometry = shm.QueuePairGeometry(16, 64, 4096)\n"
        "shm.create_engine_regions(sys.argv[1], num_queue_pairs=1, max_context=1, vocab_size=1, geometry=geometry)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, name], cwd=ROOT, env={"PYTHONPATH": python_path()}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    try:
        assert (SHM_DIR / f"blinkimp.{name}.engine").exists(), "what it left looks like an engine"
        with pytest.raises(SharedMemoryError, match="no engine named"):
            Watcher(name)
        assert name not in running_engines()
    finally:
        for path in SHM_DIR.glob(f"blinkimp.{name}.*"):
            path.unlink()


def test_small_things_are_readable() -> None:
    assert [count(value) for value in (0, 7, 99.44, 12345, 1.5e6, 2e9)] == [
        "0",
        "7",
        "99.4",
        "12,345",
        "1.50 M",
        "2.00 G",
    ]
    assert [duration(value) for value in (None, 5, 65, 3720, 90000)] == [
        "-",
        "5 s",
        "1 min 05 s",
        "1 h 02 min",
        "1 d 1 h",
    ]
    assert bar([(1, "green")], 1000, width=10).plain == "█░░░░░░░░░"
    assert bar([(5, "green"), (5, "blue")], 10, width=10).plain == "█" * 10 and bar([], 0, width=4).plain == "░░░░"
    assert spark([0, 1, 2], 3) == " ▄█" and spark([], 3) == "" and spark([0, 0], 3) == "  "
