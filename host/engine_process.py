"""The engine's process: hosts the engine (host/engine.py) for a supervisor, watches it, and ends with it.

Started by host/engine_slot.py as `python -m blinkimp.host.engine_process`, with an Order in JSON on stdin. It writes events, one JSON object
a line, to stdout: progress, log lines, that it runs, why it could not start, what was wrong when it ended.

Why a process: a CUDA context that has seen a fault refuses every further call, and nothing but the end of its process gives the GPU back.
So whatever happens to a device ends this process, and the supervisor starts the next one while the ingresses live on.
SIGTERM or SIGINT drains (drain_timeout_s at most), a second one stops at once. It dies with its supervisor; SIGSTOP harms no token.
Exit status: 0 drained or stopped, 2 could not start, 3 a fault. Test: pytest tests/host/test_recovery.py
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Literal, NoReturn

import msgspec

from blinkimp.config import Config, cache_folder
from blinkimp.host.engine import Engine, EngineFaultError
from blinkimp.host.engine_lock import EngineLock
from blinkimp.host.fault_report import write_fault_report
from blinkimp.host.tuning import TuningError
from blinkimp.host.watchdog import Symptom
from blinkimp.logs import log_uncaught

_log = logging.getLogger("blinkimp.host.engine_process")  # by this name also when run as a module

WATCH_PERIOD_S: Final = 0.1
TUNE_TIMEOUT_S: Final = 5.0
EXIT_STOPPED, EXIT_NOT_STARTED, EXIT_FAULTED = 0, 2, 3


class Order(msgspec.Struct, frozen=True):
    """What the supervisor wants run."""

    config: Config
    lock_fd: int  # of the engine's name
    num_restarts: int = 0
    tuning: dict[str, int] = {}  # limits of the schedule that the engine before this one had (host/tuning.py)


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the supervisor hears."""

    kind: Literal["progress", "log", "running", "not_started", "fault"]
    text: str = ""  # of the log line, or why
    name: str = ""  # progress: the stage; log: the logger; fault: the fault file
    symptom: Symptom | None = None
    level: int = 0
    event: str = ""  # of the log line, and its fields (blinkimp/logs.py)
    fields: dict[str, Any] = {}
    done: int = 0
    total: int = 0


class StartInterrupted(BaseException):
    """A signal came while the engine was loading: there is nothing to drain. Like KeyboardInterrupt, not an Exception."""


class EventLog(logging.Handler):
    """Log lines as events: the supervisor's own logging gives them their form."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(
            Event(
                "log",
                self.format(record),
                name=record.name,
                level=record.levelno,
                event=getattr(record, "event", ""),
                fields=getattr(record, "fields", {}),
            )
        )


class EngineProcess:
    """One engine, from its start to its end."""

    def __init__(self, order: Order, emit: Callable[[Event], None]) -> None:
        self._order = order
        self._emit = emit
        self._num_signals = 0
        self._is_starting = True

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        config = self._order.config
        engine: Engine | None = None
        try:
            lock = EngineLock(config.engine_name, inherited_fd=self._order.lock_fd)
            engine = Engine(config, progress=self._progress, lock=lock, num_restarts=self._order.num_restarts)
            engine.start()
            self._is_starting = False
        except StartInterrupted:
            self._is_starting = False  # a second signal has nothing left to interrupt
            _log.info("stopped by a signal before the engine ran")
            if engine is not None:
                engine.stop()  # it may run already, or leave memory behind: nobody knows where in its start the signal came
            return EXIT_STOPPED
        except (RuntimeError, ValueError, OSError) as error:
            # Refusals are of these types (device, driver, compiler, shared memory, checkpoint, sizes), and say what to do.
            _log.debug("where", exc_info=True)
            self._emit(Event("not_started", str(error)))
            return EXIT_NOT_STARTED
        try:
            self._tune(engine)
            self._emit(Event("running"))
            self._watch(engine)
            engine.stop()
        except EngineFaultError as error:
            self._die(engine, error)
        return EXIT_STOPPED

    def _watch(self, engine: Engine) -> None:
        while self._num_signals == 0:
            engine.check()
            time.sleep(WATCH_PERIOD_S)
        num_requests = engine.num_requests()
        timeout_s = self._order.config.drain_timeout_s
        _log.info("draining: %d requests have %g s to finish; another signal stops at once", num_requests, timeout_s)
        engine.drain(timeout_s, should_give_up=lambda: self._num_signals > 1)
        if num_left := engine.num_requests():
            _log.warning(
                "%d requests were still running when the drain ended; they finish with reason `draining`", num_left
            )
        else:
            _log.info("drained")

    def _tune(self, engine: Engine) -> None:
        if any(self._order.tuning.values()):
            try:
                engine.tune(**self._order.tuning, timeout_s=TUNE_TIMEOUT_S)
            except TuningError as error:
                _log.warning("the schedule's limits are as at the first start: %s", error)

    def _die(self, engine: Engine, error: EngineFaultError) -> NoReturn:
        """Says what is known, and leaves without a look back: what cleans up at an exit may wait for a GPU that never answers."""
        verdict = error.verdict
        assert verdict is not None, "only an engine that is not started faults without one"
        fault_file = write_fault_report(cache_folder(self._order.config), engine.fault_report(verdict))
        text = f"engine {self._order.config.engine_name}: {verdict.text}"
        self._emit(Event("fault", text, name=str(fault_file or ""), symptom=verdict.symptom))
        engine.abandon()
        os._exit(EXIT_FAULTED)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._emit(Event("progress", name=stage, done=done, total=total))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._is_starting:
            raise StartInterrupted


def main() -> int:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    # Events keep a descriptor of their own: whatever else prints goes to stderr.
    events_fd = os.dup(1)
    os.dup2(2, 1)

    one_line = threading.Lock()  # several threads log

    def emit(event: Event) -> None:
        with one_line, contextlib.suppress(BrokenPipeError):  # the supervisor has just died; so do we
            os.write(events_fd, msgspec.json.encode(event, enc_hook=str) + b"\n")

    logging.basicConfig(level=order.config.log_level.upper(), handlers=[EventLog(emit)], format="%(message)s")
    if order.config.log_format == "json":
        log_uncaught()
    return EngineProcess(order, emit).run()


if __name__ == "__main__":
    sys.exit(main())
