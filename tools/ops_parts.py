"""The parts of a step that tools/bench_ops.py and tools/torch_ops.py measure: which ops of the program they are, what they must read and compute.

Test: pytest tests/null/test_ops_parts.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from step_cost import StepCost, decode_cost, prefill_cost
from step_rows import Row

from blinkimp.host.model_config import ModelConfig
from blinkimp.ring_abi import BufferId, OpKind

Ops = NDArray[np.void]
Mask = NDArray[np.bool_]
ITEM_BYTES: Final = 2  # bf16
WHOLE: Final = "all"
PARTS: Final[dict[str, Callable[[Ops], Mask]]] = {
    WHOLE: lambda ops: np.ones(len(ops), bool),
    "qkv": lambda ops: ops["kind"] == OpKind.QKV,
    "attention": lambda ops: ops["kind"] == OpKind.ATTENTION,
    "o": lambda ops: (ops["kind"] == OpKind.PROJECT) & (ops["input"] == BufferId.ATTENTION),
    "gate_up": lambda ops: ops["kind"] == OpKind.GATE_UP,
    "down": lambda ops: (ops["kind"] == OpKind.PROJECT) & (ops["input"] != BufferId.ATTENTION),
    "lm_head": lambda ops: ops["kind"] == OpKind.LM_HEAD,
    "sample": lambda ops: ops["kind"] == OpKind.SAMPLE,
}


def members_of(part: str) -> list[str]:
    """The parts that `gate_up+down` is made of: their ops in the program's order, so that what stands between two of them is measured too."""
    return part.split("+")


def ops_of(part: str, ops: Ops) -> Ops:
    return ops[np.logical_or.reduce([PARTS[name](ops) for name in members_of(part)])]


def parse_parts(text: str) -> list[str]:
    """Parts of `qkv,down`, in the order of PARTS, then combinations such as `gate_up+down`, in their own."""
    names = [name for name in text.split(",") if name]
    if not names or not {member for name in names for member in members_of(name)} <= set(PARTS):
        raise argparse.ArgumentTypeError(
            f"parts: got {text!r}, expected some of {', '.join(PARTS)}, by commas, or several as one, by +"
        )
    return [name for name in PARTS if name in names] + [name for name in dict.fromkeys(names) if name not in PARTS]


def matrix_shapes(model: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """(matrices in a step, outputs, inputs) of the parts that are matrix products."""
    layers = model.num_layers
    return {
        "qkv": (layers, model.query_features + 2 * model.kv_features, model.hidden),
        "o": (layers, model.hidden, model.query_features),
        "gate_up": (layers, 2 * model.intermediate, model.hidden),
        "down": (layers, model.hidden, model.intermediate),
        "lm_head": (1, model.vocab, model.hidden),
    }


def matrix_rows(part: str, row: Row) -> int:
    """Rows that a part's matrices are multiplied with: of a prompt, the last one alone has logits."""
    if row.phase == "decode":
        return row.batch
    return 1 if part == "lm_head" else row.context


def part_cost(model: ModelConfig, part: str, row: Row) -> StepCost:
    """A part's share of step_cost(); the shares add up. What is no matrix product nor attention has none."""
    whole = (
        decode_cost(model, ITEM_BYTES, row.batch, row.context)
        if row.phase == "decode"
        else prefill_cost(model, ITEM_BYTES, row.context)
    )
    if part == WHOLE:
        return whole
    if len(members := members_of(part)) > 1:
        costs = [part_cost(model, name, row) for name in members]
        return StepCost(*(sum(values) for values in zip(*map(astuple, costs), strict=True)))
    if part == "attention":
        return replace(whole, weight_bytes=0, gemm_operations=0)
    num_matrices, outputs, inputs = matrix_shapes(model).get(part, (0, 0, 0))
    elements = num_matrices * outputs * inputs
    return StepCost(elements * ITEM_BYTES, 2 * elements * matrix_rows(part, row), 0, 0)
