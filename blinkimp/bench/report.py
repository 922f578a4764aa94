"""A load's figures as a table for the terminal. Called by blinkimp/cli/bench.py. Test: pytest tests/host/test_cli_bench.py"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

MAX_ERROR_KINDS: Final = 5
STATISTICS: Final = ("mean", "median", "p90", "p95", "p99", "p99.9")
ROWS: Final = (
    ("TTFT, from sending", "ttft"),
    ("TTFT, from the intended time", "ttft_intended"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("E2EL, from sending", "e2el"),
    ("E2EL, from the intended time", "e2el_intended"),
)


def table_of(report: Mapping[str, Any]) -> str:
    """What `blinkimp bench` prints."""
    lines = [
        f"{report['completed']} requests completed, {report['failed']} failed, in {report['duration']:.2f} s "
        f"({report['num_not_counted']} of the warm-up not counted)"
        + ("; stopped early" if report["stopped_early"] else "")
        + ("; ended early: the trace was used up before the duration" if report["ended_early"] else ""),
        f"{report['request_throughput']:.2f} requests/s, {report['output_throughput']:.1f} output tokens/s, "
        f"{report['total_token_throughput']:.1f} total tokens/s; while sending {report['steady_output_throughput']:.1f} output tokens/s",
    ]
    if report["completed"]:  # of nothing there are no latencies
        lines.append(f"{'ms':30}" + "".join(f"{name:>11}" for name in STATISTICS))
        lines += [
            f"{label:30}" + "".join(f"{report[f'{statistic}_{name}_ms']:11.3f}" for statistic in STATISTICS)
            for label, name in ROWS
        ]
    if report["slos_ms"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in report["slos_ms"].items())
        lines.append(
            f"goodput ({limits}): {report['request_goodput']:.2f} requests/s from sending, "
            f"{report['request_goodput_intended']:.2f} from the intended time"
        )
    if report["num_cut"]:
        lines.append(
            f"{report['num_cut']} cut off at the end; with their waiting so far, p99 TTFT is at least "
            f"{report['p99_ttft_floor_ms']:.3f} ms, p99 TPOT {report['p99_tpot_floor_ms']:.3f} ms"
        )
    lines.append(
        f"sent later than intended: p99 {report['p99_send_delay_ms']:.3f} ms, at most {report['max_send_delay_ms']:.3f} ms"
    )
    energy = report["gpu_energy"]
    if energy["j_per_token"] is not None:
        lines.append(
            f"GPU: {energy['power_w']:.0f} W, {energy['j_per_token']:.4f} J per output token{idle_text(energy)}"
        )
    if energy["left_out"] is not None:
        lines.append(f"GPU energy left out: {energy['left_out']}")
    return "\n".join([*lines, *error_lines(report["error_counts"])])


def idle_text(energy: Mapping[str, Any]) -> str:
    """What stands behind the joules per token about idling; energy: the report's gpu_energy."""
    idle_w, above, source = energy["idle_w"], energy["j_per_token_above_idle"], energy["idle_source"]
    if idle_w is None:
        return ""
    if above is None:
        return (
            f"; idling took {idle_w:.0f} W ({source}), more than the load, and is not subtracted: "
            "another GPU was measured (CUDA_VISIBLE_DEVICES names the server's), or something else ran on it"
        )
    return f", {above:.4f} without the {idle_w:.0f} W of idling ({source})"


def error_lines(counts: Mapping[str, int]) -> list[str]:
    """Failures that differ in their numbers only are one kind, shown by its first; the JSON has all."""
    kinds: dict[str, tuple[str, int]] = {}
    for words, number in counts.items():
        kind = re.sub(r"\d+", "0", words)
        first, before = kinds.get(kind, (words, 0))
        kinds[kind] = first, before + number
    most = sorted(kinds.values(), key=lambda one: -one[1])
    lines = [f"failed {number} times: {words}" for words, number in most[:MAX_ERROR_KINDS]]
    num_more = sum(number for _, number in most[MAX_ERROR_KINDS:])
    return [*lines, f"failed {num_more} times in other ways; --out has them"] if num_more else lines
