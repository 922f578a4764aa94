"""The program that the builder makes of each family's checkpoint: ops, shapes, addresses, progress.

Run: pytest tests/null/test_checkpoint_program.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp.host.model_config import UnsupportedModelError
from blinkimp.host.program import BUILDERS, Model, load_model
from blinkimp.host.weights import MatrixSource, PlacedMatrix
from blinkimp.ring_abi import BufferId, DType, OpKind
from tests.checkpoint_support import CONFIG, random_tensors, write_checkpoint, write_config

LAYER = [OpKind.QKV, OpKind.ATTENTION, OpKind.PROJECT, OpKind.GATE_UP, OpKind.PROJECT]


class RecordingTarget:
    """Hands out made-up addresses and remembers what they stand for; packs like a GPU's target would."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.matrices: list[MatrixSource] = []
        self.vectors: dict[str, NDArray[np.float32]] = {}

    def place_matrix(self, source: MatrixSource) -> PlacedMatrix:
        self.matrices.append(source)
        is_embedding = source.kind == OpKind.EMBED
        address = self._address(f"{source.name} for {source.kind.name}")
        return PlacedMatrix(address) if is_embedding else PlacedMatrix(address, 1, 32, -(-source.out_features // 32))

    def place_f32(self, name: str, values: NDArray[np.float32]) -> int:
        self.vectors[name] = values
        return self._address(name)

    def _address(self, name: str) -> int:
        address = 4096 * (len(self.names) + 1)
        self.names[address] = name
        return address


def build(folder: Path, **options: Any) -> tuple[Model, RecordingTarget]:
    target = RecordingTarget()
    return load_model(folder, target, **options), target


def named(target: RecordingTarget, address: np.uint64) -> str:
    return target.names[int(address)] if address else ""


def test_ops_of_a_llama(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model, target = build(tmp_path)
    kinds = [OpKind(kind) for kind in model.ops["kind"]]
    assert kinds == [OpKind.EMBED, *LAYER, *LAYER, OpKind.LM_HEAD, OpKind.SAMPLE]
    assert model.ops["layer"][1:11].tolist() == [0] * 5 + [1] * 5
    shapes = list(zip(model.ops["out_features"].tolist(), model.ops["in_features"].tolist(), strict=True))
    assert shapes == [(40, 32), *[(64, 32), (32, 32), (32, 32), (96, 32), (32, 48)] * 2, (40, 32), (0, 40)]
    inputs = [BufferId(value) for value in model.ops["input"]]
    assert inputs[1:6] == [BufferId.HIDDEN, BufferId.QUERY, BufferId.ATTENTION, BufferId.HIDDEN, BufferId.ACTIVATION]
    assert named(target, model.ops[9]["norm"]) == "model.layers.1.post_attention_layernorm.weight"
    assert named(target, model.ops[10]["weight"]) == "model.layers.1.mlp.down_proj.weight for PROJECT"
    assert named(target, model.ops[6]["rope"]) == "rope" and target.vectors["rope"].shape == (128, 4, 2)
    assert set(model.ops["weight_dtype"].tolist()) == {int(DType.F32)}


def test_packed_layout_reaches_the_op(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    ops = build(tmp_path)[0].ops
    assert (ops[0]["weight_layout"], ops[1]["weight_layout"]) == (0, 1)
    assert (ops[1]["tile_rows"], ops[1]["num_tiles"]) == (32, 2)


def test_each_producer_knows_the_norm_that_reads_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model, target = build(tmp_path)
    next_norms = [named(target, op["next_norm"]) for op in model.ops if op["kind"] in (OpKind.EMBED, OpKind.PROJECT)]
    assert next_norms == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    ]


def test_dims(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_tensors(CONFIG, "BF16"), eos_token_id=[3, 7])
    dims = build(tmp_path)[0].dims[0]
    names = ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate", "vocab")
    assert [int(dims[name]) for name in names] == [2, 32, 4, 2, 8, 48, 40]
    assert (dims["kv_dtype"], dims["round_bf16"], dims["num_eos_ids"]) == (DType.BF16, 1, 2)
    assert dims["eos_ids"].tolist() == [3, 7, 0, 0, 0, 0, 0, 0]
    assert dims["attention_scale"] == np.float32(8**-0.5) and dims["norm_eps"] == np.float32(1e-5)
    mixed = build(tmp_path, compute="f32", kv_dtype=DType.BF16)[0].dims[0]
    assert (mixed["kv_dtype"], mixed["round_bf16"]) == (DType.BF16, 0)


def test_biases_windows_and_norms_per_family(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "qwen2", architectures=["Qwen2ForCausalLM"])
    model, target = build(tmp_path / "qwen2")
    assert named(target, model.ops[1]["bias"]) == "model.layers.0.self_attn.qkv.bias"
    assert target.vectors["model.layers.0.self_attn.qkv.bias"].shape == (64,)
    assert not model.ops[3]["bias"] and not model.ops[1]["q_norm"]
    write_checkpoint(tmp_path / "llama", attention_bias=True)
    model, target = build(tmp_path / "llama")
    assert model.ops[1]["bias"] and named(target, model.ops[3]["bias"]) == "model.layers.0.self_attn.o_proj.bias"
    write_checkpoint(tmp_path / "qwen3", architectures=["Qwen3ForCausalLM"], head_dim=16)
    model, target = build(tmp_path / "qwen3")
    assert named(target, model.ops[6]["k_norm"]) == "model.layers.1.self_attn.k_norm.weight"
    write_checkpoint(tmp_path / "mistral", architectures=["MistralForCausalLM"], sliding_window=11)
    model, _ = build(tmp_path / "mistral")
    assert [int(op["window"]) for op in model.ops if op["kind"] == OpKind.ATTENTION] == [11, 11]
    assert set(BUILDERS) == {f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    _, target = build(tmp_path)
    first, last = target.matrices[0], target.matrices[-1]
    assert (first.kind, last.kind) == (OpKind.EMBED, OpKind.LM_HEAD)
    assert first.parts == last.parts


@pytest.mark.parametrize("is_tied", [False, True])
def test_progress_ends_at_the_total(tmp_path: Path, is_tied: bool) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=is_tied)
    reports: list[tuple[int, int]] = []
    model, _ = build(tmp_path, progress=lambda done, total: reports.append((done, total)))
    done = [report[0] for report in reports]
    assert done == sorted(done) and len(reports) == 10
    assert reports[-1] == (model.weight_bytes, model.weight_bytes)
    assert len({report[1] for report in reports}) == 1


def test_dummy_needs_the_config_alone(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    model, target = build(tmp_path, load_format="dummy", seed=3)
    assert model.compute == DType.BF16 and len(model.ops) == 13
    again = build(tmp_path, load_format="dummy", seed=3)[1]
    assert np.array_equal(target.matrices[3].read_rows(0, 16), again.matrices[3].read_rows(0, 16))


@pytest.mark.parametrize("max_context", [0, 129])
def test_context_beyond_the_model_is_refused(tmp_path: Path, max_context: int) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=rf"max_context: got {max_context}, expected 1 to max_position_embeddings \(128\)"
    ):
        build(tmp_path, max_context=max_context)
    assert build(tmp_path, max_context=64)[1].vectors["rope"].shape[0] == 64
