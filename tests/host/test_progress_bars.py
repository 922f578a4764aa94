"""Bars of commands that people wait for: on a terminal they move, elsewhere nothing of them is written (blinkimp/cli/terminal.py).
When an engine is loaded they go, and neither erase nor precede what is written then.

Run: pytest tests/host/test_progress_bars.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from blinkimp.host.shared_memory import SHM_DIR
from tests.host.server_support import wait_for_pid_below
from tests.host.terminal_support import Terminal
from tests.scripted_server import Script, scripted_server
from tests.support import PATIENCE_S, python_path

BARS = {
    "bench": (
        ["bench", "--concurrency", "1", "--num-requests", "12", "--input-len", "4", "--output-len", "2"],
        "requests",
    ),
    "lab sweep": (["lab", "sweep", "--scenarios", "4x2", "--concurrency", "1,2", "--idle-w", "0"], "cells"),
}


def screen_of(said: str) -> list[str]:
    """The lines that a terminal shows, of one as high as need be: the sequences that rich writes, and no others."""
    lines, row, column = [""], 0, 0
    for text, code, kind in re.findall(r"([^\x1b]+)|\x1b\[([?\d;]*)([A-Za-z])", said):
        if kind == "A":
            row -= int(code or 1)
        elif kind == "K":
            assert code == "2", "of the whole line"
            lines[row] = ""
        else:
            assert kind in ("", "m", "h", "l"), (code, kind)
        for character in text:
            if character == "\r":
                column = 0
            elif character == "\n":
                row, lines = row + 1, [*lines, ""] if row + 1 == len(lines) else lines
            else:
                lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
                column += 1
    return lines


def serve_command(engine_name: str, folder: Path) -> list[str]:
    flags = ["--device", "emulated", "--num-threads", "2", "--engine-name", engine_name, "--bind", f"ipc://{folder}/a"]
    return [sys.executable, "-m", "blinkimp", "serve", *flags]


def test_the_bar_of_an_own_server_is_gone_before_the_first_word() -> None:
    flags = ["--device", "emulated", "--num-threads", "2", "--max-tokens", "400", "--ignore-eos"]
    prompt = "def read_file(path):"
    terminal = Terminal([sys.executable, "-m", "blinkimp", "generate", *flags, prompt], with_stdout=True)
    status, said = terminal.end()
    assert status == 0 and "weights" in said, said
    # The bar's cursor is up or in its line; not one such sequence comes after it.
    assert not re.search(r"weights|\x1b\[\d*[AK]", said[said.index(prompt) :]), said
    screen = screen_of(said)
    assert screen[0].startswith(prompt) and not any("weights" in line for line in screen), screen


def test_log_lines_stand_alone_and_the_bar_of_an_engine_loaded_anew_goes_too(tmp_path: Path) -> None:
    terminal = Terminal(serve_command(f"bars-{uuid.uuid4().hex[:8]}", tmp_path))
    try:
        terminal.wait_for(lambda said: "serves on" in said, "it serves")
        num_drawn = terminal.said.count("weights")
        assert num_drawn
        os.kill(wait_for_pid_below(terminal.process.pid, "host.engine_process"), signal.SIGKILL)
        terminal.wait_for(lambda said: "is back" in said, "the next engine runs")
        assert "weights" in terminal.said[terminal.said.index("is started again") :], "drawn anew"
    finally:
        terminal.process.terminate()
        status, said = terminal.end()
    assert status == 0, said
    lines = [line for line in screen_of(said) if line.strip()]
    assert all(re.match(r"\d{4}-\d\d-\d\d |  \S", line) for line in lines), "\n".join(lines)  # or of the plan's table
    assert not any("weights" in line and "%" in line for line in lines), "\n".join(lines)


def test_a_server_whose_terminal_is_closed_ends_in_order(tmp_path: Path) -> None:
    name = f"bars-{uuid.uuid4().hex[:8]}"
    terminal = Terminal(serve_command(name, tmp_path))
    try:
        terminal.wait_for(lambda said: "weights" in said, "it loads, or serves already")
        terminal.close()
        assert terminal.process.wait(PATIENCE_S) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert not list(SHM_DIR.glob(f"blinkimp.{name}.*"))


@pytest.mark.parametrize("name", BARS)
def test_a_bar_moves_on_a_terminal_and_is_silent_elsewhere(name: str, tmp_path: Path) -> None:
    flags, stage = BARS[name]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with scripted_server("http", Script(first_ms=150)) as address:  # rich draws ten times a second
        command = [sys.executable, "-m", "blinkimp", *flags, "--url", address]
        folder = ["--folder", str(tmp_path / "cells")] if name == "lab sweep" else []
        output = tmp_path / "output"
        status, said = Terminal([*command, *folder], stdout=output).end()
        assert status == 0, said
        shares = {int(share) for share in re.findall(rf"{stage}\b.*?(\d+) %", said)}
        assert len(shares) >= 2 and shares <= set(range(101)), said
        folder = ["--folder", str(tmp_path / "others")] if name == "lab sweep" else []
        quiet = subprocess.run([*command, *folder], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert quiet.returncode == 0 and "%" not in quiet.stderr and "\x1b" not in quiet.stderr
        # What goes to a file goes there, bars or no bars: the same lines, whatever was measured.
        assert len(output.read_text().splitlines()) == len(quiet.stdout.splitlines()) > 0
