"""The byte-level BPE tokenizer: training, its files, and documents as token arrays.

Who calls it: tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from embedded.corpus import SourceFile

END_OF_TEXT = "<|endoftext|>"  # before every document: the model learns how files start and where they end
END_OF_TEXT_ID = 0


def train_tokenizer(files: Sequence[SourceFile], vocab: int) -> tokenizers.Tokenizer:
    """Every byte has a token, so any text can be encoded; the other entries are merges seen in `files`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer, length=len(files))
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, expected {vocab}: the text is too small for that"
            " many merges; give a larger corpus or a smaller vocabulary"
        )
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise ValueError(f"{END_OF_TEXT} has id {tokenizer.token_to_id(END_OF_TEXT)}, expected {END_OF_TEXT_ID}")
    return tokenizer


def encode_files(tokenizer: tokenizers.Tokenizer, files: Sequence[SourceFile]) -> list[NDArray[np.int64]]:
    """One array a file, without the end-of-text token. Raises where decoding does not give the text back."""
    encoded = tokenizer.encode_batch([file.text for file in files], add_special_tokens=False)
    for file, encoding in zip(files[:50], encoded[:50], strict=True):
        if tokenizer.decode(encoding.ids, skip_special_tokens=False) != file.text:
            raise ValueError(f"{file.path} does not survive encoding and decoding; the tokenizer must be lossless")
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encoded]


def join_documents(documents: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """[num_tokens]: end-of-text, document, end-of-text, document, ..., end-of-text."""
    end = np.array([END_OF_TEXT_ID], dtype=np.int64)
    return np.concatenate([part for document in documents for part in (end, document)] + [end])


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_tokens: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
