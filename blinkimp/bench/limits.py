"""Bounds of what a load may ask for. What is beyond them is a slip of the keyboard, and would end in exhausted memory or in no end.

Data only, without imports: the command line has them before anything is loaded. Used by load_plan.py, replay.py and blinkimp/cli/ranges.py.
Test: pytest tests/null/test_bench_plan.py tests/null/test_cli_ranges.py
"""

from __future__ import annotations

from typing import Final

MOST_SECONDS: Final = 1e8
MOST_REQUESTS: Final = 10_000_000
MOST_TOKENS: Final = 10_000_000  # of a prompt, of an output
