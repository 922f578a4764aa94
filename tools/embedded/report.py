"""What a training run says of itself: training_report.json and MODEL_CARD.md.

Who calls it: tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py, tests/host/test_embedded_model.py
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from embedded.corpus import Corpus, SourceFile
from embedded.evaluation import FileScore, summarise
from embedded.model import ModelConfig
from embedded.training import TrainingPlan, TrainingResult

QUOTED_TOKENS = range(
    400, 2000
)  # size of the held-out file that the report quotes: one window, for a test to score again


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def repeat_command(plan: TrainingPlan, result: TrainingResult, config: ModelConfig, smoke: bool) -> str:
    """The command that lays out the same schedule again, on whatever machine."""
    return (
        f"python3 tools/train_embedded.py --steps {result.num_steps} --batch-windows {plan.batch_windows}"
        f" --peak-rate {plan.peak_rate} --dropout {config.dropout} --seed {plan.seed}{' --smoke' if smoke else ''}"
    )


def summarise_splits(files: Sequence[SourceFile], scores: Sequence[FileScore]) -> dict[str, dict[str, float | int]]:
    """All held-out files, and the library's own code and its tests apart (where there are any)."""
    parts = {"all": list(scores), "library": [], "tests": []}
    for file, score in zip(files, scores, strict=True):
        parts["tests" if file.is_test else "library"].append(score)
    return {name: summarise(members) for name, members in parts.items() if members}


def quoted_file(files: Sequence[SourceFile], scores: Sequence[FileScore]) -> dict[str, Any]:
    """The shortest library file of a suitable size, with its text; the shortest of all where the corpus is tiny."""
    pairs = zip(files, scores, strict=True)
    file, score = min(pairs, key=lambda p: (p[1].num_tokens not in QUOTED_TOKENS, p[0].is_test, p[1].num_tokens))
    return {**asdict(score), "text": file.text}


def build_report(
    *,
    commit: str,
    smoke: bool,
    device: torch.device,
    corpus: Corpus,
    splits: dict[str, list[SourceFile]],
    num_train_tokens: int,
    config: ModelConfig,
    plan: TrainingPlan,
    result: TrainingResult,
    scores: Sequence[FileScore],
    completions: list[dict[str, str]],
    logit_error: float,
    num_parameters: int,
    file_bytes: dict[str, int],
) -> dict[str, Any]:
    num_tokens = result.num_steps * plan.batch_windows * plan.window_tokens
    return {
        "command": repeat_command(plan, result, config, smoke),
        "commit": commit,
        "smoke": smoke,
        "device": device_name(device),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "num_parameters": num_parameters,
        "model": asdict(config),
        "corpus": {
            "name": corpus.name,
            "python_version": corpus.python_version,
            "licence": corpus.licence,
            "num_files": len(corpus.files),
            "num_bytes": corpus.num_bytes,
            "num_train_files": len(splits["train"]),
            "num_train_bytes": sum(file.num_bytes for file in splits["train"]),
            "num_train_tokens": num_train_tokens,
            "num_validation_files": len(splits["validation"]),
        },
        "training": {
            **asdict(plan),
            **asdict(result),
            "num_tokens": num_tokens,
            "epochs": round(num_tokens / num_train_tokens, 2),
            "tokens_per_s": round(num_tokens / result.seconds),
        },
        "held_out": summarise_splits(splits["held_out"], scores),
        "held_out_files": [asdict(score) for score in scores],
        "held_out_sample": {**quoted_file(splits["held_out"], scores), "licence": corpus.licence},
        "transformers_logit_error": logit_error,
        "completions": completions,
        "file_bytes": file_bytes,
    }


def model_card(report: dict[str, Any]) -> str:
    """MODEL_CARD.md: what the model is, from which text, how good, and what it is not for."""
    corpus, training, model = report["corpus"], report["training"], report["model"]
    weight_mb = report["file_bytes"]["model.safetensors"] / 1e6
    rows = "\n".join(
        f"| {part}, {m['num_files']} | {m['num_tokens']:,} | {m['perplexity_per_token']:.3f} | {m['bits_per_byte']:.4f} |"
        for part, m in report["held_out"].items()
    )
    samples = "\n\n".join(f"```python\n{c['greedy'].rstrip()}\n```" for c in report["completions"][:3])
    return f"""# The embedded model of blinkimp

A small language model of Python source code, so that an installation can serve something real without a download.
Llama architecture, {report["num_parameters"] / 1e6:.2f} M parameters ({model["num_layers"]} layers, width {model["hidden"]},
{model["num_heads"]} heads, {model["num_kv_heads"]} KV heads), byte-level BPE of {model["vocab"]} entries, context of
{model["max_positions"]} tokens, {weight_mb:.1f} MB of bf16 weights. It is a base model: it continues text. It follows no
instructions, is no chat model, and what it writes looks like Python but is not to be relied upon.

## Text
{corpus["name"]}: {corpus["num_files"]} files, {corpus["num_bytes"] / 1e6:.1f} MB, {corpus["num_train_tokens"]:,} training
tokens. Code, comments, docstrings and the library's tests as they are; tables of data and repeated files left out.
Licence of the text: {corpus["licence"]}. Copyright (c) 2001 Python Software Foundation; All Rights Reserved.
`training_report.json` quotes one held-out file under the same licence.

## Training
`{report["command"]}`

{training["num_steps"]} steps of {training["batch_windows"]} windows of {training["window_tokens"]} tokens
({training["epochs"]:.0f} passes over the text) in {training["seconds"]:.0f} s on {report["device"]}, torch
{report["torch_version"]}. The checkpoint holds the averaged weights with the best validation loss
(step {training["best_step"]}).

## Held-out text
Split by file with a fixed seed before the tokenizer was trained; the validation files, which chose the checkpoint, are
others.

| files | tokens | perplexity a token | bits a byte |
|---|---|---|---|
{rows}

## Greedy completions
{samples}
"""
