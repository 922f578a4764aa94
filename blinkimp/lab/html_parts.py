"""Pieces of the lab's HTML reports. Called by blinkimp/lab/report.py and interference_report.py. Test: pytest tests/null/test_lab_report.py"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def cells(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text_of(value))}</{tag}>" for value in values) + "</tr>"

    return f"<table>{cells('th', headings)}{''.join(cells('td', row) for row in rows)}</table>"


def text_of(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def plots(svgs: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(svgs)}</div>'


def by(cells: Sequence[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    """Cells grouped by one of their words, in the order of its first appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell[name], []).append(cell)
    return groups
