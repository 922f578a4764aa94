"""A short run of tools/plan_cost.py: what it counts, not how fast. Run: pytest tests/host/test_plan_cost.py"""

from __future__ import annotations

import pytest

from tests.support import load_tool


def test_pages_enter_the_cache_only_where_it_is_on() -> None:
    result = load_tool("plan_cost").run(8, 130)
    assert result["off"]["pages_in_the_cache"] == 0
    # Of each request one page of its prompt, and at least two that its 130 tokens and those before have filled.
    assert 8 * 3 <= result["on"]["pages_in_the_cache"] <= 8 * 4
    assert all(0 < result[kind]["plan_us_p10"] <= result[kind]["plan_us_p90"] for kind in ("off", "on"))


def test_more_steps_than_a_request_has_tokens_are_refused() -> None:
    with pytest.raises(SystemExit, match="expected 2 to"):
        load_tool("plan_cost").run(8, 3000)
