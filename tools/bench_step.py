#!/usr/bin/env python3
"""Milliseconds per decoded token and per prefill of a model shape with random weights, through a queue pair of a real engine.

    python tools/bench_step.py [--shape llama-3-8b] [--batches 1,16,64] [--context 1024] [--tokens 64] [--prefill 128,1024]
                               [--device gpu] [--out FILE.json]

No ZeroMQ, no tokenizer: the figures are the engine's. Decode: `batch` requests of `context` random token ids; counted are only the
times between tokens while all of them decode, by the device's clock (device_ns of TOKEN entries) and as this client saw them.
Prefill: a lone request, from the submission to its first token as this client saw it, and from ACK to token by the device's clock.

Limit = max(weight bytes / 4.6 TB/s, GEMM operations / 790 TFLOP/s) + max(KV bytes / 4.6 TB/s, attention operations / 790 TFLOP/s), what
one H200 was measured to reach; ratios to it are given on a GPU only. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import platform
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from step_cost import LIMIT_FORMULA, StepCost, decode_cost, prefill_cost  # noqa: E402  (the path above comes first)
from step_requests import BenchError, Client, Times, steady_state  # noqa: E402

from blinkimp import __version__  # noqa: E402
from blinkimp import ring_abi as abi  # noqa: E402
from blinkimp.cli.terminal import LoadingBars, set_up_logging  # noqa: E402
from blinkimp.config import Config  # noqa: E402
from blinkimp.host.device_protocol import DeviceError  # noqa: E402
from blinkimp.host.engine import Engine, EngineFaultError  # noqa: E402
from blinkimp.host.memory_plan import MemoryPlanError  # noqa: E402
from blinkimp.nic_shim.queue_pair import QueuePairError, QueuePairPort  # noqa: E402

# config.json by shape; None is the packaged model.
SHAPES: Final[dict[str, dict[str, Any] | None]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "embedded": None,
}
NUM_PREFILLS: Final = 7  # measured ones of each length, after one that warms up
ATTACH_TIMEOUT_S: Final = 10.0


# ---- Measurements ----------------------------------------------------------------------------------------------------
def spread(samples_ns: NDArray[np.int64]) -> dict[str, float]:
    """Median, p10 and p90 in ms."""
    p10, median, p90 = np.percentile(samples_ns, [10, 50, 90]) / 1e6
    return {"median_ms": round(median, 4), "p10_ms": round(p10, 4), "p90_ms": round(p90, 4)}


def measure_decode(client: Client, engine: Engine, batch: int, context: int, num_tokens: int) -> dict[str, Any]:
    sizes = engine.plan.sizes
    # Tokens that the first request may have before the last one's prompt is through; a step's rows are prompts' after decodes'.
    num_lead = math.ceil(batch * context / max(1, min(sizes.prefill_chunk_tokens, sizes.max_step_tokens - batch))) + 2
    times = client.run(f"decode, batch {batch}", batch, context, num_tokens + num_lead)
    rows, columns = steady_state(times)
    if len(rows) < batch * num_tokens:
        raise BenchError(
            f"decode, batch {batch}: {len(rows)} times between tokens while all decode, expected {batch * num_tokens}; "
            "raise --tokens, or lower --context"
        )
    device_ns = times.device[rows, columns] - times.device[rows, columns - 1]
    client_ns = times.client[rows, columns] - times.client[rows, columns - 1]
    mean_context = context + float(columns.mean())
    cost = decode_cost(engine.model, item_bytes_of(engine), batch, mean_context)
    device = spread(device_ns)
    return {
        "batch": batch,
        "context": context,
        "mean_context": round(mean_context, 1),
        "num_steps": len(rows) // batch,
        "device": device,
        "client": spread(client_ns),
        "step_bytes": cost.num_bytes,
        "achieved_tb_per_s": round(cost.num_bytes / device["median_ms"] / 1e9, 4),
        **limit_of(engine, cost, device["median_ms"]),
    }


def measure_prefill(client: Client, engine: Engine, num_tokens: int) -> dict[str, Any]:
    runs: list[Times] = [client.run(f"prefill {num_tokens}", 1, num_tokens, 1) for _ in range(1 + NUM_PREFILLS)][1:]
    cost = prefill_cost(engine.model, item_bytes_of(engine), num_tokens)
    seen = spread(np.array([times.client[0, 0] - times.submitted[0] for times in runs]))
    return {
        "num_tokens": num_tokens,
        "num_runs": NUM_PREFILLS,
        "client": seen,
        "device": spread(np.array([times.device[0, 0] - times.accepted[0] for times in runs])),
        "step_operations": cost.num_operations,
        "achieved_tflop_per_s": round(cost.num_operations / seen["median_ms"] / 1e9, 3),
        **limit_of(engine, cost, seen["median_ms"]),
    }


def item_bytes_of(engine: Engine) -> int:
    return 2 if engine.compute == abi.DType.BF16 else 4


def limit_of(engine: Engine, cost: StepCost, got_ms: float) -> dict[str, float | None]:
    if engine.device.kind != "gpu":
        return {"limit_ms": None, "ratio_to_limit": None}
    limit_ms = cost.limit_s * 1e3
    return {"limit_ms": round(limit_ms, 4), "ratio_to_limit": round(got_ms / limit_ms, 3)}


class LoadWatch:
    """Times the stages that Device.start() reports, and shows them."""

    def __init__(self, bars: LoadingBars) -> None:
        self._bars = bars
        self._began = 0.0
        self._ended: dict[str, float] = {}

    def begin(self) -> None:
        """Right before the engine's start."""
        self._began = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._ended[stage] = time.monotonic()
        self._bars(stage, done, total)

    def report(self, weight_bytes: int) -> dict[str, float]:
        """Called once the engine runs. The GPU compiles first; the emulated device's load includes the start of its process."""
        compiled = self._ended.get("compile", self._began)
        weights_s = self._ended["weights"] - compiled
        return {
            "compile_s": round(compiled - self._began, 3),
            "weights_s": round(weights_s, 3),
            "weights_gb_per_s": round(weight_bytes / 1e9 / weights_s, 3),
            "start_s": round(time.monotonic() - self._began, 3),
        }


# ---- Report ----------------------------------------------------------------------------------------------------------
def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit that was measured, or `uncommitted` where the tree differs from it or there is no git."""
    head, changes = output_of("git", "rev-parse", "HEAD"), output_of("git", "status", "--porcelain")
    return head if head and changes == "" else "uncommitted"


def number_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def bench(arguments: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Fills `report` as it goes, so that what was measured before a failure is there."""
    shape = SHAPES[arguments.shape]
    if shape is not None:
        (folder / "config.json").write_text(json.dumps(shape))
    config = Config(
        model="embedded" if shape is None else str(folder),
        load_format="dummy",
        device=arguments.device,
        engine_name=f"bench-{secrets.token_hex(4)}",
        num_queue_pairs=1,
    )
    with LoadingBars() as bars:
        watch = LoadWatch(bars)
        engine = Engine(config, progress=watch)
        plan = engine.plan
        watch.begin()
        with engine:
            report["device"] = engine.device.describe()
            report["load"] = {"weight_bytes": plan.weight_bytes, **watch.report(plan.weight_bytes)}
            report["memory_plan"] = {
                **dataclasses.asdict(plan),
                "kv_bytes": plan.kv_bytes,
                "free_bytes": plan.free_bytes,
            }
            with QueuePairPort.open(config.engine_name, 0) as port:
                port.attach(ATTACH_TIMEOUT_S)
                port.start_heartbeat()
                client = Client(engine, port, bars, arguments.timeout)
                for num_tokens in arguments.prefill:
                    report["prefill"].append(measure_prefill(client, engine, num_tokens))
                for batch in arguments.batches:
                    report["decode"].append(measure_decode(client, engine, batch, arguments.context, arguments.tokens))


def print_report(report: dict[str, Any]) -> None:
    if "load" in report:
        load = report["load"]
        print(
            f"{report['device']}; shape {report['shape']}: {load['weight_bytes'] / 1e9:.2f} GB of weights in {load['weights_s']:.1f} s "
            f"({load['weights_gb_per_s']:.2f} GB/s), kernels in {load['compile_s']:.1f} s, running after {load['start_s']:.1f} s"
        )
    print(f"limit = {LIMIT_FORMULA}")
    print(f"{'':22}{'ms':>10}{'p10':>10}{'p90':>10}{'beside it':>12}{'limit ms':>10}{'x limit':>9}  achieved")
    for row in report["decode"]:
        print_row(f"decode, batch {row['batch']}", row, "device", "client", f"{row['achieved_tb_per_s']:.3f} TB/s")
    for row in report["prefill"]:
        print_row(
            f"prefill, {row['num_tokens']} tokens",
            row,
            "client",
            "device",
            f"{row['achieved_tflop_per_s']:.2f} TFLOP/s",
        )
    print(
        "decode: ms per token by the device's clock, the client's beside it; prefill: ms to the first token at the client"
    )


def print_row(name: str, row: dict[str, Any], clock: str, other: str, achieved: str) -> None:
    times, limit_ms = row[clock], row["limit_ms"]
    limit = f"{'-':>10}{'-':>9}" if limit_ms is None else f"{limit_ms:10.3f}{row['ratio_to_limit']:9.2f}"
    numbers = "".join(f"{times[key]:10.3f}" for key in ("median_ms", "p10_ms", "p90_ms"))
    print(f"{name:22}{numbers}{row[other]['median_ms']:12.3f}{limit}  {achieved}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("auto", "gpu", "emulated"), default="auto")
    parser.add_argument("--batches", type=number_list, default=[1, 16, 64], help="requests that decode together")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of the requests that decode")
    parser.add_argument("--tokens", type=int, default=64, help="steps to measure of each batch, at least")
    parser.add_argument("--prefill", type=number_list, default=[128, 1024], help="prompt lengths")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that one set of requests may take")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    if min([1, arguments.tokens, arguments.context, *arguments.batches, *arguments.prefill]) < 1:
        parser.error("expected positive numbers for --batches, --context, --tokens and --prefill")
    set_up_logging("info")
    report: dict[str, Any] = {
        "command": shlex.join(["python", "tools/bench_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "blinkimp": __version__},
        "driver": output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "shape": arguments.shape,
        "limit": LIMIT_FORMULA,
        "decode": [],
        "prefill": [],
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench(arguments, Path(folder), report)
    except (BenchError, DeviceError, EngineFaultError, MemoryPlanError, QueuePairError) as error:
        report["error"] = str(error)
    print_report(report)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {arguments.out}")
    if "error" in report:
        print(f"error: {report['error']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
