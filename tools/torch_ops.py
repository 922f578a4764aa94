#!/usr/bin/env python3
"""The matrix products and the attention of a step by torch, each kind by itself, in time and in energy: what tools/bench_ops.py is set beside.

    python tools/torch_ops.py --rows d64@1024,p1024 [--parts qkv,down] [--seconds 0.6] [--device cuda] --out FILE.json

bf16, cuBLAS by torch.mm, SDPA on the fastest of flash, cuDNN and memory-efficient for each row (measured; the JSON names it). A step's worth is one
call for each layer, with that layer's weights or keys and values: 32 in turn do not fit into L2. Products alone: no norms, rotations, residuals
or KV pages. Calls are CUDA graphs of about 5 ms, replayed back to back. Bursts and sustained time as in ops_timing.py, JSON as in ops_report.py, with
the one variant `torch`. Called by tools/bench_ops.py as a process of its own. Development only. Test: pytest tests/host/test_torch_ops.py
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812  (torch's own habit)
from ops_parts import matrix_rows, parse_parts  # noqa: E402
from ops_report import TORCH, costs, layout, resolution, table  # noqa: E402
from ops_timing import Figures, Settings, measure_loads  # noqa: E402
from step_rows import SHAPES, Row, parse_rows  # noqa: E402
from step_stats import header, write_report  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402
from torch_baseline import captured, fastest_sdpa, times_of, wait  # noqa: E402
from torch_llama import Dims, Weights  # noqa: E402

from blinkimp.host.model_config import parse_config  # noqa: E402
from blinkimp.host.power import PowerSource, idle_power_w, open_nvml  # noqa: E402

Call = Callable[[], object]
PARTS: Final = ("qkv", "attention", "o", "gate_up", "down", "lm_head")
GRAPH_S: Final = 0.005  # of work in a graph: the gap between two replays is a thousandth of it
IDLE_S: Final = 1.0  # how long an idle GPU's power is looked at


# ---- Calls -----------------------------------------------------------------------------------------------------------
def matrices_of(weights: Weights, part: str) -> list[Tensor]:
    """[outputs, inputs], one for each layer."""
    match part:
        case "lm_head":
            return [weights.head]
        case "o":
            return [layer.output for layer in weights.layers]
        case _:
            return [getattr(layer, part) for layer in weights.layers]


def matrix_calls(weights: Weights, part: str, row: Row) -> list[Call]:
    """A product for each layer, of one input: normal numbers, for `down` what silu and gate make of them."""
    matrices = matrices_of(weights, part)
    shape = (matrix_rows(part, row), matrices[0].shape[1])
    x = torch.randn(shape, device=matrices[0].device, dtype=matrices[0].dtype)
    if part == "down":
        x = F.silu(x) * torch.randn_like(x)
    out = torch.empty((shape[0], matrices[0].shape[0]), device=x.device, dtype=x.dtype)
    return [lambda matrix=matrix: torch.mm(x, matrix.t(), out=out) for matrix in matrices]  # type: ignore[misc]


def attention_calls(dims: Dims, row: Row, device: str, dtype: torch.dtype) -> list[Call]:
    """Attention for each layer, over that layer's keys and values."""
    is_prefill = row.phase == "prefill"
    num_queries = row.context if is_prefill else 1
    q = torch.randn((row.batch, dims.num_heads, num_queries, dims.head_dim), device=device, dtype=dtype)
    shape = (row.batch, dims.num_kv_heads, row.context, dims.head_dim)
    caches = [tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(dims.num_layers)]
    grouped = dims.num_heads != dims.num_kv_heads

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_prefill, enable_gqa=grouped)

    return [lambda k=k, v=v: attend(k, v) for k, v in caches]  # type: ignore[misc]


# ---- Loads -----------------------------------------------------------------------------------------------------------
def calls_per_graph(call_s: float, num_calls: int) -> int:
    """About GRAPH_S of them: whole turns through the layers, or a part of one."""
    wanted = GRAPH_S / call_s
    return max(1, round(wanted)) if wanted < num_calls else num_calls * round(wanted / num_calls)


class GraphLoad:
    """Calls in turn; a unit is one graph of them."""

    max_units = 1 << 20

    def __init__(self, device: str, calls: Sequence[Call]) -> None:
        def turn() -> None:
            for call in calls:
                call()

        def run() -> None:
            for i in range(num_calls):
                calls[i % len(calls)]()

        turn()  # warms up
        call_s = float(np.median(times_of(device, turn, 3))) / 1e9 / len(calls)
        num_calls = calls_per_graph(call_s, len(calls))
        self._calls = calls  # a graph knows addresses alone: these keep its tensors there
        self._device, self._replay = device, captured(device, run)
        self.per_step = len(calls) / num_calls

    def begin(self) -> None:
        """Nothing that a call leaves is read by another."""

    def prepare(self, num_units: int) -> None:
        """The graph is there, however often it is replayed."""

    def run(self, num_units: int) -> None:
        for _ in range(num_units):
            self._replay()
        wait(self._device)


class TorchOps:
    """Weights on the device, and the measurement of one row after the other."""

    def __init__(self, shape: str, device: str, settings: Settings, source: PowerSource | None) -> None:
        self._device, self._settings, self._source = device, settings, source
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._dims = Dims.of(SHAPES[shape])
        self._weights = Weights(self._dims, device, self._dtype)
        wait(device)

    def measure(self, row: Row, parts: Sequence[str]) -> tuple[dict[str, Figures], dict[str, Any]]:
        """(figures by part, what is said of attention's backend)."""
        gc.collect()  # the row before leaves its keys and values, and its graphs
        if self._device == "cuda":
            torch.cuda.empty_cache()
        loads: dict[str, GraphLoad] = {}
        said: dict[str, Any] = {}
        for part in parts:
            if part == "attention":
                backend, tried = fastest_sdpa(self._device, self._dims, row)
                said = {"backend": backend.name, "ms": tried}
                with sdpa_kernel([backend]):
                    calls = attention_calls(self._dims, row, self._device, self._dtype)
                    loads[part] = GraphLoad(self._device, calls)
            else:
                loads[part] = GraphLoad(self._device, matrix_calls(self._weights, part, row))
        return measure_loads(loads, self._settings, self._source), said


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--rows", type=parse_rows, required=True, help="such as d64@1024,p1024")
    parser.add_argument(
        "--parts", type=parse_parts, default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default all)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=Settings().seconds, help="that each part goes on for (default 0.6)"
    )
    parser.add_argument("--no-energy", action="store_true", help="bursts alone: no sustained time, no joules")
    parser.add_argument("--idle-w", type=float, help="power of the idle GPU (default: measured)")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    arguments = parser.parse_args(argv)
    if not set(arguments.parts) <= set(PARTS):
        parser.error(
            f"parts: got {','.join(arguments.parts)}, expected some of {', '.join(PARTS)}; torch has no others"
        )
    try:
        arguments.settings = Settings(seconds=0.0 if arguments.no_energy else arguments.seconds)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    on_gpu, settings = arguments.device == "cuda", arguments.settings
    if on_gpu and not torch.cuda.is_available():
        print("torch_ops: torch sees no GPU; expected one; check nvidia-smi, or use --device cpu", file=sys.stderr)
        return 2
    source = open_nvml() if on_gpu and settings.seconds else None
    idle_w = arguments.idle_w if arguments.idle_w is not None else idle_power_w(source, IDLE_S)
    model = parse_config(SHAPES[arguments.shape])
    results: dict[str, dict[str, dict[str, Figures]]] = {TORCH: {}}
    report = header("torch_ops", argv, arguments.commit, open_nvml() if on_gpu else None)
    report |= {"settings": vars(settings), "costs": costs(model, arguments.rows, arguments.parts)}
    sdpa: dict[str, Any] = {}
    failures: dict[str, str] = {}
    report |= {TORCH: {"torch": torch.__version__, "cuda": torch.version.cuda, "sdpa": sdpa}, "failures": failures}
    with torch.inference_mode():
        ops = TorchOps(arguments.shape, arguments.device, settings, source)
        for row in arguments.rows:
            try:
                results[TORCH][row.name], sdpa[row.name] = ops.measure(row, arguments.parts)
                said = ", ".join(f"{part} {figures.ms:.3f}" for part, figures in results[TORCH][row.name].items())
                print(f"torch {row.label}: ms of {said}", file=sys.stderr, flush=True)
            except RuntimeError as error:  # out of memory, no kernel: the other rows may do
                failures[row.name] = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"torch {row.label}: {failures[row.name]}", file=sys.stderr, flush=True)
            report |= layout(results, idle_w) | {"resolution": resolution(results, settings.seconds)}
            write_report(report, arguments.out)
    print(table(model, arguments.rows, results))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
