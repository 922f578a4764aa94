"""What the terminal shows besides a command's own output, log lines and progress bars on stderr; and what a closed terminal means.

Called by the subcommands. Test: pytest tests/host/test_progress_bars.py tests/host/test_cli.py
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from blinkimp import logs

stderr_console = Console(stderr=True)


def set_up_logging(log_level: str) -> None:
    """Of a command that a person waits for: shorter than a server's lines, which are kept."""
    text_format = "%(asctime)s %(levelname)s %(message)s"
    logs.set_up_logging(log_level, "text", "host", text_format=text_format, datefmt="%H:%M:%S")


@contextlib.contextmanager
def ends_in_order() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the command as Ctrl-C does: what it has made is removed."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only that one may set handlers
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While what was made is removed: whoever presses Ctrl-C again, or closes the terminal then, must not stop that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        while number not in before:
            # One that came just before is raised here: the command ends already.
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                before[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LoadingBars:
    """A bar per stage of what takes long (weights, compile, ...) while inside `with`; nothing where stderr is no terminal, or not for people.

    Calling it with (stage, done, total) moves that stage's bar; total 0 is a stage of unknown length. clear() takes the bars off the
    terminal: what it shows then is the caller's alone. A later call draws anew, where the terminal is this process's own: a server that
    another command or a shell's `&` has started would draw over what that one writes meanwhile.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self._is_shown = is_shown and stderr_console.is_terminal
        self._was_cleared = False
        self._progress: Progress | None = None  # while bars are shown
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._is_shown or (self._was_cleared and self._progress is None and not has_terminal()):
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<20}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                console=stderr_console,
                transient=True,
                # What is printed meanwhile goes above the bars where it would go among them; out of a pipe or a file rich would take it.
                redirect_stdout=sys.stdout.isatty(),
            )
            with logs.stderr_lock, contextlib.suppress(OSError):  # the terminal was closed
                self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def clear(self) -> None:
        """Returns when nothing of the bars is left on the terminal, and nothing more will come."""
        if self._progress is not None:
            with logs.stderr_lock, contextlib.suppress(OSError):
                self._progress.stop()
            self._progress, self._tasks, self._was_cleared = None, {}, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()


def has_terminal() -> bool:
    """Whether stderr is this process's terminal and it is in the foreground there."""
    try:
        return os.tcgetpgrp(2) == os.getpgrp()
    except OSError:  # no terminal, or another session's
        return False
