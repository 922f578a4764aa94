"""A slice of tools/fuzz_ring.py: the same inputs each time. tools/results/fuzz_ring.json has the last long run, with others.

Run: pytest tests/host/test_fuzz_ring.py
"""

from __future__ import annotations

import pytest

from tests.host.ring_fuzzer import FuzzError
from tests.support import load_tool

SEEDS = pytest.mark.parametrize("seed", [1, 2])


@SEEDS
def test_no_entry_gets_another_answer_than_the_abi_says(seed: int) -> None:
    result = load_tool("fuzz_ring").run(4000, seed, ("engine", "rig single"))
    assert result["inputs"] == 4000 * (0.5 + 0.15 + 0.15), "engine, hostile, rig"
    counts = result["engine"]
    assert counts["good request, right output"] > 100 and counts["neighbour's requests, right output"] > 10
    for reason in ("malformed", "bad_sampling", "bad_token", "bad_constraint", "too_long"):
        assert counts[f"reject {reason}"] > 0, reason


@SEEDS
def test_nor_on_the_lanes_of_a_warp(seed: int) -> None:
    assert load_tool("fuzz_ring").fuzz_rig("lanes", 200, seed)["reject malformed"] > 10


def test_nor_does_a_sanitizer_see_anything() -> None:
    assert load_tool("fuzz_ring").fuzz_rig_sanitized(1500, 1)["reject malformed"] > 100


def test_a_director_that_takes_what_it_should_not_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is made stricter by one token id: that the director accepts it must not go unnoticed."""
    tool = load_tool("fuzz_ring")
    monkeypatch.setattr(tool, "VOCAB", tool.VOCAB - 1)
    with pytest.raises(FuzzError, match="expected Answer"):
        tool.fuzz_rig("single", 4000, 1)
