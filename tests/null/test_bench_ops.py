"""tools/bench_ops.py without a GPU: variants, parts of a program, the table, and that logits which differ are said.

Run: pytest tests/null/test_bench_ops.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import BufferId, OpKind
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import bench_ops as tool


def program(num_layers: int) -> np.ndarray[Any, Any]:
    layer = [
        (OpKind.QKV, BufferId.HIDDEN),
        (OpKind.ATTENTION, BufferId.QUERY),
        (OpKind.PROJECT, BufferId.ATTENTION),
        (OpKind.GATE_UP, BufferId.HIDDEN),
        (OpKind.PROJECT, BufferId.ACTIVATION),
    ]
    steps = [(OpKind.EMBED, 0), *layer * num_layers, (OpKind.LM_HEAD, BufferId.HIDDEN), (OpKind.SAMPLE, 0)]
    ops = np.zeros(len(steps), abi.OP)
    ops["kind"], ops["input"] = [int(kind) for kind, _ in steps], [int(source) for _, source in steps]
    return ops


def test_parts_are_the_whole_program_but_its_first_op() -> None:
    ops = program(3)
    sizes = {name: len(pick(ops)) for name, pick in tool.PARTS.items()}
    assert sizes == {"all": 18, "qkv": 3, "attention": 3, "o": 3, "gate_up": 3, "down": 3, "lm_head": 1, "sample": 1}


def test_a_variant_is_named_with_its_macros() -> None:
    variant = tool.parse_variant("wide:BK_WIDE_TOKENS=64,BK_X=2")
    assert variant == tool.Variant("wide", (("BK_WIDE_TOKENS", "64"), ("BK_X", "2")))
    for wrong in ("wide", ":BK_WIDE_TOKENS=64", "wide:", "wide:BK_WIDE_TOKENS"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME:MACRO=VALUE"):
            tool.parse_variant(wrong)


class FakeRunner:
    """Answers as StepRunner does; its logits are a function of the request's tokens."""

    class config:  # noqa: N801  # an attribute of StepRunner
        vocab = 50

    def __init__(self) -> None:
        self.launches: list[tuple[int, tuple[int, ...]]] = []
        self.released: list[int] = []

    def run(self, requests: list[Any], *, ops: Any = None) -> None:
        self.launches.append((len(requests), () if ops is None else tuple(ops(program(2))["kind"])))

    def logits(self, num: int) -> Any:
        return np.arange(num * 50, dtype=np.float32).reshape(num, 50)

    def release(self, request_idx: int) -> None:
        self.released.append(request_idx)


def test_a_row_is_measured_whole_and_by_parts() -> None:
    runner = FakeRunner()
    parts, bits = tool.measure_row(runner, tool.Row("decode", 3, 128), seed=1)  # type: ignore[arg-type]
    assert list(parts) == list(tool.PARTS)
    assert bits.shape == (3, 50)
    assert runner.released == [0, 1, 2]
    assert {num for num, _ in runner.launches} == {3}
    assert (3, (OpKind.EMBED,)) in runner.launches  # what is taken off
    requests = tool.requests_of(tool.Row("prefill", 1, 70), np.random.default_rng(0), 50)
    assert [(len(r.tokens), r.num_computed) for r in requests] == [(70, 0)]


def test_the_table_has_a_line_for_each_row_and_variant() -> None:
    rows = [tool.Row("decode", 1, 64), tool.Row("prefill", 1, 128)]
    by_row = {row.name: dict.fromkeys(tool.PARTS, 1.5) for row in rows}
    lines = tool.table(rows, {"base": by_row, "wide": by_row}).splitlines()
    assert lines[2].startswith("| d1@64 | base | 1.500 |") and lines[5].startswith("| p128 | wide |")
    assert len(lines) == 6


def test_other_logits_are_found() -> None:
    base = {"d1@64": np.zeros((1, 4), np.uint32), "p128": np.ones((1, 4), np.uint32)}
    assert tool.differing(base, base) == []
    assert tool.differing(base, base | {"p128": np.zeros((1, 4), np.uint32)}) == ["p128"]


def test_a_variant_that_fails_is_named_and_the_others_stand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = tool.Row("decode", 1, 64)
    figures = {row.name: dict.fromkeys(tool.PARTS, 1.5)}
    answers = {"base": (figures, {row.name: np.zeros((1, 4), np.uint32)}), "hangs": "no answer in 240 s"}
    monkeypatch.setattr(tool, "probe_gpu", lambda: argparse.Namespace(num_multiprocessors=132))
    monkeypatch.setattr(tool, "compile_variants", lambda variants, num_workers: [b""] * len(variants))
    monkeypatch.setattr(tool, "measure_apart", lambda variant, *_: answers[variant.name])
    assert tool.main(["--rows", "d1@64", "--variant", "hangs:BK_X=1"]) == 1
    said = capsys.readouterr()
    assert "| d1@64 | base | 1.500" in said.out and "hangs: not measured: no answer in 240 s" in said.err


def test_a_child_that_raises_says_so() -> None:
    answer = tool.measure_apart(tool.Variant("base"), b"", 131, [])  # no rows: refused before any GPU is looked for
    assert isinstance(answer, str) and answer.startswith("ValueError")
