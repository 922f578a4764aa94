"""A slice of tools/fuzz.py: the same inputs each time. tools/results/fuzz.json has the last long run, with others.

Run: pytest tests/host/test_fuzz.py
"""

from __future__ import annotations

import pytest

from tests.support import load_tool


@pytest.mark.parametrize("seed", [1, 4])  # without a constraint that takes ten seconds of a CPU
def test_no_input_crashes_an_ingress_or_leaks_a_page(seed: int) -> None:
    result = load_tool("fuzz").run(1500, seed)
    assert sum(count for name, count in result["answers"].items() if name.startswith("http ")) == 750
    assert result["answers"]["http 200"] > 20 and result["answers"]["http 400"] > 100
    assert result["answers"]["zmq finish"] > 20 and result["answers"]["zmq error bad_message"] > 20
