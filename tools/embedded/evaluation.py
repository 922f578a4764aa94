"""Measures of a model: loss over windows (validation), perplexity and bits per byte by file (held out), completions.

Who calls it: training.py (window_loss), tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embedded.corpus import SourceFile
from embedded.model import LlamaModel
from embedded.tokenizer import END_OF_TEXT_ID

WINDOW_BATCH = 32  # windows at a time: bounds the memory of their logits


@torch.no_grad()
def window_loss(model: LlamaModel, tokens: Tensor, window_tokens: int) -> float:
    """Mean nats a token over consecutive windows of tokens [num_tokens], in fp32; the rest at the end counts too."""
    width = min(window_tokens, len(tokens) - 1)
    num_windows = (len(tokens) - 1) // width
    rows = [tokens[i * width : (i + 1) * width + 1] for i in range(num_windows)]
    total, count = 0.0, 0
    for begin in range(0, num_windows, WINDOW_BATCH):
        batch = torch.stack(rows[begin : begin + WINDOW_BATCH])
        logits = model(batch[:, :-1])
        total += functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    rest = tokens[num_windows * width :]
    if len(rest) > 1:
        total += functional.cross_entropy(model(rest[None, :-1])[0], rest[1:], reduction="sum").item()
        count += len(rest) - 1
    return total / count


@torch.no_grad()
def document_nats(model: LlamaModel, document: NDArray[np.int64], device: torch.device) -> float:
    """-log probability of a whole document after one end-of-text token, in fp32.

    Windows of max_positions advance by half their width. Each token is scored once; past the first window it has at least
    half a window before it.
    """
    tokens = torch.tensor([END_OF_TEXT_ID, *document.tolist()], device=device)
    width = model.config.max_positions
    total, scored = 0.0, 1  # tokens before `scored` are done; the first is given
    begin = 0
    while scored < len(tokens):
        end = min(begin + width + 1, len(tokens))
        logits = model(tokens[None, begin : end - 1])[0]
        first = scored - begin - 1  # the row of logits that predicts token `scored`
        total += functional.cross_entropy(logits[first:], tokens[scored:end], reduction="sum").item()
        scored = end
        begin += width // 2
    return total


@dataclass
class FileScore:
    path: str
    sha256: str
    num_bytes: int
    num_tokens: int
    nats: float


def score_files(
    model: LlamaModel, files: Sequence[SourceFile], documents: Sequence[NDArray[np.int64]], device: torch.device
) -> list[FileScore]:
    return [
        FileScore(f.path, f.sha256, f.num_bytes, len(d), round(document_nats(model, d, device), 4))
        for f, d in zip(files, documents, strict=True)
    ]


def summarise(scores: Sequence[FileScore]) -> dict[str, float | int]:
    """Perplexity a token and bits a byte over all the text of the files together."""
    nats = sum(score.nats for score in scores)
    num_tokens = sum(score.num_tokens for score in scores)
    num_bytes = sum(score.num_bytes for score in scores)
    return {
        "num_files": len(scores),
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "loss_nats_per_token": round(nats / num_tokens, 5),
        "perplexity_per_token": round(math.exp(nats / num_tokens), 4),
        "bits_per_byte": round(nats / math.log(2) / num_bytes, 5),
    }


@torch.no_grad()
def complete(
    model: LlamaModel,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The prompt and what follows, up to the end-of-text token. No KV cache: a check, not a way to serve."""
    device = next(model.parameters()).device
    draws = torch.Generator(device=device).manual_seed(seed)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(max_tokens):
        window = torch.tensor([ids[-model.config.max_positions :]], device=device)
        logits = model(window)[0, -1].float()
        if temperature > 0:
            chosen = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draws))
        else:
            chosen = int(logits.argmax())
        if chosen == END_OF_TEXT_ID:
            break
        ids.append(chosen)
    return tokenizer.decode(ids, skip_special_tokens=False)
