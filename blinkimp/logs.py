"""Log lines of every process, as text or as JSON, on stderr.

    set_up_logging("info", "json", process="http ingress 1")
    log_event(log, logging.INFO, "request", request_id="42", reason="stop", output_tokens=7)

A line in JSON is one object: time (RFC 3339, UTC), level, logger, process, pid, message; an event also has `event` and its fields, an
exception `exception`. nic_shim/METRICS.md lists the events and their fields; names do not change their meaning.
Called by blinkimp/cli/terminal.py, host/supervisor.py and the processes of nic_shim. Test: pytest tests/null/test_logs.py
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal

import msgspec

LogFormat = Literal["text", "json"]
TEXT_FORMAT: Final = "%(asctime)s %(levelname)s {process}: %(message)s"
MAX_WAITING_LINES: Final = 10_000
LINES_PER_WRITE: Final = 64
FLUSH_TIMEOUT_S: Final = 2.0
# Held while log lines are written, and while bars come and go: half of each would be a bar that stays.
stderr_lock: Final = threading.Lock()
_PLAIN: Final = re.compile(r"[\w.,:;/+@%\-]+")


def log_event(log: logging.Logger, level: int, event: str, /, message: str = "", **fields: Any) -> None:
    """One line with fields. In text: `message`, or, without one, `event field=value ...`."""
    if log.isEnabledFor(level):
        log.log(level, message or event, extra={"event": event, "fields": fields}, stacklevel=2)


def _plain(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else msgspec.json.encode(text).decode()


class TextFormatter(logging.Formatter):
    """For people."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        line = super().formatMessage(record)
        if record.message != getattr(record, "event", None):  # it says in words what the fields have
            return line
        fields: dict[str, Any] = getattr(record, "fields", {})
        return " ".join([line, *(f"{name}={_plain(value)}" for name, value in fields.items() if value is not None)])


class JsonFormatter(logging.Formatter):
    """For machines: whatever is logged, the line is one valid JSON object."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._encoder = msgspec.json.Encoder(enc_hook=str)

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if hasattr(record, "event"):
            line["event"] = record.event
            fields: dict[str, Any] = getattr(record, "fields", {})
            # A field cannot take the place of what every line has.
            line |= {name if name not in line else f"{name}_": value for name, value in fields.items()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return self._encoder.encode(line).decode()
        except (UnicodeEncodeError, msgspec.MsgspecError):  # half a surrogate pair in a client's text
            safe = {name: ascii(value) if isinstance(value, str) else value for name, value in line.items()}
            return self._encoder.encode(safe).decode()


class ForegroundHandler(logging.StreamHandler[Any]):
    """Lines go to stderr as it is when they come: while bars are shown (blinkimp/cli/terminal.py) that is a place above them."""

    def emit(self, record: logging.LogRecord) -> None:
        with stderr_lock:
            self.stream = sys.stderr
            super().emit(record)


def write_to_stderr(text: str) -> None:
    """All of it, however long that takes."""
    with stderr_lock:
        _write_to_stderr(text)


def _write_to_stderr(text: str) -> None:
    # Bars are shown (blinkimp/cli/terminal.py), or a test listens.
    if sys.stderr is not sys.__stderr__:
        sys.stderr.write(text)
        sys.stderr.flush()
        return
    # Not by the file object: a thread that stands in a write holds its lock, and the interpreter aborts when it cannot flush it at exit.
    if sys.__stderr__ is None:  # it was closed when this process began
        return
    fd, left = sys.__stderr__.fileno(), text.encode(errors="backslashreplace")
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:  # whoever has the other end has set it so
            select.select([], [fd], [])


class BackgroundHandler(logging.Handler):
    """Lines go to stderr from a thread of its own: whoever reads them and stands still (a pager, a full pipe) must not stop a stream,
    and not the supervisor, which reaps and restarts.

    What waits is bounded; what finds no place is dropped and counted, and the count is logged when there is place again."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque()
        self._num_dropped = 0
        self._own_lock = threading.Lock()  # not logging's: at exit that one is held while flush() waits for the thread
        self._has_lines = threading.Event()
        self._is_written = threading.Event()
        self._is_written.set()
        threading.Thread(target=self._run, name="blinkimp-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        with self._own_lock:
            if len(self._lines) >= MAX_WAITING_LINES:
                self._num_dropped += 1
                return
            self._lines.append(self.format(record))
            self._is_written.clear()
        self._has_lines.set()

    def flush(self) -> None:
        """Waits a moment for the thread; called at exit."""
        self._is_written.wait(FLUSH_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            self._has_lines.wait()
            self._has_lines.clear()
            while lines := self._take():
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    write_to_stderr("\n".join([*lines, ""]))

    def _take(self) -> list[str]:
        """The next lines to write; none when all are written."""
        with self._own_lock:
            lines = [self._lines.popleft() for _ in range(min(len(self._lines), LINES_PER_WRITE))]
            num_dropped = 0
            if not self._lines:
                num_dropped, self._num_dropped = self._num_dropped, 0
            if not lines and not num_dropped:
                self._is_written.set()
        if num_dropped:
            text = f"{num_dropped} lines of the log were dropped: stderr was not read"
            record = logging.LogRecord("blinkimp", logging.WARNING, __file__, 0, text, None, None)
            record.event, record.fields = "lines_dropped", {"num_lines": num_dropped}
            lines.append(self.format(record))
        return lines


def set_up_logging(
    log_level: str,
    log_format: LogFormat,
    process: str,
    *,
    text_format: str | None = None,
    datefmt: str | None = None,
    in_background: bool = False,
) -> None:
    """From now on everything that is logged goes to stderr; with JSON, warnings and uncaught exceptions too."""
    handler = BackgroundHandler() if in_background else ForegroundHandler()
    text = TextFormatter(text_format or TEXT_FORMAT.format(process=process), datefmt)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else text)
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    if log_format == "json":
        log_uncaught()


def log_uncaught() -> None:
    """From now on warnings and uncaught exceptions are lines of the log, not text on stderr."""
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_of_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("blinkimp").critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit or arguments.exc_value is None:
        return
    caught = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
    name = arguments.thread.name if arguments.thread is not None else "?"
    logging.getLogger("blinkimp").critical("uncaught exception in thread %s", name, exc_info=caught)


def fail_start(program: str, error: object, log_format: LogFormat) -> None:
    """Why a process could not start: a log line in JSON, plain words for a person. Ends soon, read or not: so must the process."""
    if log_format == "json":
        log_event(logging.getLogger("blinkimp"), logging.CRITICAL, "start_failed", str(error), program=program)
    else:
        writer = threading.Thread(target=write_to_stderr, args=(f"{program}: {error}\n",), daemon=True)
        writer.start()
        writer.join(FLUSH_TIMEOUT_S)


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="of the lines on stderr")
