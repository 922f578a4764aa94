"""The embedded model as it is packaged: complete, small, as good as stated, loadable by others, readable in its output.

Run: pytest tests/host/test_embedded_model.py      A missing or stale folder is made anew by tools/train_embedded.py.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "blinkimp" / "models" / "embedded"
MAX_WEIGHT_BYTES = 25_000_000
# What noise or a half-trained model cannot reach; trained models are well below.
MAX_PERPLEXITY = 12.0
MAX_BITS_PER_BYTE = 1.05


def read_json(name: str) -> Any:
    path = FOLDER / name
    assert path.is_file(), f"{path} is missing; train the model with: python3 tools/train_embedded.py"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def report() -> Any:
    return read_json("training_report.json")


@pytest.fixture(scope="module")
def loaded() -> Any:
    """(transformers model in fp32, its tokenizer)"""
    torch = pytest.importorskip("torch", reason="needs torch to run the checkpoint: pip install torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(FOLDER), dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(str(FOLDER))


def test_files_are_complete_and_those_of_the_report(report: Any) -> None:
    assert report["smoke"] is False
    assert (FOLDER / "MODEL_CARD.md").read_text().startswith("# The embedded model of blinkimp")
    assert report["file_bytes"] == {name: (FOLDER / name).stat().st_size for name in report["file_bytes"]}
    assert report["file_bytes"]["model.safetensors"] <= MAX_WEIGHT_BYTES


def test_weights_are_bf16_of_5_to_12_million_parameters(report: Any) -> None:
    with open(FOLDER / "model.safetensors", "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    num_parameters = sum(math.prod(entry["shape"]) for entry in header.values())
    assert num_parameters == report["num_parameters"]
    assert 5_000_000 <= num_parameters <= 12_000_000


def test_dimensions_suit_the_kernels() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] in (64, 128)
    assert config["num_key_value_heads"] < config["num_attention_heads"], "no grouped-query attention"
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    for name in ("vocab_size", "hidden_size", "intermediate_size"):
        assert config[name] % 64 == 0, name


def test_tokenizer_covers_the_vocabulary_and_loses_nothing() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    config = read_json("config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    assert config["eos_token_id"] == read_json("generation_config.json")["eos_token_id"]
    text = "def f(x):\n\treturn {'\u00e9': x}  # \u4e2d\U0001f600\r\n" + "".join(map(chr, range(1, 128)))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("        return self.value\n").ids) <= 7, "indentation should be one token"


def test_recorded_perplexity_is_consistent_and_good(report: Any) -> None:
    scores, whole = report["held_out_files"], report["held_out"]["all"]
    nats, num_tokens = sum(s["nats"] for s in scores), sum(s["num_tokens"] for s in scores)
    num_bytes = sum(s["num_bytes"] for s in scores)
    assert num_tokens > 100_000, "too little held-out text to mean anything"
    assert whole["perplexity_per_token"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-3)
    assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-3)
    assert whole["perplexity_per_token"] <= MAX_PERPLEXITY
    assert whole["bits_per_byte"] <= MAX_BITS_PER_BYTE
    assert report["corpus"]["licence"]


def test_recorded_loss_of_the_quoted_file_is_reproduced(report: Any, loaded: Any) -> None:
    import torch

    model, tokenizer = loaded
    sample = report["held_out_sample"]
    assert hashlib.sha256(sample["text"].encode()).hexdigest() == sample["sha256"]
    ids = tokenizer(sample["text"], add_special_tokens=False)["input_ids"]
    assert len(ids) == sample["num_tokens"] < model.config.max_position_embeddings
    tokens = torch.tensor([[model.config.eos_token_id, *ids]])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0]
    nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    assert nats == pytest.approx(sample["nats"], rel=2e-3)


def longest_parsing_prefix(code: str) -> ast.Module:
    """A completion ends anywhere: whole lines are dropped from its end until the rest is a module."""
    lines = code.splitlines()
    for count in range(len(lines), 0, -1):
        try:
            return ast.parse("\n".join(lines[:count]))
        except SyntaxError:
            continue
    return ast.Module(body=[], type_ignores=[])


# A prompt does not end in a line break: the tokenizer's entries join it with the next line's indentation.
@pytest.mark.parametrize("prompt", ["def read_file(path):", "def read_file(path):\n    with open(path) as f:"])
def test_greedy_completion_is_readable_python(prompt: str, loaded: Any) -> None:
    import torch

    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    parsed = longest_parsing_prefix(text)
    functions = [node for node in parsed.body if isinstance(node, ast.FunctionDef)]
    assert functions, f"no function can be parsed out of:\n{text}"
    assert functions[0].name == "read_file", text
    statements = [node for node in ast.walk(functions[0]) if isinstance(node, ast.stmt)]
    names = {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name)}
    assert len(statements) >= 3, f"hardly a body:\n{text}"
    assert names, f"nothing but literals:\n{text}"
