"""A slice of tools/fuzz.py: the same seed each time, and a drawn one. tools/results/fuzz.json has the last long run.

Run: pytest tests/host/test_fuzz.py
"""

from __future__ import annotations

import random

import pytest

from tests.support import load_tool


@pytest.mark.parametrize("seed", [1, random.randrange(2**32)], ids=["fixed", "drawn"])
def test_no_input_crashes_an_ingress_or_leaks_a_page(seed: int) -> None:
    print(f"seed {seed}")
    result = load_tool("fuzz").run(1500, seed)
    assert sum(count for name, count in result["answers"].items() if name.startswith("http ")) == 750
    assert result["answers"]["http 200"] > 20 and result["answers"]["http 400"] > 100
    assert result["answers"]["zmq finish"] > 20 and result["answers"]["zmq error bad_message"] > 20
