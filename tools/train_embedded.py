"""Trains the embedded model (blinkimp/models/embedded): corpus -> tokenizer -> model -> checkpoint, report, card.

Who calls it: a developer, by hand, on a machine with one GPU; what it writes is committed. On an H200:
    python3 tools/train_embedded.py --minutes 4 --out blinkimp/models/embedded
Needs torch, transformers, tokenizers, safetensors, numpy. Everything is seeded; --steps repeats a run's schedule.
Test: pytest tests/null/test_train_embedded.py (the same path, tiny: --smoke)
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedded.model import LlamaModel, ModelConfig
    from embedded.training import TrainingPlan
    from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPTS = [
    "def read_file(path):",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\n\ndef main():",
    '"""Utilities to parse',
    "def fibonacci(n):\n    ",
    "for line in lines:\n    ",
    "class TestQueue(unittest.TestCase):\n",
    "# Return the largest",
]
COMPLETION_TOKENS = 120
SMOKE_FILES = 60


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=REPOSITORY / "blinkimp/models/embedded", help="checkpoint folder")
    add("--corpus", type=Path, help="folder of .py files or archive of --pack-corpus (default: this Python's library)")
    add("--pack-corpus", type=Path, metavar="ARCHIVE", help="write the cleaned corpus there and leave")
    add("--minutes", type=float, default=4.0, help="training time after compilation (default 4)")
    add("--steps", type=int, help="this many steps instead of a time")
    add("--dropout", type=float, default=0.1)
    add("--peak-rate", type=float, default=3e-3, help="AdamW's highest learning rate")
    add("--batch-windows", type=int, default=64, help="windows of 2,048 tokens in a step")
    add("--seed", type=int, default=20)
    add("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    add("--no-compile", action="store_true", help="train without torch.compile")
    add("--commit", help="the revision to record (default: git's)")
    add("--smoke", action="store_true", help="a tiny model, little text, few steps: tests the whole path")
    return parser.parse_args(arguments)


def current_commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # a copy of the tree without its history
    return found.stdout.strip()


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def settings(options: argparse.Namespace, device_type: str) -> tuple[ModelConfig, TrainingPlan]:
    from embedded.model import ModelConfig
    from embedded.training import TrainingPlan

    config = ModelConfig(dropout=options.dropout)
    plan = TrainingPlan(
        minutes=options.minutes,
        num_steps=options.steps,
        peak_rate=options.peak_rate,
        batch_windows=options.batch_windows,
        seed=options.seed,
        compile=device_type == "cuda" and not options.no_compile,
    )
    if options.smoke:
        config = replace(config, vocab=512, hidden=128, num_layers=2, num_heads=2, num_kv_heads=1, intermediate=128)
        config = replace(config, max_positions=256)
        plan = replace(plan, minutes=min(plan.minutes, 0.1), window_tokens=128, batch_windows=8, num_validations=3)
    return config, plan


def rehearse_export(model: LlamaModel, bpe: Tokenizer) -> None:
    """An export that fails must fail before the training, not after it."""
    from embedded import export

    rounded = copy.deepcopy(model)
    export.round_to_bf16(rounded)
    with tempfile.TemporaryDirectory() as folder:
        export.write_checkpoint(rounded, bpe, Path(folder))
        export.verify_checkpoint(rounded, bpe, Path(folder))


def show_completions(model: LlamaModel, bpe: Tokenizer, prompts: list[str], seed: int) -> list[dict[str, str]]:
    from embedded.evaluation import complete

    completions = []
    for prompt in prompts:
        greedy = complete(model, bpe, prompt, COMPLETION_TOKENS)
        sampled = complete(model, bpe, prompt, COMPLETION_TOKENS, temperature=0.7, seed=seed)
        completions.append({"prompt": prompt, "greedy": greedy, "sampled_0.7": sampled})
        print(f"=== greedy\n{greedy}\n=== temperature 0.7\n{sampled}\n", flush=True)
    return completions


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from embedded.corpus import pack_corpus, read_corpus, split_files

    corpus = read_corpus(options.corpus)
    log(f"corpus: {corpus.name}, {len(corpus.files)} files, {corpus.num_bytes / 1e6:.1f} MB")
    if options.pack_corpus is not None:
        pack_corpus(corpus, options.pack_corpus)
        log(f"wrote {options.pack_corpus}, {options.pack_corpus.stat().st_size / 1e6:.1f} MB")
        return 0

    # Late, so that --help and --pack-corpus work without the heavy packages.
    import torch
    from embedded import evaluation, export, report, tokenizer
    from embedded.model import LlamaModel
    from embedded.training import train

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config, plan = settings(options, device.type)
    torch.manual_seed(options.seed)
    splits = split_files(corpus.files, options.seed)
    if options.smoke:
        splits = {name: files[: SMOKE_FILES if name == "train" else 4] for name, files in splits.items()}
    bpe = tokenizer.train_tokenizer(splits["train"], config.vocab)
    documents = {name: tokenizer.encode_files(bpe, files) for name, files in splits.items()}
    train_tokens, validation_tokens = (
        torch.from_numpy(tokenizer.join_documents(documents[name])).to(device) for name in ("train", "validation")
    )
    log(
        f"tokenizer: {config.vocab} entries; {len(train_tokens):,} training, {len(validation_tokens):,} validation tokens"
    )

    model = LlamaModel(config).to(device)
    log(f"model: {model.num_parameters():,} parameters, {report.device_name(device)}, torch {torch.__version__}")
    rehearse_export(model, bpe)
    result = train(model, train_tokens, validation_tokens, plan, log)
    log(
        f"trained {result.num_steps} steps in {result.seconds:.0f} s; train loss {result.train_loss:.4f} (with dropout)"
    )
    log(f"best validation loss {result.validation_loss:.4f} at step {result.best_step}")

    export.round_to_bf16(model)
    export.write_checkpoint(model, bpe, options.out)
    logit_error = export.verify_checkpoint(model, bpe, options.out)
    log(f"transformers loads {options.out}; largest logit error {logit_error:.2g}")
    completions = show_completions(model, bpe, PROMPTS[: 2 if options.smoke else None], options.seed)
    scores = evaluation.score_files(model, splits["held_out"], documents["held_out"], device)
    found = report.build_report(
        commit=options.commit or current_commit(),
        smoke=options.smoke,
        device=device,
        corpus=corpus,
        splits=splits,
        num_train_tokens=len(train_tokens),
        config=config,
        plan=plan,
        result=result,
        scores=scores,
        completions=completions,
        logit_error=logit_error,
        num_parameters=model.num_parameters(),
        file_bytes={name: (options.out / name).stat().st_size for name in export.CHECKPOINT_FILES},
    )
    (options.out / "training_report.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "MODEL_CARD.md").write_text(report.model_card(found))
    log(f"wrote {options.out}: {', '.join(sorted(p.name for p in options.out.iterdir()))}")
    for part, measures in found["held_out"].items():
        log(f"held out, {part}: {measures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
