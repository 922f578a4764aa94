"""A short run of tools/bench_prefix.py: what it counts, not how fast. Run: pytest tests/host/test_bench_prefix.py"""

from __future__ import annotations

import pytest

from tests.support import load_tool


def test_only_the_second_question_finds_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("bench_prefix")
    monkeypatch.setattr(tool, "NUM_PREFIX_TOKENS", 512)  # 8 pages
    result = tool.run(1)
    tokens = {name: (result[name]["cached_tokens"], result[name]["computed_tokens"]) for name in tool.KINDS}
    assert tokens == {"first": (0, 528), "same prefix": (512, 16), "opted out": (0, 528), "another salt": (0, 528)}
    assert all(0 < result[name]["ttft_ms_least"] <= result[name]["ttft_ms_most"] for name in tool.KINDS)
