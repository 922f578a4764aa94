"""A command on a terminal. Used by tests/host/test_progress_bars.py and test_top.py."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path

from tests.host.engine_support import wait_for
from tests.support import PATIENCE_S, hear_signals, python_path


def be_a_login_shell() -> None:
    """The leader of a session, with a terminal."""
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)
    hear_signals()


class Terminal:
    """A command on a terminal of its own, and all that came to it. Its stdout goes there `with_stdout`, else to a file."""

    def __init__(
        self, command: list[str], *, stdout: Path | None = None, with_stdout: bool = False, term: str = "xterm"
    ) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": python_path(), "TERM": term, "COLUMNS": "200"}
        with (stdout or Path(os.devnull)).open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=theirs if with_stdout else file,
                stderr=theirs,
                env=environment,
                start_new_session=True,
                preexec_fn=be_a_login_shell,
            )
        os.close(theirs)
        self._said = bytearray()
        self._is_closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while not self._is_closing.is_set():
                if select.select([self._ours], [], [], 0.05)[0]:
                    self._said.extend(os.read(self._ours, 4096))
        except OSError:  # EIO: nobody has the other end any more
            pass
        os.close(self._ours)

    @property
    def said(self) -> str:
        return self._said.decode(errors="replace")

    def wait_for(self, is_there: Callable[[str], bool], what: str) -> None:
        wait_for(lambda: is_there(self.said) or self.process.poll() is not None, PATIENCE_S, what)
        assert is_there(self.said), self.said

    def end(self) -> tuple[int, str]:
        """Exit status, and all that it said."""
        try:
            status = self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()  # nothing, where it has ended
        self._reader.join(PATIENCE_S)
        return status, self.said

    def close(self) -> None:
        """As when its window is closed: whoever writes to it gets EIO, the session's leader SIGHUP."""
        self._is_closing.set()
        self._reader.join(PATIENCE_S)
