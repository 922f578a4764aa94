"""The checkpoint folder: bf16 weights, config, tokenizer, generation defaults; and its check.

Who calls it: tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py, tests/host/test_embedded_model.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from embedded.model import LlamaModel, ModelConfig
from embedded.tokenizer import END_OF_TEXT_ID, write_tokenizer

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
MAX_LOGIT_ERROR = 1e-4  # fp32 on both sides; the order of summation is all that differs


def round_to_bf16(model: LlamaModel) -> None:
    """In place: what is measured after this is what the file holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def write_checkpoint(model: LlamaModel, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.named_parameters()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file makes it 0600, and a package is read by all
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model.config), indent=2) + "\n")
    generation = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(tokenizer, folder, model.config.max_positions)


def verify_checkpoint(model: LlamaModel, tokenizer: tokenizers.Tokenizer, folder: Path) -> float:
    """Loads the folder with transformers; the largest logit error. Raises where logits or token ids disagree.

    `model` must hold bf16-rounded weights (round_to_bf16).
    """
    import transformers  # late: it takes seconds, and the other functions here do without

    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    text = 'import os\n\n\ndef read_file(path):\n    """Return the contents of a file."""\n    with open(path) as f:\n'
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))(text, add_special_tokens=False)["input_ids"]
    if list(theirs) != ids:
        raise RuntimeError(f"transformers tokenises the check text to {theirs}, this tool to {ids}")
    tokens = torch.tensor([[END_OF_TEXT_ID, *ids]])
    device = next(model.parameters()).device
    model.eval().to("cpu")
    with torch.no_grad():
        error = float((loaded(tokens).logits - model(tokens)).abs().max())
    model.to(device)
    if not error <= MAX_LOGIT_ERROR:
        raise RuntimeError(
            f"the exported checkpoint's logits under transformers differ by {error:.3g}, expected at most"
            f" {MAX_LOGIT_ERROR}: the export or the model definition is wrong"
        )
    return error
