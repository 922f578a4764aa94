"""The null program: tokens without a model, the same in each life of a request, at the rate that was asked for.

Run: pytest tests/host/test_null_program.py
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.config import Config, model_folder
from blinkimp.host.device_protocol import DeviceError
from blinkimp.host.emulated_process import check_params
from blinkimp.host.engine import choose_device
from blinkimp.host.model_config import UnsupportedModelError
from blinkimp.host.null_program import null_ops, null_tokens
from blinkimp.nic_shim.queue_pair import sampling_record
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.ring_abi import ENGINE_PARAMS, FinishReason
from tests.host.engine_support import PortClient, finished, make_tiny_checkpoint, running_engine, wait_for
from tests.host.standing_still import standing_still
from tests.http_support import embedded
from tests.support import PATIENCE_S

EMBEDDED = model_folder(Config())
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_word(counter: int, key: int) -> int:
    """First word of Philox4x32-10 of (counter, 0, 0, 0)."""
    words, keys = [counter, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [high >> 32 ^ words[1] ^ keys[0], high & 0xFFFFFFFF, low >> 32 ^ words[3] ^ keys[1], low & 0xFFFFFFFF]
        keys = [(k + step) & 0xFFFFFFFF for k, step in zip(keys, PHILOX_KEY_STEPS, strict=True)]
    return words[0]


@functools.cache
def embedded_table() -> list[int]:
    tokenizer = Tokenizer(EMBEDDED)
    table: list[int] = null_tokens(EMBEDDED, tokenizer.vocab_size, tokenizer.eos_ids).tolist()
    return table


def expected_tokens(seed: int, num_tokens: int) -> list[int]:
    table = embedded_table()
    return [table[philox_word(position, seed) * len(table) >> 32] for position in range(num_tokens)]


def null_engine(**changes: Any) -> Any:
    values = {"load_format": "null", "null_step_us": 0, "num_threads": 0, "max_batch": 64, "num_queue_pairs": 1}
    return running_engine("embedded", **{**values, **changes})


def test_tokens_follow_from_seed_and_position_alone() -> None:
    with null_engine() as engine, PortClient(engine.config.engine_name, 0) as client:
        assert engine.device.num_workers == 1, "there is nothing for more threads to do"
        ids = {
            seed: client.submit([1, 2, seed % 7], 40, sampling=sampling_record(seed=seed, num_top_logprobs=seed % 3))
            for seed in (*range(100), 2**64 - 1)
        }
        client.wait_all(PATIENCE_S)
        for seed, request_id in ids.items():
            stream = client.streams[request_id]
            assert stream.tokens == expected_tokens(seed, 40) and stream.end == finished(FinishReason.LENGTH)
        stream = client.streams[ids[2]]
        assert stream.logprobs == pytest.approx([-math.log(len(embedded_table()))] * 40)
        for token, tops in zip(stream.tokens, stream.tops, strict=True):
            assert tops[0][0] == token and len({top for top, _ in tops}) == 2
        # Another life of the request goes on where the first one stopped.
        prior = expected_tokens(5, 10)
        resumed = client.generate([1, 2, *prior], 30, sampling=sampling_record(seed=5), num_prior_outputs=10)
        assert resumed.tokens == expected_tokens(5, 40)[10:]


def test_every_token_is_text_and_none_is_an_end() -> None:
    tokenizer, table = Tokenizer(EMBEDDED), embedded_table()
    assert len(table) > tokenizer.vocab_size / 2 and not set(table) & set(tokenizer.eos_ids)
    assert all(tokenizer.decode([token]) and "\ufffd" not in tokenizer.decode([token]) for token in table)


def test_without_a_tokenizer_it_is_the_whole_vocabulary(tmp_path: Path) -> None:
    assert null_tokens(tmp_path, 40, (2, 39)).tolist() == [0, 1, *range(3, 39)]
    with pytest.raises(UnsupportedModelError, match="got 18, expected at least 20"):
        null_tokens(tmp_path, 20, (2, 3))


def test_a_step_takes_its_time_and_no_less() -> None:
    """20 steps of 10 ms. Bounds from below only: a busy machine is slower."""
    with null_engine(null_step_us=10_000) as engine, PortClient(engine.config.engine_name, 0) as client:
        with standing_still(engine.device.pid):
            started = time.monotonic()
            ids = [client.submit([1], 20, sampling=sampling_record(seed=seed)) for seed in range(64)]
        client.wait_all(PATIENCE_S)
        assert time.monotonic() - started > 0.17, "one step may be caught up with"
        assert all(len(client.streams[request_id].tokens) == 20 for request_id in ids)
        wait_for(lambda: engine.status()["output_tokens"] == 20 * 64, PATIENCE_S, "all of it is counted")
        # Every look at the ring takes eight of them (kLoadsInFlight), and there is one in each step.
        assert 20 <= engine.status()["step"] <= 20 + 64 // 8, "all of a step's requests share it"


def test_512_requests_share_a_step() -> None:
    sizes = {"max_batch": 512, "num_completions": 1 << 15, "max_context": 256}
    with null_engine(**sizes) as engine, PortClient(engine.config.engine_name, 0) as client:
        for seed in range(512):
            client.submit([1, 2], 30, sampling=sampling_record(seed=seed, num_top_logprobs=seed % 2))
        client.wait_all(PATIENCE_S)
        for request_id, stream in client.streams.items():
            assert stream.tokens == expected_tokens(request_id - 1, 30)
            assert all(
                [top for top, _ in tops] == [token][: len(tops)]
                for token, tops in zip(stream.tokens, stream.tops, strict=True)
            )
        assert engine.status()["preemptions"] == 0


def test_a_model_without_weights_needs_no_weights(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", config_only=True)
    with running_engine(folder, load_format="null", null_step_us=0) as engine:
        assert engine.plan.weight_bytes == 0
        with PortClient(engine.config.engine_name, 0) as client:
            assert len(client.generate([1], 5).tokens) == 5


def test_a_constraint_is_refused_where_nobody_would_keep_it() -> None:
    with embedded(load_format="null", null_step_us=0) as (server, _):
        assert server.complete(max_tokens=8)["usage"]["completion_tokens"] == 8
        reply = server.post("/v1/completions", {"prompt": "a", "guided_regex": "[a-z]+"})
        assert reply.status == 400 and "no room for constraints" in reply.json["error"]["message"]


def test_a_gpu_does_not_run_it() -> None:
    with pytest.raises(DeviceError, match="expected the emulated one"):
        choose_device(Config(load_format="null", device="gpu"))


@pytest.mark.parametrize(
    ("num_ops", "table", "problem"),
    [(2, range(20), "no other op"), (1, range(19), "fewer tokens"), (1, range(81, 101), "beyond the vocabulary")],
)
def test_a_bad_program_is_refused(num_ops: int, table: range, problem: str) -> None:
    tokens = np.array(table, np.uint32)
    op = null_ops(tokens, 0)
    params = np.zeros(1, ENGINE_PARAMS)
    params["num_ops"], params["ops"], params["num_workers"] = num_ops, op.ctypes.data, 1
    dims = {
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 2,
        "hidden": 8,
        "vocab": 100,
        "intermediate": 8,
        "kv_dtype": 1,
    }
    for name, value in dims.items():
        params["dims"][name] = value
    with pytest.raises(RuntimeError, match=problem):
        check_params(params)
