"""A process of the engine's tree: it dies when the host dies, lives on when the host is only stopped, and its end is noticed.

    child = ChildProcess("emulated device", "blinkimp.host.emulated_process", stdin=b"...", on_line=print)
    child.is_alive(), child.wait(1.0), child.describe_exit()

How: the child asks the kernel for SIGKILL at its parent's death (PR_SET_PDEATHSIG) before it runs anything else. That signal is
tied to the *thread* that made the child, so each child is made by a thread of its own that lives as long as the child and waits
for it. A session of its own keeps the terminal's Ctrl-C away from it: stopping the tree in order is the host's business.
Called by host/emulated_device.py, host/engine_slot.py, host/supervisor.py. Test: pytest tests/host/test_child_process.py
"""

from __future__ import annotations

import ctypes
import logging
import os
import runpy
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
# Exit status of a child whose arguments, files or addresses are wrong: another try would end like this one.
EXIT_MISCONFIGURED: Final = 2


class ChildProcess:
    """`python -m module arguments...`, running since the constructor returned."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str] = (),
        *,
        stdin: bytes = b"",
        on_line: Callable[[bytes], None] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`stdin` is all the child can read. `on_line`: called with each line of its stdout, on a thread; else stdout is ours. What it raises is
        logged, and the next line is handed over all the same.
        `pass_fds`: descriptors that the child has too, under the same numbers."""
        self.name = name
        # -P: what lies in the working directory must not replace a module.
        launcher = [sys.executable, "-P", "-m", "blinkimp.host.child_process"]
        self._command = [*launcher, str(os.getpid()), module, *arguments]
        self._stdin, self._on_line, self._pass_fds = stdin, on_line, tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._start_error: OSError | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name=f"child-{name}", daemon=True).start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    @property
    def pid(self) -> int:
        assert self._process is not None, "set before the constructor returns"
        return self._process.pid

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended by then, its last line of output handed over included."""
        return self._ended.wait(timeout_s)

    def returncode(self) -> int | None:
        """Exit status, minus the signal's number, or None while it runs."""
        assert self._process is not None, "set before the constructor returns"
        return self._process.returncode if self._ended.is_set() else None

    def describe_exit(self) -> str:
        returncode = self.returncode()
        if returncode is None:
            return f"{self.name} (process {self.pid}) is running"
        if returncode >= 0:
            return f"{self.name} (process {self.pid}) exited with status {returncode}"
        try:
            signal_name = signal.Signals(-returncode).name
        except ValueError:
            signal_name = f"signal {-returncode}"
        hint = "; the kernel's out-of-memory killer does that, see dmesg" if -returncode == signal.SIGKILL else ""
        return f"{self.name} (process {self.pid}) was killed by {signal_name}{hint}"

    def send_signal(self, number: signal.Signals) -> None:
        if self.is_alive():
            assert self._process is not None, "set before the constructor returns"
            self._process.send_signal(number)

    def end(self, timeout_s: float) -> bool:
        """SIGTERM, then SIGKILL after the timeout. True when it ended by itself in time."""
        self.send_signal(signal.SIGTERM)
        if self.wait(timeout_s):
            return True
        self.send_signal(signal.SIGKILL)
        self.wait()
        return False

    def _run(self) -> None:
        try:
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self._on_line else None,
                start_new_session=True,
                pass_fds=self._pass_fds,
                env=_environment(),
            )
        except OSError as error:
            self._start_error = error
            self._started.set()
            return
        self._started.set()
        try:
            self._talk(process)
        finally:  # whatever went wrong here: nobody is to wait for a child that is gone
            process.wait()
            self._ended.set()

    def _talk(self, process: subprocess.Popen[bytes]) -> None:
        """Hands over its input, and what it says until it ends."""
        assert process.stdin is not None
        try:
            process.stdin.write(self._stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died before it read; whoever looks at the exit status says so
        if self._on_line is None:
            return
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    self._on_line(line)
                except Exception:
                    _log.exception("%s: its line %.200r could not be handled; the next ones are", self.name, line)


def _environment() -> dict[str, str]:
    """Ours, with this package importable even where it came from the working directory or from sys.path."""
    import blinkimp

    root = str(Path(blinkimp.__file__).parent.parent)
    environment = dict(os.environ)
    if root not in site.getsitepackages():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def die_with_parent(parent_pid: int) -> None:
    """From now on this process gets SIGKILL when its parent dies. Ends at once if that has happened already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit(f"blinkimp: parent process {parent_pid} is gone")


def main() -> None:
    """python -m blinkimp.host.child_process <parent pid> <module> <arguments...>"""
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    die_with_parent(parent_pid)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
