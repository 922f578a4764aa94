"""What a step of a model must read and compute, and the least time that an H200 needs for it.

Called by tools/bench_step.py. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blinkimp.host.model_config import ModelConfig


@dataclass(frozen=True)
class Limits:
    """What the hardware can do. The default is what one H200 was measured to reach."""

    bytes_per_s: float = 4.6e12  # reading device memory
    operations_per_s: float = 790e12  # bf16 matrix products

    @property
    def formula(self) -> str:
        memory, matrix = f"{self.bytes_per_s / 1e12:.3g} TB/s", f"{self.operations_per_s / 1e12:.4g} TFLOP/s"
        return f"max(weight bytes / {memory}, GEMM operations / {matrix}) + max(KV bytes / {memory}, attention operations / {matrix})"


H200: Final = Limits()


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

    def limit_s(self, limits: Limits = H200) -> float:
        gemm_s = max(self.weight_bytes / limits.bytes_per_s, self.gemm_operations / limits.operations_per_s)
        return gemm_s + max(self.kv_bytes / limits.bytes_per_s, self.attention_operations / limits.operations_per_s)


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
