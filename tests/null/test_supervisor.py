"""The supervisor's decisions that need no process. Test: pytest tests/null/test_supervisor.py"""

from __future__ import annotations

import signal
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from blinkimp.config import Config
from blinkimp.host import supervisor
from blinkimp.host.child_process import EXIT_MISCONFIGURED
from blinkimp.host.engine_slot import Phase
from blinkimp.host.supervisor import (
    CANCEL_GRACE_S,
    FIRST_BACKOFF_S,
    HEALTHY_S,
    INGRESS_FLUSH_S,
    MAX_BACKOFF_S,
    WATCH_PERIOD_S,
    IngressSlot,
    Supervisor,
    endpoint_of,
    ignored_settings,
    ingress_slots,
    metrics_slots,
)
from blinkimp.nic_shim import http_ingress, metrics_server, zmq_ingress


class FakeChild:
    """A process that ends when the test says so."""

    started: list[FakeChild]
    clock: list[float]

    def __init__(self, name: str, module: str, arguments: list[str], *, on_line: Any) -> None:
        self.alive = True
        self.status = 1
        self.on_line = on_line
        self.arguments = arguments
        self.signals: list[signal.Signals] = []
        self.ends_at = float("inf")  # by the clock, which wait() moves
        FakeChild.started.append(self)

    def is_alive(self) -> bool:
        return self.alive

    def returncode(self) -> int | None:
        return None if self.alive else self.status

    def describe_exit(self) -> str:
        return "ingress ended"

    def send_signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number == signal.SIGKILL:
            self.ends_at = 0.0

    def wait(self, timeout_s: float = 0.0) -> bool:
        if FakeChild.clock[0] < self.ends_at:
            FakeChild.clock[0] += timeout_s
        self.alive = FakeChild.clock[0] < self.ends_at
        return not self.alive


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    FakeChild.started, FakeChild.clock = [], now
    monkeypatch.setattr(supervisor, "ChildProcess", FakeChild)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    return now


def seconds_to_restart(slot: IngressSlot, clock: list[float]) -> float:
    FakeChild.started[-1].alive = False
    num_started, died_at = len(FakeChild.started), clock[0]
    while len(FakeChild.started) == num_started:
        slot.look()
        clock[0] += 0.01
        assert clock[0] - died_at < 60
    return clock[0] - died_at


@pytest.mark.parametrize(
    ("bind", "third"),
    [
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5557"),
        ("tcp://[::1]:5555", "tcp://[::1]:5557"),
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
        ("ipc:///run/blinkimp", "ipc:///run/blinkimp.2"),
    ],
)
def test_endpoints_of_further_ingresses(bind: str, third: str) -> None:
    assert endpoint_of(bind, 0) == bind
    assert endpoint_of(bind, 2) == third


def test_dead_ingress_is_restarted_with_growing_pauses(clock: list[float]) -> None:
    slot = IngressSlot(Config(), 0, "module", [])
    pauses = [seconds_to_restart(slot, clock) for _ in range(10)]
    assert pauses[0] == pytest.approx(FIRST_BACKOFF_S, abs=0.05)
    assert pauses[2] == pytest.approx(4 * FIRST_BACKOFF_S, abs=0.05)
    assert pauses[-1] == pytest.approx(MAX_BACKOFF_S, abs=0.05)
    clock[0] += HEALTHY_S + 1
    slot.look()
    assert seconds_to_restart(slot, clock) == pytest.approx(FIRST_BACKOFF_S, abs=0.05), "a long life starts afresh"


def test_ingress_that_is_configured_wrongly_is_not_tried_again(clock: list[float]) -> None:
    def slot_that_ended(status: int, *, has_served: bool = False) -> IngressSlot:
        slot = IngressSlot(Config(), 0, "module", [])
        assert not slot.cannot_serve, "it lives"
        child = FakeChild.started[-1]
        if has_served:
            child.on_line(b"ready tcp://127.0.0.1:5555\n")
        child.alive, child.status = False, status
        return slot

    assert slot_that_ended(EXIT_MISCONFIGURED).cannot_serve
    assert not slot_that_ended(1).cannot_serve, "the engine may have faulted under it"
    assert not slot_that_ended(-signal.SIGKILL).cannot_serve
    assert not slot_that_ended(EXIT_MISCONFIGURED, has_served=True).cannot_serve, "it could, so it may again"


def test_each_ingress_has_its_queue_pair_and_endpoint(clock: list[float]) -> None:
    config = Config(engine_name="name", num_ingress=2, http="127.0.0.1:8000", served_model_name="mine")
    slots = ingress_slots(config)
    assert [slot.idx for slot in slots] == [0, 1, 2]
    arguments = [child.arguments for child in FakeChild.started]
    values = [dict(pairwise(one)) for one in arguments]
    assert [one["--queue-pair"] for one in values] == ["0", "1", "2"]
    assert all(one["--engine"] == "name" for one in values)
    assert [one["--bind"] for one in values] == ["tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556", "127.0.0.1:8000"]
    assert values[2]["--model-name"] == "mine" and values[2]["--max-requests-per-s"] == str(config.max_requests_per_s)
    assert len(ingress_slots(Config())) == 1, "no HTTP unless it is asked for"


def test_metrics_have_a_process_where_they_have_an_address(clock: list[float]) -> None:
    assert metrics_slots(Config()) == []
    (slot,) = metrics_slots(
        Config(engine_name="name", metrics="127.0.0.1:9090", metrics_prefix="vllm:", log_format="json")
    )
    assert slot.name == "metrics"
    values = vars(metrics_server._parser().parse_args(FakeChild.started[0].arguments))
    expected = {"engine": "name", "bind": "127.0.0.1:9090", "metrics_prefix": "vllm:", "log_format": "json"}
    assert expected.items() <= values.items()


def test_every_process_knows_the_flags_it_is_given(clock: list[float]) -> None:
    ingress_slots(Config(http="127.0.0.1:8000", metrics_prefix="vllm:", log_format="json", log_level="error"))
    zmq, http = (child.arguments for child in FakeChild.started)
    for values in (vars(zmq_ingress._parser().parse_args(zmq)), vars(http_ingress._parser().parse_args(http))):
        assert (values["log_format"], values["log_level"]) == ("json", "error")
    assert vars(http_ingress._parser().parse_args(http))["metrics_prefix"] == "vllm:"


def test_ingress_is_asked_to_end_once(clock: list[float]) -> None:
    slot = IngressSlot(Config(), 0, "module", [])
    slot.ask_to_end()
    slot.ask_to_end()
    assert FakeChild.started[0].signals == [signal.SIGTERM]


DRAIN_S = 30.0
FLUSH_S = INGRESS_FLUSH_S + CANCEL_GRACE_S + WATCH_PERIOD_S


@pytest.mark.parametrize(
    ("ends_after_s", "num_signals", "drains", "killed_after_s"),
    [
        (DRAIN_S - 1, 1, True, None),
        (float("inf"), 1, True, DRAIN_S + FLUSH_S),
        (DRAIN_S - 1, 2, True, FLUSH_S),
        (DRAIN_S - 1, 0, False, FLUSH_S),
    ],
    ids=["clients read slowly", "never ends", "second signal", "the engine has failed"],
)
def test_ingresses_have_the_drains_time_to_deliver(
    clock: list[float], ends_after_s: float, num_signals: int, drains: bool, killed_after_s: float | None
) -> None:
    """The engine ends at once; the ingress has more to say."""
    server = Supervisor(Config(drain_timeout_s=DRAIN_S))
    server._ingresses, server._num_signals, began = [IngressSlot(Config(), 0, "module", [])], num_signals, clock[0]
    (child,) = FakeChild.started
    child.ends_at = began + ends_after_s
    if drains:
        engine: Any = SimpleNamespace(is_recovering=False, ask_to_end=lambda: None, look=lambda: Phase.ENDED)
        server._shut_down(engine)
    server._end_ingresses()
    assert (signal.SIGKILL in child.signals) == (killed_after_s is not None)
    ended_after_s = ends_after_s if killed_after_s is None else killed_after_s
    assert clock[0] - began == pytest.approx(ended_after_s, abs=2 * WATCH_PERIOD_S)


def test_settings_that_change_nothing_are_named() -> None:
    assert ignored_settings(Config()) == []
    assert ignored_settings(Config(api_key_file="/keys", http=":8000", trace_op_period=8, trace_events=1 << 20)) == []
    texts = ignored_settings(Config(api_key_file="/keys", trace_op_period=8))
    assert ["--http" in texts[0], "--trace-events" in texts[1]] == [True, True] and len(texts) == 2
