"""A whole server under faults: supervisor, emulated device, two ZeroMQ ingresses, clients. Test: pytest tests/host/test_server.py"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.host.shared_memory import SHM_DIR, engine_is_alive
from tests.host.engine_support import assert_all_pages_are_back, make_tiny_checkpoint, wait_for
from tests.host.server_support import ServerProcess

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPT = [17, 33, 260, 9]


def child_pids(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


class Streams:
    """`num_streams` greedy requests of one client, read on a thread of their own. join() gives their tokens."""

    def __init__(self, endpoint: str, num_streams: int, max_tokens: int) -> None:
        self.num_begun = 0
        self.num_ended = 0
        self.results: list[Any] = []
        self._error: BaseException | None = None
        self._arguments = (endpoint, num_streams, max_tokens)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        endpoint, num_streams, max_tokens = self._arguments
        try:
            with Client(endpoint, timeout_s=60) as client:
                streams = [client.submit(PROMPT, max_tokens=max_tokens, **GREEDY) for _ in range(num_streams)]
                firsts = []
                for stream in streams:
                    firsts.append(next(stream))
                    self.num_begun += 1
                for first, stream in zip(firsts, streams, strict=True):
                    tokens = [*first.token_ids, *stream.tokens()]
                    assert stream.finish is not None
                    self.results.append((tokens, stream.finish.reason))
                    self.num_ended += 1
        except BaseException as error:
            self._error = error

    def wait_begun(self, timeout_s: float = 60.0) -> None:
        wait_for(lambda: self.num_begun == self._arguments[1] or self._error, timeout_s, "every stream has begun")
        assert self._error is None, self._error
        assert self.num_ended == 0, "the streams must still run for this test to say anything"

    def join(self, timeout_s: float = 120.0) -> list[Any]:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self.num_ended} of {self._arguments[1]} streams ended in {timeout_s} s"
        if self._error is not None:
            raise self._error
        return self.results


def test_32_streams_through_an_ingress_finish_while_the_supervisor_is_stopped(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        streams = Streams(server.endpoints[0], 32, 48)
        streams.wait_begun()
        os.kill(server.process.pid, signal.SIGSTOP)
        results = streams.join()
        assert Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        assert len(results) == 32 and all(len(tokens) == 48 and reason == "length" for tokens, reason in results)
        assert len({tuple(tokens) for tokens, _ in results}) == 1, "one prompt, greedy: one answer"
        os.kill(server.process.pid, signal.SIGCONT)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_killed_ingress_is_started_again_and_the_other_one_does_not_notice(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, num_ingress=2) as server:
        with Client(server.endpoints[1]) as client:
            expected = client.generate(PROMPT, max_tokens=96, **GREEDY).token_ids
        victim_pid = server.ingress_pid(0)
        doomed = Streams(server.endpoints[0], 4, 600)  # longer than it takes to notice a death
        untouched = Streams(server.endpoints[1], 4, 96)
        doomed.wait_begun()
        untouched.wait_begun()
        os.kill(victim_pid, signal.SIGKILL)
        died_at = time.monotonic()
        wait_for(lambda: server.status()["finished_cancelled"] == 4, 2.0, "the dead ingress's requests are cancelled")
        noticed_s = time.monotonic() - died_at
        assert [tokens for tokens, _ in untouched.join()] == [expected] * 4
        server.wait_for_log("serves on", 3)
        assert server.ingress_pid(0) != victim_pid
        resumed = [tokens for tokens, _ in doomed.join()]
        assert resumed == resumed[:1] * 4 and len(resumed[0]) == 600, "clients resume where they were"
        assert resumed[0][:96] == expected
        print(f"the dead ingress's requests were gone after {noticed_s:.2f} s")
        assert any("SIGKILL" in line for line in server.log)
        wait_for(lambda: server.status()["num_pages_used"] == 0, 10, "every page is free")
        assert_all_pages_are_back(server.status())


def test_sigterm_finishes_running_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server, Client(server.endpoints[0]) as late:
        late.health()
        streams = Streams(server.endpoints[0], 8, 256)
        streams.wait_begun()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        with pytest.raises(RequestRefusedError, match="drain"):
            late.generate(PROMPT, max_tokens=4, **GREEDY)
        results = streams.join()
        assert all(len(tokens) == 256 and reason == "length" for tokens, reason in results)
        assert server.wait(30) == 0
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))


def test_second_signal_ends_a_drain_at_once(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        streams = Streams(server.endpoints[0], 16, 1500)
        streams.wait_begun()
        server.process.send_signal(signal.SIGINT)
        server.wait_for_log("another signal stops at once")
        time.sleep(0.3)
        assert server.process.poll() is None and streams.num_ended == 0
        server.process.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert [reason for _, reason in streams.join(20)] == ["draining"] * 16


def test_signal_during_loading_ends_the_server_at_once(tmp_path: Path) -> None:
    # Large enough to load for many seconds; its weights are made up.
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16}
    make_tiny_checkpoint(tmp_path, **shape, num_key_value_heads=4, head_dim=128, config_only=True)
    with ServerProcess(tmp_path, tmp_path, load_format="dummy", wait=False) as server:
        server.wait_for_log("emulated device")
        wait_for(lambda: len(child_pids(server.process.pid)) == 1, 10, "the device loads")
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert time.monotonic() - begin < 5
        assert "before the engine ran" in "".join(server.log)
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))


def test_broken_checkpoint_ends_the_server_with_what_is_wrong(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with ServerProcess(tmp_path, tmp_path, wait=False) as server:
        assert server.wait(30) == 1
        log = "".join(server.log)
        assert "could not start" in log and "model.safetensors" in log and "Traceback" not in log


def test_killed_device_ends_the_server_with_a_clear_error(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        pids = child_pids(server.process.pid)
        device_pid = next(pid for pid in pids if "emulated_process" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(device_pid, signal.SIGKILL)
        assert server.wait(30) == 1
        log = "".join(server.log)
        assert "emulated device" in log and "SIGKILL" in log and "restart the engine" in log
        assert not engine_is_alive(server.config.engine_name)


def test_killed_supervisor_takes_its_tree_with_it(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, num_ingress=2) as server:
        pids = child_pids(server.process.pid)
        assert len(pids) == 3, "device and two ingresses"
        server.process.kill()
        server.wait(10)
        wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), 5, "all of the tree are gone")
