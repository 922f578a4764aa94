"""blinkimp/lab/evidence_figures.py: of which cells an interval can be told. On a page: tests/null/test_evidence_report.py.

Run: pytest tests/null/test_evidence_figures.py
"""

from __future__ import annotations

from typing import Any

from blinkimp.lab.evidence_figures import interval


def test_a_latency_of_nothing_has_no_interval() -> None:
    """All tokens of a request in one piece: its TPOT is 0. One such among few may be all that is drawn."""

    def cell(tpots: list[float]) -> dict[str, Any]:
        return {"report": {"floors_ms": {"tpot_floor": tpots}}}

    key = "p99_tpot_floor_ms"
    assert interval(cell([5.0]), cell([0.0, 0.0]), key) is interval(cell([5.0]), cell([0.0, 5.0]), key) is None
    assert interval(cell([0.0]), cell([5.0]), key) == (0, 0)
    assert interval(None, cell([5.0]), key) is interval(cell([]), cell([5.0]), key) is None
