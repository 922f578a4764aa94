"""The portable kernel (mma.sync, cp.async) on this GPU: against the Hopper kernel step by step, and serving as an engine.

What one kernel alone must do is asked of both in test_model_gpu.py and test_engine_gpu.py.
Run: pytest -m gpu tests/gpu/test_portable_gpu.py -rP     (prints differences between the kernels, and speeds)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.step_runner import Request, StepRunner, in_steps, llama_config, write_checkpoint
from tests.host import engine_scenarios as scenarios

Options = dict[str, Any]

CONFIGS = {
    "head_dim 64": llama_config(),
    "head_dim 128": llama_config(
        head_dim=128, num_attention_heads=32, num_key_value_heads=8, intermediate_size=4096, hidden_size=1024
    ),
    "qwen3": llama_config(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128),
}
# Both round to bf16 at the same places and add in another order.
MAX_RELATIVE_ERROR = 1e-2
NUM_TOKENS = (1, 16, 17, 64, 65, 200, 1000)


@pytest.fixture(scope="module")
def portable_options(device_options: Options) -> Options:
    return {**device_options, "kernel": "portable"}


@pytest.fixture(scope="module", params=CONFIGS)
def runners(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StepRunner, StepRunner]]:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, CONFIGS[request.param], np.random.default_rng())
    with StepRunner(folder, kernel="hopper") as hopper, StepRunner(folder, kernel="portable") as portable:
        yield hopper, portable


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_logits_agree_with_the_hopper_kernel(runners: tuple[StepRunner, StepRunner], num_tokens: int) -> None:
    """One prompt whole, and as many decode rows: every item shape of the GEMMs, narrow and wide attention."""
    rng = np.random.default_rng()
    vocab = runners[0].config.vocab
    prompt = rng.integers(0, vocab, num_tokens, dtype=np.uint32)
    others = [rng.integers(0, vocab, int(n), dtype=np.uint32) for n in rng.integers(2, 40, min(num_tokens, 200))]
    logits = []
    for runner in runners:
        runner.run([Request(prompt, 0, 0)])
        first = runner.logits(1).copy()
        before = [Request(tokens[:-1], 0, 1 + i, sample=False) for i, tokens in enumerate(others)]
        for step in in_steps(before, runner.sizes.max_step_tokens):
            runner.run(step)
        runner.run([Request(tokens, len(tokens) - 1, 1 + i) for i, tokens in enumerate(others)])
        logits.append(np.concatenate([first, runner.logits(len(others))]).astype(np.float64))
        for request_idx in range(len(others) + 1):
            runner.release(request_idx)
    error = float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0]))
    share_equal = float((logits[0].argmax(1) == logits[1].argmax(1)).mean())
    same_bits = float((logits[0] == logits[1]).mean())
    print(
        f"{num_tokens} tokens: relative {error:.2e}, {share_equal:.1%} of the best tokens and {same_bits:.1%} of the logits equal"
    )
    assert error < MAX_RELATIVE_ERROR


@pytest.mark.gpu
def test_speed_beside_the_hopper_kernel(runners: tuple[StepRunner, StepRunner]) -> None:
    """Says how much slower; only an absurd figure fails."""
    rng = np.random.default_rng()
    tokens = rng.integers(0, runners[0].config.vocab, 1024, dtype=np.uint32)
    seconds = []
    for runner in runners:
        runner.run([Request(tokens, 0, 0)])
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            runner.run([Request(tokens, 0, 0)])
            times.append(time.perf_counter() - begin)
        seconds.append(min(times))
        runner.release(0)
    print(
        f"prefill of 1024 tokens, launch and copies included: hopper {seconds[0] * 1e3:.2f} ms, portable {seconds[1] * 1e3:.2f} ms"
    )
    assert seconds[1] < 50 * seconds[0]


# ---- As an engine ------------------------------------------------------------------------------------------------
def test_32_streams_finish_while_the_host_is_stopped(tiny: Path, portable_options: Options) -> None:
    scenarios.streams_finish_while_the_host_is_stopped(tiny, **portable_options)


def test_ten_thousand_random_requests_leave_nothing_behind(tiny: Path, portable_options: Options) -> None:
    scenarios.random_requests_leave_nothing_behind(tiny, mean_tokens=30, **portable_options)


def test_batch_of_256_streams_runs_at_once(tiny: Path, portable_options: Options) -> None:
    scenarios.batch_of_256_streams_runs_at_once(tiny, **portable_options)


def test_seeded_tokens_of_the_embedded_model_do_not_depend_on_the_batch(portable_options: Options) -> None:
    scenarios.seeded_tokens_do_not_depend_on_the_batch("embedded", **portable_options)


def test_context_of_the_embedded_model_fills_to_its_end(portable_options: Options) -> None:
    sizes = {"max_step_tokens": 2048, "prefill_chunk_tokens": 200}
    scenarios.context_fills_to_its_end("embedded", 1900, 148, **sizes, **portable_options)
