"""tools/bench_step.py: the limits, the choice of steady tokens, and a whole run on the emulated device.

Run: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from blinkimp.host.model_config import parse_config
from tests.support import load_tool

bench_step = load_tool("bench_step")


def test_limits_of_an_8b_model_are_those_of_its_bytes_and_operations() -> None:
    """Worked out by hand: 15.01 GB of weights but the embedding's, 128 KiB of KV a token, 6.98 G weights in the layers."""
    model = parse_config(bench_step.SHAPES["llama-3-8b"])
    one = bench_step.decode_cost(model, 2, 1, 1024)
    assert one.weight_bytes == 2 * (32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096)
    assert one.kv_bytes == 1024 * 131072
    for batch, limit_ms in (
        (1, 3.29),
        (16, 3.73),
        (64, 5.13),
        (256, 12.33),
    ):  # the last one is bound by GEMM operations
        assert bench_step.decode_cost(model, 2, batch, 1024).limit_s * 1e3 == pytest.approx(limit_ms, abs=0.01)
    for num_tokens, limit_ms in ((128, 3.27), (1024, 18.44), (8192, 167.1)):
        assert bench_step.prefill_cost(model, 2, num_tokens).limit_s * 1e3 == pytest.approx(limit_ms, rel=0.005)


def test_steady_tokens_are_those_between_the_last_first_token_and_the_first_last_one() -> None:
    """Request 1 begins two steps after request 0, which therefore ends first."""
    device = np.array([[10, 20, 30, 40, 50], [30, 40, 50, 60, 70]], np.int64)
    none = np.zeros(2, np.int64)
    rows, columns = bench_step.steady_state(bench_step.Times(none, none, device, device))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (0, 4), (1, 1), (1, 2)]


def test_a_run_measures_prefill_and_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    flags = [
        "--device",
        "emulated",
        "--shape",
        "embedded",
        "--batches",
        "1,3",
        "--context",
        "40",
        "--tokens",
        "6",
        "--prefill",
        "32",
    ]
    assert bench_step.main([*flags, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert "error" not in report
    assert report["load"]["weights_gb_per_s"] > 0 and report["load"]["start_s"] >= report["load"]["weights_s"] > 0
    assert report["memory_plan"]["sizes"]["num_pages"] > 0
    assert [row["batch"] for row in report["decode"]] == [1, 3]
    assert [row["num_tokens"] for row in report["prefill"]] == [32]
    for row in report["decode"]:
        assert row["num_steps"] >= 6 and 40 < row["mean_context"] < 60
        assert 0 < row["device"]["p10_ms"] <= row["device"]["median_ms"] <= row["device"]["p90_ms"]
        assert row["achieved_tb_per_s"] > 0 and row["limit_ms"] is None
    prefill = report["prefill"][0]
    # The client's time spans the device's: ACK and token lie between its submission and its sight of the token.
    assert 0 < prefill["device"]["median_ms"] < prefill["client"]["median_ms"] < math.inf
    assert "decode, batch 3" in capsys.readouterr().out


def test_a_batch_that_cannot_run_is_an_error_and_what_was_measured_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    flags = [
        "--device",
        "emulated",
        "--shape",
        "embedded",
        "--batches",
        "1,65",
        "--context",
        "8",
        "--tokens",
        "2",
        "--prefill",
        "8",
    ]
    assert bench_step.main([*flags, "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert "expected a batch of at most 64" in report["error"] and len(report["decode"]) == 1
    assert "expected a batch of at most 64" in capsys.readouterr().err
