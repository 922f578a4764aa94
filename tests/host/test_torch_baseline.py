"""tools/torch_llama.py against transformers, a decode step against the prefill of the same tokens, and the tool on the CPU.

Run: pytest tests/host/test_torch_baseline.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, load_tool

torch = pytest.importorskip("torch", reason="torch is a development dependency")
sys.path.insert(0, str(ROOT / "tools"))

from torch_llama import Dims, Step, Weights  # noqa: E402  (the path above comes first)

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
NUM_TOKENS = 11


def step_of(dims: Dims, weights: Weights, num_tokens: int, batch: int = 1) -> Step:
    return Step(
        dims, weights, batch=batch, num_tokens=num_tokens, num_attended=NUM_TOKENS, compiler=lambda function: function
    )


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture()
def model() -> tuple[Dims, Weights]:
    torch.manual_seed(3)
    dims = Dims.of(CONFIG)
    return dims, Weights(dims, "cpu", torch.float32)


def test_next_ids_are_those_of_transformers(model: tuple[Dims, Weights]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dims, weights = model
    rope = {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]}
    config = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    theirs = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope, attn_implementation="eager")).eval()
    q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(weights.embedding)
        theirs.lm_head.weight.copy_(weights.head)
        for layer, ours in zip(theirs.model.layers, weights.layers, strict=True):
            for name, part in zip("qkv", ours.qkv.split((q, kv, kv)), strict=True):
                getattr(layer.self_attn, f"{name}_proj").weight.copy_(part)
            layer.self_attn.o_proj.weight.copy_(ours.output)
            layer.mlp.gate_proj.weight.copy_(ours.gate_up[: dims.intermediate])
            layer.mlp.up_proj.weight.copy_(ours.gate_up[dims.intermediate :])
            layer.mlp.down_proj.weight.copy_(ours.down)
        for seed in range(4):
            torch.manual_seed(seed)
            step = step_of(dims, weights, NUM_TOKENS, batch=3)
            step.run()
            logits = theirs(step.ids).logits[:, -1]
            assert step.next_ids.tolist() == logits.argmax(-1).tolist()


def test_a_decode_step_continues_the_cache_of_a_prefill(model: tuple[Dims, Weights]) -> None:
    """The last token as a decode step, over the cache that a prefill of all tokens wrote but for the last position."""
    prefill, decode = step_of(*model, NUM_TOKENS), step_of(*model, 1)
    prefill.run()
    for ours, theirs in zip(decode._caches, prefill._caches, strict=True):
        for cache, filled in zip(ours, theirs, strict=True):
            cache[:, :, :-1] = filled[:, :, :-1]
    decode.ids.copy_(prefill.ids[:, -1:])
    decode.run()
    assert decode.next_ids.tolist() == prefill.next_ids.tolist()
    assert decode.ids[:, 0].tolist() == decode.next_ids.tolist()  # fed back to the next step


def test_a_prefill_that_does_not_begin_at_zero_is_refused(model: tuple[Dims, Weights]) -> None:
    with pytest.raises(ValueError, match="begins at position 0"):
        step_of(*model, 5)


def test_the_tool_measures_rows_and_names_its_variant(tmp_path: Path) -> None:
    """torch.compile with a backend that needs no compiler; then the same rows with its budget used up."""
    tool, out = load_tool("torch_baseline"), tmp_path / "torch.json"
    flags = ["--shape", "embedded", "--device", "cpu", "--seconds", "0.02", "--min-runs", "5", "--out", str(out)]
    assert tool.main([*flags, "--rows", "d2@24,p16", "--backend", "eager", "--matrix-rate"]) == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["d2@24", "p16"] and report["errors"] == []
    assert {row["variant"] for row in report["rows"]} == {"torch.compile(eager, default)"}
    assert all(row["device"]["n"] >= 5 and row["client"]["median_ms"] > 0 for row in report["rows"])
    assert report["operations_per_s"] > 0
    assert tool.main([*flags, "--rows", "d1@24", "--compile-budget-s", "0"]) == 0
    assert json.loads(out.read_text())["rows"][0]["variant"] == "graph of eager operations"


def test_a_row_that_fails_is_told_and_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, out = load_tool("torch_baseline"), tmp_path / "torch.json"
    make_step = tool.Step

    def step(*arguments: Any, **sizes: Any) -> Step:
        if sizes["batch"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return make_step(*arguments, **sizes)  # type: ignore[no-any-return]

    monkeypatch.setattr(tool, "Step", step)
    flags = ["--shape", "embedded", "--device", "cpu", "--seconds", "0.01", "--backend", "none", "--out", str(out)]
    assert tool.main([*flags, "--rows", "d3@16,d1@16"]) == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["d1@16"]
    assert report["errors"] == [{"name": "d3@16", "error": "CUDA out of memory. Tried to allocate 9 GiB"}]
