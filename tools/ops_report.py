"""What tools/bench_ops.py and tools/torch_ops.py write and print: one layout, {figure: {variant: {row: {part: value}}}}, and one table.

Test: pytest tests/null/test_ops_report.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ops_parts import part_cost
from ops_timing import Figures
from step_rows import Row

from blinkimp.host.model_config import ModelConfig

TORCH: Final = "torch"  # the variant beside which the others stand
Results = Mapping[str, Mapping[str, Mapping[str, Figures]]]  # by variant, row and part
FIGURES: Final[dict[str, tuple[str, int]]] = {  # key of the report: (member of Figures, decimals)
    "ms": ("ms", 5),
    "sustained_ms": ("sustained_ms", 5),
    "joules": ("joules", 6),
    "watts": ("watts", 1),
    "sm_clock_mhz": ("sm_clock_mhz", 0),
    "counter_step_s": ("counter_step_s", 3),
}


def by_part(results: Results, value: Callable[[Figures], float | None]) -> dict[str, Any]:
    """{variant: {row: {part: value}}}"""
    return {
        variant: {row: {part: value(figures) for part, figures in parts.items()} for row, parts in rows.items()}
        for variant, rows in results.items()
    }


def rounded(value: float | None, decimals: int) -> float | None:
    return None if value is None else round(value, decimals)


def joules_above_idle(figures: Figures, idle_w: float | None) -> float | None:
    """Of a step: without what the GPU draws with nothing to do in the same time."""
    if idle_w is None or figures.joules is None or figures.sustained_ms is None:
        return None
    return figures.joules - idle_w * figures.sustained_ms / 1e3


def layout(results: Results, idle_w: float | None) -> dict[str, Any]:
    """The figures as a report has them. `ms` are those of bursts."""

    def of(member: str, decimals: int) -> Callable[[Figures], float | None]:
        return lambda figures: rounded(getattr(figures, member), decimals)

    report = {key: by_part(results, of(member, decimals)) for key, (member, decimals) in FIGURES.items()}
    above = by_part(results, lambda figures: rounded(joules_above_idle(figures, idle_w), 6))
    return report | {"joules_above_idle": above, "idle_w": rounded(idle_w, 2)}


def figures_of(report: Mapping[str, Any], variant: str) -> dict[str, dict[str, Figures]]:
    """layout() read back."""
    return {
        row: {
            part: Figures(**{member: report[key][variant][row][part] for key, (member, _) in FIGURES.items()})
            for part in parts
        }
        for row, parts in report["ms"][variant].items()
    }


def costs(model: ModelConfig, rows: Sequence[Row], parts: Sequence[str]) -> dict[str, Any]:
    """{row: {part: ...}}: what a part must read and compute, and how long that takes at the least."""
    return {
        row.name: {
            part: {
                "bytes": cost.num_bytes,
                "operations": cost.num_operations,
                "limit_ms": round(cost.limit_s() * 1e3, 5),
            }
            for part in parts
            for cost in [part_cost(model, part, row)]
        }
        for row in rows
    }


def resolution(results: Results, settings_s: float) -> str | None:
    """How far joules can be trusted, in words. None: there are none."""
    steps_s = [
        figures.counter_step_s
        for rows in results.values()
        for parts in rows.values()
        for figures in parts.values()
        if figures.counter_step_s is not None
    ]
    if not steps_s:
        return None
    return (
        f"energy counter: at most {max(steps_s) * 1e3:.0f} ms between two steps, intervals of {settings_s:g} s or more: "
        f"had power moved by 10 % within the last step, joules would be {max(steps_s) / settings_s * 10:.1f} % off"
    )


def number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def table(model: ModelConfig, rows: Sequence[Row], results: Results) -> str:
    """Markdown: a line for each row, part and variant, beside torch's where that was measured."""
    ours = [variant for variant in results if variant != TORCH] or list(results)
    beside = results.get(TORCH) if TORCH not in ours else None
    columns = ["row", "part", "variant", "burst ms", "limit ms", "TFLOP/s", "sustained ms", "J", "W", "MHz"]
    columns += (
        ["torch burst ms", "torch sustained ms", "torch J", "torch W", "ms / torch", "J / torch"] if beside else []
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        for part in dict.fromkeys(part for variant in ours for part in results[variant].get(row.name, {})):
            for variant in ours:
                figures = results[variant].get(row.name, {}).get(part)
                if figures is None:
                    continue
                cost = part_cost(model, part, row)
                limit_ms, operations = cost.limit_s() * 1e3 or None, cost.num_operations or None
                cells = [row.name, part, variant, number(figures.ms, 4), number(limit_ms, 4)]
                cells += [number(ratio(operations, figures.ms * 1e9), 1), number(figures.sustained_ms, 4)]
                cells += [number(figures.joules, 4), number(figures.watts, 0), number(figures.sm_clock_mhz, 0)]
                if beside:
                    theirs = beside.get(row.name, {}).get(part, Figures(ms=0.0))
                    cells += [number(theirs.ms or None, 4), number(theirs.sustained_ms, 4), number(theirs.joules, 4)]
                    cells += [number(theirs.watts, 0)]
                    cells += [number(ratio(figures.sustained_ms, theirs.sustained_ms), 2)]
                    cells += [number(ratio(figures.joules, theirs.joules), 2)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
