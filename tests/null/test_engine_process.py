"""What the engine's process says and how it leaves, with an engine of the test's own. Test: pytest tests/null/test_engine_process.py"""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blinkimp.config import Config
from blinkimp.host import engine_process
from blinkimp.host.device_protocol import DeviceError
from blinkimp.host.engine import Engine, EngineFaultError
from blinkimp.host.engine_lock import EngineLock
from blinkimp.host.engine_process import (
    EXIT_FAULTED,
    EXIT_NOT_STARTED,
    EXIT_STOPPED,
    EngineProcess,
    Event,
    EventLog,
    Order,
)
from blinkimp.host.fault_report import FOLDER_NAME, make_fault_report
from blinkimp.host.tuning import TuningError
from blinkimp.host.watchdog import Symptom, Verdict


class Left(BaseException):
    """os._exit() was called."""


class FakeEngine:
    """Does what the test says at start() and at each check()."""

    def __init__(self, config: Config, *, progress: Any, lock: EngineLock, num_restarts: int) -> None:
        self.calls: list[Any] = []
        self.num_restarts = num_restarts
        self._progress = progress
        FakeEngine.made.append(self)

    made: list[FakeEngine]
    on_start: Callable[[], None]
    on_check: Callable[[], None]
    on_tune: Callable[[], None]

    def start(self) -> None:
        self._progress("weights", 1, 2)
        FakeEngine.on_start()

    def check(self) -> None:
        FakeEngine.on_check()

    def tune(self, **words: Any) -> None:
        self.calls.append(words)
        FakeEngine.on_tune()

    num_left = 0  # requests when a drain ends

    def num_requests(self) -> int:
        has_drained = any(isinstance(call, tuple) for call in self.calls)
        return FakeEngine.num_left if has_drained else 3

    def drain(self, timeout_s: float, should_give_up: Callable[[], bool]) -> bool:
        self.calls.append(("drain", timeout_s, should_give_up()))
        return False  # a second signal, say

    def stop(self) -> None:
        self.calls.append("stop")

    def abandon(self) -> None:
        self.calls.append("abandon")

    def fault_report(self, verdict: Verdict) -> Any:
        return make_fault_report(verdict, None, engine_name="x", model="m", device="d", num_restarts=self.num_restarts)


class Bench:
    def __init__(self, config: Config, lock: EngineLock) -> None:
        self.events: list[Event] = []
        self._config, self._lock = config, lock

    def run(self, tuning: dict[str, int] | None = None) -> int:
        order = Order(self._config, os.dup(self._lock.fd), num_restarts=2, tuning=tuning or {})
        return EngineProcess(order, self.events.append).run()

    @property
    def engine(self) -> FakeEngine:
        return FakeEngine.made[-1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    def leave(code: int) -> None:
        raise Left(code)

    FakeEngine.made = []
    FakeEngine.on_start = FakeEngine.on_tune = lambda: None
    FakeEngine.on_check = lambda: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(engine_process, "Engine", FakeEngine)
    monkeypatch.setattr(engine_process, "WATCH_PERIOD_S", 0.001)
    monkeypatch.setattr(engine_process.os, "_exit", leave)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    config = Config(engine_name=f"test-{uuid.uuid4().hex[:12]}", cache_dir=str(tmp_path), drain_timeout_s=7.0)
    lock = EngineLock(config.engine_name)
    yield Bench(config, lock)
    lock.release()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_signal_drains_and_stops(bench: Bench) -> None:
    assert bench.run() == EXIT_STOPPED
    assert [event.kind for event in bench.events] == ["progress", "running"]
    assert bench.events[0] == Event("progress", name="weights", done=1, total=2)
    assert bench.engine.calls == [("drain", 7.0, False), "stop"] and bench.engine.num_restarts == 2


@pytest.mark.parametrize(("num_left", "words"), [(0, "drained"), (2, "2 requests were still running")])
def test_end_of_a_drain_says_what_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_left: int, words: str
) -> None:
    monkeypatch.setattr(FakeEngine, "num_left", num_left)
    with caplog.at_level(logging.INFO, "blinkimp.host.engine_process"):
        assert bench.run() == EXIT_STOPPED
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("draining: 3 requests have 7 s") and lines[-1].startswith(words)


def test_refusal_at_the_start_is_told(bench: Bench) -> None:
    def refuse() -> None:
        raise DeviceError("no GPU can be used")

    FakeEngine.on_start = refuse
    assert bench.run() == EXIT_NOT_STARTED
    assert bench.events[-1] == Event("not_started", "no GPU can be used")


def test_signal_during_the_start_ends_it(bench: Bench) -> None:
    FakeEngine.on_start = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert bench.run() == EXIT_STOPPED
    assert [event.kind for event in bench.events] == ["progress"]
    assert bench.engine.calls == ["stop"], "it may have come right behind the start"


def test_second_signal_does_not_interrupt_the_end_of_a_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    def stop(engine: FakeEngine) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.append(engine)

    FakeEngine.on_start = lambda: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(FakeEngine, "stop", stop)
    assert bench.run() == EXIT_STOPPED and stopped == [bench.engine]


@pytest.mark.parametrize("is_draining", [False, True])
def test_fault_is_told_filed_and_left_by_exit(bench: Bench, tmp_path: Path, is_draining: bool) -> None:
    def fault(*_: Any, **__: Any) -> bool:
        raise EngineFaultError("for people in a hurry", Verdict(Symptom.CUDA_ERROR, "got CUDA_ERROR_LAUNCH_FAILED"))

    if is_draining:
        bench_engine_drain = FakeEngine.drain
        FakeEngine.drain = fault  # type: ignore[method-assign]
    else:
        FakeEngine.on_check = fault  # type: ignore[assignment]
    try:
        with pytest.raises(Left) as left:
            bench.run()
    finally:
        if is_draining:
            FakeEngine.drain = bench_engine_drain  # type: ignore[method-assign]
    assert left.value.args == (EXIT_FAULTED,)
    assert bench.engine.calls == ["abandon"], "nothing that waits for the device"
    event = bench.events[-1]
    assert (event.kind, event.symptom) == ("fault", Symptom.CUDA_ERROR) and "CUDA_ERROR_LAUNCH_FAILED" in event.text
    (file,) = (tmp_path / FOLDER_NAME).iterdir()
    assert event.name == str(file)


def test_limits_of_the_engine_before_are_set_again(bench: Bench) -> None:
    assert bench.run({"max_running": 5, "aging_ms": 0}) == EXIT_STOPPED
    assert bench.engine.calls[0]["max_running"] == 5


def test_limits_that_cannot_be_set_do_not_hinder_the_restart(bench: Bench) -> None:
    def refuse() -> None:
        raise TuningError("not obeyed")

    FakeEngine.on_tune = refuse
    assert bench.run({"max_running": 5}) == EXIT_STOPPED
    assert bench.events[-1].kind == "running"


def test_descriptor_that_is_not_the_lock_is_refused(bench: Bench, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        order = Order(Config(engine_name="test-other"), os.dup(file.fileno()))
        assert EngineProcess(order, bench.events.append).run() == EXIT_NOT_STARTED
        os.close(order.lock_fd)
    assert "is not the lock of engine 'test-other'" in bench.events[-1].text


def test_log_lines_are_events_with_their_fields() -> None:
    events: list[Event] = []
    log = logging.getLogger("test.engine_process")
    log.propagate = False
    log.addHandler(EventLog(events.append))
    log.warning("%d of %d", 1, 2, extra={"event": "step", "fields": {"ms": 3}})
    assert events == [
        Event("log", "1 of 2", name="test.engine_process", level=logging.WARNING, event="step", fields={"ms": 3})
    ]


def test_device_that_cannot_even_be_stopped_does_not_hold_up_the_end(tmp_path: Path) -> None:
    class LostContext:
        def stop(self, timeout_s: float) -> bool:
            raise RuntimeError("cuCtxSetCurrent: got CUDA_ERROR_LAUNCH_FAILED")

    engine = Engine.__new__(Engine)
    engine.device = LostContext()  # type: ignore[assignment]
    engine.abandon()
