"""A bench for ops of the CPU interpreter: one-op programs with random operands. Used by tests/host/test_reference_*.py."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.model_config import ModelConfig, RopeConfig
from blinkimp.host.program import Model, model_dims
from blinkimp.host.reference import ReferenceRunner
from blinkimp.host.weights import HostTarget
from blinkimp.ring_abi import OP, DType

PRECISIONS = ("f32", "bf16")
HALF_ULP_BF16 = 2.0**-9

Array = NDArray[Any]


def fresh_rng() -> np.random.Generator:
    """The same numbers every run; BLINKIMP_TEST_SEED gives others."""
    seed = int(os.environ.get("BLINKIMP_TEST_SEED", "1"))
    print(f"BLINKIMP_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def small_config(**changes: Any) -> ModelConfig:
    """Sizes that are no multiple of any vector, tile or page."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden=84,
        num_heads=6,
        num_kv_heads=2,
        head_dim=18,
        intermediate=56,
        vocab=203,
        max_positions=512,
        norm_eps=1e-5,
        tied_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        qk_norm=False,
        windows=(0, 0),
        rope=RopeConfig("default", 10000.0),
    )
    return dataclasses.replace(config, **changes)


class OpBench:
    """A one-op program with random operands, in f32 or bf16."""

    def __init__(self, rng: np.random.Generator, precision: str, **changes: Any) -> None:
        self.rng, self.config = rng, small_config(**changes)
        self.dtype = DType.BF16 if precision == "bf16" else DType.F32
        self.is_bf16 = precision == "bf16"
        self._keepalive: list[Array] = []

    def values(self, *shape: int, scale: float = 1.0) -> Array:
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def stored(self, values: Array) -> tuple[int, Array]:
        """(address, values as the op sees them) of a matrix in the bench's precision."""
        kept = bf16_from_f32(values) if self.is_bf16 else values
        return self.address(kept), f32_from_bf16(kept) if self.is_bf16 else kept

    def address(self, values: Array) -> int:
        kept = np.ascontiguousarray(values)
        self._keepalive.append(kept)
        return int(kept.ctypes.data)

    def round(self, values: Array) -> Array:
        """What the interpreter's rounding makes of an exact value."""
        narrow = values.astype(np.float32)
        return (f32_from_bf16(bf16_from_f32(narrow)) if self.is_bf16 else narrow).astype(np.float64)

    def runner(self, num_workers: int = 3, **members: Any) -> ReferenceRunner:
        op = np.zeros(1, OP)
        op["weight_dtype"] = self.dtype
        for name, value in members.items():
            op[name] = value
        dims = model_dims(self.config, self.dtype, self.dtype, ())
        model = Model(self.config, dims, op, (), 512, self.dtype, 0, HostTarget())
        return ReferenceRunner(model, num_workers=num_workers, max_step_tokens=300, max_batch=64)

    def tolerance(self, magnitude: float) -> float:
        """fp32 sums of some hundred terms; a rounded output may also fall to the other side of a rounding boundary."""
        return magnitude * (2.1 * HALF_ULP_BF16 if self.is_bf16 else 3e-6)
