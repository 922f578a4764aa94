"""The rows of tools/bench_step.py: model shapes, `d16@1024` and `p8192`, and which of them are asked for.

A decode row `d<batch>@<context>` is a step in which `batch` requests each attend to `context` positions; a prefill row `p<tokens>` is a lone
prompt up to its first token. Called by tools/bench_step.py, tools/torch_baseline.py and tools/bench_vllm.py.
Test: pytest tests/null/test_step_rows.py
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from blinkimp.lab.shapes import LLAMA_3_8B

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED_CONFIG: Final = ROOT / "blinkimp" / "models" / "embedded" / "config.json"

# config.json by shape. Llama 3 was trained for 8,192 positions; a long row needs only the rotary table to be longer.
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-3-8b": LLAMA_3_8B | {"max_position_embeddings": 65536},
    "embedded": json.loads(EMBEDDED_CONFIG.read_text()),
}


@dataclass(frozen=True)
class Row:
    """One thing to measure."""

    phase: Literal["decode", "prefill"]
    batch: int
    context: int  # positions attended to (decode), tokens of the prompt (prefill)

    @property
    def name(self) -> str:
        return f"d{self.batch}@{self.context}" if self.phase == "decode" else f"p{self.context}"

    @property
    def label(self) -> str:
        if self.phase == "decode":
            return f"decode, batch {self.batch}, context {self.context}"
        return f"prefill, {self.context} tokens"


def parse_row(text: str) -> Row:
    """Row of `d16@1024` or `p8192`."""
    if found := re.fullmatch(r"d([1-9]\d*)@([1-9]\d*)", text):
        return Row("decode", int(found[1]), int(found[2]))
    if found := re.fullmatch(r"p([1-9]\d*)", text):
        return Row("prefill", 1, int(found[1]))
    raise argparse.ArgumentTypeError(
        f"row: got {text!r}, expected d<batch>@<context> such as d16@1024, or p<tokens> such as p8192; separate rows by commas"
    )


def parse_rows(text: str) -> list[Row]:
    """Rows of `d1@1024,p128`, or of a named set."""
    if text in ROW_SETS:
        return list(ROW_SETS[text])
    rows = [parse_row(part) for part in text.split(",") if part]
    if not rows:
        raise argparse.ArgumentTypeError(
            f"rows: got {text!r}, expected at least one row, or one of {', '.join(ROW_SETS)}"
        )
    return rows


def named(text: str) -> tuple[Row, ...]:
    return tuple(parse_row(part) for part in text.split())


# Prefill first: it warms the GPU up for the shorter steps. A batch of 128 with 8,192 positions does not fit beside the weights.
ROW_SETS: Final[dict[str, tuple[Row, ...]]] = {
    "quick": named("p128 p1024 p8192 d1@1024 d16@1024 d64@1024 d128@1024 d256@1024 d1@8192"),
    "full": named("p128 p1024 p8192 d1@1024 d16@1024 d64@1024 d128@1024 d256@1024 d1@8192 d16@8192 d64@8192 d1@32768"),
}
