"""How `blinkimp top` looks: one snapshot (top_snapshot.py) as tables and bars of rich.

Called by blinkimp/cli/top.py. Test: pytest tests/host/test_top.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from blinkimp.ring_abi import FaultCode

STALE_S: Final = 2.0  # without a heartbeat for longer an engine is shown in red
WIDE_PANEL: Final = 50  # columns, two in a row where they find place
NARROW_PANEL: Final = 39
PANEL_EDGE: Final = 2  # frame and blank
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_STATE_STYLES: Final = {"running": "green", "draining": "yellow", "parked": "cyan", "starting": "yellow"}


def render(snapshot: dict[str, Any], history: Sequence[float], *, columns: int) -> RenderableType:
    """history: output tokens a second of the last looks. columns: of the terminal; 24 lines of 80 hold it all."""
    width = NARROW_PANEL if 2 * NARROW_PANEL + 1 <= columns <= 2 * WIDE_PANEL else WIDE_PANEL
    inner = width - 2 * PANEL_EDGE
    parts = {
        "batch": _batch(snapshot["batch"], snapshot["totals"], inner),
        "pages": _pages(snapshot["pages"], snapshot["prefix_cache"], inner),
        "tokens": _tokens(snapshot["rates"], history, inner),
        "step": _step(snapshot["step"], snapshot["rates"], snapshot["gpu"]),
    }
    panels = [Panel(part, title=title, width=width) for title, part in parts.items()]
    return Group(_head(snapshot["engine"]), Columns(panels), _queue_pairs(snapshot["queue_pairs"]))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def count(value: float) -> str:
    """12,345; 1.23 M"""
    if value >= 1e9:
        return f"{value / 1e9:,.2f} G"
    if value >= 1e6:
        return f"{value / 1e6:,.2f} M"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def bar(parts: Sequence[tuple[float, str]], total: float, width: int) -> Text:
    """Shares of total, each in its colour; what is something is never nothing."""
    text, used = Text(), 0
    for value, style in parts:
        cells = min(width - used, max(1 if value > 0 else 0, round(width * value / total) if total > 0 else 0))
        text.append("█" * cells, style=style)
        used += cells
    return text.append("░" * (width - used), style="bright_black")


def spark(values: Sequence[float], width: int) -> str:
    shown = list(values)[-width:]
    most = max(shown, default=0.0)
    return "".join(_BLOCKS[round(value / most * (len(_BLOCKS) - 1))] if most > 0 else " " for value in shown)


def _line(*words: tuple[str, object]) -> Text:
    """name value, name value"""
    text = Text()
    for name, value in words:
        text.append("  " if text else "").append(f"{name} ", style="bright_black").append(f"{value}")
    return text


def _head(engine: dict[str, Any]) -> Text:
    is_stale = engine["state"] in ("running", "draining") and engine["heartbeat_age_s"] > STALE_S
    style = "bold red" if is_stale else _STATE_STYLES.get(engine["state"], "bold red")
    text = Text("blinkimp ").append(engine["name"], style="bold").append("  ")
    text.append(engine["state"], style=style)
    text.append(f"   {engine['model'] or 'model unknown'}   {engine['device'] or 'device unknown'}   ")
    text.append(f"up {duration(engine['uptime_s'])}   heartbeat {engine['heartbeat']:,}")
    if engine["restarts"]:
        text.append(f"   restarts after faults {engine['restarts']}", style="yellow")
    if is_stale:
        text.append(f"   none for {engine['heartbeat_age_s']:.1f} s", style="bold red")
    if (fault := engine["fault"]) is not None:
        try:
            name = FaultCode(fault["code"]).name.lower()
        except ValueError:
            name = str(fault["code"])
        words = f"\nfault {name} at site {fault['site']}: expected {fault['expected']:#x}, seen {fault['seen']:#x}"
        text.append(f"{words}, step {fault['step']}", style="bold red")
    return text


def _batch(batch: dict[str, Any], totals: dict[str, Any], width: int) -> RenderableType:
    limit = batch["max_running"]
    words: list[tuple[str, object]] = [("running", f"{batch['running']} of {limit or '?'}")]
    if limit != batch["max_batch"]:
        words.append(("launched for", batch["max_batch"]))
    words += [("waiting", batch["waiting"]), ("finishing", batch["finishing"])]
    return Group(
        bar([(batch["running"], "green")], limit, width),
        _line(*words),
        _line(("accepted", count(totals["requests_accepted"])), ("rejected", count(totals["requests_rejected"]))),
        _line(("preemptions", count(totals["preemptions"])), ("credit stalls", count(totals["credit_stalls"]))),
    )


def _pages(pages: dict[str, int], cache: dict[str, Any], width: int) -> RenderableType:
    rate = cache["hit_rate"]
    return Group(
        bar([(pages["used"], "green"), (pages["cached"], "blue")], pages["total"], width),
        _line(("used", count(pages["used"])), ("cached", count(pages["cached"])), ("free", count(pages["free"]))),
        _line(("of", f"{count(pages['total'])} pages of 64 tokens")),
        _line(
            ("prefix cache", "-" if rate is None else f"{rate:.1%} of prompt tokens"),
            ("hits", count(cache["hit_tokens"])),
        ),
    )


def _tokens(rates: dict[str, float], history: Sequence[float], width: int) -> RenderableType:
    lines: list[RenderableType] = [
        _line(("out", f"{count(rates['output_tokens_per_s'])}/s"), ("requests", f"{count(rates['requests_finished_per_s'])}/s")),
        _line(
            ("in", f"{count(rates['prompt_tokens_per_s'])}/s"),
            ("from the prefix cache", f"{count(rates['cached_prompt_tokens_per_s'])}/s"),
        ),
    ]  # fmt: skip
    lines.append(Text(spark(history, width) or " ", style="green"))
    lines.append(_line(("over", f"{rates['interval_s']:.2f} s")))
    return Group(*lines)


def _step(step: dict[str, float], rates: dict[str, float], gpu: dict[str, Any] | None) -> RenderableType:
    power: list[tuple[str, object]] = [("GPU", "none (emulated), or no NVML")]
    if gpu is not None:
        power = [
            ("power", f"{gpu['power_w']:.0f} W"),
            ("SM", f"{gpu['sm_clock_mhz']} MHz"),
            ("memory", f"{gpu['memory_clock_mhz']} MHz"),
        ]
    return Group(
        _line(("last", f"{step['last_ms']:.3f} ms"), ("gap", f"{step['gap_us']:.1f} us")),
        _line(("steps", f"{count(rates['steps_per_s'])}/s"), ("rows a step", f"{step['mean_rows']:.1f}")),
        _line(("done", count(step["count"]))),
        _line(*power),
    )


def _queue_pairs(pairs: Sequence[dict[str, Any]]) -> Table:
    table = Table(expand=False, box=None, header_style="bright_black", pad_edge=False, collapse_padding=True)
    for name in (
        "qp",
        "served by",
        "requests",
        "tokens/s",
        "submissions",
        "completions",
        "ring full",
        "arena full",
    ):
        table.add_column(name, justify="left" if name in ("qp", "served by") else "right")
    for pair in pairs:
        if not pair["owner_pid"]:
            table.add_row(str(pair["idx"]), Text("free", style="bright_black"))
            continue
        if pair["owner"] is None:
            table.add_row(str(pair["idx"]), Text(f"gone {pair['owner_pid']}", style="red"))
            continue
        owner = Text(f"{pair['protocol']} {pair['owner_pid']}")
        if not pair["is_attached"]:
            owner.append(" (not attached)", style="red")
        waiting = f" ({pair['waiting']} not on the ring)" if pair["waiting"] else ""
        table.add_row(
            str(pair["idx"]),
            owner,
            f"{pair['outstanding']}{waiting}",
            count(pair["tokens_per_s"]),
            f"{pair['submissions_used']}/{pair['num_submissions']}",
            f"{pair['completions_used']}/{pair['num_completions']}",
            count(pair["ring_full"]),
            count(pair["arena_full"]),
        )
    return table
