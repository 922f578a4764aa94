"""The supervisor's engine process: starts it, hears what it says, and starts the next one when it has ended by a fault.

    slot = EngineSlot(config, lock, bars)
    slot.look()                     several times a second
    slot.phase                      LOADING -> RUNNING -> (BACKOFF -> LOADING -> RUNNING ...) -> ENDED or FAILED

An engine that could not start at all is not tried again: its message says what to correct. One that ran, and those after it, are: max_restarts
times within RESTART_WINDOW_S, after growing pauses. A failed start after a fault counts like a fault.
Called by host/supervisor.py. Test: pytest tests/null/test_engine_slot.py tests/host/test_recovery.py
"""

from __future__ import annotations

import enum
import logging
import signal
import time
from collections import deque
from typing import Any, Final, Protocol

import msgspec

from blinkimp import ring_abi as abi
from blinkimp.config import Config, cache_folder, model_folder
from blinkimp.host.child_process import ChildProcess
from blinkimp.host.engine_lock import EngineLock, SharedMemoryError
from blinkimp.host.engine_process import EXIT_STOPPED, Event, Order
from blinkimp.host.fault_report import ADVICE, make_fault_report, write_fault_report
from blinkimp.host.shared_memory import open_engine_page
from blinkimp.host.tuning import WORDS
from blinkimp.host.watchdog import Symptom, Verdict
from blinkimp.logs import log_event
from blinkimp.ring_abi import EngineState

_log = logging.getLogger("blinkimp.host.supervisor")

RESTART_WINDOW_S: Final = 600.0
BACKOFFS_S: Final = (0.1, 1.0, 5.0)  # before the first restart of the window, the second, all others
END_TIMEOUT_S: Final = 15.0  # from the word that it ends to its end; the driver takes seconds to give a GPU back


class Phase(enum.Enum):
    LOADING = "loading"
    RUNNING = "running"
    BACKOFF = "backoff"
    ENDED = "ended"  # it was asked to
    FAILED = "failed"  # and no further one is started


class RestartBudget:
    """How often, and after which pause."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self._restarts: deque[float] = deque()

    def pause_s(self, now: float) -> float | None:
        """Takes one restart: the pause before it. None: there is none left."""
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self.max_restarts:
            return None
        self._restarts.append(now)
        return BACKOFFS_S[min(len(self._restarts), len(BACKOFFS_S)) - 1]


class Bars(Protocol):
    """What shows how far an engine has loaded (LoadingBars of blinkimp/cli/terminal.py)."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def clear(self) -> None:
        """It is loaded, or never will be: nothing of it stays on the terminal."""


class EngineLife:
    """One engine process and what it has said. Written by the child's thread, a word at a time; read by the supervisor."""

    def __init__(self, order: Order, bars: Bars | None) -> None:
        self.is_running = False
        self.not_started = ""
        self.fault = ""
        self.fault_file = ""
        self.symptom: Symptom | None = None
        self.is_asked_to_end = False
        self.is_last = False  # however it ends, nothing is left to be done for anybody
        self.ends_since: float | None = None  # from then on its end is a matter of seconds
        self._bars = bars
        self.child = ChildProcess(
            "engine",
            "blinkimp.host.engine_process",
            stdin=msgspec.json.encode(order),
            on_line=self._on_line,
            pass_fds=(order.lock_fd,),
        )

    def _on_line(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=Event)
        except msgspec.DecodeError:  # it was killed in the middle of a line
            return
        if event.kind == "log":
            extra = {"event": event.event, "fields": event.fields} if event.event else None
            logging.getLogger(event.name).log(event.level, "%s", event.text, extra=extra)
        elif event.kind == "progress" and self._bars is not None:
            self._bars(event.name, event.done, event.total)
        elif event.kind == "running":
            self.clear_bars()  # first: whoever sees that it runs may write to the terminal
            self.is_running = True
        elif event.kind == "not_started":
            self.not_started = event.text
        elif event.kind == "fault":
            self.fault_file, self.symptom = event.name, event.symptom
            self.fault = event.text  # last: whoever sees it sees the others

    def clear_bars(self) -> None:
        if self._bars is not None:
            self._bars.clear()

    def problem(self) -> str:
        """Of a process that has ended: why, in one line."""
        return self.fault or self.not_started or self.child.describe_exit()


class EngineSlot:
    """One place for an engine process."""

    def __init__(self, config: Config, lock: EngineLock, bars: Bars | None = None) -> None:
        self.num_restarts = 0
        self._config = config
        self._lock = lock
        self._bars = bars
        self._budget = RestartBudget(config.max_restarts)
        self._tuning: dict[str, int] = {}
        self._has_run = False
        self._restart_at = 0.0
        self._lost_at: float | None = None  # since when clients wait
        self._life = self._start()

    def _start(self) -> EngineLife:
        self.phase = Phase.LOADING
        order = Order(self._config, self._lock.fd, self.num_restarts, self._tuning)
        return EngineLife(order, self._bars)

    @property
    def is_recovering(self) -> bool:
        """Whether an engine that ran is gone, and the next one is on its way."""
        return self._lost_at is not None and self.phase in (Phase.LOADING, Phase.BACKOFF)

    @property
    def is_ending(self) -> bool:
        """Whether the engine that there is now was asked to end; between two engines: no."""
        return self.phase != Phase.BACKOFF and self._life.is_asked_to_end

    # ---- Orders ------------------------------------------------------------------------------------------------------
    def ask_to_end(self) -> None:
        """The first time: drain. Again: stop at once."""
        life, now = self._life, time.monotonic()
        if self.phase == Phase.BACKOFF:
            self.phase = Phase.ENDED
        elif life.is_asked_to_end or not life.is_running:
            life.ends_since, life.is_last = now, True
        else:
            life.ends_since = now + self._config.drain_timeout_s
        # Two that are alike and come at once are one to whoever gets them.
        life.child.send_signal(signal.SIGINT if life.is_asked_to_end else signal.SIGTERM)
        life.is_asked_to_end = True

    def kill(self) -> None:
        """Ends it now, whatever it does. Returns when it has ended."""
        self._life.child.send_signal(signal.SIGKILL)
        self._life.child.wait()
        if self.phase not in (Phase.ENDED, Phase.FAILED):
            self.phase = Phase.ENDED

    # ---- Watching ----------------------------------------------------------------------------------------------------
    def look(self) -> Phase:
        now, life = time.monotonic(), self._life
        if self.phase == Phase.BACKOFF:
            if now >= self._restart_at:
                self.num_restarts += 1
                self._life = self._start()
        elif self.phase in (Phase.LOADING, Phase.RUNNING):
            if not life.child.is_alive():
                self._on_end(now)
                return self.phase
            if life.is_running and self.phase == Phase.LOADING:
                self._on_running(now)
            if life.fault:
                life.ends_since = min(life.ends_since or now, now)
            if life.ends_since is not None and now - life.ends_since > END_TIMEOUT_S:
                _log.warning("the engine's process %d does not end and is killed", life.child.pid)
                life.child.send_signal(signal.SIGKILL)
                life.ends_since = now
                life.is_last |= life.is_asked_to_end and not life.fault
        return self.phase

    def _on_running(self, now: float) -> None:
        self.phase, self._has_run = Phase.RUNNING, True
        if self._lost_at is not None:
            seconds, name = now - self._lost_at, self._config.engine_name
            text = f"engine {name} is back {seconds:.1f} s after the fault was seen (restart {self.num_restarts})"
            log_event(_log, logging.INFO, "engine_back", text, restart=self.num_restarts, seconds=round(seconds, 3))
            self._lost_at = None

    def _on_end(self, now: float) -> None:
        life = self._life
        life.clear_bars()  # it may have died while it loaded
        if life.is_last or (life.is_asked_to_end and life.child.returncode() == EXIT_STOPPED):
            self.phase = Phase.ENDED
            return
        if life.is_running:
            self._has_run = True  # it may have died between two looks
        if not self._has_run:
            self.phase = Phase.FAILED
            text = f"the engine could not start: {life.problem()}"
            log_event(_log, logging.ERROR, "engine_not_started", text, problem=life.problem())
            return
        self._lost_at = self._lost_at or now
        self._look_at_remains()
        pause_s = self._budget.pause_s(now)
        file_words = f"; details in {life.fault_file}" if life.fault_file else ""
        fields = {"problem": life.problem(), "fault_file": life.fault_file or None, "restarts_in_s": pause_s}
        if pause_s is None:
            self.phase = Phase.FAILED
            advice = ADVICE[life.symptom] if life.symptom is not None else "correct what the line says"
            limits = f"max_restarts is {self._budget.max_restarts} within {RESTART_WINDOW_S / 60:g} minutes"
            text = f"{life.problem()}{file_words}. It is not started again: {limits}; {advice}"
            log_event(_log, logging.ERROR, "engine_fault", text, **fields)
            return
        self.phase, self._restart_at = Phase.BACKOFF, now + pause_s
        text = f"{life.problem()}{file_words}; the engine is started again in {pause_s:g} s"
        log_event(_log, logging.ERROR, "engine_fault", text, **fields)

    def _look_at_remains(self) -> None:
        """What the dead engine left in shared memory: limits to carry over, a state that tells the ingresses, a report if it made none."""
        try:
            region = open_engine_page(self._config.engine_name, writable=True)
        except SharedMemoryError:  # it died before it made any
            self._report_host_death(None)
            return
        with region:
            page = region.view(abi.ENGINE_PAGE)
            if int(page["control"]["tuning_generation"][0]):
                self._tuning = {name: int(page["control"][name][0]) for name in WORDS}
            self._report_host_death(page)
            # Its writer is dead: the ingresses need not wait for the heartbeat's timeout.
            page["status"]["state"][0] = EngineState.FAULTED
            del page

    def _report_host_death(self, page: Any) -> None:
        """Where the engine's process had no time to say anything."""
        life = self._life
        if life.fault or life.not_started:
            return
        life.symptom = Symptom.HOST_DEATH
        report = make_fault_report(
            Verdict(Symptom.HOST_DEATH, life.problem()),
            page,
            engine_name=self._config.engine_name,
            model=str(model_folder(self._config)),
            device="unknown: the engine's own process ended",
            num_restarts=self.num_restarts,
        )
        life.fault_file = str(write_fault_report(cache_folder(self._config), report) or "")
