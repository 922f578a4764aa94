"""The ingress end of a queue pair against a director in Python: laps, arena wrap, back-pressure, attach, drop, takeover.

Invariants cited are those of device/ingress_port.cuh. A failing test prints the ring's words (QueuePairPort.dump).

Run: pytest tests/host/test_ingress_port.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import SharedMemoryError
from blinkimp.nic_shim.queue_pair import (
    AttachTimeoutError,
    PortStatus,
    QueuePairBusyError,
    QueuePairError,
    QueuePairPort,
    WaitEvent,
    check_header,
    sampling_record,
)
from tests.fake_director import DEFAULT_SCRIPT, FakeDirector
from tests.ingress_support import SMALL_RINGS, attach, engine_name, kind_of, prompt, wait_until
from tests.support import PATIENCE_S, python_path


@pytest.fixture
def director() -> Iterator[FakeDirector]:
    fake = FakeDirector(engine_name(), geometry=SMALL_RINGS, num_queue_pairs=2)  # not started: the test turns it
    yield fake
    fake.close()


@pytest.fixture
def port(director: FakeDirector) -> Iterator[QueuePairPort]:
    with QueuePairPort.open(director.regions.engine_name, 0) as attached:
        attach(attached, director.queue_pairs[0])
        yield attached


# ---- Attach ----------------------------------------------------------------------------------------------------------
def test_attach_detach_epochs(director: FakeDirector) -> None:
    queue_pair = director.queue_pairs[0]
    with QueuePairPort.open(director.regions.engine_name, 0) as port:
        assert port.state == PortStatus.DETACHED
        assert port.try_submit(1, prompt(3), sampling_record(), max_tokens=1) == PortStatus.DETACHED
        attach(port, queue_pair)
        assert port.epoch % 2 == 1 and queue_pair.epoch == port.epoch and port.owner_pid == os.getpid()
        first_epoch = port.epoch
        port.detach()
        assert port.owner_pid == 0 and port.state == PortStatus.DETACHED
        queue_pair.poll()
        assert queue_pair.epoch == first_epoch + 1  # I6: even while nobody is attached
        attach(port, queue_pair)
        assert port.epoch == first_epoch + 2


def test_second_ingress_is_refused_while_the_first_lives(director: FakeDirector, port: QueuePairPort) -> None:
    with QueuePairPort.open(director.regions.engine_name, 0, heartbeat_timeout_s=60) as rival:
        assert rival.try_attach() == PortStatus.BUSY
        with pytest.raises(QueuePairBusyError, match=f"belongs to process {os.getpid()}"):
            rival.attach(timeout_s=0.02)
    assert port.state == PortStatus.OK
    with QueuePairPort.open(director.regions.engine_name, 1) as other:  # each queue pair has an owner of its own
        attach(other, director.queue_pairs[1])


def test_stale_owner_is_taken_over_and_notices(director: FakeDirector, port: QueuePairPort) -> None:
    with QueuePairPort.open(director.regions.engine_name, 0, heartbeat_timeout_s=60) as rival:
        assert rival.try_attach() == PortStatus.BUSY
        director.queue_pairs[0].ingress["heartbeat_ns"] -= 61 * 10**9  # as if its last one had been so long ago
        attach(rival, director.queue_pairs[0])
        assert rival.epoch > port.epoch
        # I5: the old owner writes nothing any more, not even a heartbeat that would keep its successor alive
        assert port.state == PortStatus.STOLEN
        assert port.try_submit(1, prompt(3), sampling_record(), max_tokens=1) == PortStatus.STOLEN
        assert not port.heartbeat()
        assert len(port.poll()) == 0
        port.detach()
        assert rival.owner_pid == os.getpid() and rival.state == PortStatus.OK


def test_dead_owner_is_taken_over_soon(director: FakeDirector) -> None:
    name = director.regions.engine_name
    script = (
        "import sys, os\nfrom blinkimp.nic_shim.queue_pair import QueuePairPort\n"
        f"port = QueuePairPort.open({name!r}, 0); print(int(port.try_attach()), flush=True); os._exit(9)"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (9, "0")
    with QueuePairPort.open(name, 0, heartbeat_timeout_s=60) as port:
        fresh_ns = time.monotonic_ns()
        director.queue_pairs[0].ingress["heartbeat_ns"] = fresh_ns
        status = port.try_attach()
        if time.monotonic_ns() - fresh_ns < 200_000_000:  # kDeadOwnerGraceNs; else this machine was too slow to tell
            assert status == PortStatus.BUSY, "the process id may be of another pid namespace"
        director.queue_pairs[0].ingress["heartbeat_ns"] -= 10**9  # past the grace, far from the timeout
        assert port.try_attach() == PortStatus.OK
        assert port.owner_pid == os.getpid()


def test_attach_without_a_director_times_out(director: FakeDirector) -> None:
    with QueuePairPort.open(director.regions.engine_name, 0) as port:
        with pytest.raises(AttachTimeoutError, match=r"did not answer within 0\.05 s"):
            port.attach(timeout_s=0.05)
        assert port.owner_pid == 0  # given back


def test_drop_and_attach_again(director: FakeDirector, port: QueuePairPort) -> None:
    queue_pair = director.queue_pairs[0]
    assert port.try_submit(1, prompt(3), sampling_record(), max_tokens=9) == PortStatus.OK
    queue_pair.poll()
    queue_pair.step()
    queue_pair.publish()
    assert port.try_submit(2, prompt(3), sampling_record(), max_tokens=9) == PortStatus.OK  # not taken before the drop
    queue_pair.drop()
    assert port.state == PortStatus.DETACHED
    assert port.wait(PATIENCE_S) & WaitEvent.STATE_CHANGED
    assert port.try_submit(3, prompt(3), sampling_record(), max_tokens=9) == PortStatus.DETACHED
    assert [kind_of(entry) for entry in port.poll()] == [abi.COMPLETION_ACK, abi.COMPLETION_TOKEN]  # still to be had
    attach(port, queue_pair)
    queue_pair.poll()
    assert [request.request_id for request in queue_pair.seen] == [1]  # request 2 was of the old epoch
    assert port.try_submit(4, prompt(3), sampling_record(), max_tokens=1) == PortStatus.OK
    director.turn()
    assert [kind_of(entry) for entry in port.poll()] == [
        *(abi.COMPLETION_ACK, abi.COMPLETION_TOKEN, abi.COMPLETION_FINISH),
    ]


def test_an_ingress_without_a_lease_goes_stale_and_is_dropped(director: FakeDirector, port: QueuePairPort) -> None:
    queue_pair = director.queue_pairs[0]
    port.start_heartbeat(period_ns=10_000_000, lease_s=0.0)
    seen: set[int] = set()

    def beats() -> bool:
        queue_pair.poll()
        seen.add(int(queue_pair.ingress["heartbeat_ns"][0]))
        return len(seen) > 10

    wait_until(beats, "the thread keeps it alive while this one does nothing")
    assert port.state == PortStatus.OK, port.dump()
    port.renew_lease(0.05)
    queue_pair.timeout_s = 0.5

    def is_dropped() -> bool:
        queue_pair.poll()
        return port.state != PortStatus.OK

    wait_until(is_dropped, "an owner that hangs does not renew: it must be dropped")
    last = int(queue_pair.ingress["heartbeat_ns"][0])
    time.sleep(0.1)
    assert int(queue_pair.ingress["heartbeat_ns"][0]) == last, "without a lease there are no heartbeats"


def test_header_is_checked_word_by_word(director: FakeDirector) -> None:
    region = director.regions.queue_pairs[0]
    check_header(region)
    header = np.frombuffer(region.buffer, dtype=abi.QUEUE_PAIR_HEADER, count=1)
    bad_values = {"magic": 1, "abi_version": 77, "header_bytes": 64, "region_bytes": 1 << 40}
    bad_values |= {"submission_entry_bytes": 32}
    bad_values |= {"completion_entry_bytes": 64, "num_submissions": 3, "num_completions": 0, "arena_bytes": 1000}
    bad_values |= {"submissions_offset": 8, "completions_offset": 1 << 62, "arena_offset": (1 << 64) - 64}
    for field, bad in bad_values.items():
        good = int(header[0][field])
        header[field] = bad
        with pytest.raises(
            QueuePairError,
            match=rf"header word {field} is {bad if field != 'region_bytes' else region.region_bytes:#x}, expected",
        ):
            check_header(region)
        with pytest.raises((QueuePairError, SharedMemoryError)):
            QueuePairPort.open(director.regions.engine_name, 0)
        header[field] = good
    check_header(region)


# ---- Submissions -----------------------------------------------------------------------------------------------------
def test_request_arrives_whole(director: FakeDirector, port: QueuePairPort) -> None:
    sampling = sampling_record(temperature=0.7, top_p=0.9, min_p=0.125, top_k=40, seed=2**64 - 1, ignore_eos=True)
    assert port.try_submit(2**63 + 5, prompt(100), sampling, stop_ids=[7, 8, 9], max_tokens=13) == PortStatus.OK
    director.queue_pairs[0].poll()
    (request,) = director.queue_pairs[0].seen
    assert (request.request_id, request.max_tokens, request.stop_ids) == (2**63 + 5, 13, (7, 8, 9))
    assert request.prompt_ids == tuple(range(1, 101)) and request.ignore_eos
    assert request.sampling == {
        "temperature": pytest.approx(0.7),
        "top_p": pytest.approx(0.9),
        "min_p": 0.125,
        "top_k": 40,
        "seed": 2**64 - 1,
    }


def test_every_word_of_a_request_arrives(director: FakeDirector, port: QueuePairPort) -> None:
    words = {
        "min_tokens": 3,
        "repetition_penalty": 1.25,
        "presence_penalty": -0.5,
        "frequency_penalty": 1.5,
        "num_top_logprobs": 20,
    }
    status = port.try_submit(
        9,
        prompt(6),
        sampling_record(**words),  # type: ignore[arg-type]
        max_tokens=4,
        stop_ids=[5],
        logit_bias={17: -100.0, 3: 2.5},
        num_prior_outputs=2,
        flags=abi.REQUEST_NO_PREFIX_CACHE,
        priority=-7,
        timeout_ns=2**40,
        cache_salt=2**63 + 1,
        constraint_slot=0,
        constraint_state=77,
    )
    assert status == PortStatus.OK
    director.queue_pairs[0].poll()
    (request,) = director.queue_pairs[0].seen
    assert request.prompt_ids == tuple(range(1, 7)) and request.stop_ids == (5,)
    assert request.logit_bias == ((17, -100.0), (3, 2.5))
    assert {name: request.body["sampling"][name] for name in words} == words
    assert int(request.body["sampling"]["num_logit_bias"]) == 2
    names = ("num_prior_outputs", "flags", "constraint", "constraint_state")
    assert [int(request.body[name]) for name in names] == [2, abi.REQUEST_NO_PREFIX_CACHE, 1, 77]
    names = ("priority", "timeout_ns", "cache_salt", "max_tokens")
    assert [int(request.entry[name]) for name in names] == [-7, 2**40, 2**63 + 1, 4]


def test_plain_request_has_the_neutral_words(director: FakeDirector, port: QueuePairPort) -> None:
    assert port.try_submit(9, prompt(6), sampling_record(), max_tokens=4) == PortStatus.OK
    director.queue_pairs[0].poll()
    (request,) = director.queue_pairs[0].seen
    body = request.body.copy()
    sampling = sampling_record()
    assert body["sampling"] == sampling[0] and float(sampling["repetition_penalty"][0]) == 1.0
    body["sampling"] = 0
    assert body.tobytes() == bytes(abi.REQUEST_BODY.itemsize)
    assert [int(request.entry[name]) for name in ("priority", "timeout_ns", "cache_salt", "client_ns")] == [0] * 4


@pytest.mark.parametrize(
    "words",
    [{"priority": 2**31}, {"cache_salt": -1}, {"stop_ids": [2**32]}, {"logit_bias": {-1: 0.0}}, {"max_tokens": 2**32}],
    ids=str,
)
def test_word_that_does_not_fit_is_refused(port: QueuePairPort, words: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a word of the request does not fit"):
        port.try_submit(1, prompt(3), sampling_record(), **{"max_tokens": 1, **words})


def test_constraint_arrives_in_pieces_with_room_for_requests(director: FakeDirector, port: QueuePairPort) -> None:
    queue_pair = director.queue_pairs[0]
    table = np.random.default_rng(1).integers(0, 256, 3 * SMALL_RINGS.arena_bytes + 12, dtype=np.uint8).tobytes()
    port.num_constraint_slots, port.constraint_slot_bytes = 2, len(table)
    status, offset = port.try_load_constraint(1, table)
    full = (PortStatus.ARENA_FULL, PortStatus.RING_FULL)
    assert status in full and offset == SMALL_RINGS.arena_bytes, "four pieces of a quarter"
    while status != PortStatus.OK:
        queue_pair.poll()
        status, offset = port.try_load_constraint(1, table, offset)
    queue_pair.poll()
    assert queue_pair.constraints == {1: table} and offset == len(table)
    assert port.load_constraint(1, b"another") == PortStatus.OK
    queue_pair.poll()
    assert queue_pair.constraints == {1: b"another"}


@pytest.mark.parametrize(("slot", "num_bytes"), [(2, 1), (-1, 1), (0, 101), (0, 0)])
def test_constraint_that_has_no_place_is_refused(port: QueuePairPort, slot: int, num_bytes: int) -> None:
    port.num_constraint_slots, port.constraint_slot_bytes = 2, 100
    with pytest.raises(ValueError, match="expected 1 to 100 bytes and a slot below 2"):
        port.try_load_constraint(slot, bytes(num_bytes))


def test_wrap_at_lap_boundary(director: FakeDirector, port: QueuePairPort) -> None:
    for lap_request in range(5 * SMALL_RINGS.num_submissions + 1):  # the parity of entry 0 changes at each lap
        assert port.try_ping(lap_request, client_ns=1000 + lap_request) == PortStatus.OK
        director.turn()
        (pong,) = port.poll()
        assert (kind_of(pong), int(pong["request_id"]), int(pong["device_ns"])) == (
            *(abi.COMPLETION_PONG, lap_request, 1000 + lap_request),
        )


def test_full_ring_is_a_result(director: FakeDirector, port: QueuePairPort) -> None:
    for request_id in range(SMALL_RINGS.num_submissions):
        assert port.try_cancel(request_id) == PortStatus.OK
    assert port.try_cancel(99) == PortStatus.RING_FULL
    assert port.try_submit(99, prompt(3), sampling_record(), max_tokens=1) == PortStatus.RING_FULL
    director.queue_pairs[0].poll()
    assert director.queue_pairs[0].num_cancels == SMALL_RINGS.num_submissions  # I2: none was overwritten
    assert port.try_cancel(99) == PortStatus.OK


def test_full_arena_is_a_result(director: FakeDirector, port: QueuePairPort) -> None:
    num_tokens = SMALL_RINGS.arena_bytes // 2 // 4 - abi.REQUEST_BODY.itemsize // 4  # body of exactly half of the arena
    assert port.try_submit(1, prompt(num_tokens), sampling_record(), max_tokens=1) == PortStatus.OK
    assert port.try_submit(2, prompt(num_tokens), sampling_record(), max_tokens=1) == PortStatus.OK
    assert port.try_submit(3, prompt(1), sampling_record(), max_tokens=1) == PortStatus.ARENA_FULL
    assert port.try_cancel(1) == PortStatus.OK  # an operation without a body needs no arena
    director.queue_pairs[0].poll()
    assert port.try_submit(3, prompt(1), sampling_record(), max_tokens=1) == PortStatus.OK


def test_body_larger_than_half_of_the_arena_can_never_fit(port: QueuePairPort) -> None:
    num_tokens = SMALL_RINGS.arena_bytes // 2 // 4 - abi.REQUEST_BODY.itemsize // 4 + 1
    assert port.try_submit(1, prompt(num_tokens), sampling_record(), max_tokens=1) == PortStatus.TOO_LARGE


def test_body_never_wraps(director: FakeDirector, port: QueuePairPort) -> None:
    queue_pair = director.queue_pairs[0]
    for request_id, num_tokens in enumerate([200, 300, 400, 440, 448, 150, 448, 300] * 3):
        assert (
            port.try_submit(request_id, prompt(num_tokens, first=2), sampling_record(), max_tokens=1) == PortStatus.OK
        )
        director.turn()  # the fake director asserts that the body lies in one piece
        port.poll()
        assert queue_pair.seen[-1].prompt_ids == tuple(range(2, 2 + num_tokens))


def test_impossible_positions_are_noticed(director: FakeDirector, port: QueuePairPort) -> None:
    director.queue_pairs[0].director["submission_consumer_pos"] = 10  # more than was produced
    assert port.try_cancel(1) == PortStatus.CORRUPT
    director.queue_pairs[0].director["submission_consumer_pos"] = 0


def test_wrong_prompt_dtype_is_refused(port: QueuePairPort) -> None:
    with pytest.raises(TypeError, match="expected contiguous uint32"):
        port.try_submit(1, np.arange(4), sampling_record(), max_tokens=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected contiguous uint32"):
        port.try_submit(1, prompt(8)[::2], sampling_record(), max_tokens=1)


# ---- Completions -----------------------------------------------------------------------------------------------------
def test_credit_stops_the_director_and_nothing_is_lost(director: FakeDirector, port: QueuePairPort) -> None:
    assert port.try_submit(1, prompt(3), sampling_record(), max_tokens=50) == PortStatus.OK
    for _ in range(40):
        director.turn()  # asserts that it never writes over unread completions
    tokens: list[int] = []
    for _ in range(200):
        for entry in port.poll():
            if kind_of(entry) == abi.COMPLETION_TOKEN:
                assert int(entry["index"]) == len(tokens)
                tokens.append(int(entry["token"]))
        director.turn()
    assert tokens == [DEFAULT_SCRIPT[(3 + i) % len(DEFAULT_SCRIPT)] for i in range(50)]


def test_wait_sees_completion_readable_and_timeout(director: FakeDirector, port: QueuePairPort) -> None:
    started = time.monotonic()
    assert port.wait(0.02) == WaitEvent(0)
    assert time.monotonic() - started >= 0.02
    read_fd, write_fd = os.pipe()
    try:
        assert port.wait(0.001, read_fd) == WaitEvent(0)
        os.write(write_fd, b"x")
        assert port.wait(PATIENCE_S, read_fd) == WaitEvent.READABLE
        assert port.try_ping(1, 1) == PortStatus.OK
        director.turn()
        assert port.wait(PATIENCE_S, read_fd) == WaitEvent.READABLE | WaitEvent.COMPLETION
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_a_long_wait_is_few_wake_ups(director: FakeDirector, port: QueuePairPort) -> None:
    """One in 250 us once nothing has come for 2 ms; at 50 us all the way it would be several thousand. A busy machine wakes us less often."""

    def num_sleeps() -> int:
        lines = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    before = num_sleeps()
    event_fd = os.eventfd(0)
    assert port.wait(0.4, event_fd) == WaitEvent(0)
    os.close(event_fd)
    assert 0 < num_sleeps() - before < 0.4 / 250e-6 + 100
