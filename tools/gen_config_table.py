#!/usr/bin/env python3
"""Writes the configuration and environment tables of README.md from blinkimp/config.py.

Called by: a person after a change of Config (`python tools/gen_config_table.py`).
Test: pytest tests/null/test_config.py (compares the README with what this would write)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- config table: python tools/gen_config_table.py -->", "<!-- end of config table -->"


def render() -> str:
    from blinkimp import config

    lines = [BEGIN, "| key | default | expected | meaning |", "|---|---|---|---|"]
    for key in config.keys().values():
        default = f"`{key.default}`" if key.default != "" else "empty"
        default = default.lower() if isinstance(key.default, bool) else default  # as TOML writes it
        expected = key.expected.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {default} | {expected} | {key.description} |")
    lines += ["", "| other variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in config.OTHER_VARIABLES.items()]
    return "\n".join([*lines, END])


def updated(readme: str) -> str:
    """The README's text with the tables between the two markers replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected one line {BEGIN!r} and one line {END!r}")
    head, _, rest = readme.partition(BEGIN)
    return head + render() + rest.partition(END)[2]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.path.insert(0, str(ROOT))
    README.write_text(updated(README.read_text()))
