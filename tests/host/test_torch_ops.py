"""tools/torch_ops.py on the CPU: its calls compute what a layer does, graphs have whole turns, and the tool writes the layout of a report.

Run: pytest tests/host/test_torch_ops.py
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from blinkimp.host.model_config import parse_config
from tests.gpu.step_runner import llama_config
from tests.support import ROOT

torch = pytest.importorskip("torch", reason="torch is a development dependency")
sys.path.insert(0, str(ROOT / "tools"))

import torch_ops as tool  # noqa: E402  (the path above comes first)
from ops_parts import matrix_rows, matrix_shapes, part_cost  # noqa: E402
from ops_report import TORCH, figures_of  # noqa: E402
from ops_timing import Settings  # noqa: E402
from step_rows import SHAPES, Row  # noqa: E402
from torch_llama import Dims, Weights  # noqa: E402

CONFIG = llama_config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
)
DECODE, PREFILL = Row("decode", 5, 24), Row("prefill", 1, 11)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def weights() -> Weights:
    torch.manual_seed(3)
    return Weights(Dims.of(CONFIG), "cpu", torch.float32)


@pytest.mark.parametrize("row", [DECODE, PREFILL], ids=lambda row: row.name)
@pytest.mark.parametrize("part", [part for part in tool.PARTS if part != "attention"])
def test_products_are_of_the_shapes_that_are_counted(weights: Weights, part: str, row: Row) -> None:
    """As tools/ops_parts.py has them, so that TFLOP/s and limits are both sides'."""
    num_matrices, outputs, inputs = matrix_shapes(parse_config(CONFIG))[part]
    calls = tool.matrix_calls(weights, part, row)
    assert len(calls) == num_matrices
    results = [call().clone() for call in calls]
    assert {tuple(result.shape) for result in results} == {(matrix_rows(part, row), outputs)}
    assert {tuple(matrix.shape) for matrix in tool.matrices_of(weights, part)} == {(outputs, inputs)}
    operations = sum(2 * result.numel() * inputs for result in results)
    assert operations == part_cost(parse_config(CONFIG), part, row).num_operations
    if num_matrices > 1:  # each layer has its own matrix
        assert not torch.equal(results[0], results[1])


def test_a_product_is_of_its_input_and_the_layers_matrix(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = []

    def randn(*shape: Any, **how: Any) -> Any:
        inputs.append(torch.empty(*shape, **how).normal_())
        return inputs[-1]

    monkeypatch.setattr(tool.torch, "randn", randn)
    last = tool.matrix_calls(weights, "gate_up", DECODE)[2]()
    torch.testing.assert_close(last, torch.nn.functional.linear(inputs[0], weights.layers[2].gate_up))


@pytest.mark.parametrize("row", [DECODE, PREFILL], ids=lambda row: row.name)
def test_attention_is_grouped_and_causal_where_there_is_a_prompt(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def randn(*shape: Any, **how: Any) -> Any:
        made.append(torch.empty(*shape, **how).normal_())
        return made[-1]

    monkeypatch.setattr(tool.torch, "randn", randn)
    dims = Dims.of(CONFIG)
    calls = tool.attention_calls(dims, row, "cpu", torch.float32)
    q, *caches = made
    assert len(calls) == 3 and len(caches) == 6
    for layer, call in enumerate(calls):
        k, v = (cache.repeat_interleave(2, 1) for cache in caches[2 * layer : 2 * layer + 2])
        scores = q @ k.transpose(2, 3) / dims.head_dim**0.5
        if row.phase == "prefill":
            scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(call(), scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


def test_graphs_are_whole_turns_or_a_part_of_one() -> None:
    assert tool.calls_per_graph(10e-6, 32) == 512
    assert tool.calls_per_graph(40e-6, 32) == 128
    assert tool.calls_per_graph(1e-3, 32) == 5
    assert tool.calls_per_graph(50e-3, 32) == 1 and tool.calls_per_graph(50e-3, 1) == 1
    assert tool.calls_per_graph(240e-6, 1) == 21


def test_a_unit_is_a_graph_of_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    calls = [lambda i=i: called.append(i) for i in range(3)]
    monkeypatch.setattr(tool, "calls_per_graph", lambda call_s, num_calls: 6)
    load = tool.GraphLoad("cpu", calls)
    assert load.per_step == 0.5
    called.clear()
    load.run(2)
    assert called == [0, 1, 2, 0, 1, 2] * 2
    called.clear()
    load.run(0)
    assert called == []


def test_a_graphs_tensors_live_as_long_as_it(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """captured() gives a graph's replay, which knows addresses alone."""
    monkeypatch.setattr(tool, "captured", lambda device, run: lambda: None)
    kept = [torch.randn(4) for _ in range(2)]
    load = tool.GraphLoad("cpu", [lambda tensor=tensor: tensor.sum() for tensor in kept])
    alive = [weakref.ref(tensor) for tensor in kept]
    kept.clear()
    gc.collect()
    assert all(tensor() is not None for tensor in alive)
    del load
    gc.collect()
    assert all(tensor() is None for tensor in alive)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in a quarter of a second: what is looked at is not how long they took."""
    monkeypatch.setitem(SHAPES, "embedded", CONFIG)
    quick = Settings(seconds=0, burst_s=0.002, num_bursts=1, pause_s=0, rest_s=0)
    monkeypatch.setattr(tool, "Settings", lambda seconds=0.0: quick)


def test_the_tool_writes_a_report(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "torch.json"
    flags = [
        "--shape",
        "embedded",
        "--device",
        "cpu",
        "--rows",
        "d2@24,p16",
        "--no-energy",
        "--commit",
        "abc",
        "--out",
        str(out),
    ]
    assert tool.main(flags) == 0
    report = json.loads(out.read_text())
    found = figures_of(report, TORCH)
    assert {row: list(parts) for row, parts in found.items()} == {row: list(tool.PARTS) for row in ("d2@24", "p16")}
    assert all(figures.joules is None for parts in found.values() for figures in parts.values())
    assert report["failures"] == {} and report["commit"] == "abc" and report[TORCH]["torch"] == torch.__version__
    assert report[TORCH]["sdpa"]["p16"]["backend"] == "MATH" and report["costs"]["p16"]["o"]["operations"] > 0
    assert "| p16 | lm_head | torch |" in capsys.readouterr().out


def test_a_row_that_fails_is_told_and_the_others_are_measured(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, attention_calls = tmp_path / "torch.json", tool.attention_calls

    def fail(dims: Dims, row: Row, *rest: Any) -> Any:
        if row.name == "d2@24":
            raise RuntimeError("out of memory\nand much more")
        return attention_calls(dims, row, *rest)

    monkeypatch.setattr(tool, "attention_calls", fail)
    flags = ["--shape", "embedded", "--device", "cpu", "--rows", "d2@24,p16", "--parts", "attention", "--no-energy"]
    assert tool.main([*flags, "--commit", "abc", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["failures"] == {"d2@24": "out of memory"} and list(report["ms"][TORCH]) == ["p16"]


def test_parts_that_torch_has_not_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--rows", "p16", "--parts", "sample", "--out", str(tmp_path / "torch.json")])
    assert "expected some of qkv, attention" in capsys.readouterr().err
