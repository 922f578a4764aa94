#!/usr/bin/env python3
"""Bytes per second that this GPU reads from its memory by bulk copies: the bandwidth limit of tools/bench_step.py --measure-limits.

    python tools/stream_rate.py            prints the best and the median of some launches; needs a Hopper GPU

The kernel is tools/stream_rate.cu. Test: pytest tests/compile/test_stream_rate.py
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from blinkimp.host.compile import compile_cubin  # noqa: E402  (the path above comes first)
from blinkimp.host.gpu_driver import GpuContext, GpuError  # noqa: E402

SOURCE: Final = ROOT / "tools" / "stream_rate.cu"
TILE_BYTES: Final = 16384  # kTileBytes of stream_rate.cu; a test compares
NUM_STAGES: Final = 13  # kNumStages
BUFFER_BYTES: Final = 8 << 30  # far more than the caches hold
NUM_PASSES: Final = 8  # about 15 ms a launch, beside which the launch itself is nothing
NUM_LAUNCHES: Final = 11


def stream_rates() -> list[float]:
    """Bytes/s of each launch but the first. Raises GpuError where there is no GPU to ask."""
    cubin, _ = compile_cubin(SOURCE)
    context = GpuContext()
    try:
        num_blocks = context.properties.num_multiprocessors
        num_tiles = BUFFER_BYTES // TILE_BYTES // num_blocks * num_blocks
        buffer = context.allocate(num_tiles * TILE_BYTES, "the buffer to stream", zero=True)
        shared_memory_bytes = NUM_STAGES * TILE_BYTES
        kernel = context.load_kernel(cubin, "stream_rate", shared_memory_bytes)
        arguments = [ctypes.c_uint64(buffer), ctypes.c_uint64(num_tiles), ctypes.c_uint32(NUM_PASSES)]
        rates = []
        for _ in range(NUM_LAUNCHES):
            began_ns = time.perf_counter_ns()
            context.launch(kernel, num_blocks, 32, arguments, shared_memory_bytes=shared_memory_bytes)
            context.synchronize()
            rates.append(num_tiles * TILE_BYTES * NUM_PASSES / (time.perf_counter_ns() - began_ns) * 1e9)
        return rates[1:]
    finally:
        context.close()


def stream_rate() -> float:
    """The median of stream_rates()."""
    return statistics.median(stream_rates())


def main() -> int:
    try:
        rates = stream_rates()
    except GpuError as error:
        print(f"stream_rate needs a GPU: {error}", file=sys.stderr)
        return 1
    print(
        f"best {max(rates) / 1e12:.3f} TB/s, median {statistics.median(rates) / 1e12:.3f} TB/s, {len(rates)} launches"
    )
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
