"""What a Hugging Face config.json means to blinkimp: families, their parameters, and refusals.

`parse_config` turns the JSON of a supported architecture into a `ModelConfig`, or raises `UnsupportedModelError` with what was
found, what was expected and what is supported. Keys that are absent take the value that `transformers` gives them.
Called by host/checkpoint.py and host/program.py. Test: pytest tests/null/test_checkpoint_config.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

SUPPORTED: Final = (
    "Supported: LlamaForCausalLM (Llama 2, 3, 3.1 and kin; attention_bias), MistralForCausalLM (sliding_window), "
    "Qwen2ForCausalLM, Qwen3ForCausalLM (dense); silu; rope types default, linear, llama3; "
    "unquantized BF16, F16 or F32 weights in safetensors, one file or sharded."
)


class UnsupportedModelError(ValueError):
    """A checkpoint that cannot be served: unsupported, inconsistent or damaged."""


def refusal(what: str, got: object, expected: object, remedy: str = "") -> UnsupportedModelError:
    """The one form of every refusal: what, got, expected, remedy, and the list of what is supported."""
    hint = f" {remedy.rstrip('.')}." if remedy else ""
    return UnsupportedModelError(f"{what}: got {got}, expected {expected}.{hint} {SUPPORTED}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: rope_type is "default", "linear" (factor) or "llama3" (all members)."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of one of the supported families. `windows` has one entry per layer: sliding window in tokens, 0 = none."""

    architecture: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    rope: RopeConfig

    @property
    def query_features(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        return self.num_kv_heads * self.head_dim


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json. Raises UnsupportedModelError."""
    architecture = _architecture(raw)
    _refuse_foreign_features(raw)
    num_layers = _count(raw, "num_hidden_layers")
    hidden = _count(raw, "hidden_size")
    num_heads = _count(raw, "num_attention_heads")
    num_kv_heads = _count(raw, "num_key_value_heads", num_heads if architecture == "LlamaForCausalLM" else None)
    max_positions = _count(raw, "max_position_embeddings")
    if num_heads % num_kv_heads:
        raise refusal("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    # Mistral and Qwen2 have no such key: transformers ignores it there.
    attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and _flag(raw, "attention_bias")
    config = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(raw, architecture, hidden, num_heads),
        intermediate=_count(raw, "intermediate_size"),
        vocab=_count(raw, "vocab_size"),
        max_positions=max_positions,
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tied_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        output_bias=attention_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=WINDOW_RULES[architecture](raw, num_layers),
        rope=_rope(raw, max_positions),
    )
    if config.intermediate % 8:
        raise refusal("intermediate_size", config.intermediate, "a multiple of 8")
    return config


# ---- Architecture and what no supported architecture has ------------------------------------------------------------
def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in WINDOW_RULES:
        raise refusal("config.json architectures", names, f"one of {sorted(WINDOW_RULES)}")
    return names[0]


def _refuse_foreign_features(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config") is not None or raw.get("compression_config") is not None:
        method = raw.get("quantization_config") or raw.get("compression_config")
        name = method.get("quant_method", method) if isinstance(method, dict) else method
        raise refusal("quantization", name, "none", "Use the unquantized checkpoint of this model")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise refusal(f"mixture of experts ({key})", raw[key], "a dense model")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise refusal("hidden_act", activation, "silu")
    if _flag(raw, "mlp_bias"):
        raise refusal("mlp_bias", True, False)
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise refusal("partial_rotary_factor", raw["partial_rotary_factor"], 1.0)


# ---- Typed access ---------------------------------------------------------------------------------------------------
def _count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise refusal(f"config.json {key}", "nothing" if value is None else repr(value), "a positive integer")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None, where: str = "config.json") -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise refusal(f"{where} {key}", "nothing" if value is None else repr(value), "a positive number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise refusal(f"config.json {key}", repr(value), "true or false")
    return value


def _head_dim(raw: Mapping[str, Any], architecture: str, hidden: int, num_heads: int) -> int:
    if raw.get("head_dim") is None and architecture != "Qwen3ForCausalLM" and hidden % num_heads:
        raise refusal("hidden_size without head_dim", hidden, f"a multiple of num_attention_heads ({num_heads})")
    head_dim = _count(raw, "head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden // num_heads)
    if head_dim % 2:
        raise refusal("head_dim", head_dim, "an even number (rotary embedding turns pairs)")
    return head_dim


# ---- Sliding windows ------------------------------------------------------------------------------------------------
def _no_window(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    return (0,) * num_layers


def _window(raw: Mapping[str, Any]) -> int:
    """An absent key means 4096 (transformers' default of these families), null means none."""
    return 0 if raw.get("sliding_window", 4096) is None else _count(raw, "sliding_window", 4096)


def _mistral_window(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    return (_window(raw),) * num_layers


def _qwen_window(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    layer_types = raw.get("layer_types")
    uses_window = _flag(raw, "use_sliding_window")
    window = _window(raw) if uses_window else 0
    first = raw.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise refusal("config.json max_window_layers", "null" if first is None else repr(first), "an integer")
    if layer_types is None:
        return tuple(window if idx >= first else 0 for idx in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise refusal("config.json layer_types", layer_types, f"a list of num_hidden_layers ({num_layers}) names")
    for name in layer_types:
        if name not in ("full_attention", "sliding_attention"):
            raise refusal("config.json layer_types", name, "full_attention or sliding_attention")
        if name == "sliding_attention" and not window:
            got = "sliding_window null" if uses_window else "use_sliding_window false"
            raise refusal("layer_types with sliding_attention", got, "use_sliding_window true and a sliding_window")
    return tuple(window if name == "sliding_attention" else 0 for name in layer_types)


WINDOW_RULES: Final[dict[str, Callable[[Mapping[str, Any], int], tuple[int, ...]]]] = {
    "LlamaForCausalLM": _no_window,
    "MistralForCausalLM": _mistral_window,
    "Qwen2ForCausalLM": _qwen_window,
    "Qwen3ForCausalLM": _qwen_window,
}


# ---- Rotary embedding -----------------------------------------------------------------------------------------------
def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Accepts `rope_scaling` + `rope_theta` (transformers 4) and `rope_parameters` (transformers 5)."""
    parameters: Any = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise refusal("config.json rope_parameters", repr(parameters), "an object or null")
    for key, value in parameters.items():
        if isinstance(value, dict):
            raise refusal(f"config.json rope_parameters {key}", value, "one set of parameters for all layers")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise refusal("partial_rotary_factor", parameters["partial_rotary_factor"], 1.0)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    theta = _number(parameters, "rope_theta", _number(raw, "rope_theta", 10000.0), "rope_parameters")
    if rope_type == "default":
        return RopeConfig("default", theta)
    if rope_type == "linear":
        return RopeConfig("linear", theta, _number(parameters, "factor", None, "rope_parameters"))
    if rope_type != "llama3":
        raise refusal("rope type", repr(rope_type), "default, linear or llama3")
    key = "original_max_position_embeddings"
    original = parameters.get(key, raw.get(key))
    rope = RopeConfig(
        "llama3",
        theta,
        factor=_number(parameters, "factor", None, "rope_parameters"),
        low_freq_factor=_number(parameters, "low_freq_factor", None, "rope_parameters"),
        high_freq_factor=_number(parameters, "high_freq_factor", None, "rope_parameters"),
        original_max_positions=_count({key: original}, key, max_positions),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        expected = f"more than low_freq_factor ({rope.low_freq_factor})"
        raise refusal("rope high_freq_factor", rope.high_freq_factor, expected)
    return rope
