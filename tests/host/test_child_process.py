"""Children die with their parent, not with its pause, and their end is told. Test: pytest tests/host/test_child_process.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blinkimp.host.child_process import ChildProcess
from tests.host.engine_support import process_state
from tests.support import PATIENCE_S, ROOT

SLEEPER = "import sys, time\nprint('up', *sys.argv[1:], flush=True)\ntime.sleep(600)\n"
PARENT = (
    "import sys, time, threading\n"
    "from blinkimp.host.child_process import ChildProcess\n"
    "def spawn():\n"
    "    child = ChildProcess('sleeper', 'bk_sleeper')\n"
    "    print(child.pid, flush=True)\n"
    "thread = threading.Thread(target=spawn); thread.start(); thread.join()\n"  # the thread that asked is gone: no reason to die
    "time.sleep(600)\n"
)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bk_sleeper.py").write_text(SLEEPER)
    (tmp_path / "bk_echo.py").write_text("import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)\n")
    (tmp_path / "bk_exit.py").write_text("import sys; sys.exit(int(sys.argv[1]))\n")
    (tmp_path / "bk_deaf.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))


def wait_until_gone(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process_state(pid) in "XZ":
            return True
        time.sleep(0.01)
    return False


def start_and_hear(module: str, *arguments: str) -> tuple[ChildProcess, list[bytes]]:
    lines: list[bytes] = []
    heard = threading.Event()

    def on_line(line: bytes) -> None:
        lines.append(line)
        heard.set()

    child = ChildProcess(module, module, arguments, on_line=on_line)
    assert heard.wait(PATIENCE_S), child.describe_exit()
    return child, lines


def test_stdin_arguments_output_and_status_pass_through() -> None:
    lines: list[bytes] = []
    child = ChildProcess("echo", "bk_echo", stdin=b"one\ntwo\n", on_line=lines.append)
    assert child.wait(PATIENCE_S)
    assert lines == [b"ONE\n", b"TWO\n"] and child.returncode() == 0 and not child.is_alive()
    child, lines = start_and_hear("bk_sleeper", "a", "b c")
    assert lines == [b"up a b c\n"]
    assert child.end(PATIENCE_S) and child.describe_exit().endswith("killed by SIGTERM")


def test_a_line_that_its_host_cannot_handle_costs_neither_the_next_ones_nor_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[bytes] = []

    def on_line(line: bytes) -> None:
        if line == b"ONE\n":
            raise ValueError("not this one")
        lines.append(line)

    child = ChildProcess("echo", "bk_echo", stdin=b"one\ntwo\n", on_line=on_line)
    assert child.wait(PATIENCE_S), "it has ended, and its host does not know"
    assert lines == [b"TWO\n"] and child.returncode() == 0 and not child.is_alive()
    (record,) = caplog.records
    assert record.getMessage() == r"echo: its line b'ONE\n' could not be handled; the next ones are"
    assert record.exc_info is not None and "not this one" in str(record.exc_info[1])


def test_exit_status_is_described() -> None:
    child = ChildProcess("seven", "bk_exit", ["7"])
    assert child.wait(PATIENCE_S)
    assert child.returncode() == 7 and "exited with status 7" in child.describe_exit()


def test_child_that_ignores_sigterm_is_killed() -> None:
    child, _ = start_and_hear("bk_deaf")
    assert not child.end(0.2)
    assert child.returncode() == -signal.SIGKILL and "SIGKILL" in child.describe_exit()


def test_child_outlives_a_stopped_parent_and_dies_with_a_dead_one() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGSTOP)
        time.sleep(0.3)
        assert process_state(child_pid) not in "XZ", "SIGSTOP of the parent ended the child"
        os.kill(parent.pid, signal.SIGKILL)
        assert wait_until_gone(child_pid, PATIENCE_S)


def test_child_of_a_parent_that_is_already_gone_does_not_start() -> None:
    command = [sys.executable, "-m", "blinkimp.host.child_process", str(os.getppid()), "bk_sleeper"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert result.returncode == 1 and "is gone" in result.stderr


def test_module_that_does_not_exist_is_an_exit_status_not_a_hang() -> None:
    child = ChildProcess("nothing", "bk_no_such_module")
    assert child.wait(PATIENCE_S) and child.returncode() == 1
