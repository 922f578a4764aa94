"""Times the persistent kernel op by op, several builds of it in one run, in time and in energy: what a change costs or saves, row by row.

Each row is a step of the Llama-3-8B shape with random weights, run by the workers alone, without a director: the whole program, and each kind of
op of all layers by itself, over and over in one launch. Figures are of a step: a burst's on a rested GPU, and, over --seconds without a pause,
time, joules, watts and SM clock (ops_timing.py says how). Variants are builds with other macros; `base` is always there, and the logits of each
variant must be base's, bit for bit. --torch puts the same matrix products by cuBLAS and attention by SDPA beside them, on the same GPU in the same
run (torch_ops.py): products alone, where this kernel's ops have norms, rotations, residuals and KV pages as well. A variant is measured in a process
of its own: one that fails or hangs is named, and the others' figures stand. Needs a GPU; compiling takes a minute, all variants side by side, and
nothing where the cache of compiled kernels has them; then the eight rows with --torch take 3.5 minutes. Writes JSON with --out.
Usage: python tools/bench_ops.py [--rows d1@1024,p1024] [--parts qkv,gate_up+down] [--variant wide:BK_WIDE_TOKENS=128] [--torch] [--out ops.json]
Test: pytest tests/null/test_bench_ops.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ops_engine import Bits, RowFigures, measure_build
from ops_parts import PARTS, WHOLE, matrix_shapes, parse_parts, part_cost
from ops_report import TORCH, costs, layout, resolution, table
from ops_report import figures_of as figures_of_report
from ops_timing import Settings
from step_rows import SHAPES, Row, parse_rows
from step_stats import ROOT, header, write_report

from blinkimp.config import cache_folder, load_config
from blinkimp.host.compile_cache import get_kernel
from blinkimp.host.gpu_driver import GpuError, probe_gpu
from blinkimp.host.gpu_kernel import kernel_shape
from blinkimp.host.model_config import parse_config
from blinkimp.host.power import idle_power_w, open_nvml

DEFAULT_ROWS: Final = "d1@1024,d16@1024,d64@1024,d128@1024,d256@1024,p128,p1024,p8192"
MODEL: Final = "llama-3-8b"
BASE: Final = "base"
IDLE_S: Final = 1.0  # how long an idle GPU's power is looked at
START_S: Final = 15.0  # of a process: imports, a context, 16 GB of weights


@dataclass(frozen=True)
class Variant:
    name: str
    defines: tuple[tuple[str, str], ...] = ()


def parse_variant(text: str) -> Variant:
    """`name:MACRO=value,MACRO=value`. Raises ArgumentTypeError."""
    name, colon, rest = text.partition(":")
    defines = tuple(tuple(part.split("=", 1)) for part in rest.split(","))
    if not name or not colon or any(len(define) != 2 or not define[0] for define in defines) or name in (BASE, TORCH):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected NAME:MACRO=VALUE[,MACRO=VALUE], such as wide:BK_WIDE_TOKENS=128,BK_WIDE_STACK=2; "
            f"{BASE} and {TORCH} are taken"
        )
    return Variant(name, tuple((macro, value) for macro, value in defines))


# ---- How long it takes -----------------------------------------------------------------------------------------------
def torch_parts(parts: Sequence[str]) -> list[str]:
    """Those that torch has: matrix products and attention."""
    return [part for part in parts if part == "attention" or part in matrix_shapes(parse_config(SHAPES[MODEL]))]


def process_s(rows: Sequence[Row], parts: Sequence[str], settings: Settings) -> float:
    """About what one process takes on a GPU. A long step adds to each of its parts: it comes before each, and few of it are a run."""
    model = parse_config(SHAPES[MODEL])
    steps_s = sum(1.5 * part_cost(model, WHOLE, row).limit_s() * (2 * len(parts) + 10) for row in rows)
    return START_S + steps_s + len(rows) * (settings.rest_s + len(parts) * settings.load_s())


def timeout_s(rows: Sequence[Row], parts: Sequence[str], settings: Settings) -> float:
    return 120 + 2 * process_s(rows, parts, settings)


# ---- Variants --------------------------------------------------------------------------------------------------------
def compile_variant(variant: Variant, num_workers: int) -> bytes:
    shape = kernel_shape(parse_config(SHAPES[MODEL]), num_workers)
    defines = shape.defines() | dict(variant.defines)
    return get_kernel(shape.source, cache_folder(load_config()), defines=defines).cubin


def compile_variants(variants: Sequence[Variant], num_workers: int) -> list[bytes]:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_variant, variant, num_workers) for variant in variants]
        return [future.result() for future in futures]


def _measure_in_child(answer: Connection, *arguments: Any) -> None:
    try:
        answer.send(measure_build(*arguments))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


def measure_apart(
    variant: Variant, cubin: bytes, num_workers: int, rows: Sequence[Row], parts: Sequence[str], settings: Settings
) -> tuple[RowFigures, Bits] | str:
    """measure_build() in a process of its own, or why there are no figures: a GPU exception ends the process that meets it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, variant.name, MODEL, cubin, num_workers, rows, parts, settings)
    child = context.Process(target=_measure_in_child, args=arguments)
    child.start()
    sender.close()
    patience_s = timeout_s(rows, parts, settings)
    try:
        if not receiver.poll(patience_s):
            return f"no answer in {patience_s:.0f} s"
        result: tuple[RowFigures, Bits] | str = receiver.recv()
        return result
    except EOFError:
        return "its process ended without an answer"
    finally:
        child.kill()
        child.join()


def differing(base: Bits, other: Bits) -> list[str]:
    """Rows whose logits are not base's, bit for bit."""
    return [name for name, bits in base.items() if not np.array_equal(bits, other[name])]


# ---- torch -----------------------------------------------------------------------------------------------------------
def measure_torch(
    rows: Sequence[Row], parts: Sequence[str], settings: Settings, idle_w: float | None
) -> dict[str, Any] | str:
    """The report of tools/torch_ops.py, in a process of its own, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "torch.json"
        command = [sys.executable, str(ROOT / "tools" / "torch_ops.py"), "--shape", MODEL, "--out", str(out)]
        command += ["--rows", ",".join(row.name for row in rows), "--parts", ",".join(torch_parts(parts))]
        command += ["--seconds", str(settings.seconds)] if settings.seconds else ["--no-energy"]
        command += [] if idle_w is None else ["--idle-w", str(idle_w)]
        patience_s = timeout_s(rows, torch_parts(parts), settings)
        try:
            done = subprocess.run(command, check=False, timeout=patience_s, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return f"still ran after {patience_s:.0f} s"
        if not out.exists():
            return f"ended with status {done.returncode} and no figures; its messages stand above"
        report: dict[str, Any] = json.loads(out.read_text())
    for row in rows:
        if row.name not in report["ms"][TORCH]:
            report["failures"].setdefault(row.name, f"ended before it, with status {done.returncode}")
    return report


# ---- The run ---------------------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=parse_rows, default=DEFAULT_ROWS, help=f"as of tools/bench_step.py (default {DEFAULT_ROWS})"
    )
    parser.add_argument(
        "--parts", type=parse_parts, default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default all)"
    )
    parser.add_argument("--variant", type=parse_variant, action="append", default=[], help="NAME:MACRO=VALUE[,...]")
    parser.add_argument(
        "--seconds", type=float, default=Settings().seconds, help="that each part goes on for (default 0.6)"
    )
    parser.add_argument("--no-energy", action="store_true", help="bursts alone: no sustained time, no joules")
    parser.add_argument("--torch", action="store_true", help="tools/torch_ops.py beside it")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    rows: list[Row] = arguments.rows
    parts: list[str] = arguments.parts
    try:
        settings = Settings(seconds=0.0 if arguments.no_energy else arguments.seconds)
        num_workers = probe_gpu().num_multiprocessors - 1  # one is the director's
    except (GpuError, ValueError) as error:
        print(f"bench_ops: {error}", file=sys.stderr)
        return 2
    variants = [Variant(BASE), *arguments.variant]
    has_torch = arguments.torch and bool(torch_parts(parts))
    estimate_s = IDLE_S + len(variants) * process_s(rows, parts, settings)
    estimate_s += process_s(rows, torch_parts(parts), settings) if has_torch else 0.0
    print(f"about {estimate_s:.0f} s on the GPU once {len(variants)} kernels are compiled", file=sys.stderr, flush=True)
    cubins = compile_variants(variants, num_workers)
    source = open_nvml() if settings.seconds else None
    idle_w = idle_power_w(source, IDLE_S)
    results: dict[str, RowFigures] = {}
    logits: dict[str, Bits] = {}
    failures: dict[str, str] = {}
    report: dict[str, Any] = header("bench_ops", argv, arguments.commit, open_nvml())
    report["settings"] = vars(settings)
    for variant, cubin in zip(variants, cubins, strict=True):
        found = measure_apart(variant, cubin, num_workers, rows, parts, settings)
        if isinstance(found, str):
            failures[variant.name] = found
        else:
            results[variant.name], logits[variant.name] = found
    if has_torch:
        theirs = measure_torch(rows, parts, settings, idle_w)
        if isinstance(theirs, str):
            failures[TORCH] = theirs
        else:
            results[TORCH] = figures_of_report(theirs, TORCH)
            report[TORCH] = theirs[TORCH]
            failures |= {f"{TORCH} {row}": why for row, why in theirs["failures"].items()}
    wrong = {name: differing(logits[BASE], bits) for name, bits in logits.items()} if BASE in logits else {}
    model = parse_config(SHAPES[MODEL])
    print(table(model, rows, results))
    if words := resolution(results, settings.seconds):
        print(f"{words}; idle GPU: {'-' if idle_w is None else f'{idle_w:.1f} W'}")
    report |= layout(results, idle_w) | {"costs": costs(model, rows, parts), "resolution": words}
    write_report(report | {"differing_logits": wrong, "failures": failures}, arguments.out)
    for name, why in failures.items():
        print(f"{name}: not measured: {why}", file=sys.stderr)
    for name, row_names in wrong.items():
        if row_names:
            print(
                f"{name}: logits differ from base's in {', '.join(row_names)}; expected the same bits", file=sys.stderr
            )
    return 1 if failures or any(wrong.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
