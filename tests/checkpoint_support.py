"""Checkpoint folders made without any framework, whole or broken on purpose. Used by tests/null/test_checkpoint*.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32

Tensors = dict[str, NDArray[Any]]  # float32, float16, or uint16 that holds bf16

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-shaped checkpoint with this config."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    architecture = config["architectures"][0]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (query, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, query),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
        if architecture == "Qwen2ForCausalLM" or config.get("attention_bias"):
            rows = {"q_proj": query, "k_proj": kv, "v_proj": kv}
            shapes |= {f"{prefix}.self_attn.{name}.bias": (num,) for name, num in rows.items()}
        if config.get("attention_bias"):
            shapes[f"{prefix}.self_attn.o_proj.bias"] = (hidden,)
        if architecture == "Qwen3ForCausalLM":
            shapes |= {f"{prefix}.self_attn.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(config: Mapping[str, Any], dtype: str = "F32") -> Tensors:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
    if dtype == "BF16":
        return {name: bf16_from_f32(value) for name, value in values.items()}
    return {name: value.astype(np.float16 if dtype == "F16" else np.float32) for name, value in values.items()}


def safetensors_bytes(tensors: Tensors) -> bytes:
    """The file, written by hand from the format's description, so that the reader is not tested against itself."""
    names = {
        np.dtype(np.uint16): "BF16",
        np.dtype(np.float16): "F16",
        np.dtype(np.float32): "F32",
        np.dtype(np.int8): "I8",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, value in tensors.items():
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + value.nbytes],
        }
        body += value.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path, tensors: Tensors | None = None, num_shards: int = 0, **changes: Any) -> Tensors:
    """A folder with CONFIG as changed; 0 shards: one file. Returns the tensors."""
    config = {**CONFIG, **changes}
    write_config(folder, config)
    tensors = random_tensors(config) if tensors is None else tensors
    if not num_shards:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return tensors
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        (folder / file_name).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors
