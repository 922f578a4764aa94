"""config.json of each family: defaults as in transformers, both rope forms, and refusals of what cannot be served.

Run: pytest tests/null/test_checkpoint_config.py
"""

from __future__ import annotations

from typing import Any

import pytest

from blinkimp.host.model_config import SUPPORTED, ModelConfig, RopeConfig, UnsupportedModelError, parse_config
from tests.checkpoint_support import CONFIG


def parsed(architecture: str = "Llama", **changes: Any) -> ModelConfig:
    config = {**CONFIG, "architectures": [f"{architecture}ForCausalLM"], **changes}
    return parse_config({key: value for key, value in config.items() if value != "absent"})


def test_llama_defaults() -> None:
    config = parsed(num_key_value_heads="absent", rms_norm_eps="absent")
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 8, 1e-6)
    assert config.windows == (0, 0) and config.rope == RopeConfig("default", 10000.0)
    assert not (config.tied_embeddings or config.qkv_bias or config.output_bias or config.qk_norm)
    assert (config.query_features, config.kv_features) == (32, 32)


def test_biases_and_norms_per_family() -> None:
    assert parsed("Llama", attention_bias=True).output_bias and parsed("Llama", attention_bias=True).qkv_bias
    assert parsed("Qwen2").qkv_bias and not parsed("Qwen2").output_bias
    assert not parsed("Qwen2", attention_bias=True).output_bias, "transformers ignores the key in this family"
    assert not parsed("Mistral", attention_bias=True).qkv_bias, "transformers ignores the key in this family"
    qwen3 = parsed("Qwen3", attention_bias=True)
    assert qwen3.qk_norm and qwen3.qkv_bias and qwen3.output_bias and qwen3.head_dim == 128
    assert parsed("Qwen3", head_dim=16).head_dim == 16


def test_windows() -> None:
    assert parsed("Mistral").windows == (4096, 4096), "an absent key takes the family's default"
    assert parsed("Mistral", sliding_window=None).windows == (0, 0)
    assert parsed("Mistral", sliding_window=7).windows == (7, 7)
    assert parsed("Llama", sliding_window=7).windows == (0, 0)
    sliding = {"use_sliding_window": True, "sliding_window": 9}
    for family in ("Qwen2", "Qwen3"):
        assert parsed(family, sliding_window=9).windows == (0, 0), "use_sliding_window decides"
        assert parsed(family, **sliding, max_window_layers=1).windows == (0, 9)
        assert parsed(family, **sliding).windows == (0, 0), "max_window_layers is 28 by default"
        assert parsed(family, **(sliding | {"sliding_window": None}), max_window_layers=0).windows == (0, 0)
        assert parsed(family, use_sliding_window=True, max_window_layers=-1).windows == (4096, 4096)
        assert parsed(family, **sliding, layer_types=["sliding_attention", "full_attention"]).windows == (9, 0)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig("default", 5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig("default", 5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig("default", 5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig("linear", 5e5, 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}}, RopeConfig("linear", 1e4, 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64),
        ),
    ],
)
def test_both_rope_forms(changes: dict[str, Any], expected: RopeConfig) -> None:
    assert parsed(**changes).rope == expected


@pytest.mark.parametrize(
    ("architecture", "changes", "parts"),
    [
        ("GPT2LMHeadModel", {}, ["config.json architectures", "got ['GPT2LMHeadModelForCausalLM']"]),
        ("Llama", {"architectures": None}, ["config.json architectures: got None"]),
        ("Llama", {"architectures": ["LlamaModel"]}, ["LlamaModel"]),
        ("Llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization: got gptq", "Use the unquantized"]),
        ("Qwen3", {"num_experts": 8}, ["mixture of experts (num_experts): got 8"]),
        ("Mistral", {"num_local_experts": 8}, ["mixture of experts"]),
        ("Llama", {"hidden_act": "gelu"}, ["hidden_act: got gelu, expected silu"]),
        ("Llama", {"mlp_bias": True}, ["mlp_bias: got True"]),
        ("Llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor: got 0.5"]),
        ("Llama", {"hidden_size": "absent"}, ["hidden_size: got nothing, expected a positive integer"]),
        ("Llama", {"vocab_size": 0}, ["vocab_size: got 0"]),
        ("Llama", {"num_hidden_layers": "2"}, ["num_hidden_layers: got '2'"]),
        ("Llama", {"num_hidden_layers": True}, ["num_hidden_layers: got True"]),
        ("Qwen2", {"num_key_value_heads": "absent"}, ["num_key_value_heads: got nothing"]),
        (
            "Llama",
            {"num_key_value_heads": 3},
            ["num_key_value_heads: got 3, expected a divisor of num_attention_heads (4)"],
        ),
        ("Llama", {"hidden_size": 34}, ["hidden_size without head_dim: got 34"]),
        ("Llama", {"head_dim": 7}, ["head_dim: got 7, expected an even number"]),
        ("Llama", {"intermediate_size": 50}, ["intermediate_size: got 50, expected a multiple of 8"]),
        ("Llama", {"rms_norm_eps": -1}, ["rms_norm_eps: got -1"]),
        ("Llama", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings: got 'yes'"]),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
            ["rope type: got 'yarn', expected default, linear or llama3"],
        ),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 4}}, ["rope type: got 'dynamic'"]),
        ("Llama", {"rope_scaling": {"type": "linear"}}, ["rope_parameters factor: got nothing"]),
        ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor: got nothing"]),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            ["high_freq_factor: got 1.0"],
        ),
        ("Llama", {"rope_scaling": "linear"}, ["rope_parameters: got 'linear'"]),
        (
            "Llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["one set of parameters for all layers"],
        ),
        ("Qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers (2)"]),
        ("Qwen2", {"layer_types": ["full_attention", "linear_attention"]}, ["got linear_attention"]),
        ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["use_sliding_window false"]),
        (
            "Qwen2",
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": None,
            },
            ["sliding_window null"],
        ),
        ("Qwen2", {"max_window_layers": None}, ["max_window_layers: got null, expected an integer"]),
        ("Qwen3", {"max_window_layers": "2"}, ["max_window_layers: got '2', expected an integer"]),
        ("Llama", {"architectures": [["LlamaForCausalLM"]]}, ["architectures: got [['LlamaForCausalLM']]"]),
        ("Mistral", {"sliding_window": 0}, ["sliding_window: got 0"]),
    ],
)
def test_refusals(architecture: str, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parsed(architecture, **changes)
    message = str(caught.value)
    assert message.endswith(SUPPORTED) and ": got " in message and ", expected " in message
    for part in parts:
        assert part in message
