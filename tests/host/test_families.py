"""The CPU interpreter against `transformers`: random tiny checkpoints of each family, logits of every position, greedy tokens.

Run: pytest -rP tests/host/test_families.py (prints the error of each family; tools/check_families.py writes them down)
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: pip install .[dev]")
pytest.importorskip("transformers", reason="needs transformers: pip install .[dev]")

from blinkimp.host.checkpoint import read_eos_ids, read_model_config
from blinkimp.host.model_config import UnsupportedModelError
from blinkimp.host.program import load_model
from blinkimp.host.reference import Chunk, ReferenceRunner
from blinkimp.host.weights import HostTarget
from blinkimp.ring_abi import DType
from tests.support import load_tool

tiny = load_tool("make_tiny_checkpoint")
families = load_tool("check_families")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and transformers themselves


@pytest.mark.parametrize("name", list(tiny.CASES))
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    result = families.compare_case(name, tiny.CASES[name], tmp_path)
    print(f"{name}: max abs error {result.max_abs_error:.2e} of logits up to {result.max_abs_logit:.1f}")
    assert result.max_abs_error <= families.MAX_ERROR
    assert result.num_greedy_equal == result.num_greedy_tokens == 64 * len(tiny.CASES[name].prompt_lengths)
    assert result.max_abs_logit > 1.0, "logits this small would hide an error"


def test_the_cases_are_what_they_claim(tmp_path: Path) -> None:
    """Guards the comparison: a window wider than the prompts or a single shard would test nothing."""
    for name, case in tiny.CASES.items():
        folder = tmp_path / name
        tiny.make_checkpoint(case, folder)
        config = read_model_config(folder)
        if "window" in name or name == "mistral":
            assert 0 < max(config.windows) < max(case.prompt_lengths), name
        if name.endswith("window"):
            assert 0 in config.windows, f"{name}: full and sliding layers"
        if case.max_shard_size == "100KB":
            assert len(list(folder.glob("model-*.safetensors"))) > 1, name
            assert (folder / "model.safetensors.index.json").exists(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_are_widened_exactly(dtype: str, tmp_path: Path) -> None:
    """compute f32 on stored halves: as close to transformers in fp32 as an fp32 checkpoint is."""
    import torch

    tiny.make_checkpoint(tiny.CASES["qwen2"], tmp_path, dtype)
    reference = tiny.load_widened(tmp_path)
    model = load_model(tmp_path, HostTarget(), compute="f32")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, 90).tolist()
    got = ReferenceRunner(model, num_requests=1, max_batch=90).step([Chunk(0, tokens, sample="all")]).logits
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(got - expected).max() <= families.MAX_ERROR


def test_bf16_compute_stays_within_bf16_of_fp32(tmp_path: Path) -> None:
    """auto takes bf16 for a bf16 checkpoint. Three layers of rounding at 2^-9 move logits of spread 1 by some hundredths."""
    import torch

    tiny.make_checkpoint(tiny.CASES["llama3"], tmp_path, "bfloat16")
    reference = tiny.load_widened(tmp_path)
    model = load_model(tmp_path, HostTarget())
    assert model.compute == DType.BF16 and int(model.dims[0]["kv_dtype"]) == DType.BF16
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, 90).tolist()
    got = ReferenceRunner(model, num_requests=1, max_batch=90).step([Chunk(0, tokens, sample="all")]).logits
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    error = np.abs(got - expected)
    print(
        f"bf16: max abs error {error.max():.3f}, mean {error.mean():.4f}, of logits up to {np.abs(expected).max():.1f}"
    )
    assert 1e-4 < error.max() < 0.1, "no rounding at all, or too much"
    assert error.mean() < 0.015


def test_both_forms_of_rope_config_mean_the_same(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters; every checkpoint of before has rope_theta and rope_scaling."""
    tiny.make_checkpoint(tiny.CASES["llama3.1"], tmp_path)
    newer = read_model_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    raw["rope_scaling"] = scaling
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(tmp_path) == newer
    assert newer.rope.rope_type == "llama3" and newer.rope.theta == 500000.0


def test_eos_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    tiny.make_checkpoint(tiny.CASES["llama2"], tmp_path)
    assert read_eos_ids(tmp_path, 320) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 7]}))
    assert read_eos_ids(tmp_path, 320) == (7, 9)
    with pytest.raises(UnsupportedModelError, match=r"eos_token_id: got 9, expected an id below vocab_size \(8\)"):
        read_eos_ids(tmp_path, 8)


def test_a_tampered_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: one changed weight of 130,000 is seen."""
    import torch

    reference = tiny.make_checkpoint(tiny.CASES["qwen3"], tmp_path)
    with torch.no_grad():
        reference.model.layers[1].self_attn.q_norm.weight[3] += 0.05
    model = load_model(tmp_path, HostTarget())
    tokens = list(range(40))
    got = ReferenceRunner(model, num_requests=1).step([Chunk(0, tokens, sample="all")]).logits
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(got - expected).max() > families.MAX_ERROR
