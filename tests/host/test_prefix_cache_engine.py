"""The prefix cache in a whole engine: time to the first token behind a shared prefix, and the same bits with and without it.

On the emulated device, whose results do not depend on how a prompt is cut (device/emu/INTERPRETER.md).
Run: pytest tests/host/test_prefix_cache_engine.py
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from blinkimp.nic_shim.queue_pair import PortStatus, sampling_record
from tests.host.engine_support import (
    GREEDY,
    TINY_VOCAB,
    PortClient,
    assert_all_pages_are_back,
    make_tiny_checkpoint,
    running_engine,
    wait_for,
)

LONG = 2000  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for a prompt to take longer than all that surrounds it."""
    folder = tmp_path_factory.mktemp("model")
    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    return make_tiny_checkpoint(folder, num_hidden_layers=4, max_position_embeddings=4096, **shape)


def ids(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, TINY_VOCAB, count)]


def time_to_first_token(client: PortClient, prompt: list[int]) -> float:
    begun = time.monotonic()
    request_id = client.submit(prompt, 4)
    client.wait_begun([request_id])
    taken = time.monotonic() - begun
    client.wait_all(30)
    return taken


def test_a_shared_prefix_of_2000_tokens_makes_the_first_token_at_least_5_times_sooner(model: Path) -> None:
    with running_engine(model) as engine, PortClient(engine.config.engine_name, 0) as client:
        cold, warm = [], []
        for seed in range(3):
            prefix = ids(seed, LONG)
            cold.append(time_to_first_token(client, prefix + ids(100, 20)))
            warm.append(time_to_first_token(client, prefix + ids(200, 20)))
        print(f"time to first token: cold {sorted(cold)[1] * 1e3:.1f} ms, warm {sorted(warm)[1] * 1e3:.1f} ms")
        assert sorted(cold)[1] >= 5 * sorted(warm)[1], (cold, warm)
        status = engine.status()
        assert status["prefix_hit_tokens"] == 3 * (LONG - LONG % 64)
        assert status["prefix_query_tokens"] == 6 * (LONG + 20)


def test_outputs_are_the_same_bits_with_and_without(model: Path) -> None:
    """Random sharing, greedy and sampled, at few pages: tokens and logprobs do not tell whether KV was computed or found."""
    pick = random.Random(1)
    prompts = [ids(pick.randrange(3), pick.randrange(40, 300)) + ids(50 + i, pick.randrange(1, 40)) for i in range(30)]
    samplings = [GREEDY if i % 2 else sampling_record(temperature=1.0, seed=i, ignore_eos=True) for i in range(30)]
    brought = {}
    for prefix_cache in (True, False):
        changes = {"prefix_cache": prefix_cache, "num_pages": 24, "max_context": 1024}
        with running_engine(model, **changes) as engine, PortClient(engine.config.engine_name, 0) as client:
            for begin in range(0, 30, 6):
                for prompt, sampling in list(zip(prompts, samplings, strict=True))[begin : begin + 6]:
                    client.submit(prompt, 40, sampling)
                client.wait_all(60)
            brought[prefix_cache] = [(stream.tokens, stream.logprobs) for stream in client.streams.values()]
            status = engine.status()
            assert (status["prefix_hit_tokens"] > 1000) == prefix_cache
            assert_all_pages_are_back(status)
    assert brought[True] == brought[False]


def test_200_clients_that_vanish_leave_their_pages_at_the_next_commit(model: Path) -> None:
    """Each cancels in the middle of its stream; those that go on are not disturbed."""
    with running_engine(model, num_requests=512, max_batch=64) as engine:
        with PortClient(engine.config.engine_name, 0) as client:
            shared = ids(7, 130)
            vanishing = [client.submit(shared + ids(i, 30), 500) for i in range(200)]
            staying = [client.submit(ids(1000 + i, 30), 20) for i in range(4)]
            wait_for(
                lambda: client.poll() >= 0 and client.streams[vanishing[0]].tokens, 60, "the first stream has begun"
            )
            for request_id in vanishing:
                assert client.port.try_cancel(request_id) == PortStatus.OK
            step = engine.status()["step"]
            wait_for(
                lambda: client.poll() >= 0 and all(client.streams[i].end is not None for i in vanishing),
                30,
                "all have ended",
            )
            assert engine.status()["step"] - step < 400, "not one of them ran to its 500 tokens"
            client.wait_all(60)
            assert all(len(client.streams[i].tokens) == 20 for i in staying)
        wait_for(lambda: engine.status()["num_running"] == 0, 10, "idle")
        assert_all_pages_are_back(engine.status())
        assert engine.status()["finished_cancelled"] == 200
