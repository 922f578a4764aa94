"""The prefix cache in a whole engine: what is computed before the first token behind a shared prefix, and the same bits with and without it.

On the emulated device, whose results do not depend on how a prompt is cut (device/emu/INTERPRETER.md).
Run: pytest tests/host/test_prefix_cache_engine.py
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from blinkimp.host.engine import Engine
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
from tests.support import PATIENCE_S

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


def cost_of_first_token(engine: Engine, client: PortClient, prompt: list[int]) -> tuple[int, int, float]:
    """Prompt tokens computed and steps made for it, by the device's counters; and how long that took."""
    wait_for(lambda: engine.status()["num_running"] == 0, PATIENCE_S, "idle")
    before, begun = engine.status(), time.monotonic()
    client.generate(prompt, 1)
    taken_s = time.monotonic() - begun
    wait_for(lambda: engine.status()["num_running"] == 0, PATIENCE_S, "idle")
    after = engine.status()
    return after["prompt_tokens"] - before["prompt_tokens"], after["step"] - before["step"], taken_s


def test_a_shared_prefix_of_2000_tokens_makes_the_first_token_at_least_5_times_cheaper(model: Path) -> None:
    """In tokens and in steps of 64 tokens; the time is printed, as a machine's speed proves nothing."""
    settings = {"prefill_chunk_tokens": 64, "max_step_tokens": 64, "max_batch": 16}
    with running_engine(model, **settings) as engine, PortClient(engine.config.engine_name, 0) as client:
        for seed in range(3):
            prefix = ids(seed, LONG)
            cold = cost_of_first_token(engine, client, prefix + ids(100, 20))
            warm = cost_of_first_token(engine, client, prefix + ids(200, 20))
            print(f"time to first token: cold {cold[2] * 1e3:.1f} ms, warm {warm[2] * 1e3:.1f} ms")
            assert cold[0] == LONG + 20 and warm[0] == LONG % 64 + 20
            assert cold[1] >= (LONG + 20) // 64 and cold[1] >= 5 * warm[1] > 0, (cold, warm)
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
                client.wait_all(PATIENCE_S)
            brought[prefix_cache] = [(stream.tokens, stream.logprobs) for stream in client.streams.values()]
            assert_all_pages_are_back(engine.status)
            assert (engine.status()["prefix_hit_tokens"] > 1000) == prefix_cache
    assert brought[True] == brought[False]


def test_200_clients_that_vanish_leave_their_pages_at_the_next_commit(model: Path) -> None:
    """Each cancels in the middle of its stream; those that go on are not disturbed."""
    with running_engine(model, num_requests=512, max_batch=64) as engine:
        with PortClient(engine.config.engine_name, 0) as client:
            shared = ids(7, 130)
            vanishing = [client.submit(shared + ids(i, 30), 1500) for i in range(200)]
            staying = [client.submit(ids(1000 + i, 30), 20) for i in range(4)]
            wait_for(
                lambda: client.poll() >= 0 and client.streams[vanishing[0]].tokens,
                PATIENCE_S,
                "the first stream has begun",
            )
            for request_id in vanishing:
                assert client.port.try_cancel(request_id) == PortStatus.OK
            step = engine.status()["step"]
            wait_for(
                lambda: client.poll() >= 0 and all(client.streams[i].end is not None for i in vanishing),
                PATIENCE_S,
                "all have ended",
            )
            assert engine.status()["step"] - step < 400, "not one of them ran to its 1,500 tokens"
            client.wait_all(PATIENCE_S)
            assert all(len(client.streams[i].tokens) == 20 for i in staying)
        assert_all_pages_are_back(engine.status)
        assert engine.status()["finished_cancelled"] == 200
