#!/usr/bin/env python3
"""Compares the CPU interpreter with `transformers` on a random tiny checkpoint of each supported family.

    python tools/check_families.py [--case llama3.1 ...]    -> a table, and tools/results/families_cpu.json when all cases run

For each case several requests of different lengths share steps, their prompts cut into odd chunks; then 64 greedy tokens each,
decoded as a batch. The logits of every position, prompt and output, are held against one fp32 forward pass over the whole sequence.
Needs torch and transformers (pip install .[dev]). Test: pytest tests/host/test_families.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from make_tiny_checkpoint import CASES, Case, make_checkpoint  # noqa: E402

from blinkimp.host.program import Model, load_model  # noqa: E402
from blinkimp.host.reference import Chunk, ReferenceRunner, kernels_in_use  # noqa: E402
from blinkimp.host.weights import HostTarget  # noqa: E402

NUM_GREEDY_STEPS = 64
MAX_ERROR = 1e-4  # of a logit, in fp32
CHUNK_LENGTHS = (1, 37, 64, 3, 90)  # around and across pages


@dataclass(frozen=True)
class Comparison:
    """What one case gave."""

    case: str
    max_abs_error: float
    max_abs_logit: float
    num_positions: int
    num_greedy_tokens: int
    num_greedy_equal: int
    kernels: str


def run_greedy(
    model: Model, prompts: list[list[int]], num_steps: int
) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """(tokens, logits of each position) of every request: prompts in odd chunks side by side, then a batch of greedy decoding."""
    runner = ReferenceRunner(model, num_requests=len(prompts), max_batch=512, max_step_tokens=512)
    sequences = [list(prompt) for prompt in prompts]
    logits: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
    step_idx = 0
    while any(len(rows) < len(prompt) + num_steps for rows, prompt in zip(logits, prompts, strict=True)):
        chunks = []
        for idx, sequence in enumerate(sequences):
            begin = len(logits[idx])
            length = CHUNK_LENGTHS[(step_idx + idx) % len(CHUNK_LENGTHS)]
            if begin < len(prompts[idx]) + num_steps:
                chunks.append(Chunk(idx, sequence[begin : begin + length], sample="all"))
        result = runner.step(chunks)
        row = 0
        for chunk in chunks:
            rows = result.logits[row : row + len(chunk.tokens)]
            logits[chunk.request_idx].extend(rows)
            row += len(chunk.tokens)
            is_caught_up = len(logits[chunk.request_idx]) == len(sequences[chunk.request_idx])
            if is_caught_up and len(sequences[chunk.request_idx]) < len(prompts[chunk.request_idx]) + num_steps:
                sequences[chunk.request_idx].append(int(result.tokens[row - 1]))
        step_idx += 1
    return sequences, [np.stack(rows) for rows in logits]


def compare_case(name: str, case: Case, folder: Path) -> Comparison:
    """Makes the checkpoint in `folder`, runs both sides in fp32."""
    import torch

    reference = make_checkpoint(case, folder)
    model = load_model(folder, HostTarget(), compute="f32")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab, length).tolist() for length in case.prompt_lengths]
    sequences, logits = run_greedy(model, prompts, NUM_GREEDY_STEPS)
    max_error = max_logit = 0.0
    num_positions = num_equal = 0
    for prompt, sequence, got in zip(prompts, sequences, logits, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([sequence])).logits[0].numpy()
        max_error = max(max_error, float(np.abs(got - expected).max()))
        max_logit = max(max_logit, float(np.abs(expected).max()))
        num_positions += len(sequence)
        # A token follows from the logits one position before: equal arg-max along the whole sequence is equal greedy decoding.
        greedy = expected[len(prompt) - 1 : -1].argmax(axis=-1)
        num_equal += int((greedy == np.array(sequence[len(prompt) :])).sum())
    num_greedy = NUM_GREEDY_STEPS * len(prompts)
    return Comparison(name, max_error, max_logit, num_positions, num_greedy, num_equal, kernels_in_use())


def versions() -> dict[str, Any]:
    import torch
    import transformers

    import blinkimp

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "blinkimp": blinkimp.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="only this one (may be repeated)")
    arguments = parser.parse_args()
    results = []
    print(f"{'case':20} {'max abs error':>14} {'max logit':>10} {'positions':>10} {'greedy equal':>13}")
    for name in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            result = compare_case(name, CASES[name], Path(folder))
        results.append(result)
        equal = f"{result.num_greedy_equal}/{result.num_greedy_tokens}"
        print(
            f"{name:20} {result.max_abs_error:14.2e} {result.max_abs_logit:10.2f} {result.num_positions:10} {equal:>13}"
        )
    if not arguments.case:
        path = ROOT / "tools" / "results" / "families_cpu.json"
        path.parent.mkdir(exist_ok=True)
        report = {
            "command": "python tools/check_families.py",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "limit_max_abs_error": MAX_ERROR,
            "cases": [asdict(result) for result in results],
        }
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    passed = all(
        item.max_abs_error <= MAX_ERROR and item.num_greedy_equal == item.num_greedy_tokens for item in results
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
