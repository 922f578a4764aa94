"""What the tests of the HTTP ingress share: the ingress as a process in front of a scripted director or of a real engine.

Used by tests/host/test_http_*.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blinkimp.config import Config, model_folder
from blinkimp.host.engine import Engine
from tests.fake_director import FakeDirector
from tests.host.engine_support import running_engine, status_of
from tests.ingress_support import TEXT, engine_name, wait_until, write_byte_tokenizer
from tests.support import PATIENCE_S, ROOT, python_path

MODEL = "test-model"
EMBEDDED = model_folder(Config())


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The payloads of a stream; its end must be there."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@dataclass
class HttpServer:
    """An HTTP ingress process."""

    engine_name: str
    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, payload, headers or {})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Reply:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Reply:
        return self.request("POST", path, body, **options)

    def complete(self, prompt: Any = "Hi", **fields: Any) -> Any:
        """A completion that must succeed."""
        reply = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert reply.status == 200, reply.body
        return reply.json

    def status(self) -> dict[str, int]:
        """The engine's status page."""
        return status_of(self.engine_name)

    def wait_until_idle(self, timeout_s: float = PATIENCE_S) -> dict[str, int]:
        """Until nothing runs in the engine and every page is free or cached: two words of its status may be a moment apart."""
        status: dict[str, int] = {}

        def is_idle() -> bool:
            status.update(self.status())
            num_there = status["num_pages_free"] + status["num_pages_cached"]
            busy = ("num_running", "num_waiting", "num_finishing", "num_pages_used")
            return not any(map(status.get, busy)) and num_there == status["num_pages"]

        wait_until(is_idle, "the engine has nothing to do, and every page is back", timeout_s)
        return status


@contextlib.contextmanager
def http_ingress(
    name: str, folder: Path, *flags: str, queue_pair_idx: int = 0, environment: dict[str, str] | None = None
) -> Iterator[HttpServer]:
    """The ingress of an engine that runs; it must end well when it is told to."""
    command = [sys.executable, "-m", "blinkimp.nic_shim.http_ingress", "--engine", name, "--model-folder", str(folder)]
    command += ["--queue-pair", str(queue_pair_idx), "--bind", "127.0.0.1:0", "--model-name", MODEL]
    command += ["--drain-timeout", str(PATIENCE_S), *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path(), **(environment or {})},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        ready = process.stdout.readline().split()
        assert ready and ready[0] == "ready", (ready, process.wait(PATIENCE_S), log)
        yield HttpServer(name, ready[1], process, log)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0, log
        assert not any("Traceback" in line for line in log), "".join(log)
    except BaseException:
        print("".join(log))
        raise
    finally:
        process.kill()
        process.wait()
        reader.join(PATIENCE_S)
        process.stdout.close()
        process.stderr.close()


@dataclass
class Scripted:
    """An HTTP ingress in front of a scripted director."""

    http: HttpServer
    director: FakeDirector
    script: list[int]


@contextlib.contextmanager
def scripted(
    folder: Path, *flags: str, environment: dict[str, str] | None = None, text: str = TEXT, **director_options: Any
) -> Iterator[Scripted]:
    """The byte tokenizer of tests/ingress_support.py; the model says `text` over and over."""
    from blinkimp.nic_shim.tokenizer import Tokenizer

    script = Tokenizer(write_byte_tokenizer(folder)).encode(text).tolist()
    with (
        FakeDirector(engine_name(), script=script, vocab_size=258, **director_options) as director,
        http_ingress(director.regions.engine_name, folder, *flags, environment=environment) as http,
    ):
        yield Scripted(http, director, script)


@contextlib.contextmanager
def embedded(*flags: str, **changes: Any) -> Iterator[tuple[HttpServer, Engine]]:
    """The embedded model on the emulated device."""
    with (
        running_engine("embedded", **changes) as engine,
        http_ingress(engine.config.engine_name, EMBEDDED, *flags) as http,
    ):
        yield http, engine
