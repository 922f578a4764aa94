"""Plots of lab runs as SVG text. matplotlib comes with the extra `lab`.

Called by the reports of blinkimp/lab; check_plots() by blinkimp/cli/lab.py and evidence.py. Test: pytest tests/null/test_lab_report.py
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from blinkimp.bench.errors import LoadError

SIZE_INCHES: Final = (6.4, 4.0)


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str


@dataclass(frozen=True)
class Line:
    """Points of one engine or level."""

    label: str
    points: Sequence[tuple[float, float]]
    frontier: Sequence[tuple[float, float]] = field(default_factory=list)
    color_idx: int | None = None  # None: one of its own
    is_dashed: bool = False


def check_plots() -> None:
    """Before the work that they are made of. Raises LoadError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LoadError(f"plots need matplotlib: {error}; install it: pip install 'blinkimp[lab]'") from error


def _figure() -> Any:
    check_plots()
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "blinkimp"  # the same figures give the same file
    from matplotlib.figure import Figure

    return Figure(figsize=SIZE_INCHES, layout="constrained")


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plain_log(axes: Any) -> None:
    """Ticks at 1, 2, 5, 10 and so on, in plain numbers, and a range in which a tenth more does not look like a mountain."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def line_plot(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log_x: bool = False, log_y: bool = False
) -> Plot:
    """A line with markers for each of `lines`, the first the widest, so that those that lie on each other all show; frontiers thick behind them."""
    figure = _figure()
    axes = figure.add_subplot()
    for number, line in enumerate(lines):
        color = f"C{(number if line.color_idx is None else line.color_idx) % 10}"
        width = 1.2 + 2.0 * (1 - number / len(lines))
        if line.frontier:
            axes.plot(*zip(*line.frontier, strict=True), color=color, linewidth=6, alpha=0.2)
        if line.points:
            xs, ys = zip(*sorted(line.points), strict=True)
            style = "o--" if line.is_dashed else "o-"
            axes.plot(xs, ys, style, color=color, label=line.label, linewidth=width, markersize=3 + width)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    if log_x:
        from matplotlib.ticker import FuncFormatter

        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if log_y:
        _plain_log(axes)
    elif any(line.points for line in lines):
        axes.set_ylim(bottom=0)
    if any(line.points for line in lines):
        axes.legend(fontsize="small")
    return Plot(title, _svg(figure))


def bar_plot(
    title: str, y_label: str, groups: Sequence[str], bars: Mapping[str, Sequence[float]], *, log_y: bool = False
) -> Plot:
    """Groups along x, one bar of each name in a group; 0 is none."""
    figure = _figure()
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(bars))
    for number, (name, heights) in enumerate(bars.items()):
        at = [place - 0.4 + width * (number + 0.5) for place in range(len(groups))]
        axes.bar(at, heights, width=width, label=name, color=f"C{number % 10}")
    axes.set_xticks(range(len(groups)), groups, rotation=20 if max(map(len, groups), default=0) > 8 else 0)
    axes.set(title=title, ylabel=y_label)
    axes.grid(visible=True, axis="y", alpha=0.3)
    if log_y:
        _plain_log(axes)
    figure.legend(fontsize="small", loc="outside lower center", ncols=max(1, len(bars)))
    return Plot(title, _svg(figure))
