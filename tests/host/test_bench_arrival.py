"""tools/bench_arrival.py: which gaps are steady and which stand beside the arrival, and a run on the emulated device.

Run: pytest tests/host/test_bench_arrival.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support import load_tool

tool = load_tool("bench_arrival")


def times(device_ms: list[list[float]], accepted_ms: float = 0.0) -> object:
    device = (np.array(device_ms) * 1e6).astype(np.int64)
    accepted = np.full(len(device_ms), int(accepted_ms * 1e6), np.int64)
    return tool.Times(accepted - 1_000_000, accepted, device, device + 500_000)


def test_the_worst_gap_is_one_that_touches_the_arrival() -> None:
    """Steps of 5 ms; the newcomer is taken at 22 ms and has its first token at 60 ms, between which steps take 12 and 26 ms."""
    streams = times([[1, 5, 10, 15, 20, 32, 58, 63, 68], [5, 10, 15, 20, 32, 58, 63, 68, 73]])
    got = tool.gaps_of(streams, times([[60]], accepted_ms=22))
    assert (got["steady_tpot_ms"], got["worst_gap_ms"], got["ratio"]) == (5.0, 26.0, 5.2)
    assert got["newcomer_ttft_ms"] == 38.0 and got["newcomer_client_ttft_ms"] == 39.5
    assert got["steady_tpot_after_ms"] == 5.0


def test_streams_that_end_before_the_newcomer_begins_are_no_measurement() -> None:
    streams = times([[1, 5, 10, 15, 20, 32]])
    with pytest.raises(tool.BenchError, match="too short"):
        tool.gaps_of(streams, times([[60]], accepted_ms=22))


def test_a_smaller_chunk_makes_the_worst_gap_smaller(tmp_path: Path) -> None:
    out = tmp_path / "arrival.json"
    flags = ["--device", "emulated", "--shape", "embedded", "--batch", "3", "--context", "16", "--prompt", "512"]
    assert tool.main([*flags, "--chunks", "16,256", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    small, large = report["chunks"]
    assert (small["chunk"], large["chunk"]) == (16, 256)
    assert large["worst"]["worst_gap_ms"] > 2 * small["worst"]["worst_gap_ms"]
    assert report["errors"] == [] and report["prompt"] == 512
