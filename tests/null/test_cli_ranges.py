"""Numbers with bounds, as the command line takes them. Run: pytest tests/null/test_cli_ranges.py"""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from blinkimp.cli import main
from blinkimp.cli.ranges import amount, count, duration, listed


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (duration(), {"0": 0.0, "2.5": 2.5}, ("nan", "inf", "-1", "1e9", "soon", "")),
        (duration(above=True), {"0.1": 0.1}, ("0", "nan", "-inf")),
        (count(1), {"1": 1, "16": 16}, ("0", "-1", "2.5", str(1 << 32), "nan")),
        (amount(), {"0": 0.0, "450": 450.0}, ("nan", "inf", "-1")),
        (listed(amount(above=True)), {"": [], "2,4.5": [2.0, 4.5]}, ("0", "2,nan", "x")),
    ],
)
def test_what_is_out_of_its_range_is_refused(read: Any, good: dict[str, object], bad: tuple[str, ...]) -> None:
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"got '.*', expected .* (from|above) .* to "):
            read(text)


@pytest.mark.parametrize(
    "flags", [["--drain", "nan"], ["--drain", "inf"], ["--drain", "-1"], ["--vocab-size", "-1"], ["--idle-w", "nan"]]
)
def test_a_load_with_one_is_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is sent: nobody is there."""
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--url", "http://127.0.0.1:1", "--rate", "1", "--num-requests", "1", *flags])
    assert f"argument {flags[0]}: got '{flags[1]}', expected" in capsys.readouterr().err
