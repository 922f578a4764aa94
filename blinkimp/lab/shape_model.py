"""A model folder of a published shape without its weights: config.json and a tokenizer of the right size, for engines that make weights up.

    write_llama_3_8b(folder)        then serve it with load_format dummy

Every id from 256 on decodes to a word of its own, so that a text protocol streams a piece for each token, whatever random weights say; the first 256
are bytes, so that any text can be encoded. Called by blinkimp/cli/evidence.py. Test: pytest tests/null/test_evidence_plan.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from blinkimp.lab.shapes import LLAMA_3_8B

NUM_BYTES: Final = 256
SERVED: Final[dict[str, Any]] = LLAMA_3_8B | {
    # Where transformers 5 has rope_theta.
    "rope_parameters": {"rope_type": "default", "rope_theta": LLAMA_3_8B["rope_theta"]},
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128254,
    "eos_token_id": 128255,
}


def write_llama_3_8b(folder: Path) -> int:
    """Returns the size of the vocabulary."""
    write_model(folder, SERVED)
    return int(SERVED["vocab_size"])


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """config.json, generation_config.json and a tokenizer; the last two ids begin and end a text."""
    folder.mkdir(parents=True, exist_ok=True)
    num_plain = config["vocab_size"] - 2
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: idx for idx, character in enumerate(alphabet)}
    vocabulary |= {f"\u0120t{idx}": idx for idx in range(NUM_BYTES, num_plain)}  # U+0120: the byte alphabet's space
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = "<|begin|>", "<|end|>"
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (begin, end)])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    files = {
        "config.json": config,
        "generation_config.json": {**ids, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
