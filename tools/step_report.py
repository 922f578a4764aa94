"""Rows of tools/bench_step.py put together: ratios, achieved rates, joules a token; and the table.

Called by tools/bench_step.py. Test: pytest tests/null/test_step_rows.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step_cost import Limits, StepCost, decode_cost, prefill_cost
from step_rows import Row

from blinkimp.host.model_config import ModelConfig
from blinkimp.host.power import per_token

ITEM_BYTES = 2  # bf16


def cost_of(row: Row, model: ModelConfig, context: float) -> StepCost:
    if row.phase == "decode":
        return decode_cost(model, ITEM_BYTES, row.batch, context)
    return prefill_cost(model, ITEM_BYTES, row.context)


def side_of(
    row: Row, model: ModelConfig, limits: Limits | None, figures: dict[str, Any], idle_w: float | None
) -> dict[str, Any]:
    """One side's figures with what follows from them. Without limits (no GPU) there are no rates either."""
    cost = cost_of(row, model, figures.get("mean_context", row.context))
    median_s = figures["device"]["median_ms"] / 1e3
    num_tokens = figures["energy_steps"] * (row.batch if row.phase == "decode" else row.context)
    side = {key: value for key, value in figures.items() if not key.startswith("energy_") and key != "name"}
    side |= per_token(figures["energy_j"], figures["energy_s"], num_tokens, idle_w)
    if limits is None:
        return side
    limit_s = cost.limit_s(limits)
    return side | {
        "limit_ms": round(limit_s * 1e3, 4),
        "ratio_to_limit": round(median_s / limit_s, 4),
        "achieved_tb_per_s": round(cost.num_bytes / median_s / 1e12, 4),
        "achieved_tflop_per_s": round(cost.num_operations / median_s / 1e12, 2),
    }


def fill_rows(
    rows: Sequence[Row],
    model: ModelConfig,
    limits: Limits | None,
    blinkimp: Mapping[str, dict[str, Any]],
    torch: Mapping[str, dict[str, Any]],
    idle_w: float | None,
) -> list[dict[str, Any]]:
    """One entry per row that either side has measured."""
    filled = []
    for row in rows:
        entry: dict[str, Any] = {"name": row.name, "phase": row.phase, "batch": row.batch, "context": row.context}
        for name, figures in (("blinkimp", blinkimp), ("torch", torch)):
            if row.name in figures:
                entry[name] = side_of(row, model, limits, figures[row.name], idle_w)
        if limits is not None:
            entry["limit_ms"] = round(cost_of(row, model, row.context).limit_s(limits) * 1e3, 4)
        if "blinkimp" in entry and "torch" in entry:
            speedup = entry["torch"]["device"]["median_ms"] / entry["blinkimp"]["device"]["median_ms"]
            entry["speedup_over_torch"] = round(speedup, 4)
        if "blinkimp" in entry or "torch" in entry:
            filled.append(entry)
    return filled


# ---- Table -----------------------------------------------------------------------------------------------------------
HEADINGS = (
    f"{'':9}|{'blinkimp ms':>12}{'p10':>9}{'p90':>9}{'client':>9}{'x limit':>9}{'TB/s':>7}{'TFLOP/s':>9}{'J/token':>9}{'> idle':>8} "
    f"|{'torch ms':>9}{'p90':>9}{'client':>9}{'x limit':>9}{'J/token':>9}{'> idle':>8} |{'limit ms':>9}{'torch / blinkimp':>18}"
)


def number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def table_line(row: Mapping[str, Any]) -> str:
    line = f"{row['name']:9}|"
    ours, theirs = row.get("blinkimp"), row.get("torch")
    if ours is None:
        line += f"{'-':>12}" + " " * 69 + " |"
    else:
        line += number(ours["device"]["median_ms"], 12, 3)
        line += number(ours["device"]["p10_ms"], 9, 3) + number(ours["device"]["p90_ms"], 9, 3)
        line += number(ours["client"]["median_ms"], 9, 3) + number(ours.get("ratio_to_limit"), 9, 2)
        line += number(ours.get("achieved_tb_per_s"), 7, 2) + number(ours.get("achieved_tflop_per_s"), 9, 1)
        line += number(ours["j_per_token"], 9, 4) + number(ours["j_per_token_above_idle"], 8, 4) + " |"
    if theirs is None:
        line += f"{'-':>9}" + " " * 44 + " |"
    else:
        line += number(theirs["device"]["median_ms"], 9, 3) + number(theirs["device"]["p90_ms"], 9, 3)
        line += number(theirs["client"]["median_ms"], 9, 3) + number(theirs.get("ratio_to_limit"), 9, 2)
        line += number(theirs["j_per_token"], 9, 4) + number(theirs["j_per_token_above_idle"], 8, 4) + " |"
    return line + number(row.get("limit_ms"), 9, 3) + number(row.get("speedup_over_torch"), 18, 2)


def print_report(report: Mapping[str, Any]) -> None:
    if "engine" in report:
        load = report["engine"]["load"]
        print(
            f"{report['engine']['device']}; shape {report['shape']}: {load['weight_bytes'] / 1e9:.2f} GB of weights in "
            f"{load['weights_s']:.1f} s ({load['weights_gb_per_s']:.2f} GB/s), kernels in {load['compile_s']:.1f} s, "
            f"running after {load['start_s']:.1f} s; ping of the idle engine {report['engine']['ping']['median_us']:.1f} us"
        )
    limits = Limits(**report["limits"])
    source = "measured in this run" if report["limits_measured_in_this_run"] else "of one H200"
    print(f"limit ({source}) = {limits.formula}")
    idle = report["idle"]
    if idle["gpu_w"] is not None:
        engine = "" if idle["engine_w"] is None else f", idle engine {idle['engine_w']:.0f} W"
        print(f"idle GPU {idle['gpu_w']:.0f} W{engine}")
    print(HEADINGS)
    for row in report["rows"]:
        print(table_line(row))
    gaps = {
        row["name"]: row["blinkimp"]["director_gap_us"]
        for row in report["rows"]
        if "director_gap_us" in row.get("blinkimp", {})
    }
    if gaps:
        print(
            "director, us between two steps (median): "
            + ", ".join(f"{name} {gap['median']:.1f}" for name, gap in gaps.items())
        )
    uncompiled = [row["name"] for row in report["rows"] if row.get("torch", {}).get("variant", "").startswith("graph")]
    if uncompiled:
        print(f"torch without compilation (over --compile-budget-s, or --torch-backend none): {', '.join(uncompiled)}")
    print("> idle: J/token without what the idle GPU draws")
    print("ms: median by the device's clock; decode is per token of each request, prefill up to the first token")
