"""tools/ops_parts.py: the parts are the whole program, and their costs the whole step's.

Run: pytest tests/null/test_ops_parts.py
"""

from __future__ import annotations

import argparse
import sys

import pytest

from blinkimp.host.model_config import parse_config
from blinkimp.ring_abi import OpKind
from tests.fake_gpu import program
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from ops_parts import PARTS, matrix_rows, matrix_shapes, ops_of, parse_parts, part_cost
from step_rows import SHAPES, Row

MODEL = parse_config(SHAPES["llama-3-8b"])


def test_parts_are_the_whole_program_but_its_first_op() -> None:
    ops = program(3)
    sizes = {name: len(ops_of(name, ops)) for name in PARTS}
    assert sizes == {"all": 18, "qkv": 3, "attention": 3, "o": 3, "gate_up": 3, "down": 3, "lm_head": 1, "sample": 1}


@pytest.mark.parametrize("row", [Row("decode", 64, 1024), Row("prefill", 1, 128)], ids=lambda row: row.name)
def test_costs_of_parts_add_up_to_the_steps(row: Row) -> None:
    whole, *parts = (part_cost(MODEL, part, row) for part in PARTS)
    for count in ("weight_bytes", "gemm_operations", "kv_bytes", "attention_operations"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count) > 0


def test_a_matrix_part_is_its_matrices() -> None:
    assert matrix_shapes(MODEL)["gate_up"] == (32, 28672, 4096)
    cost = part_cost(MODEL, "gate_up", Row("decode", 256, 1024))
    assert (cost.num_bytes, cost.num_operations) == (32 * 28672 * 4096 * 2, 2 * 32 * 28672 * 4096 * 256)
    prompt = Row("prefill", 1, 1024)
    assert [matrix_rows(part, prompt) for part in ("down", "lm_head")] == [1024, 1]
    assert part_cost(MODEL, "sample", prompt).limit_s() == 0


def test_several_parts_as_one_are_in_the_programs_order() -> None:
    ops = program(3)
    both, row = ops_of("down+gate_up", ops), Row("decode", 64, 1024)
    assert both["kind"].tolist() == [OpKind.GATE_UP, OpKind.PROJECT] * 3
    assert part_cost(MODEL, "down+gate_up", row).num_bytes == sum(
        part_cost(MODEL, name, row).num_bytes for name in ("gate_up", "down")
    )


def test_parts_come_in_their_own_order() -> None:
    assert parse_parts("down,qkv") == ["qkv", "down"]
    assert parse_parts("down+o,sample,qkv") == ["qkv", "sample", "down+o"]
    for wrong in ("", "mlp", "qkv,mlp", "qkv+mlp"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected some of all, qkv"):
            parse_parts(wrong)
