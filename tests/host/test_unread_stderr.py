"""Nobody reads a server's stderr, and the pipe is full: it recovers from faults and ends all the same.

Run: pytest tests/host/test_unread_stderr.py
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.client import Client
from blinkimp.host.shared_memory import SHM_DIR
from tests.host.engine_support import wait_for
from tests.host.server_support import pid_below, wait_for_pid_below
from tests.support import PATIENCE_S, hear_signals, python_path


class UnreadServer:
    """Its stderr is a pipe in which there is no place for a byte."""

    def __init__(self, folder: Path) -> None:
        self.name = f"unread-{uuid.uuid4().hex[:8]}"
        self.socket = folder / "ingress"
        self.pipe, theirs = os.pipe()
        self.num_filled = fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ)
        os.write(theirs, b"#" * self.num_filled)
        flags = ["--device", "emulated", "--num-threads", "2", "--engine-name", self.name]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blinkimp", "serve", *flags, "--bind", f"ipc://{self.socket}"],
            stderr=theirs,
            env={**os.environ, "PYTHONPATH": python_path()},
            preexec_fn=hear_signals,
        )
        os.close(theirs)

    def kill(self, module: str) -> None:
        """And waits until the next one is there."""
        killed = wait_for_pid_below(self.process.pid, module)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: pid_below(self.process.pid, module) not in (0, killed), PATIENCE_S, f"another {module} runs")

    def serves(self) -> None:
        wait_for(self.socket.exists, PATIENCE_S, "it listens")
        with Client(f"ipc://{self.socket}", timeout_s=PATIENCE_S) as client:
            assert client.generate("def f(", max_tokens=4, ignore_eos=True).num_output_tokens == 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[UnreadServer]:
    server = UnreadServer(tmp_path)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        os.close(server.pipe)
        for path in SHM_DIR.glob(f"blinkimp.{server.name}.*"):
            path.unlink()  # of a server that had to be killed


def test_a_server_whose_log_nobody_reads_recovers_and_ends(server: UnreadServer) -> None:
    server.serves()
    server.kill("host.engine_process")
    server.serves()
    server.kill("nic_shim.zmq_ingress")
    server.serves()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE_S) == 0
    assert not list(SHM_DIR.glob(f"blinkimp.{server.name}.*"))


def test_last_lines_are_written_when_somebody_reads_at_the_end(server: UnreadServer) -> None:
    server.serves()
    said = bytearray()

    def read() -> None:
        while part := os.read(server.pipe, 65536):
            said.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE_S) == 0
    reader.join(PATIENCE_S)
    text = said[server.num_filled :].decode()
    assert "ingress 0 serves on" in text and "host: drained" in text, text


def test_a_process_that_cannot_start_ends_though_it_cannot_say_why() -> None:
    """Its supervisor waits for its exit status."""
    ours, theirs = os.pipe()
    os.write(theirs, b"#" * fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ))
    command = [sys.executable, "-m", "blinkimp.nic_shim.metrics_server", "--engine", "nobody", "--bind", "127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "PYTHONPATH": python_path()})
    os.close(theirs)
    try:
        assert process.wait(PATIENCE_S) == 1
    finally:
        process.kill()
        os.close(ours)
