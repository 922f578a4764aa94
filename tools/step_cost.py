"""What a step of a model must read and compute, and the least time that an H200 needs for it.

Called by tools/bench_step.py. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blinkimp.host.model_config import ModelConfig

BYTES_PER_S: Final = 4.6e12  # device memory of one H200, measured
OPERATIONS_PER_S: Final = 790e12  # bf16 GEMMs of one H200, measured
LIMIT_FORMULA: Final = "max(weight bytes / 4.6 TB/s, GEMM operations / 790 TFLOP/s) + max(KV bytes / 4.6 TB/s, attention operations / 790 TFLOP/s)"


@dataclass(frozen=True)
class StepCost:
    """What one step must read and compute; the shapes here have no sliding windows."""

    weight_bytes: int
    gemm_operations: int
    kv_bytes: int
    attention_operations: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    @property
    def num_operations(self) -> int:
        return self.gemm_operations + self.attention_operations

    @property
    def limit_s(self) -> float:
        gemm_s = max(self.weight_bytes / BYTES_PER_S, self.gemm_operations / OPERATIONS_PER_S)
        return gemm_s + max(self.kv_bytes / BYTES_PER_S, self.attention_operations / OPERATIONS_PER_S)


def step_cost(
    model: ModelConfig, item_bytes: int, num_rows: int, num_logits: int, kv_read: float, pairs: float
) -> StepCost:
    """num_rows through the layers, num_logits of them through the LM head; kv_read positions are read, `pairs` attended to."""
    layer = model.hidden * (2 * model.query_features + 2 * model.kv_features + 3 * model.intermediate)
    layers, head = model.num_layers * layer, model.vocab * model.hidden
    return StepCost(
        weight_bytes=(layers + head) * item_bytes,
        gemm_operations=2 * (layers * num_rows + head * num_logits),
        kv_bytes=round(kv_read * model.num_layers * 2 * model.kv_features * item_bytes),
        attention_operations=round(pairs * 4 * model.query_features * model.num_layers),
    )


def decode_cost(model: ModelConfig, item_bytes: int, batch: int, context: float) -> StepCost:
    return step_cost(model, item_bytes, batch, batch, batch * context, batch * context)


def prefill_cost(model: ModelConfig, item_bytes: int, num_tokens: int) -> StepCost:
    """A prompt in one step: causal, and the last row alone has logits."""
    return step_cost(model, item_bytes, num_tokens, 1, num_tokens, num_tokens * (num_tokens + 1) / 2)
