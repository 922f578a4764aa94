"""What the engine's tests share: a tiny random checkpoint, an engine of the test's own, a host process, a client on a queue pair.

On the emulated device, unless the test asks for another (`device="gpu"`).

Run as a module it is an engine host without ingresses: `python -m tests.host.engine_support '{"model": ...}'` prints
`ready <device pid>` and then watches the engine as the supervisor does; SIGTERM drains it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from blinkimp import ring_abi as abi
from blinkimp.config import Config
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.engine import Engine, EngineFaultError
from blinkimp.host.shared_memory import SHM_DIR, open_engine_page
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort, WaitEvent, sampling_record
from blinkimp.ring_abi import CompletionKind, FinishReason
from tests.support import PATIENCE_S, ROOT, python_path

TINY_VOCAB = 256
TINY_POSITIONS = 512
GREEDY = sampling_record(temperature=0.0, ignore_eos=True)


def make_tiny_checkpoint(folder: Path, seed: int = 0, *, config_only: bool = False, **changes: int) -> Path:
    """A random two-layer Llama in fp32; some 90,000 parameters, so that a step costs microseconds. `changes` go to config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": TINY_VOCAB,
        "max_position_embeddings": TINY_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not config_only:
        save_file(random_tensors(config, seed), folder / "model.safetensors")
    return folder


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return values

    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    query_features = config["num_attention_heads"] * config["head_dim"]
    kv_features = config["num_key_value_heads"] * config["head_dim"]
    vocab = config["vocab_size"]
    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    tensors["lm_head.weight"] = matrix(vocab, hidden) * 4
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = matrix(query_features, hidden)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = matrix(kv_features, hidden)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = matrix(kv_features, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, query_features)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, intermediate)
    return tensors


def engine_config(model: Path | str, **changes: Any) -> Config:
    """An engine of a name of its own, emulated unless `changes` say otherwise, small enough to run beside others."""
    values: dict[str, Any] = {
        "model": str(model),
        "device": "emulated",
        "engine_name": f"test-{uuid.uuid4().hex[:12]}",
        "num_threads": 2,
        "num_queue_pairs": 2,
        "arena_bytes": 1 << 20,
        "num_completions": 4096,
        "ingress_timeout_s": 30.0,  # nobody is dropped because the machine was busy with something else
        "log_level": "debug",
    }
    return Config(**{**values, **changes})


@contextmanager
def running_engine(model: Path | str, **changes: Any) -> Iterator[Engine]:
    """An engine hosted by this process; leaves nothing in /dev/shm, and ends without a fault."""
    config = engine_config(model, **changes)
    with Engine(config) as engine:
        yield engine
        engine.check()
    left = [path.name for path in SHM_DIR.glob(f"blinkimp.{config.engine_name}.*")]
    assert not left, f"left behind: {left}"


def status_of(engine_name: str) -> dict[str, int]:
    """Engine.status() from outside."""
    with open_engine_page(engine_name) as page:
        record = page.view(abi.ENGINE_PAGE)["status"][0].copy()
    return {name: int(record[name]) for name in abi.STATUS_LINES.names or () if name != "reserved"}


class HostProcess:
    """An engine host in a process of its own, as under `blinkimp serve`. `prefix`, `environment`: for sanitizer builds."""

    def __init__(
        self,
        model: Path | str,
        prefix: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **changes: Any,
    ) -> None:
        config = engine_config(model, **changes)
        self.engine_name = config.engine_name
        values = {name: getattr(config, name) for name in config.__struct_fields__}
        command = [*prefix, sys.executable, "-m", "tests.host.engine_support", json.dumps(values)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": python_path(), **(environment or {})},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready "):
            self.process.kill()
            raise AssertionError(f"the host did not start: {line!r} {self.process.communicate()[1]}")
        self.device_pid = int(line.split()[1])  # of the emulated device; a GPU has none: 0

    def status(self) -> dict[str, int]:
        return status_of(self.engine_name)

    def wait(self, timeout_s: float) -> tuple[int, str]:
        """Exit status and stderr."""
        _, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, stderr

    def __enter__(self) -> HostProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.communicate()
        for path in SHM_DIR.glob(f"blinkimp.{self.engine_name}.*"):
            path.unlink()  # of a host that was killed


@dataclass
class Stream:
    """What a request has brought so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the tokens, under the model's logits
    tops: list[list[tuple[int, float]]] = field(default_factory=list)  # alternatives of each token, if asked for
    num_prior_outputs: int = 0
    is_accepted: bool = False
    end: tuple[CompletionKind, int] | None = None  # FINISH or REJECT, and its reason


class PortClient:
    """Requests on one queue pair, and a check that completions come in the order that ring_abi.h promises."""

    def __init__(self, engine_name: str, queue_pair_idx: int) -> None:
        self.port = QueuePairPort.open(engine_name, queue_pair_idx)
        self.port.attach(timeout_s=PATIENCE_S)
        self.port.start_heartbeat()
        self.streams: dict[int, Stream] = {}
        self.num_unfinished = 0
        self._next_id = 1

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: np.ndarray[Any, Any] = GREEDY,
        stop_ids: tuple[int, ...] = (),
        timeout_s: float = PATIENCE_S,
        **words: Any,
    ) -> int:
        """words: the other keywords of QueuePairPort.try_submit()."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.port.try_submit(
                request_id, np.array(prompt, np.uint32), sampling, stop_ids=stop_ids, max_tokens=max_tokens, **words
            )
            if status == PortStatus.OK:
                break
            assert status in (PortStatus.RING_FULL, PortStatus.ARENA_FULL), status.name
            assert time.monotonic() < deadline, f"no room to submit for {timeout_s} s\n{self.port.dump()}"
            self.poll(0.001)
        self.streams[request_id] = Stream(num_prior_outputs=words.get("num_prior_outputs", 0))
        self.num_unfinished += 1
        return request_id

    def poll(self, timeout_s: float = 0.0) -> int:
        """Takes in what has come, waiting up to timeout_s for something. Returns the number of completions."""
        if timeout_s:
            event = self.port.wait(timeout_s)
            assert not event & WaitEvent.STATE_CHANGED, self.port.dump()
        entries = self.port.poll()
        for entry in entries:
            self.take(entry)
        return len(entries)

    def take(self, entry: Any) -> None:
        """One completion, for tests that poll the port themselves."""
        commit = int(entry["commit"])
        kind = CompletionKind((commit >> abi.COMMIT_KIND_SHIFT) & 0xFF)
        reason = (commit >> abi.COMMIT_REASON_SHIFT) & 0xFF
        if kind == CompletionKind.PONG:
            return
        stream = self.streams[int(entry["request_id"])]
        assert stream.end is None, f"{kind.name} after the end of request {entry['request_id']}"
        if kind == CompletionKind.ACK:
            assert not stream.is_accepted
            stream.is_accepted = True
        elif kind == CompletionKind.TOKEN:
            assert stream.is_accepted and int(entry["index"]) == stream.num_prior_outputs + len(stream.tokens)
            stream.tokens.append(int(entry["token"]))
            stream.logprobs.append(float(entry["logprob"]))
            stream.tops.append([])
        elif kind == CompletionKind.TOP:
            assert int(entry["index"]) == len(stream.tops[-1]), "TOPs follow their TOKEN, likeliest first"
            stream.tops[-1].append((int(entry["token"]), float(entry["logprob"])))
        elif kind == CompletionKind.START:
            assert stream.is_accepted and not stream.tokens
        else:
            assert stream.is_accepted == (kind == CompletionKind.FINISH)
            if kind == CompletionKind.FINISH:
                assert int(entry["index"]) == len(stream.tokens)
            stream.end = (kind, reason)
            self.num_unfinished -= 1

    def wait_begun(self, request_ids: list[int], timeout_s: float = PATIENCE_S) -> None:
        """Until each of these has said a token."""
        wait_for(
            lambda: self.poll() >= 0 and all(self.streams[i].tokens for i in request_ids),
            timeout_s,
            "every stream has begun",
        )

    def wait_all(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.num_unfinished:
            self.poll(0.05)
            assert time.monotonic() < deadline, (
                f"{self.num_unfinished} unfinished after {timeout_s} s\n{self.port.dump()}"
            )

    def generate(self, prompt: list[int], max_tokens: int, timeout_s: float = PATIENCE_S, **options: Any) -> Stream:
        """One request from its submission to its end."""
        stream = self.streams[self.submit(prompt, max_tokens, **options)]
        deadline = time.monotonic() + timeout_s
        while stream.end is None:
            self.poll(0.05)
            assert time.monotonic() < deadline, f"unfinished after {timeout_s} s\n{self.port.dump()}"
        return stream

    def close(self) -> None:
        self.port.close()

    def __enter__(self) -> PortClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finished(reason: FinishReason) -> tuple[CompletionKind, int]:
    return (CompletionKind.FINISH, int(reason))


def assert_all_pages_are_back(status: dict[str, int] | Callable[[], dict[str, int]]) -> None:
    """An idle engine: no request, and free + cached == total. Given how to look, it looks until the engine is idle: a status follows the
    completions that it goes with, and its words one another."""
    if callable(status):
        look, busy = status, ("num_running", "num_waiting", "num_finishing", "num_pages_used")
        wait_for(lambda: not any(map(look().get, busy)), PATIENCE_S, "the engine is idle")
        status = look()
    assert status["num_running"] == status["num_waiting"] == status["num_finishing"] == status["num_pages_used"] == 0, (
        status
    )
    assert status["num_pages_free"] + status["num_pages_cached"] == status["num_pages"] > 0, status


def process_state(pid: int) -> str:
    """R, S, T (stopped), Z (dead, not reaped), or X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def wait_for(predicate: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.005)


def main() -> int:
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    with Engine(Config(**json.loads(sys.argv[1]))) as engine:
        device_pid = engine.device.pid if isinstance(engine.device, EmulatedDevice) else 0
        print(f"ready {device_pid}", flush=True)
        try:
            while not stopping:
                engine.check()
                time.sleep(0.05)
            engine.drain(PATIENCE_S)
        except EngineFaultError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
