"""Times device/gemm_wide.cuh alone: each GEMM of a Llama-3-8B layer at 128 to 8,192 rows, every tiling, behind a grid barrier as in a step.

Prints us, TFLOP/s and the bytes that each SM reads; `*` marks the tiling that the rule of gemm_wide_tiling.cuh chooses. `no stores`
is without the epilogue. Random bf16 weights, as many copies as do not fit the L2 cache. Writes JSON with --out. Needs a GPU.
Usage: python tools/bench_gemm_wide.py [--rows 128 256 ...] [--quick] [--out FOLDER]
Test of what it times: pytest -m gpu tests/gpu/test_gemm_wide.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from blinkimp.host.bf16 import bf16_from_f32
from blinkimp.host.step_costs import COST_ROWS, LONE_STACK, ROW_TILE, Matrix, has_lone_items, stacks, wide_time_ns
from tests.gpu.gemm_wide_runner import PlacedWeights, WideRunner, compile_wide

SHAPES = {  # name: (packed tile rows, out features, in features)
    "qkv": (48, 6144, 4096),
    "o": (32, 4096, 4096),
    "gate_up": (112, 28672, 4096),
    "down": (32, 4096, 14336),
}
ROWS = (128, 256, 512, 1024, 2048, 8192)
NUM_LAYERS = 32
CACHED_BYTES = 200 << 20  # weights that are used again sooner would partly come from the L2 cache
MIN_OPS = 8
VARIANTS: dict[str, tuple[str, ...]] = {"whole": (), "no stores": ("-DSTORE=0",)}  # options


def tilings(rows: int, tile_rows: int) -> list[tuple[int, int]]:
    """(tokens, stack) of those that the rule chooses from, small ones first."""
    whole = [(COST_ROWS, stack) for stack in reversed(stacks(tile_rows))]
    return [(ROW_TILE, LONE_STACK), *whole] if rows <= COST_ROWS and has_lone_items(tile_rows) else whole


def place_copies(runner: WideRunner, rng: np.random.Generator, shape: tuple[int, int, int]) -> list[PlacedWeights]:
    """Random packed matrices; their order does not matter to the clock, so they are not packed from anything."""
    tile_rows, out_features, in_features = shape
    num_elements = -(-out_features // tile_rows) * tile_rows * in_features
    num_copies = max(2, -(-CACHED_BYTES // (num_elements * 2)))
    block = bf16_from_f32(0.02 * rng.standard_normal(1 << 24, dtype=np.float32))
    bits = np.tile(block, -(-num_elements // len(block)))[:num_elements]
    return [PlacedWeights(runner.array(bits).address, in_features, out_features, tile_rows) for _ in range(num_copies)]


def measure(runner: WideRunner, rows_list: list[int], rng: np.random.Generator) -> list[dict[str, Any]]:
    results = []
    for name, shape in SHAPES.items():
        tile_rows, out_features, in_features = shape
        copies = place_copies(runner, rng, shape)
        ops = (copies * (-(-MIN_OPS // len(copies)) + 1))[: max(MIN_OPS, len(copies))]
        for rows in rows_list:
            padded = -(-rows // 128) * 128
            inputs = runner.array(bf16_from_f32(rng.standard_normal(padded * in_features, dtype=np.float32)))
            output = runner.zeros((rows, out_features), np.float32)
            candidates = tilings(rows, tile_rows)
            for variant, options in VARIANTS.items():
                predicted = {t: wide_time_ns(rows, Matrix(*shape), *t, runner.num_workers) for t in candidates}
                chosen = min(reversed(candidates), key=lambda t: predicted[t])
                for tokens, stack in candidates:
                    kernel = compile_wide(tile_rows, tokens=tokens, stack=stack, options=options)
                    runner.launch(kernel, ops, inputs, rows, output)
                    times = np.sort(runner.launch(kernel, ops, inputs, rows, output)[1:])
                    us = float(np.median(times)) / 1000
                    columns = stack * tile_rows
                    items = -(-rows // tokens) * -(-out_features // columns)
                    result = {
                        "op": name, "rows": rows, "tokens": tokens, "columns": columns, "variant": variant,
                        "chosen": (tokens, stack) == chosen, "items": items, "us": us, "us_min": times[0] / 1000, "us_max": times[-1] / 1000,
                        "predicted_us": predicted[tokens, stack] / 1000,
                        "tflops": 2e-6 * rows * out_features * in_features / us,
                        "gb_per_s_per_sm": 2e-3 * items * (tokens + columns) * in_features / us / runner.num_workers,
                        "weight_tb_per_s": 2e-6 * out_features * in_features / us,
                    }  # fmt: skip
                    results.append(result)
                    print(
                        f"{name:8} {rows:5} rows  {tokens:3} x {columns:3}{'*' if result['chosen'] else ' '} {variant:10} {us:9.1f} us (predicted "
                        f"{result['predicted_us']:8.1f})  {result['tflops']:6.1f} TFLOP/s  weights {result['weight_tb_per_s']:5.2f} TB/s  "
                        f"into an SM {result['gb_per_s_per_sm']:5.1f} GB/s", flush=True,
                    )  # fmt: skip
            runner.free(inputs, output)
        for weights in copies:
            runner.context.free(weights.address)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="rows of the step")
    parser.add_argument("--quick", action="store_true", help="128, 256 and 1,024 rows")
    parser.add_argument("--out", type=Path, help="folder for gemm_wide.json")
    arguments = parser.parse_args()
    rows_list = [128, 256, 1024] if arguments.quick else arguments.rows
    with WideRunner() as runner:
        gpu = runner.context.properties.name
        print(f"{gpu}, {runner.num_workers} workers")
        results = measure(runner, rows_list, np.random.default_rng(7))
    for rows in rows_list:
        for variant in VARIANTS:
            those = [r for r in results if r["rows"] == rows and r["variant"] == variant]
            chosen = sum(r["us"] for r in those if r["chosen"])
            best = sum(min(r["us"] for r in those if r["op"] == name) for name in SHAPES)
            print(
                f"{rows:5} rows, {variant:9}: {NUM_LAYERS} layers' GEMMs {NUM_LAYERS * chosen / 1000:7.2f} ms as chosen, "
                f"{NUM_LAYERS * best / 1000:7.2f} ms with the best of each"
            )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gemm_wide.json").write_text(json.dumps({"gpu": gpu, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
