#!/usr/bin/env python3
"""Milliseconds per step of a hand-written torch model: torch.compile, one CUDA graph a step, static KV cache, SDPA. The baseline of bench_step.

    python tools/torch_baseline.py --rows d1@1024,p128 [--shape llama-3-8b] [--device cuda] [--backend inductor] --out FILE.json

A decode step attends to exactly `context` positions and writes the last one's keys and values: a mask over a longer static cache would
only cost it time. SDPA runs on the fastest of flash, cuDNN and memory-efficient for each row (measured; the JSON names it). Where compiling has
used up --compile-budget-s, further rows are CUDA graphs of uncompiled operations, and say so. device: CUDA events between graph replays that
are queued back to back; client: with the ids brought to the host after each step, as a server must.
Called by tools/bench_step.py as a process of its own. Development only. Test: pytest tests/host/test_torch_baseline.py
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812  (torch's own habit)
from numpy.typing import NDArray  # noqa: E402
from step_rows import SHAPES, Row, parse_rows  # noqa: E402
from step_stats import spread  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch_llama import Dims, Step, Weights  # noqa: E402

from blinkimp.host.power import PowerMeter, PowerSource, open_nvml  # noqa: E402

NUM_WARM_UP: Final = 3
NUM_CLIENT_RUNS: Final = 20  # steps with their ids brought to the host
MATRIX_SIDE: Final = 8192
SDPA_BACKENDS: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class BaselineError(RuntimeError):
    """The figures would not mean what they claim; the message says why."""


# ---- Time ------------------------------------------------------------------------------------------------------------
def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times_of(device: str, run: Callable[[], object], num_runs: int) -> NDArray[np.int64]:
    """ns of each run, by the device's clock; queued back to back on a GPU."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        times_ms = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
        return np.array([milliseconds * 1e6 for milliseconds in times_ms], np.int64)
    moments = [time.perf_counter_ns()]
    for _ in range(num_runs):
        run()
        moments.append(time.perf_counter_ns())
    return np.array([end - begin for begin, end in itertools.pairwise(moments)], np.int64)


def captured(device: str, run: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph; on the CPU, the step."""
    if device != "cuda":
        run()
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ---- Attention's backend ---------------------------------------------------------------------------------------------
def fastest_sdpa(device: str, dims: Dims, row: Row) -> tuple[SDPBackend, dict[str, float | str]]:
    """Which backend runs the row's attention fastest, and what each one did: ms, or why not."""
    if device != "cuda":
        return SDPBackend.MATH, {}
    num_queries = row.context if row.phase == "prefill" else 1
    q = torch.randn((row.batch, dims.num_heads, num_queries, dims.head_dim), device=device, dtype=torch.bfloat16)
    shape = (row.batch, dims.num_kv_heads, row.context, dims.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    found: dict[str, float | str] = {}

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=row.phase == "prefill", enable_gqa=True)

    for backend in SDPA_BACKENDS:
        try:
            with sdpa_kernel([backend]):
                for _ in range(NUM_WARM_UP):
                    attend()
                found[backend.name] = round(float(np.median(times_of(device, attend, 10))) / 1e6, 4)
        except RuntimeError as error:  # this backend has no kernel for the shape
            found[backend.name] = str(error).splitlines()[0][:120]
    times = {name: ms for name, ms in found.items() if isinstance(ms, float)}
    if not times:
        raise BaselineError(
            f"{row.label}: no SDPA backend runs it: {found}; expected one of {[b.name for b in SDPA_BACKENDS]}"
        )
    best = min(times, key=lambda name: times[name])
    return next(backend for backend in SDPA_BACKENDS if backend.name == best), found


# ---- Rows ------------------------------------------------------------------------------------------------------------
class Baseline:
    """Weights on the device, and the measurement of one row after the other."""

    def __init__(self, arguments: argparse.Namespace, source: PowerSource | None) -> None:
        self._arguments, self._source = arguments, source
        self._device: str = arguments.device
        self._dims = Dims.of(SHAPES[arguments.shape])
        self._dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        self._weights = Weights(self._dims, self._device, self._dtype)
        self._compile_s = 0.0
        wait(self._device)

    def _compiler(self) -> tuple[str, Callable[[Any], Any]]:
        arguments = self._arguments
        if arguments.backend == "none" or self._compile_s >= arguments.compile_budget_s:
            return "graph of eager operations", lambda function: function
        torch._dynamo.reset()
        name = f"torch.compile({arguments.backend}, {arguments.mode})"
        if arguments.tune:
            # Batch 1 becomes generated matrix-vector kernels, whose launch parameters are searched for.
            settings = {**torch._inductor.list_mode_options(arguments.mode), "coordinate_descent_tuning": True}
            return f"{name[:-1]}, tuned)", lambda function: torch.compile(
                function, options=settings, dynamic=False, fullgraph=True
            )
        if arguments.backend != "inductor":  # modes are inductor's
            return name, lambda function: torch.compile(
                function, backend=arguments.backend, dynamic=False, fullgraph=True
            )
        return name, lambda function: torch.compile(function, mode=arguments.mode, dynamic=False, fullgraph=True)

    def measure(self, row: Row) -> dict[str, Any]:
        backend, tried = fastest_sdpa(self._device, self._dims, row)
        variant, compiler = self._compiler()
        num_tokens = row.context if row.phase == "prefill" else 1
        gc.collect()  # the row before leaves its KV cache and its graph
        if self._device == "cuda":
            torch.cuda.empty_cache()
        with sdpa_kernel([backend]):
            step = Step(
                self._dims,
                self._weights,
                batch=row.batch,
                num_tokens=num_tokens,
                num_attended=row.context,
                compiler=compiler,
            )
            began = time.monotonic()
            step.run()
            wait(self._device)
            prepare_s = time.monotonic() - began
            if variant.startswith("torch.compile"):
                self._compile_s += prepare_s
            replay = captured(self._device, step.run)
            figures = self._run(step, replay)
        return {
            "name": row.name,
            "variant": variant,
            "first_run_s": round(prepare_s, 2),
            "sdpa": backend.name,
            "sdpa_ms": tried,
            **figures,
        }

    def _run(self, step: Step, replay: Callable[[], None]) -> dict[str, Any]:
        """Device times over --seconds, with the energy drawn meanwhile; then the client's times."""
        rough_s = float(np.median(times_of(self._device, replay, 3))) / 1e9
        num_runs = max(self._arguments.min_runs, int(self._arguments.seconds / max(rough_s, 1e-6)))
        with PowerMeter(self._source) as meter:
            begin_ns = time.monotonic_ns()
            device_ns = times_of(self._device, replay, num_runs)
            end_ns = time.monotonic_ns()
        host_in = torch.zeros(step.ids.shape, dtype=step.ids.dtype, pin_memory=self._device == "cuda")
        host_in.copy_(step.ids)
        host_out = torch.zeros(step.next_ids.shape, dtype=step.next_ids.dtype, pin_memory=self._device == "cuda")
        client_ns = []
        for _ in range(min(num_runs, NUM_CLIENT_RUNS)):
            began_ns = time.perf_counter_ns()
            if step.ids.shape[1] > 1:  # a prompt comes from the host
                step.ids.copy_(host_in, non_blocking=True)
            replay()
            host_out.copy_(step.next_ids, non_blocking=True)
            wait(self._device)
            client_ns.append(time.perf_counter_ns() - began_ns)
        return {
            "device": spread(device_ns),
            "client": spread(np.array(client_ns, np.int64)),
            "energy_j": meter.energy_j(begin_ns, end_ns),
            "energy_s": (end_ns - begin_ns) / 1e9,
            "energy_steps": num_runs,
        }


def matrix_rate(device: str) -> float:
    """Operations/s of a large bf16 matrix product through cuBLAS."""
    side = MATRIX_SIDE if device == "cuda" else 256
    a, b = (torch.randn((side, side), device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    times_of(device, multiply, 10)
    return 2 * side**3 / (float(np.median(times_of(device, multiply, 30))) / 1e9)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--rows", type=parse_rows, required=True, help="such as d1@1024,p128, or quick, or full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="inductor", help="torch.compile's backend; none: no compilation")
    parser.add_argument("--mode", default="default", help="torch.compile's mode, such as max-autotune-no-cudagraphs")
    parser.add_argument(
        "--tune", action="store_true", help="inductor's coordinate descent tuning (compiles for longer)"
    )
    parser.add_argument("--compile-budget-s", type=float, default=600.0, help="then rows are measured uncompiled")
    parser.add_argument("--seconds", type=float, default=1.5, help="of device time that each row is repeated")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--matrix-rate", action="store_true", help="measure the rate of bf16 matrix products too")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.tune and arguments.backend != "inductor":
        parser.error("--tune is inductor's; expected --backend inductor")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch_baseline: torch sees no GPU; expected one; check nvidia-smi, or use --device cpu", file=sys.stderr)
        return 1
    report: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "rows": [], "errors": []}
    with torch.inference_mode():
        if arguments.matrix_rate:
            report["operations_per_s"] = matrix_rate(arguments.device)
        baseline = Baseline(arguments, open_nvml() if arguments.device == "cuda" else None)
        for row in arguments.rows:
            began = time.monotonic()
            try:
                report["rows"].append(baseline.measure(row))
                took = f"{report['rows'][-1]['device']['median_ms']:.3f} ms"
            except RuntimeError as error:  # out of memory, a compilation that fails, no kernel: the other rows may do
                words = (str(error).splitlines() or [type(error).__name__])[0]
                took = f"failed: {words}"
                report["errors"].append({"name": row.name, "error": words})
            print(f"torch: {row.label}: {took} ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
