"""Each GEMM op of the persistent kernel, and EMBED, against float64 on fresh random inputs: narrow and wide, ragged rows, poisoned outputs.

Run: pytest -m gpu tests/gpu/test_gemm.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.gpu_weights import rotated_order
from blinkimp.ring_abi import OpKind
from tests.gpu.step_runner import Request, StepRunner, llama_config, tiled_index, write_checkpoint

HIDDEN, NORMED, QUERY, ATTENTION, ACTIVATION, SQUARES = range(6)
NUM_ROWS = (1, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 515)
FAMILIES = {
    "llama": llama_config(),
    "qwen2": llama_config(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "qwen3_64": llama_config(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
    "qwen3_128": llama_config(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128, num_attention_heads=4
    ),
    "llama_128": llama_config(
        head_dim=128, num_attention_heads=32, num_key_value_heads=8, intermediate_size=4096, hidden_size=1024
    ),
}


class Case:
    """A runner with its weights in float64."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.rng = np.random.default_rng()
        tensors = write_checkpoint(folder, config, self.rng)
        self.runner = StepRunner(folder)
        self.tensors = {
            name: f32_from_bf16(bf16_from_f32(values)).astype(np.float64) for name, values in tensors.items()
        }
        self.gains = {name: values.astype(np.float64) for name, values in tensors.items()}  # vectors stay fp32

    def request(self, num_rows: int) -> list[Request]:
        tokens = self.rng.integers(0, self.runner.config.vocab, num_rows + 3, dtype=np.uint32)
        return [Request(tokens, 3, 0)]

    def put_tiled(self, workspace: int, num_rows: int, num_columns: int) -> NDArray[np.float64]:
        """Random bf16 values as a tiled input; returns them."""
        bits = bf16_from_f32(self.rng.standard_normal((num_rows, num_columns)).astype(np.float32))
        num = -(-num_rows // 128) * 128 * num_columns
        flat = np.full(num, 0xFFFF, np.uint16)
        flat[tiled_index(num_rows, num_columns)] = bits
        self.runner.set_workspace(workspace, flat)
        return f32_from_bf16(bits).astype(np.float64)

    def put_squares(self, num_rows: int) -> NDArray[np.float64]:
        """Random sums of squares; returns 1 / rms of each row."""
        config = self.runner.config
        parts = self.rng.uniform(10, 60, (num_rows, config.hidden // 32)).astype(np.float32)
        self.runner.set_workspace(SQUARES, parts)
        return 1 / np.sqrt(parts.astype(np.float64).sum(1, keepdims=True) / config.hidden + config.norm_eps)

    def tiled(self, workspace: int, num_rows: int, num_columns: int) -> NDArray[np.float32]:
        return f32_from_bf16(self.runner.workspace(workspace, np.uint16)[tiled_index(num_rows, num_columns)])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])
    yield case
    case.runner.close()


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def only(kind: OpKind, input_id: int | None = None) -> Any:
    def pick(ops: NDArray[np.void]) -> NDArray[np.void]:
        chosen = [i for i, op in enumerate(ops) if op["kind"] == kind and (input_id is None or op["input"] == input_id)]
        return ops[chosen[-1] :][:1]  # of the last layer

    return pick


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_embed(case: Case, num_rows: int) -> None:
    runner, config = case.runner, case.runner.config
    runner.poison_workspaces()
    requests = case.request(num_rows)
    runner.run(requests, ops=only(OpKind.EMBED))
    expected = case.tensors["model.embed_tokens.weight"][requests[0].tokens[3:]]
    hidden = runner.workspace(HIDDEN, np.float32).reshape(-1, config.hidden)[:num_rows]
    np.testing.assert_array_equal(hidden, expected.astype(np.float32))
    gain = case.gains["model.layers.0.input_layernorm.weight"]
    assert relative_error(case.tiled(NORMED, num_rows, config.hidden), expected * gain) < 3e-3
    squares = runner.workspace(SQUARES, np.float32).reshape(-1, config.hidden // 32)[:num_rows]
    assert relative_error(squares, (expected**2).reshape(num_rows, -1, 32).sum(2)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("source", ["attention", "activation"])
def test_project(case: Case, source: str, num_rows: int) -> None:
    runner, config = case.runner, case.runner.config
    runner.poison_workspaces()
    workspace, columns, name = {
        "attention": (ATTENTION, config.query_features, "self_attn.o_proj"),
        "activation": (ACTIVATION, config.intermediate, "mlp.down_proj"),
    }[source]
    last = config.num_layers - 1
    inputs = case.put_tiled(workspace, num_rows, columns)
    residual = case.rng.standard_normal((num_rows, config.hidden)).astype(np.float32)
    runner.set_workspace(HIDDEN, residual)
    input_id = int(abi.BufferId.ATTENTION if source == "attention" else abi.BufferId.ACTIVATION)
    runner.run(case.request(num_rows), ops=only(OpKind.PROJECT, input_id))
    expected = residual + inputs @ case.tensors[f"model.layers.{last}.{name}.weight"].T
    hidden = runner.workspace(HIDDEN, np.float32).reshape(-1, config.hidden)[:num_rows]
    assert relative_error(hidden, expected) < 1e-5  # fp32 accumulation
    gain_name = f"model.layers.{last}.post_attention_layernorm.weight" if source == "attention" else "model.norm.weight"
    assert relative_error(case.tiled(NORMED, num_rows, config.hidden), expected * case.gains[gain_name]) < 3e-3
    squares = runner.workspace(SQUARES, np.float32).reshape(-1, config.hidden // 32)[:num_rows]
    assert relative_error(squares, (expected**2).reshape(num_rows, -1, 32).sum(2)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gate_up(case: Case, num_rows: int) -> None:
    runner, config = case.runner, case.runner.config
    runner.poison_workspaces()
    normed = case.put_tiled(NORMED, num_rows, config.hidden) * case.put_squares(num_rows)
    runner.run(case.request(num_rows), ops=only(OpKind.GATE_UP))
    prefix = f"model.layers.{config.num_layers - 1}.mlp"
    gate, up = (normed @ case.tensors[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
    assert relative_error(case.tiled(ACTIVATION, num_rows, config.intermediate), gate / (1 + np.exp(-gate)) * up) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_qkv(case: Case, num_rows: int) -> None:
    runner, config = case.runner, case.runner.config
    runner.poison_workspaces()
    normed = case.put_tiled(NORMED, num_rows, config.hidden) * case.put_squares(num_rows)
    runner.run(case.request(num_rows), ops=only(OpKind.QKV))
    layer, head_dim = config.num_layers - 1, config.head_dim
    prefix = f"model.layers.{layer}.self_attn"
    positions = np.arange(3, 3 + num_rows)
    angles = positions[:, None] * (config.rope.theta ** (-np.arange(0, head_dim, 2) / head_dim))[None]

    def heads_of(name: str) -> NDArray[np.float64]:
        values = normed @ case.tensors[f"{prefix}.{name}_proj.weight"].T
        if f"{prefix}.{name}_proj.bias" in case.gains:
            values = values + case.gains[f"{prefix}.{name}_proj.bias"]
        values = values.reshape(num_rows, -1, head_dim)
        if name == "v":
            return values
        if config.qk_norm:
            values = (
                values
                / np.sqrt((values**2).mean(2, keepdims=True) + config.norm_eps)
                * case.gains[f"{prefix}.{name}_norm.weight"]
            )
        low, high = values[..., : head_dim // 2], values[..., head_dim // 2 :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)
        return turned[..., rotated_order(head_dim)]

    query = f32_from_bf16(runner.workspace(QUERY, np.uint16)).reshape(-1, config.num_heads, head_dim)[:num_rows]
    assert relative_error(query, heads_of("q")) < 3e-3
    pages = runner.page_tables[0][positions // abi.PAGE_TOKENS]
    stored = f32_from_bf16(
        runner.kv_pages()[layer][pages, :, :, positions % abi.PAGE_TOKENS]
    )  # [rows, kv_heads, 2, head_dim]
    assert relative_error(stored[:, :, 0], heads_of("k")) < 3e-3
    assert relative_error(stored[:, :, 1], heads_of("v")) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_samples", (1, 5, 64, 130))
def test_lm_head(case: Case, num_samples: int) -> None:
    runner, config = case.runner, case.runner.config
    runner.poison_workspaces()
    lengths = case.rng.integers(1, 8, num_samples)
    num_rows = int(lengths.sum())
    normed = case.put_tiled(NORMED, num_rows, config.hidden) * case.put_squares(num_rows)
    requests = [Request(case.rng.integers(0, config.vocab, n, dtype=np.uint32), 0, i) for i, n in enumerate(lengths)]
    runner.run(requests, ops=only(OpKind.LM_HEAD))
    expected = normed[np.cumsum(lengths) - 1] @ case.tensors["lm_head.weight"].T
    assert relative_error(runner.logits(num_samples), expected) < 1e-5
    for request in requests:
        runner.release(request.request_idx)


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_batch(case: Case) -> None:
    """A row's result is the same alone (narrow) and among 200 others (wide)."""
    runner, config = case.runner, case.runner.config
    normed = case.put_tiled(NORMED, 200, config.hidden)
    bits = runner.workspace(NORMED, np.uint16)
    squares = case.rng.uniform(10, 60, (200, config.hidden // 32)).astype(np.float32)
    runner.set_workspace(SQUARES, squares)
    runner.run(case.request(200), ops=only(OpKind.GATE_UP))
    together = case.tiled(ACTIVATION, 200, config.intermediate)
    for num_rows in (1, 9, 30, 64):
        for row in (0, 63, 64, 200 - num_rows):
            few = np.zeros(128 * config.hidden, np.uint16)
            few[tiled_index(num_rows, config.hidden)] = bits[tiled_index(200, config.hidden)[row : row + num_rows]]
            runner.set_workspace(NORMED, few)
            runner.set_workspace(SQUARES, squares[row : row + num_rows])
            runner.run(case.request(num_rows), ops=only(OpKind.GATE_UP))
            alone = case.tiled(ACTIVATION, num_rows, config.intermediate)
            np.testing.assert_array_equal(alone, together[row : row + num_rows])
    assert normed.shape[0] == 200
