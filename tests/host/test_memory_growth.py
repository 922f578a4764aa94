"""What a request leaves behind in the processes that serve it, and what an ingress does that has none: nothing. Bytes a request and blocks a
turn, whatever the machine's speed.

The long version: python tools/bench_streams.py --transport both --rate 4000 --seconds 600.
Run: pytest tests/host/test_memory_growth.py
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.nic_shim import engine_thread, request_metrics, zmq_ingress
from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.engine_thread import EngineThread
from blinkimp.nic_shim.garbage import Collector
from tests.fake_director import FakeDirector
from tests.host.server_support import ServerProcess
from tests.ingress_support import engine_name, serve, wait_until
from tests.support import PATIENCE_S, load_tool

# A request's state is 2 to 3 KB; with a cycle of references, which only the collector frees, 700 bytes of it stay over such a run. Without any
# an ingress grows by 30 to 80 bytes a request while its heap finds its size, and the others not at all.
MOST_BYTES_A_REQUEST = 400
NAMES = {"supervisor", "engine", "device", "zmq ingress", "http ingress"}
NUM_WARM, NUM_MEASURED = 1500, 3000


@pytest.fixture(autouse=True)
def _no_huge_pages() -> Iterator[None]:
    """Of this process and those that it starts: where the kernel gives them unasked, a heap grows by two megabytes at a time."""
    set_thp_disable, libc = 41, ctypes.CDLL(None)
    libc.prctl(set_thp_disable, 1, 0, 0, 0)
    yield
    libc.prctl(set_thp_disable, 0, 0, 0, 0)


def test_requests_leave_no_memory_behind(tmp_path: Path) -> None:
    clients, memory = load_tool("stream_clients"), load_tool("process_memory")
    with ServerProcess(
        tmp_path,
        wait=False,
        load_format="null",
        null_step_us=0,
        num_threads=0,
        http="127.0.0.1:0",
        max_batch=64,
        max_requests_per_s=1 << 20,
    ) as server:
        server.wait_for_log("serves on", 2)
        processes = memory.processes_of(server.process.pid)
        assert {process.name for process in processes} == NAMES

        def serve(num_requests: int) -> None:
            for transport, address in (("zmq", server.endpoints[0]), ("http", f"127.0.0.1:{server.http_port}")):
                plan = clients.Plan(
                    transport=transport, address=address, num_streams=64, num_connections=4, seconds=PATIENCE_S, least_tokens=1, most_tokens=8,
                    sample_period=1 << 30, seed=1, output="", most_requests=num_requests,
                )  # fmt: skip
                assert clients.run(plan).num_requests >= num_requests

        serve(NUM_WARM)
        for process in processes:
            process.sample()
        serve(NUM_MEASURED)
        for process in processes:
            process.sample()
            before, after = process.resident_kb["anonymous"]
            grown = (after - before) * 1024 / NUM_MEASURED
            print(f"{process.name}: {grown:.0f} bytes a request, {before} -> {after} KB")
            assert grown < MOST_BYTES_A_REQUEST, f"{process.name}: {grown:.0f} bytes a request, {before} -> {after} KB"


# ---- Idle ------------------------------------------------------------------------------------------------------------
NUM_TURNS = 1500


class CountedLooks(Collector):
    """Says how often a loop has come round, and never looks: that would empty the free lists, which count here."""

    num_turns = 0

    def look(self, now: float) -> None:
        type(self).num_turns += 1


@pytest.fixture
def busy_idlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loops that do in each turn what they otherwise do some times a second."""
    monkeypatch.setattr(zmq_ingress, "HOUSEKEEPING_PERIOD_S", 0.0)
    monkeypatch.setattr(zmq_ingress, "IDLE_WAIT_MS", 0)
    monkeypatch.setattr(zmq_ingress, "Collector", CountedLooks)
    monkeypatch.setattr(engine_thread, "MEMORY_CHECK_TURNS", 1)
    monkeypatch.setattr(engine_thread, "IDLE_WAIT_MS", 0)
    monkeypatch.setattr(engine_thread, "Collector", CountedLooks)
    monkeypatch.setattr(request_metrics, "PUBLISH_PERIOD_S", 0.0)
    gc.disable()
    yield
    gc.enable()


def wait_for_turns(num_turns: int) -> None:
    last = CountedLooks.num_turns + num_turns
    wait_until(lambda: CountedLooks.num_turns >= last, "the loop goes round")


def blocks_kept_by_turns() -> float:
    """Python's memory blocks a turn of the loop that runs in this process; the least of some measurements, as other threads allocate too."""
    kept = []
    for _ in range(3):
        gc.collect()  # empties the free lists
        wait_for_turns(10)
        first, before = CountedLooks.num_turns, sys.getallocatedblocks()
        wait_for_turns(NUM_TURNS)
        kept.append((sys.getallocatedblocks() - before) / (CountedLooks.num_turns - first))
    return min(kept)


@pytest.mark.usefixtures("busy_idlers")
def test_an_idle_zmq_ingress_keeps_nothing(tmp_path: Path) -> None:
    with serve(tmp_path):
        assert blocks_kept_by_turns() < 0.1


@pytest.mark.usefixtures("busy_idlers")
def test_an_idle_engine_thread_of_the_http_ingress_keeps_nothing() -> None:
    failures: list[BaseException] = []
    with FakeDirector(engine_name()) as director:
        link = EngineLink(director.regions.engine_name, 0, eos_ids=(), loss_timeout_s=PATIENCE_S)
        link.attach(PATIENCE_S)
        loop = asyncio.new_event_loop()
        engine = EngineThread(link, loop, lambda batch: None, failures.append, max_memory_bytes=1 << 50)
        engine.start()
        try:
            assert blocks_kept_by_turns() < 0.1
        finally:
            engine.stop()
            loop.close()
    assert not failures
