"""Where time moved between two traces: a request's phases, the steps' classes, the ops, the director's gap.

Every table adds up: its rows' changes sum to the change in its last row, so that a share is a share of something.
  requests   the mean time of a phase, over requests that have all of them; the sum is the mean life of a request
  steps      the mean time of a step; each class of steps counts with what it became slower (at the mean of both mixes) and with what more
             of it there is (at the distance of its mean time from the whole's), which is exact: sum(w2 t2) - sum(w1 t1)
  ops        the mean time of a sampled step, by kind of op
Called by blinkimp/cli/trace.py. Test: pytest tests/null/test_trace_figures.py
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from rich.console import Console, RenderableType

from blinkimp.trace.figures import (
    MOMENTS,
    MS,
    PHASES,
    Steps,
    gap_quantiles_ms,
    lives_of,
    op_figures,
    step_classes,
    steps_of,
)
from blinkimp.trace.file import TraceFile
from blinkimp.trace.scan import scan
from blinkimp.trace.tables import number, table_of
from blinkimp.trace.tokens import token_streams

DEVICE_ONLY: Final = ("queue", "prefill", "decode")  # what is left where a trace has no ingress events


class Moved(msgspec.Struct):
    """One row: means in ms before and after, and the change that this row explains."""

    name: str
    before_ms: float | None
    after_ms: float | None
    change_ms: float
    share: float | None  # of the table's whole change; None where that is nothing


class Comparison(msgspec.Struct):
    requests: list[Moved]  # the last row is the whole, as in the next two
    steps: list[Moved]
    ops: list[Moved]
    figures: list[Moved]  # medians and tails that do not add up
    same_tokens: bool | None  # whether the requests, in the order in which they came, said the same; None: not as many
    remarks: list[str]


class Side:
    """One of the two traces."""

    def __init__(self, trace: TraceFile) -> None:
        self.trace = trace
        self.table = scan(trace.events)
        self.lives = lives_of(self.table, trace.clock)
        self.steps = steps_of(self.table)

    def phase_means_ms(self, phases: tuple[str, ...]) -> dict[str, float] | None:
        """Over requests that have all of these phases; None where there is none."""
        spans = [
            self.lives.at[MOMENTS[i + 1]] - self.lives.at[MOMENTS[i]] for i, name in enumerate(PHASES) if name in phases
        ]
        stacked = np.stack(spans)
        whole = np.isfinite(stacked).all(0)
        if not whole.any():
            return None
        return dict(zip(phases, (stacked[:, whole].mean(1) / MS).tolist(), strict=True))

    def tokens(self) -> list[bytes]:
        """Of each request that has finished, in the order in which they were queued."""
        order = np.argsort(self.table.requests["queued"], kind="stable")
        finished = self.table.requests[order]
        streams = token_streams(self.trace.events)
        return [streams.get(int(row["id"]), b"") for row in finished if row["queued"] and row["finished"]]


def compare(before: TraceFile, after: TraceFile) -> Comparison:
    sides = Side(before), Side(after)
    remarks: list[str] = []
    phases: tuple[str, ...] = PHASES
    means = [side.phase_means_ms(phases) for side in sides]
    if any(mean is None for mean in means):
        phases = DEVICE_ONLY
        means = [side.phase_means_ms(phases) for side in sides]
        remarks.append(
            "only the device's phases are compared: one of the traces has no ingress events, or its clocks are not aligned"
        )
    requests: list[Moved] = []
    if means[0] is not None and means[1] is not None:
        requests = additive([(name, means[0][name], means[1][name]) for name in phases], "a request's life")
    else:
        remarks.append("no request went through all phases in one of the traces")
    ops = [op_figures(side.trace).get("by_kind", {}) for side in sides]
    op_rows: list[tuple[str, float, float]] = [
        (kind, ops[0].get(kind, {}).get("ms_a_step", 0.0), ops[1].get(kind, {}).get("ms_a_step", 0.0))
        for kind in dict.fromkeys([*ops[0], *ops[1]])
    ]
    if bool(ops[0]) != bool(ops[1]):
        remarks.append("ops are not compared: one of the traces has no op times (--trace-op-period)")
    for name in ("lost", "config"):
        remarks += _remarks(name, before, after)
    streams = [side.tokens() for side in sides]
    is_comparable = len(streams[0]) == len(streams[1]) and len(streams[0]) > 0
    same = streams[0] == streams[1] if is_comparable else None
    return Comparison(
        requests,
        step_changes(sides[0].steps, sides[1].steps),
        additive(op_rows, "a sampled step") if all(ops) else [],
        tail_changes(*sides),
        same,
        remarks,
    )


def additive(rows: list[tuple[str, float, float]], whole: str) -> list[Moved]:
    total = sum(second - first for _, first, second in rows)
    found = [
        Moved(name, first, second, second - first, (second - first) / total if total else None)
        for name, first, second in rows
    ]
    before, after = sum(first for _, first, _ in rows), sum(second for _, _, second in rows)
    return [*found, Moved(whole, before, after, total, 1.0 if total else None)]


def step_changes(before: Steps, after: Steps) -> list[Moved]:
    """Each class twice: slower, and more of it."""
    if not len(before.table) or not len(after.table):
        return []
    classes = [step_classes(steps) for steps in (before, after)]
    whole = [float(steps.time_ns.mean()) / MS for steps in (before, after)]
    total = whole[1] - whole[0]
    middle = sum(whole) / 2
    rows: list[Moved] = []

    def add(name: str, first: float | None, second: float | None, change: float) -> None:
        rows.append(Moved(name, first, second, change, change / total if total else None))

    for name in dict.fromkeys([*classes[0], *classes[1]]):
        weights, times = [], []
        for steps, own in zip((before, after), classes, strict=True):
            mine = own.get(name, np.zeros(0, np.int64))
            weights.append(len(mine) / len(steps.table))
            times.append(float(steps.time_ns[mine].mean()) / MS if len(mine) else None)
        known = [time for time in times if time is not None]
        first, second = (time if time is not None else known[0] for time in times)
        add(name, times[0], times[1], (weights[0] + weights[1]) / 2 * (second - first))
        mixed = (weights[1] - weights[0]) * ((first + second) / 2 - middle)
        if weights[0] != weights[1]:
            add(f"  share {100 * weights[0]:.1f} % -> {100 * weights[1]:.1f} %", None, None, mixed)
    rows.append(Moved("a step", whole[0], whole[1], total, 1.0 if total else None))
    return rows


def tail_changes(before: Side, after: Side) -> list[Moved]:
    found: list[Moved] = []

    def add(name: str, values: list[float | None]) -> None:
        first, second = values
        if first is not None and second is not None:
            found.append(Moved(name, first, second, second - first, None))

    sides = (before, after)
    for name, first, second in (("TTFT", "received", "streamed"), ("TTFT, device", "queued", "first_token")):
        for quantile in (50, 99):
            spans = [side.lives.between(first, second) for side in sides]
            add(
                f"{name} p{quantile}",
                [float(np.percentile(span, quantile)) / MS if len(span) else None for span in spans],
            )
    histograms = [gap_quantiles_ms(side.table.gap_histogram) for side in sides]
    for name in ("p50", "p99", "p99.9"):
        add(f"between tokens {name}", [histogram.get(name) for histogram in histograms])
    gaps = [side.steps.gap_ns[np.isfinite(side.steps.gap_ns)] for side in sides]
    for quantile in (50, 99):
        add(
            f"director's gap p{quantile}",
            [float(np.percentile(gap, quantile)) / MS if len(gap) else None for gap in gaps],
        )
    return found


def _remarks(what: str, before: TraceFile, after: TraceFile) -> list[str]:
    if what == "lost":
        return [
            f"{trace.path}: {trace.metadata.lost.device + trace.metadata.lost.ingress} events were lost"
            for trace in (before, after)
            if trace.metadata.lost.device or trace.metadata.lost.ingress
        ]
    configs = [trace.metadata.engine.config for trace in (before, after)]
    names = [name for name in {**configs[0], **configs[1]} if name not in ("engine_name", "bind", "http", "cache_dir")]
    return [
        f"{name}: {configs[0].get(name)} -> {configs[1].get(name)}"
        for name in names
        if configs[0].get(name) != configs[1].get(name)
    ]


def moved_table(title: str, rows: list[Moved]) -> RenderableType:
    shown = [
        [
            row.name,
            number(row.before_ms),
            number(row.after_ms),
            f"{row.change_ms:+.4f}",
            "" if row.share is None else f"{100 * row.share:+.1f} %",
        ]
        for row in rows
    ]
    return table_of(title, ["", "before, ms", "after, ms", "change, ms", "share of it"], shown)


def print_comparison(found: Comparison, console: Console) -> None:
    titles = {
        "requests": "Requests: mean of each phase",
        "steps": "Steps: mean time; what each class became slower, and what its share of the steps changed",
        "ops": "Ops: a sampled step",
        "figures": "Medians and tails",
    }
    for name, title in titles.items():
        if getattr(found, name):
            console.print(moved_table(title, getattr(found, name)), "", highlight=False, markup=False)
    if found.same_tokens is not None:
        console.print(
            f"tokens: {'the same' if found.same_tokens else 'not the same'}, request by request", highlight=False
        )
    for remark in found.remarks:
        console.print(remark, highlight=False, markup=False)
