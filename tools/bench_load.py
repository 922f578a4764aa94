#!/usr/bin/env python3
"""How fast a checkpoint comes from the page cache to where the kernel reads it: GB/s of reading alone, and of a whole load onto the GPU.

    python tools/bench_load.py --gb 16                     the 8B shape, written to /dev/shm; GPU if there is one
    python tools/bench_load.py --gb 2 --folder /tmp --keep --json load.json

Writes a checkpoint of the Llama-3-8B shape with random weights (as many layers as --gb holds, in shards of up to 5 GB), reads it once so that
it is in the page cache, then takes the time of --repeats loads. Test: pytest tests/null/test_bench_load_tool.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.program import load_model, num_weight_elements
from blinkimp.host.weight_stream import WeightStream
from blinkimp.host.weights import MatrixSource, PlacedMatrix, Weights
from blinkimp.lab.shapes import LLAMA_3_8B

WRITTEN: Final[dict[str, Any]] = LLAMA_3_8B | {"eos_token_id": 2}
SHARD_BYTES: Final = 5 << 30  # as transformers cuts them
TARGET_GB_PER_S: Final = 3.0
REQUIRED_HEADROOM_BYTES: Final = 1 << 30


# ---- The checkpoint ------------------------------------------------------------------------------------------------
def layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (query, hidden),
        f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
        f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, query),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}.mlp.up_proj.weight": (inner, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, inner),
    }


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    table = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(config, layer)
    return shapes | {"model.norm.weight": (config["hidden_size"],), "lm_head.weight": table}


def config_of(num_bytes: int, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with as many layers as num_bytes hold, one at least."""
    tables = 2 * 2 * base["vocab_size"] * base["hidden_size"]
    layer = 2 * sum(int(np.prod(shape)) for shape in layer_shapes(base, 0).values())
    return base | {"num_hidden_layers": max(1, min(base["num_hidden_layers"], round((num_bytes - tables) / layer)))}


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], pool: NDArray[np.uint16]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        num_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(offset, 0, -pool.nbytes):
            file.write(pool.data.cast("B")[: min(left, pool.nbytes)])


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> int:
    """Returns the bytes of weights."""
    (folder / "config.json").write_text(json.dumps(config))
    pool = np.random.default_rng(0).integers(0x3B00, 0x3D00, 8 << 20, dtype=np.uint16)  # small positive bf16 numbers
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = total = 0
    for name, shape in shapes_of(config).items():
        num_bytes = 2 * int(np.prod(shape))
        if filled and filled + num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled, total = filled + num_bytes, total + num_bytes
    weight_map: dict[str, str] = {}
    for i, shapes in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file_name, shapes, pool)
        weight_map |= dict.fromkeys(shapes, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


# ---- Loads ---------------------------------------------------------------------------------------------------------
class HostBuffer:
    """Staging memory without a GPU behind it: what reading alone gives."""

    def __init__(self, num_bytes: int) -> None:
        self.memory: NDArray[np.uint8] = np.zeros(num_bytes, np.uint8)

    def wait(self) -> None:
        return


class ReadOnlyTarget:
    """Implements WeightTarget: reads every row into staging memory and leaves it there."""

    def __init__(self, num_threads: int | None) -> None:
        self.stream = WeightStream([HostBuffer(32 << 20) for _ in range(4)], num_threads)
        self.num_bytes = 0

    def place_matrix(self, source: MatrixSource) -> PlacedMatrix:
        self.stream.add(source, self._count)
        return PlacedMatrix(1)

    def place_f32(self, name: str, values: NDArray[np.float32]) -> int:
        return 1  # an address that is not null

    def _count(self, buffer: HostBuffer, begin: int, rows: Weights) -> None:
        self.num_bytes += rows.nbytes


def time_reading(folder: Path, num_threads: int | None) -> tuple[float, int]:
    """Seconds, threads. The staging memory is made before the clock starts, as a GPU's is pinned once."""
    target = ReadOnlyTarget(num_threads)
    begin = time.perf_counter()
    load_model(folder, target, compute="bf16")
    target.stream.finish()
    return time.perf_counter() - begin, target.stream.num_threads


def time_gpu_load(folder: Path, config: ModelConfig) -> float:
    """Seconds from an empty GPU to packed weights, staging memory included."""
    from blinkimp.host.compile import DEVICE_DIR, compile_cubin
    from blinkimp.host.gpu_driver import GpuContext
    from blinkimp.host.gpu_kernel import PACK_SOURCE
    from blinkimp.host.gpu_weights import GpuTarget

    context = GpuContext()
    try:
        pack, _report = compile_cubin(DEVICE_DIR / PACK_SOURCE, context.properties.arch)
        begin = time.perf_counter()
        target = GpuTarget(context, config, pack, context.properties.num_multiprocessors - 1)
        try:
            load_model(folder, target, compute="bf16")
            target.finish()
        finally:
            target.close()
        return time.perf_counter() - begin
    finally:
        context.close()


def gpu_name() -> str | None:
    from blinkimp.host.gpu_driver import GpuError, probe_gpu

    try:
        return probe_gpu().name
    except GpuError:
        return None


def measure(folder: Path, num_bytes: int, repeats: int, num_threads: int | None) -> dict[str, Any]:
    config = read_model_config(folder)
    matrix_bytes = 2 * num_weight_elements(config)
    runs: dict[str, list[float]] = {"read": []}
    time_reading(folder, num_threads)  # into the page cache
    used_threads = 0
    for _ in range(repeats):
        seconds, used_threads = time_reading(folder, num_threads)
        runs["read"].append(seconds)
    gpu = gpu_name()
    if gpu:
        runs["gpu"] = [time_gpu_load(folder, config) for _ in range(repeats)]
    rates = {name: [matrix_bytes / second / 1e9 for second in seconds] for name, seconds in runs.items()}
    return {
        "checkpoint_bytes": num_bytes,
        "num_layers": config.num_layers,
        "gpu": gpu,
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_threads": used_threads,
        "seconds": runs,
        "gb_per_s": rates,
        "median_gb_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "target_gb_per_s": TARGET_GB_PER_S,
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['checkpoint_bytes'] / 1e9:.2f} GB, {result['num_layers']} layers; {result['num_threads']} threads on {result['num_cpus']} CPUs; "
        f"{result['gpu'] or 'no GPU'}; target {result['target_gb_per_s']} GB/s"
    ]
    names = {"read": "page cache -> staging memory", "gpu": "page cache -> packed on the GPU"}
    for name, rates in result["gb_per_s"].items():
        median = result["median_gb_per_s"][name]
        lines.append(
            f"  {names[name]:<34}{median:7.2f} GB/s  ({min(rates):.2f} to {max(rates):.2f} in {len(rates)} runs)"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None, base: dict[str, Any] = WRITTEN) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gb", type=float, default=16.1, metavar="N", help="size of the checkpoint (default %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), metavar="DIR", help="where it is written")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, and use one that is there")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="reading threads (default: by the CPUs)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    config = config_of(int(options.gb * 1e9), base)
    num_bytes = sum(2 * int(np.prod(shape)) for shape in shapes_of(config).values())
    folder = (
        options.folder / f"blinkimp-load-{num_bytes}" if options.keep else Path(tempfile.mkdtemp(dir=options.folder))
    )
    try:
        if not (folder / "model.safetensors.index.json").exists():
            free_bytes = shutil.disk_usage(options.folder).free
            if free_bytes < num_bytes + REQUIRED_HEADROOM_BYTES:
                print(
                    f"{options.folder}: got {free_bytes / 1e9:.1f} GB free, expected {num_bytes / 1e9:.1f} and 1 more; lower --gb",
                    file=sys.stderr,
                )
                return 1
            folder.mkdir(exist_ok=True)
            write_checkpoint(folder, config)
        result = measure(folder, num_bytes, options.repeats, options.threads)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
