"""tools/step_*.py: rows as they are written, limits worked out by hand, spreads, steady tokens, ratios and the table.

Run: pytest tests/null/test_step_rows.py
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pytest

from blinkimp.host.model_config import parse_config
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from step_cost import Limits, decode_cost, prefill_cost
from step_report import fill_rows, print_report, table_line
from step_requests import steady_state
from step_rows import ROW_SETS, SHAPES, Row, parse_rows
from step_stats import header, spread

MODEL = parse_config(SHAPES["llama-3-8b"])


def test_rows_are_read_as_they_are_written() -> None:
    assert parse_rows("d16@1024,p128") == [Row("decode", 16, 1024), Row("prefill", 1, 128)]
    assert [row.name for row in parse_rows("d16@1024,p128")] == ["d16@1024", "p128"]
    assert parse_rows("quick") == list(ROW_SETS["quick"]) and set(ROW_SETS["quick"]) < set(ROW_SETS["full"])


@pytest.mark.parametrize("text", ["", "d16", "d0@1024", "x128", "p-1", "d16@1024;p128", "quick,full"])
def test_a_row_that_is_none_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        parse_rows(text)


def test_limits_of_an_8b_model_are_those_of_its_bytes_and_operations() -> None:
    """Worked out by hand: 15.01 GB of weights but the embedding's, 128 KiB of KV a token, 6.98 G weights in the layers."""
    one = decode_cost(MODEL, 2, 1, 1024)
    assert one.weight_bytes == 2 * (32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096)
    assert one.kv_bytes == 1024 * 131072
    # The last one is bound by GEMM operations.
    for batch, limit_ms in ((1, 3.29), (16, 3.73), (64, 5.13), (256, 12.33)):
        assert decode_cost(MODEL, 2, batch, 1024).limit_s() * 1e3 == pytest.approx(limit_ms, abs=0.01)
    for num_tokens, limit_ms in ((128, 3.27), (1024, 18.44), (8192, 167.1)):
        assert prefill_cost(MODEL, 2, num_tokens).limit_s() * 1e3 == pytest.approx(limit_ms, rel=0.005)


def test_limits_follow_the_measured_rates() -> None:
    half = Limits(bytes_per_s=2.3e12, operations_per_s=395e12)
    cost = decode_cost(MODEL, 2, 16, 1024)
    assert cost.limit_s(half) == pytest.approx(2 * cost.limit_s())
    assert "2.3 TB/s" in half.formula and "395 TFLOP/s" in half.formula


def test_steady_tokens_are_those_between_the_last_first_token_and_the_first_last_one() -> None:
    """Request 1 begins two steps after request 0, which therefore ends first."""
    device = np.array([[10, 20, 30, 40, 50], [30, 40, 50, 60, 70]], np.int64)
    rows, columns = steady_state(device)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (0, 4), (1, 1), (1, 2)]


def test_a_spread_is_median_p10_p90_and_how_many() -> None:
    assert spread(np.arange(101, dtype=np.int64) * 1_000_000) == {
        "median_ms": 50.0,
        "p10_ms": 10.0,
        "p90_ms": 90.0,
        "n": 101,
    }


def figures_of(row: str, median_ms: float, **more: float) -> dict[str, object]:
    times = {"median_ms": median_ms, "p10_ms": median_ms, "p90_ms": median_ms, "n": 5}
    return {"name": row, "device": times, "client": times, "energy_j": None, "energy_s": 1.0, "energy_steps": 5, **more}


def test_ratios_rates_and_joules_follow_from_times() -> None:
    """A step of 16 at 5 ms, 1,000 J in 2 s for 400 steps: 0.15625 J a token; torch takes 10 ms, twice as long."""
    ours = figures_of("d16@1024", 5.0, mean_context=1024.0, energy_j=1000.0, energy_s=2.0, energy_steps=400)
    theirs = figures_of("d16@1024", 10.0)
    (row,) = fill_rows(
        [Row("decode", 16, 1024)], MODEL, Limits(), {"d16@1024": ours}, {"d16@1024": theirs}, idle_w=100.0
    )
    assert row["speedup_over_torch"] == 2.0 and row["limit_ms"] == pytest.approx(3.73, abs=0.01)
    assert row["blinkimp"]["ratio_to_limit"] == pytest.approx(5 / 3.7293, rel=1e-3)
    assert row["blinkimp"]["achieved_tb_per_s"] == pytest.approx((15.01e9 + 16 * 1024 * 131072) / 5e-3 / 1e12, rel=1e-3)
    assert row["blinkimp"]["power_w"] == 500.0 and row["blinkimp"]["j_per_token"] == 0.15625
    assert row["blinkimp"]["j_per_token_above_idle"] == pytest.approx((1000 - 200) / 6400)
    assert row["torch"]["j_per_token"] is None


def test_a_row_of_one_side_alone_has_no_ratio_and_a_line_of_the_same_width(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("decode", 1, 1024), Row("prefill", 1, 128)]
    both = {"d1@1024": figures_of("d1@1024", 4.0, mean_context=1024.0), "p128": figures_of("p128", 6.0)}
    filled = fill_rows(rows, MODEL, Limits(), {"d1@1024": both["d1@1024"]}, {"p128": both["p128"]}, None)
    assert "speedup_over_torch" not in filled[0] and "blinkimp" not in filled[1]
    full = fill_rows(rows, MODEL, Limits(), both, both, None)
    assert len({len(table_line(row)) for row in (*filled, *full)}) == 1
    report = {**header("bench_step", [], "abc", None), "limits": {}, "limits_measured_in_this_run": False}
    print_report({**report, "idle": {"gpu_w": None, "engine_w": None}, "rows": full})
    assert "p128" in capsys.readouterr().out
    assert report["commit"] == "abc" and report["gpu"] is None
