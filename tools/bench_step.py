#!/usr/bin/env python3
"""Milliseconds per decoded token and per prefill: blinkimp's kernel through a queue pair, a torch baseline, and what the hardware allows.

    python tools/bench_step.py --quick --out FILE.json          nine rows of the 8B shape, within 4 minutes of an H200
    python tools/bench_step.py --rows full                      contexts of 8,192 and 32,768 as well
    python tools/bench_step.py --rows d16@1024,p128 --only blinkimp

Rows: d<batch>@<context> is a step in which `batch` requests each attend to `context` positions (blinkimp's prompts are shortened so that the
mean over the measured steps is that); p<tokens> a lone prompt up to its first token. Random weights and prompts. No ZeroMQ, no tokenizer: the
figures are the engine's. All on the same GPU, one after the other: (a) blinkimp, by the device's clock (device_ns of completion entries) and at the
client beside it; (b) tools/torch_baseline.py in a process of its own: torch.compile, CUDA graph, static KV, SDPA; (c) the limit from bytes and
operations (tools/step_cost.py), at rates that one H200 reached or, with --measure-limits, that this GPU reaches now. Energy by NVML.
Without a GPU: --device emulated, which has no limits and no energy. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from step_cost import Limits  # noqa: E402  (the path above comes first)
from step_engine import EngineBench  # noqa: E402
from step_report import fill_rows, print_report  # noqa: E402
from step_requests import SAMPLING, BenchError  # noqa: E402
from step_rows import SHAPES, Row, parse_rows  # noqa: E402
from step_stats import header, write_report  # noqa: E402

from blinkimp.cli.terminal import set_up_logging  # noqa: E402
from blinkimp.host.compile import CompileError  # noqa: E402
from blinkimp.host.device_protocol import DeviceError  # noqa: E402
from blinkimp.host.engine import EngineFaultError  # noqa: E402
from blinkimp.host.gpu_driver import GpuError  # noqa: E402
from blinkimp.host.memory_plan import MemoryPlanError  # noqa: E402
from blinkimp.host.model_config import parse_config  # noqa: E402
from blinkimp.host.power import PowerSource, idle_power_w, open_nvml  # noqa: E402
from blinkimp.nic_shim.queue_pair import QueuePairError  # noqa: E402

IDLE_S = 2.0  # how long an idle GPU's power is looked at
TORCH_TIMEOUT_S = 1800.0
QUICK_COMPILE_BUDGET_S = 80.0


def max_context_of(rows: list[Row], shape: str) -> int:
    """Room for the measured steps, and for those in which the prompts of a batch are still on their way."""
    wanted = max(row.context for row in rows) * 5 // 4 + 1024
    num_positions: int = SHAPES[shape]["max_position_embeddings"]
    return min(-(-wanted // 64) * 64, num_positions)


def bench_blinkimp(arguments: argparse.Namespace, report: dict[str, Any], source: PowerSource | None) -> dict[str, Any]:
    """Figures by row name. Fills `report` as it goes, so that what was measured before a failure is there."""
    figures: dict[str, Any] = {}
    settings = {
        name: value
        for name, value in (("max_step_tokens", arguments.step_tokens), ("prefill_chunk_tokens", arguments.chunk))
        if value
    }
    try:
        with EngineBench(
            arguments.shape,
            arguments.device,
            max_context_of(arguments.rows, arguments.shape),
            settings,
            arguments.timeout,
            source,
            arguments.sampling,
        ) as bench:
            report["engine"] = bench.describe()
            report["engine"]["ping"] = bench.ping_us()
            report["idle"]["engine_w"] = bench.idle_power_w(IDLE_S)
            for row in arguments.rows:
                try:
                    figures[row.name] = bench.measure(row, arguments.tokens, arguments.energy_s)
                except BenchError as error:
                    report["errors"].append(f"blinkimp, {error}")
                    bench.engine.check()  # is it only this row?
                    if not bench.client.settle():
                        raise BenchError(
                            f"requests of {row.name} still run; expected an idle engine for the next row"
                        ) from error
    except (BenchError, DeviceError, EngineFaultError, GpuError, MemoryPlanError, QueuePairError) as error:
        report["errors"].append(f"blinkimp: {error}")
    return figures


def bench_torch(arguments: argparse.Namespace, report: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Figures by row name, from tools/torch_baseline.py."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "torch.json"
        command = [
            sys.executable,
            str(ROOT / "tools" / "torch_baseline.py"),
            "--shape",
            arguments.shape,
            "--out",
            str(out),
        ]
        command += ["--rows", ",".join(row.name for row in arguments.rows), "--device", "cuda" if on_gpu else "cpu"]
        command += ["--backend", arguments.torch_backend, "--mode", arguments.torch_mode]
        command += ["--compile-budget-s", str(arguments.compile_budget_s), "--seconds", str(arguments.energy_s)]
        command += ["--tune"] if arguments.torch_tune else []
        command += ["--matrix-rate"] if arguments.measure_limits else []
        try:
            done = subprocess.run(command, check=False, timeout=TORCH_TIMEOUT_S)
            if done.returncode:
                report["errors"].append(
                    f"torch: ended with status {done.returncode}, expected 0; its messages stand above"
                )
        except subprocess.TimeoutExpired:
            report["errors"].append(f"torch: still ran after {TORCH_TIMEOUT_S:g} s; expected an end; choose fewer rows")
        if not out.exists():
            return {}
        found = json.loads(out.read_text())
    report["torch"] = {name: found[name] for name in ("torch", "cuda")}
    report["errors"] += [f"torch, {failed['name']}: {failed['error']}" for failed in found["errors"]]
    if "operations_per_s" in found:
        report["limits"]["operations_per_s"] = found["operations_per_s"]
    return {row["name"]: row for row in found["rows"]}


def bench(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    on_gpu = arguments.device == "gpu" or (arguments.device == "auto" and open_nvml() is not None)
    source = open_nvml() if on_gpu else None
    report["idle"]["gpu_w"] = idle_power_w(source, IDLE_S)
    if arguments.measure_limits:
        from stream_rate import stream_rate

        try:
            report["limits"]["bytes_per_s"] = stream_rate()
        except (CompileError, GpuError) as error:
            report["errors"].append(f"bandwidth: {error}")
    model = parse_config(SHAPES[arguments.shape])

    def fill(blinkimp: dict[str, Any], torch: dict[str, Any]) -> None:
        limits = Limits(**report["limits"]) if on_gpu else None
        report["rows"] = fill_rows(arguments.rows, model, limits, blinkimp, torch, report["idle"]["gpu_w"])

    blinkimp = bench_blinkimp(arguments, report, source) if arguments.only != "torch" else {}
    fill(blinkimp, {})
    if arguments.only != "blinkimp":
        write_report(report, arguments.out)  # torch takes minutes: what there is is kept
        fill(blinkimp, bench_torch(arguments, report, on_gpu))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="--rows quick with less repetition: within 4 minutes of GPU time"
    )
    parser.add_argument(
        "--rows", type=parse_rows, help="d<batch>@<context> and p<tokens>, by commas; or quick, or full"
    )
    parser.add_argument("--only", choices=("blinkimp", "torch"), help="one side of the comparison")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("auto", "gpu", "emulated"), default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps to measure of each row, at least")
    parser.add_argument("--energy-s", type=float, help="how long each row is repeated on a GPU (default 2; quick: 1)")
    parser.add_argument("--sampling", choices=SAMPLING, default="greedy", help="what blinkimp's requests ask for")
    parser.add_argument("--step-tokens", type=int, default=0, help="rows of a step at most (max_step_tokens)")
    parser.add_argument(
        "--chunk", type=int, default=0, help="prompt tokens of a request in a step (prefill_chunk_tokens)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one set of requests may take")
    parser.add_argument("--measure-limits", action="store_true", help="measure bandwidth and matrix rate on this GPU")
    parser.add_argument("--torch-backend", default="inductor", help="of torch.compile; none: uncompiled")
    parser.add_argument("--torch-mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument("--torch-tune", action="store_true", help="inductor's coordinate descent tuning")
    parser.add_argument(
        "--compile-budget-s", type=float, help="torch.compile's, over all rows (default 600; quick: 80)"
    )
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    arguments.rows = arguments.rows or parse_rows("quick" if arguments.quick else "full")
    if arguments.energy_s is None:
        arguments.energy_s = 1.0 if arguments.quick else 2.0
    if arguments.compile_budget_s is None:
        arguments.compile_budget_s = QUICK_COMPILE_BUDGET_S if arguments.quick else 600.0
    if arguments.tokens < 1 or arguments.energy_s <= 0:
        parser.error("expected positive numbers for --tokens and --energy-s")
    if arguments.measure_limits and (arguments.only == "blinkimp" or arguments.device == "emulated"):
        parser.error(
            "--measure-limits asks the GPU, and torch for the matrix rate; leave --only blinkimp and --device emulated away"
        )
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    set_up_logging("info")
    report: dict[str, Any] = {
        **header("bench_step", argv, arguments.commit, open_nvml()),
        "shape": arguments.shape,
        "sampling": arguments.sampling,
        "limits": dataclasses.asdict(Limits()),
        "limits_measured_in_this_run": arguments.measure_limits,
        "idle": {"gpu_w": None, "engine_w": None},
        "rows": [],
        "errors": [],
    }
    bench(arguments, report)
    print_report(report)
    write_report(report, arguments.out)
    for error in report["errors"]:
        print(f"error: {error}", file=sys.stderr)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
