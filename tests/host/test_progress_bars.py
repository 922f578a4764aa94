"""Bars of commands that people wait for: on a terminal they move, elsewhere nothing of them is written (blinkimp/cli/terminal.py).

Run: pytest tests/host/test_progress_bars.py
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.scripted_server import Script, scripted_server
from tests.support import PATIENCE_S, python_path

BARS = {
    "bench": (
        ["bench", "--concurrency", "1", "--num-requests", "12", "--input-len", "4", "--output-len", "2"],
        "requests",
    ),
    "lab sweep": (["lab", "sweep", "--scenarios", "4x2", "--concurrency", "1,2", "--idle-w", "0"], "cells"),
}


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status, and what came to a terminal that is the command's stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    said = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                said.extend(part)
        except OSError:  # EIO: nobody has the other end any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    status = process.wait(PATIENCE_S)
    reader.join(PATIENCE_S)
    os.close(ours)
    return status, said.decode(errors="replace")


@pytest.mark.parametrize("name", BARS)
def test_a_bar_moves_on_a_terminal_and_is_silent_elsewhere(name: str, tmp_path: Path) -> None:
    flags, stage = BARS[name]
    environment = {**os.environ, "PYTHONPATH": python_path(), "TERM": "xterm", "COLUMNS": "100"}
    with scripted_server("http", Script(first_ms=150)) as address:  # rich draws ten times a second
        command = [sys.executable, "-m", "blinkimp", *flags, "--url", address]
        folder = ["--folder", str(tmp_path / "cells")] if name == "lab sweep" else []
        status, said = on_a_terminal([*command, *folder], environment)
        assert status == 0, said
        shares = {int(share) for share in re.findall(rf"{stage}\b.*?(\d+) %", said)}
        assert len(shares) >= 2 and shares <= set(range(101)), said
        folder = ["--folder", str(tmp_path / "others")] if name == "lab sweep" else []
        quiet = subprocess.run([*command, *folder], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert quiet.returncode == 0 and "%" not in quiet.stderr and "\x1b" not in quiet.stderr
