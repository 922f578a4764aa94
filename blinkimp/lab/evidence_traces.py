"""Cells with a trace (`blinkimp lab evidence --trace`): where a server of ours spent the time that the client saw.

Called by blinkimp/lab/evidence_report.py; the traces are cell_trace.py's, their figures are defined in ../trace/TRACE.md.
Test: pytest tests/null/test_evidence_report.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from blinkimp.lab.evidence_figures import Cells, by_load, threads_of
from blinkimp.lab.evidence_plan import EvidenceGrid
from blinkimp.lab.pages import Section

REQUEST_HEADINGS: Final = ("TTFT at the client", "in the server", "ingress", "ring", "queue", "prefill", "way back")
STEP_HEADINGS: Final = ("decode step ms", "step with prompts ms", "gap us", "busy", "clocks within us", "lost")
WORDS: Final = (
    "p50 / p99, ms, warm-up included; of runs with a trace, which costs a percent. A request's way: `in the server` is from its arrival in the "
    "ingress process to the hand-over of the first token to the connection; of that `ingress` is until it is written to the submission ring (HTTP, "
    "tokenizer, checks), `ring` until the director took it, `queue` until it is in a batch, `prefill` until the first token was sampled (the GPU's "
    "work), `way back` until the ingress has read that token. What the client sees beyond is sockets and the client itself.",
    "A step goes from the plan's publication to the sight of the last worker, of the class of batch that most time went into; `gap`: from there to "
    "the next one, where a request waited for it; `busy`: share of the time in which a step ran. `clocks within`: how well the two clocks are "
    "aligned, which `ring` and `way back` hang on.",
)


def pair(spread: Mapping[str, float] | None, digits: int = 2) -> str | None:
    return f"{spread['p50']:,.{digits}f} / {spread['p99']:,.{digits}f}" if spread else None


def longest_class(steps: Mapping[str, Any], word: str) -> str | None:
    """Of the steps of a kind, those of the class of batch that most time went into: its name and its median."""
    classes = {name: c["step_ms"] for name, c in steps.get("by_class", {}).items() if name.startswith(word)}
    if not classes:
        return None
    name = max(classes, key=lambda one: classes[one]["mean"] * classes[one]["n"])
    return f"{classes[name]['p50']:.3f} ({name.removeprefix(word).strip()})"


def request_words(requests: Mapping[str, Any]) -> list[object]:
    if not requests:
        return [None] * (len(REQUEST_HEADINGS) - 1)
    phases = requests["phases_ms"]
    return [
        pair(requests["ttft_ms"]),
        *(pair(phases[name]) for name in ("ingress", "ring", "queue", "prefill")),
        pair(requests["first_token_drain_ms"]),
    ]


def traced(grid: EvidenceGrid, cells: Cells) -> list[Section]:
    """One table; none where no cell has a trace."""
    rows: list[list[object]] = []
    for load, of_load in by_load(grid, with_again=True).items():
        for cell in of_load:
            found = cells.get(cell.key, {})
            if "trace" not in found:
                continue
            report, trace = found["report"], found["trace"]
            steps, about = trace["steps"], trace["trace"]
            client = {"p50": report["median_ttft_floor_ms"], "p99": report["p99_ttft_floor_ms"]}
            row: list[object] = [cell.engine, cell.transport, cell.placement, load, threads_of(cell)]
            row += [pair(client), *request_words(trace["requests"])]
            row += [longest_class(steps, "decode"), longest_class(steps, "with prompts"), pair(steps.get("gap_us"), 1)]
            row += [f"{steps['busy_fraction']:.1%}" if steps else None, about["clock_error_us"]]
            rows.append([*row, sum(about["lost"][name] for name in ("device", "ingress"))])
    headings = ("engine", "over", "placement", "load", "threads", *REQUEST_HEADINGS, *STEP_HEADINGS)
    return [Section("Causes: where the time went", headings, rows, words=list(WORDS))] if rows else []
