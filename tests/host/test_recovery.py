"""A device dies, hangs or reports a fault under streams: clients see a pause, and not one token more, less or other.

Emulated device, whole server. What is broken is broken while the device stands still in the middle of every stream, so that no machine is
too fast or too slow for it. Test: pytest tests/host/test_recovery.py
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.host.fault_report import FOLDER_NAME, FaultReport
from blinkimp.host.shared_memory import SHM_DIR
from blinkimp.host.watchdog import Symptom
from tests.host.engine_support import assert_all_pages_are_back, wait_for
from tests.host.recovery_support import Jobs, find_stop_string, num_restarts, record_fault
from tests.host.server_support import GREEDY, NUM_TRIES, PROMPT, ServerProcess, streams_held
from tests.support import PATIENCE_S, undisturbed

DEVICE = "host.emulated_process"
# A device that hangs is waited out for this long, once. A machine that stands still for less is not taken for one.
STALL_TIMEOUT_S = 10.0
OPTIONS: dict[str, Any] = {"max_restarts": 100, "constraint_slots": 2, "num_queue_pairs": 3}


def get(server: ServerProcess, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def reports(folder: Path) -> list[FaultReport]:
    files = sorted((folder / FOLDER_NAME).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [msgspec.json.decode(path.read_bytes(), type=FaultReport) for path in files]


def left_behind(server: ServerProcess) -> list[str]:
    return [path.name for path in SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path, dict[str, Any], str]]:
    """A server, its cache folder, what the jobs come to when nothing happens, and the stop string of one of them."""
    folder = tmp_path_factory.mktemp("recovery")
    with ServerProcess(
        folder, http="127.0.0.1:0", stall_timeout_s=STALL_TIMEOUT_S, cache_dir=str(folder), **OPTIONS
    ) as server:
        stop = find_stop_string(server)
        undisturbed = Jobs(server, stop).join()
        assert undisturbed["stopped"][5] == stop and undisturbed["constrained"][4] in ("length", "eos")
        yield server, folder, undisturbed, stop
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
        assert left_behind(server) == []


def begin_and_freeze(server: ServerProcess, stop: str) -> Jobs:
    """All jobs, each in the middle of its stream, and a device that stands still."""
    for _ in range(NUM_TRIES):
        jobs = Jobs(server, stop)
        jobs.wait_begun()
        server.kill(DEVICE, signal.SIGSTOP)
        if jobs.num_ended == 0:
            return jobs
        server.kill(DEVICE, signal.SIGCONT)  # this process was too slow for some stream: once more
        jobs.join()
    raise AssertionError(f"a stream was over before all had begun, {NUM_TRIES} times")


@pytest.mark.parametrize("symptom", [Symptom.FAULT_RECORD, Symptom.HEARTBEAT_STALL])
def test_streams_of_a_faulted_device_are_what_they_would_have_been(
    served: tuple[ServerProcess, Path, dict[str, Any], str], symptom: Symptom
) -> None:
    server, folder, undisturbed, stop = served
    restarts, num_reports = num_restarts(server), len(reports(folder))
    jobs = begin_and_freeze(server, stop)  # as it is for the second symptom: it hangs
    if symptom == Symptom.FAULT_RECORD:
        record_fault(server)
    assert jobs.join() == undisturbed
    assert num_restarts(server) > restarts
    # The first one: on a machine that stands still for seconds, a stall may follow.
    report = reports(folder)[num_reports]
    assert report.symptom == symptom and report.engine_name == server.config.engine_name and report.step > 0
    if symptom == Symptom.FAULT_RECORD:
        assert report.record is not None and report.record["site_name"] == "kSitePageCount"
        assert report.record["step"] == 12
    assert any(report.text in line for line in server.log)
    assert_all_pages_are_back(server.status)


def test_dead_device_and_a_fault_while_the_next_one_loads(
    served: tuple[ServerProcess, Path, dict[str, Any], str],
) -> None:
    """In between, the server is live and not ready; what comes then waits, and ends by its deadline or a cancel all the same."""
    server, folder, undisturbed, stop = served
    restarts, num_reports = num_restarts(server), len(reports(folder))
    jobs = begin_and_freeze(server, stop)
    server.process.send_signal(signal.SIGSTOP)  # nobody starts another engine for now
    try:
        server.kill(DEVICE)
        wait_for(lambda: get(server, "/ready")[0] == 503, PATIENCE_S, "the loss is noticed")
        assert get(server, "/health")[0] == 200
        with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
            assert client.health().status in ("engine_lost", "engine_faulted")
            waiting = client.submit(PROMPT, max_tokens=20, **GREEDY)
            late = client.submit(PROMPT, max_tokens=20, timeout_s=0.2)
            cancelled = client.submit(PROMPT, max_tokens=20)
            cancelled.cancel()
            assert late.result().finish_reason == "timeout", "its time is over, engine or not"
            assert cancelled.result().finish_reason == "cancelled"
            server.process.send_signal(signal.SIGCONT)
            wait_for(lambda: server.pid_of(DEVICE) != 0, PATIENCE_S, "the next device loads")
            server.kill(DEVICE)
            assert len(waiting.result().token_ids) == 20
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert jobs.join() == undisturbed
    wait_for(lambda: get(server, "/ready")[0] == 200, PATIENCE_S, "the server is ready again")
    assert num_restarts(server) >= restarts + 2
    assert reports(folder)[num_reports].symptom == Symptom.DEVICE_DEATH


@undisturbed  # the signal must come before the next engine runs
def test_sigterm_while_recovering_finishes_the_streams(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with ServerProcess(folder, cache_dir=str(folder)) as server:
        with streams_held(server, (server.endpoints[0], 4, 400)) as (streams,):
            server.kill("host.engine_process")  # and the device dies with it
        server.wait_for_log("started again")
        server.process.send_signal(signal.SIGTERM)
        results = streams.join()
        assert [(len(tokens), reason) for tokens, reason in results] == [(400, "length")] * 4
        assert len({tuple(tokens) for tokens, _ in results}) == 1
        assert server.wait(PATIENCE_S) == 0
        assert any("draining while" in line for line in server.log) and left_behind(server) == []
        assert [report.symptom for report in reports(folder)] == [Symptom.HOST_DEATH]


@undisturbed
def test_sigterm_while_recovering_with_nothing_to_finish_ends_at_once(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with ServerProcess(folder, cache_dir=str(folder)) as server:
        server.kill(DEVICE)
        server.wait_for_log("started again")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
        assert left_behind(server) == [] and not any("is back" in line for line in server.log)


@undisturbed  # the next device must be killed before the stream is over
def test_server_gives_up_when_the_restarts_are_used_up(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with ServerProcess(folder, cache_dir=str(folder), max_restarts=1) as server:
        with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
            for _ in range(NUM_TRIES):
                stream = client.submit(PROMPT, max_tokens=1500, **GREEDY)
                next(stream)
                first = server.kill(DEVICE, signal.SIGSTOP)
                if server.status()["num_running"]:  # the stream is in its middle and stays there
                    break
                os.kill(first, signal.SIGCONT)
                stream.result()
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: server.pid_of(DEVICE) not in (0, first), PATIENCE_S, "the next device loads")
            server.kill(DEVICE)
            try:
                raise AssertionError(f"the stream ended: {stream.result().finish_reason}")
            except RequestRefusedError as refused:
                assert refused.code == "engine_lost"
        assert server.wait(PATIENCE_S) == 1
        assert any("max_restarts is 1 within 10 minutes" in line for line in server.log)
        assert left_behind(server) == []
        assert reports(folder)[0].symptom == Symptom.DEVICE_DEATH
