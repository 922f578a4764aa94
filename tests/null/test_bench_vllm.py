"""tools/bench_vllm.py with a scripted engine in vLLM's place: which steps count, and what is said without vLLM.

Run: pytest tests/null/test_bench_vllm.py
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import load_tool

tool = load_tool("bench_vllm")
STEP_NS = 4_000_000
PREFILL_NS = 30_000_000


@dataclass
class Output:
    request_id: str
    outputs: list[Any]


@dataclass
class Tokens:
    token_ids: list[int] = field(default_factory=list)


class ScriptedEngine:
    """One prompt a step, which then takes PREFILL_NS; else STEP_NS for a token of every request that has begun."""

    def __init__(self) -> None:
        self.now_ns = 10**9
        self.waiting: list[tuple[str, int]] = []
        self.running: dict[str, tuple[Tokens, int]] = {}

    def add_request(self, name: str, prompt: dict[str, list[int]], max_tokens: int) -> None:
        assert len(prompt["prompt_token_ids"]) >= 1
        self.waiting.append((name, max_tokens))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Output]:
        if self.waiting:
            name, max_tokens = self.waiting.pop(0)
            self.running[name] = (Tokens(), max_tokens)
            self.now_ns += PREFILL_NS
        else:
            self.now_ns += STEP_NS
        for tokens, _ in self.running.values():
            tokens.token_ids.append(7)
        outputs = [Output(name, [Tokens(list(tokens.token_ids))]) for name, (tokens, _) in self.running.items()]
        self.running = {name: item for name, item in self.running.items() if len(item[0].token_ids) < item[1]}
        return outputs


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Any:
    """By the engine's own clock."""
    engine = ScriptedEngine()
    clock = SimpleNamespace(monotonic=lambda: engine.now_ns / 1e9, monotonic_ns=lambda: engine.now_ns)
    monkeypatch.setattr(tool, "time", clock)
    return tool.VllmSide(engine, lambda max_tokens: max_tokens, 100, None)


def test_decode_counts_only_steps_in_which_all_requests_decode(side: Any) -> None:
    """Prompts take 30 ms a step; none of that is in the 4 ms between tokens."""
    got = side.measure(tool.Row("decode", 3, 64), 32)
    assert got["num_steps"] >= 30
    assert got["device"]["p10_ms"] == got["device"]["median_ms"] == STEP_NS / 1e6
    assert got["mean_context"] == pytest.approx(64, abs=2)


def test_prefill_is_the_time_to_the_first_token(side: Any) -> None:
    got = side.measure(tool.Row("prefill", 1, 32), 5)
    assert got["num_steps"] == 5 and got["device"]["median_ms"] == PREFILL_NS / 1e6


def test_without_vllm_the_tool_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # --site adds to these
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')\n")
    assert tool.main(["--site", str(tmp_path), "--rows", "d1@64"]) == 1
    assert "no vLLM here" in capsys.readouterr().err


def test_what_was_measured_before_an_end_in_the_middle_is_kept(
    side: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = side.measure

    def until_batch_2(row: Any, num_repeats: int) -> dict[str, Any]:
        if row.batch == 2:
            raise KeyboardInterrupt
        return dict(measure(row, num_repeats))

    monkeypatch.setattr(side, "measure", until_batch_2)
    report: dict[str, Any] = {"gpu": None, "idle_w": None, "rows": [], "errors": []}
    rows = [tool.Row("decode", batch, 64) for batch in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        tool.bench(side, rows, "embedded", 0.01, report, tmp_path / "vllm.json")
    kept = json.loads((tmp_path / "vllm.json").read_text())
    assert [row["name"] for row in kept["rows"]] == [rows[0].name]
