#!/usr/bin/env python3
"""Speed of the CPU interpreter alone: decode at a context of 256 and prefill of 512 tokens, in bf16, on 1 and 2 threads.

    python tools/bench_reference.py [--model FOLDER]    -> a table, and tools/results/reference_speed.json

Without --model it takes a Llama of 11.4 million random weights. Each figure is the best of several runs, because the machine
may have other work; the load average is recorded beside it. GB/s counts the weights that a step must read.
Test: pytest tests/host/test_reference_ops.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from blinkimp.host.program import Model, load_model  # noqa: E402
from blinkimp.host.reference import Chunk, ReferenceRunner, kernels_in_use  # noqa: E402
from blinkimp.host.weights import HostTarget  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
NUM_REPEATS = 7
CONTEXT_TOKENS = 256
PREFILL_TOKENS = 512


def load(folder: Path | None) -> Model:
    if folder is not None:
        return load_model(folder, HostTarget(), compute="bf16")
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "config.json").write_text(json.dumps(CONFIG))
        return load_model(made, HostTarget(), load_format="dummy")


def measure(model: Model, num_workers: int) -> list[dict[str, Any]]:
    """One row per step shape: tokens in the step, best seconds, tokens/s, weight bytes/s."""
    runner = ReferenceRunner(
        model, num_workers=num_workers, num_requests=64, max_batch=64, max_step_tokens=PREFILL_TOKENS
    )
    shapes = [
        ("decode", num, [Chunk(idx, [5], position_begin=CONTEXT_TOKENS) for idx in range(num)])
        for num in (1, 4, 16, 64)
    ]
    shapes.append(("prefill", PREFILL_TOKENS, [Chunk(0, [7] * PREFILL_TOKENS, position_begin=0)]))
    runner.kv_cache[:] = 0  # the measured steps attend to positions that no step has written
    rows = []
    for kind, num_tokens, chunks in shapes:
        num_runs = 20 if num_tokens <= 4 else 4
        best = min(runner.time_step(chunks, num_runs) for _ in range(NUM_REPEATS)) / 1e9
        rows.append(
            {
                "threads": num_workers,
                "kind": kind,
                "tokens_per_step": num_tokens,
                "step_ms": round(best * 1e3, 3),
                "tokens_per_s": round(num_tokens / best),
                "weight_gb_per_s": round(model.weight_bytes / best / 1e9, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of random weights")
    arguments = parser.parse_args()
    model = load(arguments.model)
    rows = [row for num_workers in (1, 2) for row in measure(model, num_workers)]
    print(
        f"{model.weight_bytes / 2e6:.1f} M weights in bf16, {kernels_in_use()} kernels, load average {os.getloadavg()[0]:.1f}"
    )
    print(f"{'threads':>7} {'step':>8} {'tokens':>6} {'ms':>9} {'tokens/s':>9} {'weights GB/s':>13}")
    for row in rows:
        print(
            f"{row['threads']:7} {row['kind']:>8} {row['tokens_per_step']:6} {row['step_ms']:9.3f} {row['tokens_per_s']:9} "
            f"{row['weight_gb_per_s']:13.1f}"
        )
    if arguments.model is None:
        report = {
            "command": "python tools/bench_reference.py",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "kernels": kernels_in_use(),
            "num_cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "weight_bytes": model.weight_bytes,
            "rows": rows,
        }
        path = ROOT / "tools" / "results" / "reference_speed.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
