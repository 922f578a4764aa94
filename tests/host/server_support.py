"""A whole server (`python -m blinkimp.host.supervisor`) for a test: engine, device, ingress processes, all as in production.

With scenarios that any device must pass. Used by tests/host/test_server.py (emulated) and tests/gpu/test_server_gpu.py.
Test: pytest tests/host/test_server.py
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blinkimp import ring_abi as abi
from blinkimp.client import Client, RequestRefusedError
from blinkimp.config import Config
from blinkimp.host.shared_memory import SHM_DIR, open_queue_pair
from tests.host.engine_support import engine_config, process_state, status_of, wait_for
from tests.host.standing_still import standing_still
from tests.support import PATIENCE_S, ROOT, python_path

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPT = [17, 33, 260, 9]
NUM_TRIES = 20


class ServerProcess:
    """Runs once the constructor has returned: every ingress has said that it serves, unless wait is False."""

    def __init__(self, folder: Path, model: Path | str = "embedded", *, wait: bool = True, **changes: Any) -> None:
        defaults = {"bind": f"ipc://{folder}/ingress", "log_level": "info", "drain_timeout_s": PATIENCE_S}
        self.config: Config = engine_config(model, **{**defaults, **changes})
        self.log: list[str] = []
        lines: queue.Queue[str] = queue.Queue()
        # Settings go through a file, as an operator's would; strings and numbers look alike in TOML and in repr().
        values = {name: getattr(self.config, name) for name in self.config.__struct_fields__}
        toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        (folder / "server.toml").write_text(toml)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blinkimp.host.supervisor", "--config", str(folder / "server.toml")],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": python_path()},
        )  # fmt: skip

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line)
                lines.put(line)

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if wait:
            self.wait_for_log("serves on", self.config.num_ingress + bool(self.config.http))

    @property
    def endpoints(self) -> list[str]:
        return [self.config.bind, *(f"{self.config.bind}.{idx}" for idx in range(1, self.config.num_ingress))]

    def wait_for_log(self, text: str, num_times: int = 1, timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while sum(text in line for line in self.log) < num_times:
            if self.process.poll() is not None:
                self._reader.join(timeout_s)  # what it said last may be on its way
                assert sum(text in line for line in self.log) >= num_times, f"the server ended:\n{''.join(self.log)}"
            assert time.monotonic() < deadline, f"{text!r} was not logged {num_times} times:\n{''.join(self.log)}"
            time.sleep(0.01)

    def status(self) -> dict[str, int]:
        return status_of(self.config.engine_name)

    @property
    def http_port(self) -> int:
        line = next(line for line in self.log if "serves on http://" in line)
        return int(line.strip().rpartition(":")[2])

    @property
    def pids(self) -> dict[int, str]:
        """Process ids of everything below the supervisor, with their command lines."""
        return tree_of(self.process.pid)

    def pid_of(self, module: str) -> int:
        """The process that runs blinkimp.<module>; 0 where there is none."""
        return pid_below(self.process.pid, module)

    def wait_for_pid_of(self, module: str) -> int:
        """Of a process that must be there."""
        return wait_for_pid_below(self.process.pid, module)

    def kill(self, module: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to the process that runs blinkimp.<module>; its id."""
        pid = self.wait_for_pid_of(module)
        os.kill(pid, number)
        return pid

    def ingress_pid(self, idx: int) -> int:
        """The process that owns queue pair idx."""
        with open_queue_pair(self.config.engine_name, idx) as region:
            return int(region.view(abi.QUEUE_PAIR)["ingress"]["owner_pid"][0])

    def wait(self, timeout_s: float) -> int:
        returncode = self.process.wait(timeout_s)
        self._reader.join(PATIENCE_S)
        return returncode

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print("".join(self.log))
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        for path in SHM_DIR.glob(f"blinkimp.{self.config.engine_name}.*"):
            path.unlink()  # of a server that was killed


def pid_below(root_pid: int, module: str) -> int:
    """The descendant that runs blinkimp.<module>; 0 where there is none."""
    return next((pid for pid, command in tree_of(root_pid).items() if f"blinkimp.{module}" in command), 0)


def wait_for_pid_below(root_pid: int, module: str) -> int:
    """Of a process that must be there: a look at a tree that changes may miss a part of it."""
    pid = 0

    def is_there() -> bool:
        nonlocal pid
        pid = pid_below(root_pid, module)
        return pid != 0

    wait_for(is_there, PATIENCE_S, f"blinkimp.{module} runs")
    return pid


def tree_of(pid: int) -> dict[int, str]:
    """Command lines of a process's descendants, itself not included; of those that end meanwhile, perhaps."""
    found: dict[int, str] = {}
    gone = (FileNotFoundError, ProcessLookupError)  # a process or a thread that ends; its siblings do not
    tasks: list[str] = []
    with contextlib.suppress(*gone):
        tasks = os.listdir(f"/proc/{pid}/task")
    for task in tasks:
        with contextlib.suppress(*gone):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                with contextlib.suppress(*gone):
                    found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                    found |= tree_of(child)
    return found


class Streams:
    """`num_streams` greedy requests of one client, read on a thread of their own: the first token of each, the rest when go_on() or join()
    says so. join() gives their tokens."""

    def __init__(self, endpoint: str, num_streams: int, max_tokens: int) -> None:
        self.num_begun = 0
        self.num_ended = 0
        self.results: list[Any] = []
        self._error: BaseException | None = None
        self._arguments = (endpoint, num_streams, max_tokens)
        self._may_go_on = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        endpoint, num_streams, max_tokens = self._arguments
        try:
            with Client(endpoint, timeout_s=PATIENCE_S) as client:
                streams = [client.submit(PROMPT, max_tokens=max_tokens, **GREEDY) for _ in range(num_streams)]
                firsts = []
                for stream in streams:
                    firsts.append(next(stream))
                    self.num_begun += 1
                self._may_go_on.wait()
                for first, stream in zip(firsts, streams, strict=True):
                    tokens = [*first.token_ids, *stream.tokens()]
                    assert stream.finish is not None
                    self.results.append((tokens, stream.finish.reason))
                    self.num_ended += 1
        except BaseException as error:
            self._error = error

    def wait_begun(self, timeout_s: float = PATIENCE_S) -> None:
        wait_for(lambda: self.num_begun == self._arguments[1] or self._error, timeout_s, "every stream has begun")
        assert self._error is None, self._error

    def go_on(self) -> None:
        self._may_go_on.set()

    def join(self, timeout_s: float = 2 * PATIENCE_S) -> list[Any]:
        self.go_on()
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self.num_ended} of {self._arguments[1]} streams ended in {timeout_s} s"
        if self._error is not None:
            raise self._error
        return self.results


@contextlib.contextmanager
def streams_held(server: ServerProcess, *groups: tuple[str, int, int]) -> Iterator[list[Streams]]:
    """Streams of each group's arguments, all of them in their middle: the emulated device stands still meanwhile, on a machine however fast or
    slow. A GPU cannot be stopped: there they must be long enough to outlive what happens to the server."""
    for _ in range(NUM_TRIES):
        streams = [Streams(*group) for group in groups]
        for one in streams:
            one.wait_begun()
        if server.config.device != "emulated":
            yield streams
            return
        with standing_still(server.wait_for_pid_of("host.emulated_process")):
            if server.status()["num_running"] >= sum(num_streams for _, num_streams, _ in groups):
                yield streams
                return
        for one in streams:  # this process was too slow for some stream: once more
            one.join()
    raise AssertionError(f"a stream was over before all had begun, {NUM_TRIES} times")


# ---- Scenarios: `options` are fields of Config ---------------------------------------------------------------------------
def streams_through_an_ingress_finish_while_the_supervisor_is_stopped(
    folder: Path, num_streams: int, max_tokens: int, **options: Any
) -> None:
    with ServerProcess(folder, **options) as server:
        with streams_held(server, (server.endpoints[0], num_streams, max_tokens)) as (streams,):
            hosts = (server.process.pid, server.kill("host.engine_process", signal.SIGSTOP))
            server.process.send_signal(signal.SIGSTOP)
            wait_for(lambda: [process_state(pid) for pid in hosts] == ["T", "T"], PATIENCE_S, "both stand still")
        results = streams.join()
        assert [process_state(pid) for pid in hosts] == ["T", "T"], "supervisor or engine host ran in between"
        assert len(results) == num_streams
        assert all(len(tokens) == max_tokens and reason == "length" for tokens, reason in results)
        assert len({tuple(tokens) for tokens, _ in results}) == 1, "one prompt, greedy: one answer"
        for pid in hosts:
            os.kill(pid, signal.SIGCONT)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
        assert not any("fault" in line for line in server.log), "standing still is no fault"


def sigterm_finishes_running_streams_and_refuses_new_ones(
    folder: Path, num_streams: int, max_tokens: int, **options: Any
) -> None:
    with ServerProcess(folder, **options) as server, Client(server.endpoints[0]) as late:
        late.health()
        with streams_held(server, (server.endpoints[0], num_streams, max_tokens)) as (streams,):
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("draining num_unfinished")  # the ingress's line: from now on it refuses
            with pytest.raises(RequestRefusedError, match="drain"):
                late.generate(PROMPT, max_tokens=4, **GREEDY)
        results = streams.join()
        assert len(results) == num_streams
        assert all(len(tokens) == max_tokens and reason == "length" for tokens, reason in results)
        assert server.wait(PATIENCE_S) == 0
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))
