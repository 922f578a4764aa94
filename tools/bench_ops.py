"""Times the persistent kernel op by op, several builds of it in one run: what a change costs or saves, row by row.

Each row is a step of the Llama-3-8B shape with random weights, run by the workers alone, without a director: once whole, and each kind of op
of all layers by itself. Wall time of a launch less that of the same step's embedding alone; the least of some repeats. Variants are builds
with other macros; `base` is always there, and the logits of each variant must be base's, bit for bit. A variant is measured in a process of its
own: one that fails or hangs is named, and the others' figures stand. Needs a GPU; compiling takes a minute, all variants side by side, and nothing
where the cache of compiled kernels has them. Writes JSON with --out.
Usage: python tools/bench_ops.py [--rows d1@1024,d64@1024,p1024] [--variant wide:BK_WIDE_TOKENS=128,BK_WIDE_STACK=2] [--out ops.json]
Test: pytest tests/null/test_bench_ops.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_rows import SHAPES, Row, parse_rows
from step_stats import header, write_report

from blinkimp import ring_abi as abi
from blinkimp.config import cache_folder, load_config
from blinkimp.host.compile_cache import get_kernel
from blinkimp.host.gpu_driver import GpuError, probe_gpu
from blinkimp.host.gpu_kernel import kernel_shape
from blinkimp.host.memory_plan import page_bytes_of
from blinkimp.host.model_config import parse_config
from blinkimp.host.power import open_nvml
from blinkimp.ring_abi import BufferId, DType, OpKind
from tests.gpu.step_runner import Request, StepRunner

DEFAULT_ROWS: Final = "d1@1024,d16@1024,d64@1024,d128@1024,d256@1024,p128,p1024,p8192"
MODEL: Final = "llama-3-8b"
KV_BYTE: Final = 0x3C  # bf16 0.0115: keys and values that nobody computed
NUM_REPEATS: Final = 5
VARIANT_TIMEOUT_S: Final = 240.0
WHOLE: Final = "all"

Ops = NDArray[np.void]
Bits = dict[str, NDArray[np.uint32]]  # of the logits, by row
Times = dict[str, dict[str, float]]  # ms by row and part
PARTS: Final[dict[str, Callable[[Ops], Ops]]] = {
    WHOLE: lambda ops: ops,
    "qkv": lambda ops: ops[ops["kind"] == OpKind.QKV],
    "attention": lambda ops: ops[ops["kind"] == OpKind.ATTENTION],
    "o": lambda ops: ops[(ops["kind"] == OpKind.PROJECT) & (ops["input"] == BufferId.ATTENTION)],
    "gate_up": lambda ops: ops[ops["kind"] == OpKind.GATE_UP],
    "down": lambda ops: ops[(ops["kind"] == OpKind.PROJECT) & (ops["input"] != BufferId.ATTENTION)],
    "lm_head": lambda ops: ops[ops["kind"] == OpKind.LM_HEAD],
    "sample": lambda ops: ops[ops["kind"] == OpKind.SAMPLE],
}


@dataclass(frozen=True)
class Variant:
    name: str
    defines: tuple[tuple[str, str], ...] = ()


def parse_variant(text: str) -> Variant:
    """`name:MACRO=value,MACRO=value`. Raises ArgumentTypeError."""
    name, colon, rest = text.partition(":")
    defines = tuple(tuple(part.split("=", 1)) for part in rest.split(","))
    if not name or not colon or any(len(define) != 2 or not define[0] for define in defines):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected NAME:MACRO=VALUE[,MACRO=VALUE], such as wide:BK_WIDE_TOKENS=128,BK_WIDE_STACK=2"
        )
    return Variant(name, tuple((macro, value) for macro, value in defines))


def requests_of(row: Row, rng: np.random.Generator, vocab: int) -> list[Request]:
    num_computed = row.context - 1 if row.phase == "decode" else 0
    batch = row.batch if row.phase == "decode" else 1
    return [Request(rng.integers(0, vocab, row.context, dtype=np.uint32), num_computed, i) for i in range(batch)]


def time_ms(run: Callable[[], None], num_repeats: int) -> float:
    """The least wall time of some calls, after one that warms up."""
    run()
    times = []
    for _ in range(num_repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def measure_row(runner: StepRunner, row: Row, seed: int) -> tuple[dict[str, float], NDArray[np.uint32]]:
    """(ms by part, bits of the logits)."""
    requests = requests_of(row, np.random.default_rng(seed), runner.config.vocab)
    launch_ms = time_ms(lambda: runner.run(requests, ops=lambda ops: ops[:1]), NUM_REPEATS)  # the plan's upload, too
    parts = {
        name: round(time_ms(lambda pick=pick: runner.run(requests, ops=pick), NUM_REPEATS) - launch_ms, 4)  # type: ignore[misc]
        for name, pick in PARTS.items()
    }
    runner.run(requests)
    logits = runner.logits(len(requests)).view(np.uint32).copy()
    for request in requests:
        runner.release(request.request_idx)
    return parts, logits


def compile_variant(variant: Variant, num_workers: int) -> bytes:
    shape = kernel_shape(parse_config(SHAPES[MODEL]), num_workers)
    defines = shape.defines() | dict(variant.defines)
    return get_kernel(shape.source, cache_folder(load_config()), defines=defines).cubin


def compile_variants(variants: Sequence[Variant], num_workers: int) -> list[bytes]:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_variant, variant, num_workers) for variant in variants]
        return [future.result() for future in futures]


def measure_variant(name: str, cubin: bytes, num_workers: int, rows: Sequence[Row]) -> tuple[Times, Bits]:
    longest = max(row.context for row in rows)
    num_pages = max((row.batch if row.phase == "decode" else 1) * -(-row.context // abi.PAGE_TOKENS) for row in rows)
    times: Times = {}
    bits: Bits = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[MODEL]))
        with StepRunner(
            Path(folder), load_format="dummy", max_context=longest, num_pages=num_pages, max_step_tokens=max(longest, 512),
            num_workers=num_workers, cubin=cubin,
        ) as runner:  # fmt: skip
            kv_bytes = num_pages * page_bytes_of(runner.config, DType.BF16)
            for seed, row in enumerate(rows):
                runner.context.fill(int(runner.params["kv_cache"][0]), KV_BYTE, kv_bytes)
                times[row.name], bits[row.name] = measure_row(runner, row, seed)
                print(f"{name} {row.label}: {times[row.name][WHOLE]:.3f} ms", file=sys.stderr, flush=True)
    return times, bits


def _measure_in_child(answer: Connection, *arguments: Any) -> None:
    try:
        answer.send(measure_variant(*arguments))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


def measure_apart(variant: Variant, cubin: bytes, num_workers: int, rows: Sequence[Row]) -> tuple[Times, Bits] | str:
    """measure_variant() in a process of its own, or why there are no figures: a GPU exception ends the process that meets it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_in_child, args=(sender, variant.name, cubin, num_workers, rows))
    child.start()
    sender.close()
    try:
        if not receiver.poll(VARIANT_TIMEOUT_S):
            return f"no answer in {VARIANT_TIMEOUT_S:.0f} s"
        result: tuple[Times, Bits] | str = receiver.recv()
        return result
    except EOFError:
        return "its process ended without an answer"
    finally:
        child.kill()
        child.join()


def table(rows: Sequence[Row], results: dict[str, Times]) -> str:
    """Markdown: a line for each row and variant; results[variant][row][part] in ms."""
    lines = [f"| row | variant | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 2) + "|"]
    for row in rows:
        for variant, by_row in results.items():
            figures = " | ".join(f"{by_row[row.name][part]:.3f}" for part in PARTS)
            lines.append(f"| {row.name} | {variant} | {figures} |")
    return "\n".join(lines)


def differing(base: Bits, other: Bits) -> list[str]:
    """Rows whose logits are not base's, bit for bit."""
    return [name for name, bits in base.items() if not np.array_equal(bits, other[name])]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=DEFAULT_ROWS, help=f"as of tools/bench_step.py (default {DEFAULT_ROWS})")
    parser.add_argument("--variant", type=parse_variant, action="append", default=[], help="NAME:MACRO=VALUE[,...]")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    rows: list[Row] = parse_rows(arguments.rows)
    variants = [Variant("base"), *arguments.variant]
    try:
        num_workers = probe_gpu().num_multiprocessors - 1  # one is the director's
    except GpuError as error:
        print(f"bench_ops: {error}", file=sys.stderr)
        return 2
    print(f"compiling {len(variants)} kernels side by side", file=sys.stderr, flush=True)
    cubins = compile_variants(variants, num_workers)
    results: dict[str, Times] = {}
    logits: dict[str, Bits] = {}
    failures: dict[str, str] = {}
    for variant, cubin in zip(variants, cubins, strict=True):
        found = measure_apart(variant, cubin, num_workers, rows)
        if isinstance(found, str):
            failures[variant.name] = found
        else:
            results[variant.name], logits[variant.name] = found
    print(table(rows, results))
    wrong = {name: differing(logits["base"], bits) for name, bits in logits.items()} if "base" in logits else {}
    if arguments.out:
        report = header("bench_ops", argv, arguments.commit, open_nvml())
        write_report(report | {"ms": results, "differing_logits": wrong, "failures": failures}, arguments.out)
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
