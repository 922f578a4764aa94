"""A timed round trip through a queue pair, against a director in Python. Run: pytest tests/host/test_ping.py"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from blinkimp import ring_abi as abi
from blinkimp.cli import checks
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairError, QueuePairPort
from tests.fake_director import FakeDirector
from tests.ingress_support import SMALL_RINGS, attach, engine_name, kind_of


@pytest.fixture
def director() -> Iterator[FakeDirector]:
    fake = FakeDirector(engine_name(), geometry=SMALL_RINGS)  # not started: the test turns it
    yield fake
    fake.close()


@pytest.fixture
def port(director: FakeDirector) -> Iterator[QueuePairPort]:
    with QueuePairPort.open(director.regions.engine_name, 0) as attached:
        attach(attached, director.queue_pairs[0])
        yield attached


def test_ping_is_timed_between_commit_and_answer(director: FakeDirector, port: QueuePairPort) -> None:
    def answer() -> None:
        while not director.queue_pairs[0].num_pings:
            director.turn()

    answering = threading.Thread(target=answer)
    answering.start()
    before_ns = time.monotonic_ns()
    status, committed_ns, seen_ns = port.ping(7, spin_s=0.0001, timeout_s=60)
    after_ns = time.monotonic_ns()
    answering.join()
    assert status == PortStatus.OK and before_ns <= committed_ns <= seen_ns <= after_ns
    assert port.ping(8, spin_s=0, timeout_s=0)[0] == PortStatus.BUSY, "the answer is still on the ring"
    (pong,) = port.poll()
    assert (kind_of(pong), int(pong["request_id"]), int(pong["device_ns"])) == (abi.COMPLETION_PONG, 7, committed_ns)
    assert port.ping(9, spin_s=0.001, timeout_s=0.002)[0] == PortStatus.PENDING, "nobody answers"


def test_doctor_tells_what_a_ping_came_to(
    director: FakeDirector, port: QueuePairPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "PING_TIMEOUT_S", 0.002)
    with pytest.raises(QueuePairError, match=r"ping 1 had no answer within 0\.002 s"):
        checks.ping_us(port, 1)
    director.turn()
    with pytest.raises(QueuePairError, match="the port says BUSY, with 1 answers; expected OK"):
        checks.ping_us(port, 2)
    director.start()
    assert checks.ping_us(port, 3) > 0
