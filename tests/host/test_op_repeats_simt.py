"""Programs that tools/bench_ops.py makes of a model's: a part's ops over and over, the whole several times, in one launch, on emulated Hopper CTAs.

Every op must find what it counts on behind itself, too: rings and barriers in step, counters that are zero between ops, a plan that lasts as long
as the launch. A whole program behind all that leaves the bits that it leaves by itself. Run: pytest tests/host/test_op_repeats_simt.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from tests.gpu.step_runner import Request, llama_config, write_checkpoint
from tests.host.emulated_gpu import EmulatedWorkers
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from ops_parts import PARTS, WHOLE, ops_of

NUM_REPEATS = 3
CONFIG = llama_config(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
    vocab_size=230, max_position_embeddings=512,
)  # fmt: skip


def use_program(workers: EmulatedWorkers, program: NDArray[np.void]) -> None:
    address = workers.context.allocate(program.nbytes, "program")
    workers.context.upload(address, program)
    workers.params["ops"], workers.params["num_ops"] = address, len(program)


def long_program(ops: NDArray[np.void]) -> NDArray[np.void]:
    """The whole, each part several times, the whole twice."""
    parts = [ops_of(name, ops) for name in PARTS if name != WHOLE]
    return np.concatenate([ops, *(part for part in parts for _ in range(NUM_REPEATS)), ops, ops])


@pytest.fixture
def workers(tmp_path: Path) -> EmulatedWorkers:
    write_checkpoint(tmp_path, CONFIG, np.random.default_rng(1))
    return EmulatedWorkers(tmp_path, tmp_path, num_workers=3, max_step_tokens=256, max_batch=8)


def plans_of(workers: EmulatedWorkers) -> list[NDArray[np.uint8]]:
    """A wide step, decode rows over what it left, a chunk of which no row is sampled."""
    rng = np.random.default_rng(2)
    tokens = [rng.integers(0, workers.config.vocab, num, dtype=np.uint32) for num in (142, 14, 30)]
    steps: list[list[Any]] = [
        [Request(tokens[0][:140], 0, 0), Request(tokens[1][:12], 0, 1)],
        [Request(tokens[0][:141], 140, 0), Request(tokens[1][:13], 12, 1)],
        [Request(tokens[1], 13, 1), Request(tokens[2], 0, 2, sample=False)],
        [Request(tokens[0], 141, 0)],
    ]
    return [workers.plan(step) for step in steps]


def test_repeated_parts_leave_a_steps_bits_alone(workers: EmulatedWorkers) -> None:
    """In front of the whole program, and in launches of their own: those end when all workers have arrived at each barrier of the program."""
    plans, ops = plans_of(workers), workers.model.ops
    logits, sampled = workers.run_steps(plans, seed=0)
    assert np.isfinite(logits[:, 0]).all() and not np.array_equal(logits[0, 0], logits[1, 0])
    for seed, name in enumerate(PARTS):
        if name != WHOLE:
            use_program(workers, np.tile(ops_of(name, ops), NUM_REPEATS)[:-1])  # within a turn through the layers
            workers.run_steps(plans[1:3], seed)
    use_program(workers, long_program(ops))
    again, sampled_again = workers.run_steps(plans, seed=1)
    np.testing.assert_array_equal(again.view(np.uint32), logits.view(np.uint32))
    np.testing.assert_array_equal(sampled_again, sampled)
    counters = int(workers.params["workspaces"][0, abi.NUM_WORKSPACES - 1])
    assert not workers.context.view(counters, np.uint32, workers.sizes.max_batch * workers.config.num_kv_heads).any()
