"""Numbers of a command line with bounds, as argparse types: what is out of them, or none, is wrong usage with the reason.

    parser.add_argument("--drain", type=duration(), ...)      "argument --drain: got 'nan', expected seconds from 0 to 1e+08"

Called by the subcommands. Test: pytest tests/null/test_cli_ranges.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final, TypeVar

from blinkimp.bench.limits import MOST_SECONDS

MOST: Final = 1_000_000_000  # of a count that has no bound of its own
Value = TypeVar("Value", int, float)
Read = Callable[[str], Value]


def bounded(kind: Read[Value], what: str, least: Value, most: Value, *, above: bool = False) -> Read[Value]:
    """least is out, where it must be above."""

    def read(text: str) -> Value:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Not a number is in no range.
        if value is None or not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected {what} {'above' if above else 'from'} {least:g} to {most:g}"
            )
        return value

    return read


def duration(*, above: bool = False) -> Read[float]:
    return bounded(float, "seconds", 0.0, MOST_SECONDS, above=above)


def count(least: int = 0, most: int = MOST) -> Read[int]:
    return bounded(int, "a whole number", least, most)


def amount(*, above: bool = False) -> Read[float]:
    return bounded(float, "a number", 0.0, float(MOST), above=above)


def listed(read: Read[Value]) -> Callable[[str], list[Value]]:
    """`2,4,8`"""
    return lambda text: [read(part) for part in text.split(",") if part]
