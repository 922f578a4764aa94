"""Figures of a trace as tables for the terminal.

Called by blinkimp/cli/trace.py. Test: pytest tests/host/test_cli_trace.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table

from blinkimp.trace.figures import PHASE_MEANINGS
from blinkimp.trace.timeline import Moment

COLUMNS: Final = ("mean", "p50", "p90", "p99", "max", "n")
BARS: Final = " ▁▂▃▄▅▆▇█"


def number(value: float | int | None) -> str:
    """Four figures or so."""
    if value is None:
        return "-"
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def sparkline(values: Iterable[int]) -> str:
    shown = list(values)
    most = max(shown, default=0)
    return "".join(BARS[0 if most == 0 else -(-value * (len(BARS) - 1) // most)] for value in shown)


def table_of(title: str, head: Iterable[str], rows: Iterable[Iterable[str]], *, text_columns: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for idx, name in enumerate(head):
        table.add_column(name, justify="left" if idx < text_columns else "right", no_wrap=idx > 0)
    for row in rows:
        table.add_row(*row)
    return table


def spread_row(name: str, values: dict[str, float], *more: str) -> list[str]:
    return [name, *(number(values.get(column)) for column in COLUMNS), *more]


def overview(figures: dict[str, Any]) -> str:
    trace = figures["trace"]
    lost = trace["lost"]
    error = trace["clock_error_us"]
    clock = "not aligned (nothing went through the rings)" if error is None else f"aligned within {number(error)} us"
    lines = [
        f"{trace['file']}: {trace['events']:,} events in {trace['seconds']} s; {trace['device'] or 'device unknown'}",
        f"clocks {clock}; lost: {lost['device']} events of the device, {lost['ingress']} of ingresses; ended by: {trace['ended_by']}",
    ]
    return "\n".join(lines)


def step_tables(steps: dict[str, Any]) -> list[RenderableType]:
    if not steps:
        return ["no complete step in this trace"]
    rows = [spread_row("step, ms", steps["step_ms"]), spread_row("gap to the next, us", steps["gap_us"])]
    busy = steps["busy_fraction"]
    title = (
        f"Steps: {steps['num']:,}, {steps['tokens']:,} tokens, in a step {number(busy and 100 * busy)} % of the time"
    )
    by_class = [
        [
            name,
            number(own["step_ms"]["n"]),
            number(own["step_ms"]["mean"]),
            number(own["step_ms"]["p99"]),
            number(own["rows"]),
            number(own["tokens_per_s"]),
        ]
        for name, own in steps["by_class"].items()
    ]
    head = ["requests in the step", "steps", "mean ms", "p99 ms", "mean rows", "tokens/s"]
    return [table_of(title, ["", *COLUMNS], rows), table_of("Steps by what they did", head, by_class)]


def op_table(ops: dict[str, Any]) -> list[RenderableType]:
    if not ops:
        return ["no op times in this trace; start the engine with --trace-op-period 64"]
    rows = [
        [
            kind,
            number(own["num_ops"]),
            number(own["ms_a_step"]),
            f"{100 * own['share']:.1f} %",
            number(own["worker_ms"]),
        ]
        for kind, own in ops["by_kind"].items()
    ]
    title = f"Ops: {ops['num_samples']} steps sampled, {number(ops['ms_a_step'])} ms each"
    return [table_of(title, ["op", "in a step", "ms a step", "share", "a worker's ms"], rows)]


def request_tables(requests: dict[str, Any]) -> list[RenderableType]:
    if not requests:
        return ["no request in this trace"]
    rows = [spread_row(name, values, PHASE_MEANINGS[name]) for name, values in requests["phases_ms"].items() if values]
    for key, name, meaning in (
        ("whole_ms", "whole", "received until handed over"),
        ("ttft_ms", "TTFT", "received until the first token was handed over"),
        ("ttft_device_ms", "TTFT, device", "queued until the first token was committed"),
        ("first_token_drain_ms", "first token's drain", "committed until the ingress read it"),
        ("tpot_ms", "TPOT", "mean time between a request's tokens"),
    ):
        if requests[key]:
            rows.append(spread_row(name, requests[key], meaning))
    reasons = ", ".join(f"{count} {reason}" for reason, count in requests["by_reason"].items())
    title = f"Requests, ms: {requests['num']:,}, {requests['num_finished']:,} finished ({reasons})"
    table = table_of(title, ["", *COLUMNS, ""], rows)
    table.columns[-1].justify = "left"
    itl = requests["itl_ms"]
    lines = [
        "between tokens, ms: " + ", ".join(f"{name} {number(value)}" for name, value in itl.items() if name != "n") if itl else "",
        f"chunks a prompt {number(requests['chunks'].get('mean'))}; prompt tokens from the prefix cache {100 * requests['cached_fraction']:.1f} %",
        f"credit stalls {requests['num_stalls']} of {requests['num_stalled_requests']} requests; preemptions {requests['num_preemptions']}, "
        f"{requests['recomputed_tokens']} tokens computed again; cancels {requests['num_cancels']}",
    ]  # fmt: skip
    return [table, "\n".join(line for line in lines if line)]


def occupancy_table(occupancy: dict[str, Any]) -> list[RenderableType]:
    rows = [
        [name, number(own["mean"]), number(own["max"]), sparkline(own["series"])] for name, own in occupancy.items()
    ]
    if not rows:
        return []
    table = table_of("Occupancy", ["", "mean", "max", "over time"], rows)
    table.columns[-1].justify = "left"
    return [table]


def print_figures(figures: dict[str, Any], console: Console) -> None:
    parts: list[RenderableType] = [overview(figures), *step_tables(figures["steps"]), *op_table(figures["ops"])]
    parts += [*request_tables(figures["requests"]), *occupancy_table(figures["occupancy"])]
    spaced: list[RenderableType] = []
    for part in parts:
        spaced += [part, ""]
    console.print(Group(*spaced), highlight=False, markup=False)


def timeline_table(request_id: int, moments: list[Moment], *, every_token: bool) -> RenderableType:
    """Tokens but the first and the last are left out, unless every_token."""
    tokens = [moment for moment in moments if moment.what == "token"]
    shown = [moment for moment in moments if every_token or moment.what != "token" or moment in (tokens[0], tokens[-1])]
    rows = [
        [
            f"{moment.at_ms:,.3f}",
            f"{moment.since_ms:+,.3f}",
            moment.source,
            moment.what,
            moment.detail,
            "" if moment.step is None else str(moment.step),
        ]
        for moment in shown
    ]
    table = table_of(f"Request {request_id:#x}", ["ms", "since", "", "", "", "step"], rows, text_columns=0)
    for column in table.columns[2:5]:
        column.justify = "left"
    return table
