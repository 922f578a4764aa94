#!/usr/bin/env python3
"""Makes a small random checkpoint of a supported family with `transformers`, as a Hugging Face folder: what the tests compare against.

    python tools/make_tiny_checkpoint.py llama3 /tmp/llama3 [--dtype float32] [--seed 0]

All parameters are random, norm gains and biases too (transformers would leave them 1 and 0, which hides mistakes).
Needs torch and transformers (pip install .[dev]). Called by tools/check_families.py, tests/host, tests/gpu.
Test: pytest tests/host/test_families.py
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Case:
    """One variation of a family. prompt_lengths: tokens of each request that the comparison runs."""

    family: str  # the transformers class prefix
    config: dict[str, Any] = field(default_factory=dict)
    prompt_lengths: tuple[int, ...] = (150, 9, 64, 97)
    max_shard_size: str = "5GB"


CASES: dict[str, Case] = {
    "llama2": Case("Llama", {"num_key_value_heads": 4}),
    "llama3": Case(
        "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, max_shard_size="100KB"
    ),
    "llama3.1": Case(
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 2048, "tie_word_embeddings": True},
        prompt_lengths=(1900, 300),
    ),
    "llama-linear-bias": Case(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "attention_bias": True},
    ),
    "llama-ragged": Case(
        "Llama", {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 18, "intermediate_size": 136}
    ),
    "mistral": Case("Mistral", {"sliding_window": 40}),
    "mistral-full": Case("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": Case("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
    "qwen3": Case("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-window": Case(
        "Qwen3",
        {
            "head_dim": 24,
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
}


def make_checkpoint(case: Case, folder: Path, dtype: str = "float32", seed: int = 0) -> Any:
    """Writes the folder; returns the model as torch.nn.Module, in eval mode, in dtype."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        config = getattr(transformers, f"{case.family}Config")(**{**SHAPE, **case.config})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{case.family}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                else:
                    parameter.copy_(noise * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0))
        model = model.to(getattr(torch, dtype)).eval()
        model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    return model


def load_widened(folder: Path) -> Any:
    """The checkpoint as an fp32 torch.nn.Module. Unlike module.float(), it keeps the rotary frequencies in full precision."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(CASES[arguments.case], arguments.folder, arguments.dtype, arguments.seed)
    print(
        f"{arguments.case}: {', '.join(sorted(path.name for path in arguments.folder.iterdir()))} in {arguments.folder}"
    )


if __name__ == "__main__":
    main()
