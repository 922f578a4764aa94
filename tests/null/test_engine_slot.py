"""When an engine's process is started again, when not, and what it is told. Test: pytest tests/null/test_engine_slot.py"""

from __future__ import annotations

import logging
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blinkimp import ring_abi as abi
from blinkimp.config import Config
from blinkimp.host import engine_slot
from blinkimp.host.engine_lock import EngineLock
from blinkimp.host.engine_process import EXIT_FAULTED, EXIT_NOT_STARTED, EXIT_STOPPED, Event, Order
from blinkimp.host.engine_slot import BACKOFFS_S, END_TIMEOUT_S, RESTART_WINDOW_S, EngineSlot, Phase, RestartBudget
from blinkimp.host.fault_report import FOLDER_NAME, FaultReport
from blinkimp.host.shared_memory import QueuePairGeometry, create_engine_regions, discard_regions, open_engine_page
from blinkimp.host.watchdog import Symptom
from blinkimp.ring_abi import EngineState


class FakeChild:
    """A process that says and does what the test wants."""

    started: list[FakeChild]

    def __init__(self, name: str, module: str, *, stdin: bytes, on_line: Any, pass_fds: tuple[int, ...]) -> None:
        self.order = msgspec.json.decode(stdin, type=Order)
        self.pass_fds = pass_fds
        self.signals: list[int] = []
        self.pid = 1000 + len(FakeChild.started)
        self._code: int | None = None
        self._on_line = on_line
        FakeChild.started.append(self)

    def says(self, event: Event) -> None:
        self._on_line(msgspec.json.encode(event) + b"\n")

    def ends(self, code: int) -> None:
        self._code = code

    def is_alive(self) -> bool:
        return self._code is None

    def returncode(self) -> int | None:
        return self._code

    def describe_exit(self) -> str:
        return f"engine (process {self.pid}) ended with {self._code}"

    def send_signal(self, number: int) -> None:
        if self.is_alive():
            self.signals.append(number)
            if number == signal.SIGKILL:
                self._code = -9

    def wait(self, timeout_s: float | None = None) -> bool:
        assert not self.is_alive(), "would wait for ever"
        return True


class FakeBars:
    """What is drawn now."""

    def __init__(self) -> None:
        self.drawn: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.drawn.add(stage)

    def clear(self) -> None:
        self.drawn = set()


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, lock: EngineLock, **changes: Any) -> None:
        self.now = 1000.0
        FakeChild.started = []
        monkeypatch.setattr(engine_slot, "ChildProcess", FakeChild)
        monkeypatch.setattr(engine_slot.time, "monotonic", lambda: self.now)
        self.folder, self.lock = folder, lock
        config = Config(engine_name=lock.engine_name, cache_dir=str(folder), **changes)
        self.bars = FakeBars()
        self.slot = EngineSlot(config, lock, self.bars)

    @property
    def child(self) -> FakeChild:
        return FakeChild.started[-1]

    def look(self, after_s: float = 0.0) -> Phase:
        self.now += after_s
        return self.slot.look()

    def run(self) -> None:
        self.child.says(Event("running"))
        assert self.look(0.1) == Phase.RUNNING

    def fault(self) -> Phase:
        self.child.says(Event("fault", "engine x: it broke", name="/file", symptom=Symptom.CUDA_ERROR))
        self.child.ends(EXIT_FAULTED)
        return self.look(0.1)

    def reports(self) -> list[FaultReport]:
        files = sorted((self.folder / FOLDER_NAME).glob("*.json"))
        return [msgspec.json.decode(path.read_bytes(), type=FaultReport) for path in files]


@pytest.fixture
def lock() -> Iterator[EngineLock]:
    lock = EngineLock(f"test-{uuid.uuid4().hex[:12]}")
    yield lock
    discard_regions(lock)
    lock.release()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lock: EngineLock) -> Bench:
    return Bench(monkeypatch, tmp_path, lock)


def test_budget_gives_so_many_restarts_in_its_window() -> None:
    budget = RestartBudget(2)
    assert [budget.pause_s(now) for now in (0.0, 1.0, 2.0)] == [BACKOFFS_S[0], BACKOFFS_S[1], None]
    assert budget.pause_s(RESTART_WINDOW_S + 0.5) is not None, "the first restart is long ago"
    assert budget.pause_s(RESTART_WINDOW_S + 0.6) is None
    assert RestartBudget(0).pause_s(0.0) is None


def test_first_engine_gets_the_lock_and_the_configuration(bench: Bench) -> None:
    assert bench.look() == Phase.LOADING and not bench.slot.is_recovering
    order = bench.child.order
    assert bench.child.pass_fds == (bench.lock.fd,) and order.lock_fd == bench.lock.fd
    assert order.config.engine_name == bench.lock.engine_name and order.num_restarts == 0
    bench.run()


def test_engine_that_cannot_start_is_not_tried_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.child.says(Event("not_started", "num_pages is 7; expected more"))
    bench.child.ends(EXIT_NOT_STARTED)
    assert bench.look(0.1) == Phase.FAILED
    assert "could not start: num_pages is 7" in caplog.text and bench.reports() == []


@pytest.mark.parametrize("last_words", [Event("running"), Event("not_started", "no"), None])
def test_bars_are_gone_once_an_engine_is_loaded_or_never_will_be(bench: Bench, last_words: Event | None) -> None:
    bench.child.says(Event("progress", name="weights", done=1, total=2))
    assert bench.bars.drawn == {"weights"}
    if last_words is not None:
        bench.child.says(last_words)
    if last_words != Event("running"):
        bench.child.ends(EXIT_NOT_STARTED)
        assert bench.look(0.1) == Phase.FAILED
    assert not bench.bars.drawn
    if last_words == Event("running"):  # of the next engine too, and not before the supervisor looks
        assert bench.fault() == Phase.BACKOFF and bench.look(BACKOFFS_S[0]) == Phase.LOADING
        bench.child.says(Event("progress", name="weights", done=1, total=2))
        assert bench.bars.drawn == {"weights"}
        bench.child.says(Event("running"))
        assert not bench.bars.drawn


def test_faulted_engine_is_started_again_after_a_pause(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.run()
    assert bench.fault() == Phase.BACKOFF and bench.slot.is_recovering
    assert "engine x: it broke; details in /file" in caplog.text
    assert bench.look(BACKOFFS_S[0] - 0.05) == Phase.BACKOFF
    assert bench.look(0.1) == Phase.LOADING and bench.slot.is_recovering
    assert len(FakeChild.started) == 2 and bench.child.order.num_restarts == 1
    with caplog.at_level(logging.INFO):
        bench.run()
    assert "is back" in caplog.text and not bench.slot.is_recovering


def test_restarts_end_with_the_budget_and_say_what_to_do(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        bench.run()
        assert bench.fault() == Phase.BACKOFF
        assert bench.look(BACKOFFS_S[-1]) == Phase.LOADING
    bench.run()
    assert bench.fault() == Phase.FAILED
    assert "not started again: max_restarts is 3" in caplog.text and "Xid" in caplog.text
    assert len(FakeChild.started) == 4 and bench.look(3600) == Phase.FAILED


def test_failed_start_after_a_fault_is_tried_again_within_the_budget(bench: Bench) -> None:
    bench.run()
    bench.fault()
    for _ in range(2):
        assert bench.look(BACKOFFS_S[-1]) == Phase.LOADING
        bench.child.says(Event("not_started", "cuInit: got CUDA_ERROR_UNKNOWN"))
        bench.child.ends(EXIT_NOT_STARTED)
        assert bench.look(0.1) == Phase.BACKOFF
    assert bench.look(BACKOFFS_S[-1]) == Phase.LOADING
    bench.run()


def test_killed_engine_process_is_reported_by_the_supervisor(bench: Bench) -> None:
    bench.run()
    bench.child.ends(-9)
    assert bench.look(0.1) == Phase.BACKOFF
    (report,) = bench.reports()
    assert report.symptom == Symptom.HOST_DEATH and "ended with -9" in report.text and report.advice


def test_remains_tell_the_ingresses_and_keep_the_limits(bench: Bench) -> None:
    regions = create_engine_regions(
        bench.lock.engine_name, num_queue_pairs=1, geometry=QueuePairGeometry(2, 2, 4096), max_context=1, vocab_size=1,
        lock=EngineLock(bench.lock.engine_name, inherited_fd=bench.lock.fd),
    )  # fmt: skip
    page = regions.engine_page.view(abi.ENGINE_PAGE)
    page["status"]["state"], page["status"]["step"] = EngineState.RUNNING, 42
    page["control"]["tuning_generation"], page["control"]["max_running"] = 1, 5
    bench.run()
    bench.child.ends(-9)
    bench.look(0.1)
    assert bench.reports()[0].step == 42
    with open_engine_page(bench.lock.engine_name) as seen:
        assert int(seen.view(abi.ENGINE_PAGE)["status"]["state"][0]) == EngineState.FAULTED
    bench.look(BACKOFFS_S[-1])
    assert bench.child.order.tuning["max_running"] == 5
    del page
    for region in (regions.engine_page, *regions.queue_pairs):
        region.close()


def test_engine_that_was_asked_to_end_has_ended(bench: Bench) -> None:
    bench.run()
    bench.slot.ask_to_end()
    assert bench.child.signals == [signal.SIGTERM] and bench.slot.is_ending
    bench.child.ends(EXIT_STOPPED)
    assert bench.look(0.1) == Phase.ENDED


def test_signal_while_the_first_engine_loads_ends_it(bench: Bench) -> None:
    bench.slot.ask_to_end()
    bench.child.ends(-15)  # before it had a handler
    assert bench.look(0.1) == Phase.ENDED


def test_fault_while_draining_is_recovered_from(bench: Bench) -> None:
    bench.run()
    bench.slot.ask_to_end()
    assert bench.slot.is_ending and bench.fault() == Phase.BACKOFF and not bench.slot.is_ending
    assert bench.look(BACKOFFS_S[0] + 0.1) == Phase.LOADING and not bench.slot.is_ending
    bench.slot.ask_to_end()
    assert bench.child.signals == [signal.SIGTERM]
    bench.child.ends(EXIT_STOPPED)
    assert bench.look(0.1) == Phase.ENDED


def test_asked_to_end_during_the_pause_no_other_one_starts(bench: Bench) -> None:
    bench.run()
    bench.fault()
    bench.slot.ask_to_end()
    assert bench.look(100) == Phase.ENDED and len(FakeChild.started) == 1


def test_engine_that_does_not_end_after_its_fault_is_killed(bench: Bench) -> None:
    bench.run()
    bench.child.says(Event("fault", "engine x: it hangs", symptom=Symptom.HEARTBEAT_STALL))
    assert bench.look(0.1) == Phase.RUNNING
    assert bench.look(END_TIMEOUT_S + 0.1) == Phase.RUNNING and bench.child.signals == [signal.SIGKILL]
    assert bench.look(0.1) == Phase.BACKOFF


def test_engine_that_drains_for_ever_is_killed(bench: Bench) -> None:
    bench.run()
    bench.slot.ask_to_end()
    bench.look(Config().drain_timeout_s + END_TIMEOUT_S - 0.1)
    assert bench.child.signals == [signal.SIGTERM]
    bench.look(0.2)
    assert bench.child.signals == [signal.SIGTERM, signal.SIGKILL]
    assert bench.look(0.1) == Phase.ENDED, "its drain was over"


def test_engine_that_dies_when_it_is_to_stop_at_once_is_not_started_again(bench: Bench) -> None:
    bench.run()
    bench.slot.ask_to_end()
    bench.slot.ask_to_end()
    assert bench.child.signals == [signal.SIGTERM, signal.SIGINT], (
        "of another kind: it may come before the first was seen"
    )
    assert bench.fault() == Phase.ENDED


def test_cut_off_line_of_a_killed_process_is_ignored(bench: Bench) -> None:
    bench.child._on_line(b'{"kind":"runn')
    assert bench.look() == Phase.LOADING


def test_log_lines_of_the_engine_are_logged_here(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        bench.child.says(Event("log", "weights: 3 %s", name="blinkimp.host.x", level=logging.INFO))
        bench.child.says(Event("log", "slow", name="blinkimp.host.x", level=30, event="step", fields={"ms": 7}))
    assert [(one.name, one.getMessage()) for one in caplog.records] == [
        ("blinkimp.host.x", "weights: 3 %s"),
        ("blinkimp.host.x", "slow"),
    ]
    assert (caplog.records[1].event, caplog.records[1].fields) == ("step", {"ms": 7})  # type: ignore[attr-defined]
