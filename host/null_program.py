"""The null program: no weights, no arithmetic, a token for every running request at a set rate (`load_format="null"`).

It measures what is around a model: director, rings, ingresses and clients are the real ones. Tokens are drawn from those of the model's
vocabulary that are whole text by themselves, so that every token streams some. Only the emulated device runs it.
Called by host/program.py. Test: pytest tests/host/test_null_program.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from blinkimp.host.model_config import refusal
from blinkimp.ring_abi import MAX_TOP_LOGPROBS, OP, OpKind

REPLACEMENT = "\ufffd"  # what half a character decodes to


def null_ops(table: NDArray[np.uint32], step_ns: int) -> NDArray[np.void]:
    """[1] OP. The caller keeps `table`, as long as the engine runs."""
    op = np.zeros(1, OP)
    op["kind"], op["out_features"], op["weight"] = OpKind.NULL, len(table), table.ctypes.data
    op["step_ns"] = step_ns
    return op


def null_tokens(folder: Path, vocab: int, eos_ids: Sequence[int]) -> NDArray[np.uint32]:
    """Token ids to draw from: whole text each; without a tokenizer all of the vocabulary. None of them ends a request."""
    ids: NDArray[np.uint32] = np.setdiff1d(np.arange(vocab, dtype=np.uint32), np.asarray(eos_ids, dtype=np.uint32))
    path = folder / "tokenizer.json"
    if path.is_file():
        texts = Tokenizer.from_file(str(path)).decode_batch([[token] for token in ids.tolist()])
        ids = ids[[bool(text) and REPLACEMENT not in text for text in texts]]
    if len(ids) < MAX_TOP_LOGPROBS:
        raise refusal(
            "load_format=null: tokens that are text", len(ids), f"at least {MAX_TOP_LOGPROBS}", "Use another tokenizer"
        )
    return ids
