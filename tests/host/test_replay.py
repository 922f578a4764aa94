"""Record and replay: what a live server was asked, asked again of a fresh one, brings the same tokens, bit for bit.

Run: pytest tests/host/test_replay.py
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.bench.load_plan import LoadOptions
from blinkimp.bench.runner import Target, run_load
from blinkimp.cli import main
from blinkimp.client import Client
from blinkimp.nic_shim.arrival_capture import ArrivalCapture
from blinkimp.ring_abi import LEAST_TRACE_EVENTS
from blinkimp.trace.arrivals import collect_arrivals, read_arrivals
from blinkimp.trace.diff import compare
from blinkimp.trace.file import TraceFile
from blinkimp.trace.recorder import Recorder
from blinkimp.trace.scan import scan
from blinkimp.trace.tokens import token_streams
from tests.host.engine_support import make_tiny_checkpoint, wait_for
from tests.host.server_support import ServerProcess
from tests.ingress_support import serve, write_byte_tokenizer
from tests.support import PATIENCE_S

NUM_SAMPLED = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_checkpoint(folder)
    write_byte_tokenizer(folder)
    return folder


def ask(endpoint: str) -> list[list[int]]:
    """Sampled requests whose seeds the server draws, a greedy one, and one that is cancelled; the tokens that came."""
    with Client(endpoint, timeout_s=PATIENCE_S) as client:
        streams = [
            client.submit([3 + idx, 7], max_tokens=24, temperature=1.5, top_p=0.95, top_k=50 + idx, ignore_eos=True)
            for idx in range(NUM_SAMPLED)
        ]
        streams.append(client.submit([3, 7, 9], max_tokens=12, temperature=0.0, priority=-1, cache_salt="mine"))
        told = [stream.result().token_ids for stream in streams]
        given_up = client.submit([200], max_tokens=400, temperature=1.0, ignore_eos=True)
        next(iter(given_up))
        given_up.cancel()
        for _ in given_up:
            pass
    return told


def wait_until_published(server: ServerProcess) -> None:
    """What clients have been told stands in the trace: a status comes behind it."""
    wait_for(lambda: server.status()["num_running"] + server.status()["num_finishing"] == 0, PATIENCE_S, "it is idle")


def test_a_replay_says_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captured, arrivals = tmp_path / "captured", tmp_path / "arrivals.jsonl"
    options: dict[str, Any] = {"num_threads": 2, "trace_events": LEAST_TRACE_EVENTS}
    with ServerProcess(tmp_path, model, capture_arrivals=str(captured), **options) as server:
        with Recorder(server.config.engine_name, tmp_path / "live.trace", pings=False) as recorder:
            told = ask(server.endpoints[0])
            wait_until_published(server)
            recorder.run(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    assert [path.stat().st_mode & 0o077 for path in captured.iterdir()] == [0]
    assert main(["trace", "arrivals", str(captured), "-o", str(arrivals)]) == 0
    assert f"{NUM_SAMPLED + 2} with what they came to" in capsys.readouterr().out
    read = read_arrivals(arrivals)
    assert [one.prompt_ids for one in read] == [*([3 + idx, 7] for idx in range(NUM_SAMPLED)), [3, 7, 9], [200]]
    assert len({one.sampling.seed for one in read}) == len(read), "seeds were drawn, and written down"
    assert read[NUM_SAMPLED].cache_salt not in ("", "mine") and read[NUM_SAMPLED].priority == -1
    assert all(one.outcome is not None for one in read)

    (tmp_path / "second").mkdir()
    with (
        ServerProcess(tmp_path / "second", model, **options) as server,
        Recorder(server.config.engine_name, tmp_path / "replay.trace", pings=False) as recorder,
    ):
        target = Target(connect=server.endpoints[0])
        report = asyncio.run(run_load(LoadOptions(replay=arrivals, time_scale=0.5), target))
        wait_until_published(server)
        recorder.run(0.1)
    assert report["completed"] == NUM_SAMPLED + 2 and report["failed"] == 0
    replay = report["replay"]
    assert replay["num_compared"] >= NUM_SAMPLED + 1 and replay["differing"] == []
    assert replay["num_identical"] == replay["num_compared"]
    # The device's own record of both runs says so too. (The cancelled request may have gone on past its last token that counted.)
    streams = [_streams(tmp_path / name) for name in ("live.trace", "replay.trace")]
    assert streams[0][: NUM_SAMPLED + 1] == streams[1][: NUM_SAMPLED + 1]
    assert sorted(streams[0][: NUM_SAMPLED + 1]) == sorted(told)
    assert compare(TraceFile(tmp_path / "live.trace"), TraceFile(tmp_path / "replay.trace")).requests


def _streams(path: Path) -> list[list[int]]:
    """Tokens of each request, in the order in which the director queued them."""
    trace = TraceFile(path)
    requests = scan(trace.events).requests
    streams = token_streams(trace.events)
    ordered = requests[np.argsort(requests["queued"], kind="stable")]
    return [np.frombuffer(streams[int(row["id"])], np.uint32).tolist() for row in ordered if int(row["id"]) in streams]


def test_an_ingress_that_was_not_asked_to_writes_nothing_down(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        client.generate([3, 4], max_tokens=2)
        assert not list(tmp_path.rglob("*.jsonl"))
        served.ingress.link.capture_arrivals(tmp_path / "captured")
        client.generate([5, 6], max_tokens=2)
    (arrival,) = collect_arrivals([tmp_path / "captured"])
    assert arrival.prompt_ids == [5, 6] and arrival.outcome is not None and arrival.outcome.num_output_tokens == 2


class FullDisk(io.FileIO):
    """The end of a file on a disk that has room for some bytes more: the write that does not fit is cut short, the next one fails."""

    def __init__(self, path: Path, room_bytes: int) -> None:
        super().__init__(path, "ab")
        self.room_bytes = room_bytes

    def write(self, data: Any, /) -> int:
        fitting = bytes(data)[: self.room_bytes]
        if not fitting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room_bytes -= len(fitting)
        return super().write(fitting)


def test_a_full_disk_ends_the_capture_and_not_the_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    captured = tmp_path / "captured"
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        served.ingress.link.capture_arrivals(captured)
        client.generate([5, 6], max_tokens=2)
        (path,) = captured.iterdir()
        wait_for(lambda: len(path.read_bytes().splitlines()) == 2, PATIENCE_S, "it is written down, and its end")
        capture = served.ingress.link._capture
        assert capture is not None
        with_room, capture._file = capture._file, io.BufferedWriter(FullDisk(path, room_bytes=20))
        for prompt in ([7, 8], [9], [10]):
            assert client.generate(prompt, max_tokens=2).finish_reason == "length"
        wait_for(lambda: bool(caplog.records), PATIENCE_S, "it says so")
        assert client.generate([11], max_tokens=2).finish_reason == "length"
    with_room.close()
    assert served.ingress.error is None, "and it ends in order"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in said and "No space left on device" in said and "requests go on" in said

    caplog.clear()
    assert not path.read_bytes().endswith(b"\n"), "the last record is torn"
    assert main(["trace", "arrivals", str(captured), "-o", str(tmp_path / "arrivals.jsonl")]) == 0
    (arrival,) = read_arrivals(tmp_path / "arrivals.jsonl")
    assert arrival.prompt_ids == [5, 6] and arrival.outcome is not None
    (told,) = caplog.messages
    assert told == f"{path}, line 3: the last record is torn and is left out; the 2 before it are whole"


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"capture_arrivals: got .*file/captured \(Not a directory\), expected a folder"):
        ArrivalCapture(tmp_path / "file" / "captured", "engine", 0)
