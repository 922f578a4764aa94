"""Jobs of every kind that stream through a server while its device dies, and what they must come to all the same.

Used by tests/host/test_recovery.py (emulated device) and tests/gpu/test_recovery_gpu.py.
"""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from blinkimp import ring_abi as abi
from blinkimp.client import Client
from blinkimp.host.shared_memory import open_engine_page
from blinkimp.ring_abi import FaultCode
from tests.host.engine_support import wait_for
from tests.host.server_support import ServerProcess
from tests.support import PATIENCE_S

NUM_TOKENS = 160
NUM_BEFORE_FAULT = 3  # tokens that every stream has shown before something is broken

PROMPT = "def read_file(path):"
SAMPLED = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
ZMQ_JOBS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "sampled": {**SAMPLED, "top_p": 0.95, "top_k": 50},
    "penalised": {**SAMPLED, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "alternatives": {**SAMPLED, "seed": 8, "top_logprobs": 3, "min_tokens": 150},
    "constrained": {
        "temperature": 1.0,
        "seed": 9,
        "constraint": {"kind": "regex", "value": "([0-9]{4}-[a-f]{4} ){40}"},
    },
    "deadline": {**SAMPLED, "seed": 10},
}
STOPPED = {**SAMPLED, "seed": 12}  # with a stop string that comes late
DEADLINE_S = 600.0


@dataclass
class Job:
    """One request, read on a thread of its own."""

    name: str
    run: Any
    num_seen: int = 0  # tokens, or events of a stream
    result: Any = None
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.run(self)
        except BaseException as error:
            self.error = error


class Jobs:
    """All of ZMQ_JOBS, one with a stop string, and one HTTP request for two choices as server-sent events."""

    def __init__(self, server: ServerProcess, stop: str, num_tokens: int = NUM_TOKENS) -> None:
        sampling = {**ZMQ_JOBS, "stopped": {**STOPPED, "stop": [stop]}}
        self._server, self._num_tokens = server, num_tokens
        # All connect, then all submit: a stream must not be over before another has begun.
        self._all_connected = threading.Barrier(len(sampling) + 1, timeout=PATIENCE_S)
        self.jobs = [
            Job(name, lambda job, options=options: self._over_zmq(job, options)) for name, options in sampling.items()
        ]
        self.jobs.append(Job("http", self._over_http))

    def _over_zmq(self, job: Job, options: dict[str, Any]) -> Any:
        with Client(self._server.endpoints[0], timeout_s=PATIENCE_S) as client:
            timeout_s = DEADLINE_S if job.name == "deadline" else None
            client.health()
            self._all_connected.wait()
            with client.submit(PROMPT, max_tokens=self._num_tokens, timeout_s=timeout_s, **options) as stream:
                chunks = []
                for chunk in stream:
                    chunks.append(chunk)
                    job.num_seen += len(chunk.token_ids)
                assert stream.finish is not None
                top = [alternatives for chunk in chunks for alternatives in chunk.top]
                logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
                ids = [token for chunk in chunks for token in chunk.token_ids]
                text = "".join(chunk.text for chunk in chunks)
                finish = stream.finish
                return ids, text, logprobs, top, finish.reason, finish.stop, finish.num_output_tokens

    def _over_http(self, job: Job) -> Any:
        body = {
            "prompt": PROMPT,
            "max_tokens": self._num_tokens,
            "n": 2,
            "seed": 3,
            "temperature": 1,
            "logprobs": 2,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._server.http_port, timeout=PATIENCE_S)
        try:
            connection.connect()
            self._all_connected.wait()
            connection.request("POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}))
            response = connection.getresponse()
            assert response.status == 200, response.read()
            choices: dict[int, list[Any]] = {0: [], 1: []}
            last = ""
            for line in response:
                last = line.decode().strip() or last
                if not last.startswith("data: {") or not line.strip():
                    continue
                event = json.loads(last.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    choices[choice["index"]].append(choice)
                job.num_seen = min(len(one) for one in choices.values())
            assert last == "data: [DONE]"
            return [_joined(choices[index]) for index in (0, 1)]
        finally:
            connection.close()

    def wait_begun(self) -> None:
        wait_for(lambda: all(self._is_ready(job) for job in self.jobs), PATIENCE_S, "every stream has begun")

    @staticmethod
    def _is_ready(job: Job) -> bool:
        if job.error is not None:
            raise job.error
        return job.num_seen >= NUM_BEFORE_FAULT

    @property
    def num_ended(self) -> int:
        return sum(not job.thread.is_alive() for job in self.jobs)

    def join(self) -> dict[str, Any]:
        for job in self.jobs:
            job.thread.join(PATIENCE_S)
            assert not job.thread.is_alive(), f"{job.name} has not ended; {job.num_seen} tokens or events so far"
            if job.error is not None:
                raise AssertionError(f"{job.name}: {job.error!r}") from job.error
        return {job.name: job.result for job in self.jobs}


def _joined(pieces: list[Any]) -> Any:
    """Text, tokens and logprobs of one choice, however they were cut into events."""
    text = "".join(piece["text"] for piece in pieces)
    logprobs: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in (piece.get("logprobs") or {}).items():
            logprobs.setdefault(name, []).extend(values)
    return text, logprobs, pieces[-1]["finish_reason"]


def late_stop_string(text: str) -> str:
    """A piece of `text` that comes first in its second half."""
    for begin in range(len(text) // 2, len(text) - 6):
        if text.find(text[begin : begin + 6]) == begin:
            return text[begin : begin + 6]
    raise AssertionError(f"no piece of its second half is new: {text!r}")


def find_stop_string(server: ServerProcess) -> str:
    with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
        return late_stop_string(client.generate(PROMPT, max_tokens=NUM_TOKENS, **STOPPED).text)


def num_restarts(server: ServerProcess) -> int:
    """Of the engine that has the name now; -1 while there is none."""
    try:
        with open_engine_page(server.config.engine_name) as page:
            return int(page.view(abi.ENGINE_HEADER)["num_restarts"][0])
    except RuntimeError:
        return -1


def record_fault(server: ServerProcess, code: FaultCode = FaultCode.INTEGRITY, site: int = 10) -> None:
    """As the device does: the code last."""
    with open_engine_page(server.config.engine_name, writable=True) as page:
        fault = page.view(abi.ENGINE_PAGE)["fault"]
        fault["site"], fault["expected"], fault["seen"], fault["step"] = site, 512, 511, 12
        fault["code"] = code
        del fault
