"""What the command lines of tools/fuzz*.py have in common: how many inputs, from which seed, and where the result is kept.

Called by them. Test: pytest tests/host/test_fuzz.py
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fuzz_parser(description: str | None, num_inputs: int) -> argparse.ArgumentParser:
    """num_inputs: the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=num_inputs)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: drawn, and printed")
    parser.add_argument("--out", type=Path, help="where to keep the result")
    return parser


def run_fuzzer(arguments: argparse.Namespace, run: Callable[[int, int], dict[str, Any]]) -> None:
    """run: of a number of inputs and a seed; returns the result, or raises."""
    print(f"seed {arguments.seed}", flush=True)
    text = json.dumps(run(arguments.inputs, arguments.seed), indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
