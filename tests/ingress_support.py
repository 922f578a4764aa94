"""What the tests of the ingress and of the clients share: a byte-level tokenizer, a fake engine with an ingress in this process.

Used by tests/host/test_zmq_ingress.py, tests/host/test_ingress_*.py, tests/host/test_clients.py.

Token ids of the tokenizer: 0 is `<s>`, 1 is `</s>`, then one token per byte, so every character beyond ASCII is split over tokens.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from blinkimp import ring_abi as abi
from blinkimp.config import keys
from blinkimp.host.shared_memory import QueuePairGeometry
from blinkimp.nic_shim.ingress_limits import ZmqLimits
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import ServerMessage, decode_server_messages
from blinkimp.transport import Security
from tests.fake_director import FakeDirector, FakeQueuePair
from tests.support import PATIENCE_S, python_path

EOS_ID = 1
TEXT = "naïve café 😀 👨‍👩‍👧 日本語 — done. "  # what the scripted model says, over and over


def write_byte_tokenizer(folder: Path) -> Path:
    """tokenizer.json of a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": EOS_ID} | {symbol: 2 + i for i, symbol in enumerate(alphabet)}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_metaspace_tokenizer(folder: Path) -> Path:
    """As of Llama 2: spaces as a symbol, bytes as tokens where a character is unknown, a leading space that is dropped."""
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.", "▁the"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def engine_name() -> str:
    return f"test-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass
class Served:
    """A fake engine and its ingress."""

    director: FakeDirector
    ingress: ZmqIngress
    endpoint: str
    tokenizer: Tokenizer
    script: list[int]


@contextmanager
def serve(
    folder: Path,
    *,
    limits: ZmqLimits | None = None,
    bind: str = "tcp://127.0.0.1:*",
    eos_ids: Sequence[int] = (),
    send_buffer_bytes: int = -1,
    **director_options: Any,
) -> Iterator[Served]:
    """A running fake engine with one ingress, both on threads of this process."""
    tokenizer = Tokenizer(write_byte_tokenizer(folder))
    script = tokenizer.encode(TEXT).tolist()
    with FakeDirector(engine_name(), script=script, eos_ids=eos_ids, vocab_size=258, **director_options) as director:
        ingress = ZmqIngress(
            director.regions.engine_name,
            0,
            bind,
            tokenizer,
            eos_ids=eos_ids,
            limits=limits,
            security=lambda socket: socket.setsockopt(zmq.SNDBUF, send_buffer_bytes),
        )
        endpoint = ingress.start()
        try:
            yield Served(director, ingress, endpoint, tokenizer, script)
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S), "the ingress's loop does not end"


def hold_after_first_tokens(served: Served, begin: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Streams of one client, each of which has said a token; the model stands still until director.paused is taken back.

    So whatever the test does next happens while they run, on a machine however slow."""
    director, queue_pair = served.director, served.director.queue_pairs[0]
    num_running = len(queue_pair.running)
    director.paused = True
    streams = begin()
    wait_until(lambda: len(queue_pair.running) == num_running + len(streams), "all of them run")
    director.num_allowed_steps = 1
    for stream in streams:
        next(stream)
    return streams


def expected_ids(served: Served, num_prompt_tokens: int, num_tokens: int) -> list[int]:
    return [served.script[(num_prompt_tokens + i) % len(served.script)] for i in range(num_tokens)]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.005)


def larger_limit_in(refusal: str) -> str:
    """The flag that a refusal advises; the server has it."""
    advice = re.search(r"start the server with a larger (--[a-z-]+)", refusal)
    assert advice, refusal
    (flag,) = advice.groups()
    assert flag in {key.flag for key in keys().values()}
    return flag


def encoded(**fields: Any) -> bytes:
    """A `submit` as bytes; fields may be wrong on purpose."""
    return msgspec.msgpack.encode({"type": "submit", "id": 1, "prompt": "x"} | fields)


class RawClient:
    """A DEALER socket that sends what it is told to."""

    def __init__(
        self, endpoint: str, *, recv_hwm: int = 1000, recv_bytes: int = -1, security: Security | None = None
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, recv_hwm)
        self.socket.setsockopt(zmq.RCVBUF, recv_bytes)
        if security is not None:
            security(self.socket)
        self.socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def send_message(self, message: Any) -> None:
        self.send(msgspec.msgpack.encode(message))

    def receive(self, timeout_s: float = PATIENCE_S) -> list[ServerMessage]:
        if not self.socket.poll(int(timeout_s * 1000)):
            raise TimeoutError("no frame from the server")
        return decode_server_messages(self.socket.recv())

    def receive_until(self, wanted: Callable[[ServerMessage], bool]) -> list[ServerMessage]:
        messages: list[ServerMessage] = []
        while not any(wanted(message) for message in messages):
            messages += self.receive()
        return messages

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- An ingress as a process ------------------------------------------------------------------------------------------
def start_process(name: str, tokenizer: Path, queue_pair_idx: int, *flags: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "blinkimp.nic_shim.zmq_ingress", "--engine", name, "--tokenizer", str(tokenizer)]
    command += ["--queue-pair", str(queue_pair_idx), "--bind", "tcp://127.0.0.1:*", *flags]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    assert ready and ready[0] == "ready", f"the ingress said {ready}"
    return process, ready[1]


def end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


# ---- The queue pair alone ---------------------------------------------------------------------------------------------
SMALL_RINGS = QueuePairGeometry(num_submissions=4, num_completions=8, arena_bytes=4096)


def prompt(num_tokens: int, first: int = 1) -> npt.NDArray[np.uint32]:
    return np.arange(first, first + num_tokens, dtype=np.uint32)


def kind_of(entry: np.void) -> int:
    return int(entry["commit"]) >> abi.COMMIT_KIND_SHIFT & 0xFF


def reason_of(entry: np.void) -> int:
    return int(entry["commit"]) >> abi.COMMIT_REASON_SHIFT & 0xFF


def attach(port: QueuePairPort, queue_pair: FakeQueuePair) -> None:
    assert port.try_attach() == PortStatus.OK
    assert port.attach_answered() == PortStatus.PENDING
    queue_pair.poll()
    assert port.attach_answered() == PortStatus.OK
