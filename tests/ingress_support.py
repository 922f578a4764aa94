"""What the tests of the ingress and of the clients share: a byte-level tokenizer, a fake engine with an ingress in this process.

Token ids of the tokenizer: 0 is `<s>`, 1 is `</s>`, then one token per byte, so every character beyond ASCII is split over tokens.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from blinkimp.nic_shim.message_handler import IngressLimits
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from tests.fake_director import FakeDirector

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


def engine_name() -> str:
    return f"test-{os.getpid()}-{secrets.token_hex(3)}"


def script_text(tokenizer: Tokenizer, script: Sequence[int], num_prompt_tokens: int, num_tokens: int) -> str:
    """What the scripted model's output decodes to, less an incomplete character at its end."""
    ids = [script[(num_prompt_tokens + i) % len(script)] for i in range(num_tokens)]
    return tokenizer.decode(ids).rstrip("\ufffd")


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
    limits: IngressLimits | None = None,
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
            assert ingress.join(10), "the ingress's loop does not end"
