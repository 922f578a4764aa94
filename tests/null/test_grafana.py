"""The Grafana dashboard: the committed file is what the generator writes, and Grafana can show it.

Run: pytest tests/null/test_grafana.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import load_tool

gen_grafana = load_tool("gen_grafana")
DASHBOARD: dict[str, Any] = json.loads(gen_grafana.OUTPUT.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_file_is_up_to_date() -> None:
    assert gen_grafana.OUTPUT.read_text() == gen_grafana.render(), "run `python tools/gen_grafana.py`"


def test_data_source_and_prefix_are_variables() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "prefix", "model_name", "instance"}
    assert [option["value"] for option in variables["prefix"]["options"]] == ["blinkimp:", "vllm:"]
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}" and "vllm:" not in target["expr"], target


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_something_in_balanced_brackets(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        for opening, closing in ("()", "[]", "{}"):
            assert target["expr"].count(opening) == target["expr"].count(closing) > 0 or opening == "[", target["expr"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
