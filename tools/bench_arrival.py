#!/usr/bin/env python3
"""How long running streams stall while a long prompt arrives: their worst gap between tokens against their steady one, by the rows of a step.

    python tools/bench_arrival.py [--batch 16] [--context 1024] [--prompt 8192] [--budgets 64,128,256,512] [--out FILE.json]

One engine with random weights; for each budget: `batch` streams decode; once each has some tokens, the budget is set (step_tokens, tuned
while it runs; the streams' own prompts had whole steps) and one prompt is submitted, which takes the rows that the streams leave of each
step. Steady: the median gap between tokens before the arrival; worst: the longest gap that touches the time from the newcomer's ACK to its
first token. All by the device's clock (device_ns of completion entries); the client's worst gap, the newcomer's time to its first token and
the number of steps that the streams made meanwhile stand beside it. A budget that cannot be measured is a line of the table, too; the
others' figures stand, and are written as they come.
Test: pytest tests/host/test_bench_arrival.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
from numpy.typing import NDArray  # noqa: E402
from step_engine import EngineBench  # noqa: E402
from step_requests import BenchError, Times, Wave  # noqa: E402
from step_rows import SHAPES  # noqa: E402
from step_stats import finish, header, save_report  # noqa: E402

from blinkimp.cli.terminal import set_up_logging  # noqa: E402
from blinkimp.host.device_protocol import DeviceError  # noqa: E402
from blinkimp.host.engine import EngineFaultError  # noqa: E402
from blinkimp.host.memory_plan import MemoryPlanError  # noqa: E402
from blinkimp.host.power import open_nvml  # noqa: E402
from blinkimp.host.tuning import TuningError  # noqa: E402
from blinkimp.nic_shim.queue_pair import QueuePairError  # noqa: E402
from blinkimp.ring_abi import MAX_STEP_TOKENS, PAGE_TOKENS  # noqa: E402

NUM_STEADY: Final = 48  # tokens of each stream before the arrival
NUM_AFTER: Final = 64  # and some for the time after it, and for a client that comes late
FILL_TOKENS: Final = 2048  # rows of a step for the streams' own prompts: at a small budget the first stream would be far ahead of the last


def gaps_of(streams: Times, newcomer: Times) -> dict[str, Any]:
    """Steady and worst gaps of the running streams, in ms."""
    arrived_ns, began_ns = int(newcomer.accepted[0]), int(newcomer.device[0, 0])
    device_gaps = np.diff(streams.device, axis=1)  # [batch, max_tokens - 1]
    starts, ends = streams.device[:, :-1], streams.device[:, 1:]
    is_before = (starts >= streams.device[:, 0].max()) & (ends <= arrived_ns)
    is_beside = (ends > arrived_ns) & (starts < began_ns)
    is_after = (starts >= began_ns) & (ends <= streams.device[:, -1].min())
    slack_ms = (int(streams.device[:, -1].min()) - began_ns) / 1e6
    if not (is_before.any() and is_beside.any()) or slack_ms < 0:
        raise BenchError(
            f"{int(is_before.sum())} gaps before the arrival and {int(is_beside.sum())} beside it, the first stream ends {slack_ms:.1f} ms after the "
            f"newcomer's first token; expected some, some, and at least 0: streams of {streams.device.shape[1]} tokens are too short for "
            "this prompt; try again where the machine was busy, else give a larger budget or a shorter --prompt"
        )
    steady_ms = float(np.median(device_gaps[is_before])) / 1e6
    worst_ms = float(device_gaps[is_beside].max()) / 1e6
    client_gaps: NDArray[np.int64] = np.diff(streams.client, axis=1)
    return {
        "steady_tpot_ms": round(steady_ms, 4),
        "worst_gap_ms": round(worst_ms, 4),
        "ratio": round(worst_ms / steady_ms, 3),
        "num_steps_beside": int(is_beside.sum(axis=1).max()),  # of any stream: a token comes from each step
        "median_gap_beside_ms": round(float(np.median(device_gaps[is_beside])) / 1e6, 4),
        "steady_tpot_after_ms": round(float(np.median(device_gaps[is_after])) / 1e6, 4) if is_after.any() else None,
        "client_worst_gap_ms": round(float(client_gaps[is_beside].max()) / 1e6, 4),
        "newcomer_ttft_ms": round((began_ns - arrived_ns) / 1e6, 4),
        "newcomer_client_ttft_ms": round((int(newcomer.client[0, 0]) - int(newcomer.submitted[0])) / 1e6, 4),
    }


def fill_tokens(arguments: argparse.Namespace) -> int:
    """The engine's rows of a step, and what the streams' prompts are read with."""
    num_rows: int = max(FILL_TOKENS, *arguments.budgets)
    return num_rows


def num_stream_tokens(arguments: argparse.Namespace, budget: int) -> int:
    """So long a stream lives. The first one has a token from each step that the others' prompts take. Then the newcomer has what the streams leave
    of each step; half as many steps again leave room for a scheduler that gives prompts less, as where a step ends at a whole tile."""
    num_fill: int = -(-arguments.batch * arguments.context // (fill_tokens(arguments) - arguments.batch)) + 1
    num_steps: int = -(-arguments.prompt // (budget - arguments.batch))
    return num_fill + NUM_STEADY + num_steps * 3 // 2 + NUM_AFTER


def measure(bench: EngineBench, arguments: argparse.Namespace, budget: int, num_runs: int) -> list[dict[str, Any]]:
    """Arrivals, one after the other."""
    waves = [
        Wave(arguments.batch, arguments.context, num_stream_tokens(arguments, budget)),
        Wave(1, arguments.prompt, 1, NUM_STEADY, prepare=lambda: bench.engine.tune(step_tokens=budget)),
    ]
    runs = []
    for _ in range(num_runs):
        bench.engine.tune(step_tokens=0)  # as launched
        streams, newcomer = bench.client.run(f"budget {budget}", waves)
        runs.append(gaps_of(streams, newcomer))
    return runs


def attempt(
    bench: EngineBench, arguments: argparse.Namespace, budget: int, num_runs: int
) -> list[dict[str, Any]] | BenchError:
    """measure(), or why not. Raises BenchError where the engine is not done with it: then no other budget can be measured either."""
    try:
        return measure(bench, arguments, budget, num_runs)
    except BenchError as error:
        if not bench.client.settle():
            raise BenchError(
                f"budget {budget}: {error}; its requests still run; expected an idle engine for the next budget"
            ) from error
        return error


def measure_all(bench: EngineBench, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every budget into the report and the table. Raises BenchError as attempt()."""
    attempt(bench, arguments, max(arguments.budgets), 1)  # warms up in few steps; what fails here fails in its turn
    for budget in arguments.budgets:
        began = time.monotonic()
        runs = attempt(bench, arguments, budget, arguments.repeats)
        row: dict[str, Any] = {"budget": budget, "wall_s": round(time.monotonic() - began, 2)}
        if isinstance(runs, BenchError):
            row["error"] = str(runs)
            report["errors"].append(f"budget {budget}: {runs}")
            print(f"{budget:6}  not measured: the error stands below", flush=True)
        else:
            row["worst"] = worst = max(runs, key=lambda run: float(run["ratio"]))
            row["runs"] = runs
            print(
                f"{budget:6}{worst['steady_tpot_ms']:11.3f}{worst['worst_gap_ms']:11.3f}{worst['ratio']:8.2f}"
                f"{worst['client_worst_gap_ms']:14.3f}{worst['newcomer_ttft_ms']:18.1f}{row['wall_s']:8.1f}",
                flush=True,
            )
        report["budgets"].append(row)
        save_report(report, arguments.out)  # an end from outside loses one budget, not all


def number_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("auto", "gpu", "emulated"), default="auto")
    parser.add_argument("--batch", type=int, default=16, help="streams that run")
    parser.add_argument("--context", type=int, default=1024, help="their prompt tokens")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt that arrives")
    parser.add_argument(
        "--budgets", type=number_list, default=[32, 64, 128, 256, 512, 2048], help="rows of a step (step_tokens) to try"
    )
    parser.add_argument("--repeats", type=int, default=3, help="arrivals to measure for each budget")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one arrival may take")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    if min([1, arguments.batch, arguments.context, arguments.prompt, arguments.repeats]) < 1:
        parser.error("expected positive numbers for --batch, --context, --prompt and --repeats")
    if (
        not arguments.budgets
        or not arguments.batch < min(arguments.budgets) <= max(arguments.budgets) <= MAX_STEP_TOKENS
    ):
        parser.error(
            f"--budgets is {arguments.budgets}, expected numbers above --batch ({arguments.batch}), whose rows come first, up to {MAX_STEP_TOKENS}"
        )
    set_up_logging("warning")
    report: dict[str, Any] = {
        **header("bench_arrival", argv, arguments.commit, open_nvml()),
        "shape": arguments.shape,
        **{name: getattr(arguments, name) for name in ("batch", "context", "prompt")},
        "budgets": [],
        "errors": [],
    }
    longest = arguments.context + num_stream_tokens(arguments, min(arguments.budgets))
    max_context = -(-max(longest, arguments.prompt + 1) // PAGE_TOKENS) * PAGE_TOKENS
    settings = {"max_step_tokens": fill_tokens(arguments), "max_batch": arguments.batch + 1}
    print(
        f"{'budget':>6}{'steady ms':>11}{'worst gap':>11}{'ratio':>8}{'client worst':>14}{'newcomer TTFT ms':>18}{'wall s':>8}"
    )
    try:
        with EngineBench(arguments.shape, arguments.device, max_context, settings, arguments.timeout, None) as bench:
            measure_all(bench, arguments, report)
    except (BenchError, DeviceError, EngineFaultError, MemoryPlanError, QueuePairError, TuningError) as error:
        report["errors"].append(str(error))
    if len(report["budgets"]) < len(arguments.budgets):
        report["errors"].append(
            f"no figures of budgets {arguments.budgets[len(report['budgets']) :]}: the error above ended it"
        )
    return finish(report, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
