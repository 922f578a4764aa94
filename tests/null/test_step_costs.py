"""host/step_costs.py: where Llama-3-8B's costs leap, and what fits into EngineParams. Run: pytest tests/null/test_step_costs.py

That the device's rule counts the same: tests/host/test_worker_sm90_simt.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.gpu_kernel import kernel_shape
from blinkimp.host.model_config import parse_config
from blinkimp.host.step_costs import COST_ROWS, stacks, step_costs
from blinkimp.lab.shapes import LLAMA_3_8B

NUM_WORKERS = 131


def costs_of(changes: dict[str, Any] | None = None, kind: Any = "hopper") -> tuple[int, np.ndarray[Any, Any]]:
    config = parse_config(LLAMA_3_8B | (changes or {}))
    return step_costs(config, kernel_shape(config, NUM_WORKERS, kind), NUM_WORKERS)


def test_a_round_more_costs_more_than_a_decode_step() -> None:
    """131 CTAs take 128 tiles of O and down in one round: up to 512 rows at 128 columns, 1,024 at 256; a row more is another round."""
    rows, costs = costs_of()
    assert rows == COST_ROWS and len(costs) == abi.MAX_STEP_COSTS
    assert abi.MAX_STEP_TOKENS // rows < len(costs)
    leaps = {i for i in range(1, 33) if int(costs[i + 1]) - int(costs[i]) > int(costs[0])}
    assert leaps == {4, 8, 12, 16, 24, 32}
    assert (np.diff(costs.astype(int)) >= 0).all() and costs[0] > 0


def test_a_step_more_is_not_for_nothing() -> None:
    """Two steps of whole rounds take longer than one of both: an LM head and 32 beginnings of attention."""
    _, costs = costs_of()
    assert int(costs[4]) + int(costs[2]) > int(costs[6]) and 2 * int(costs[8]) > int(costs[16])
    assert int(costs[8]) + int(costs[0]) < int(costs[9])


def test_a_model_ten_times_as_large_fits_the_words() -> None:
    _, costs = costs_of(
        {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    )
    assert int(costs.max()) > 60_000 and int(costs[0]) > 0
    assert (np.diff(costs.astype(int)) >= 0).all()


def test_the_portable_kernel_has_none() -> None:
    rows, costs = costs_of(kind="portable")
    assert rows == 0 and not costs.any()


def test_stacks_are_those_that_the_kernel_is_compiled_for() -> None:
    assert {height: stacks(height) for height in (32, 48, 64, 112, 128)} == {
        32: [8, 4, 2], 48: [4, 2], 64: [4, 2, 1], 112: [2], 128: [2, 1],
    }  # fmt: skip
