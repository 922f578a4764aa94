#!/usr/bin/env python3
"""How long running streams stall while a long prompt arrives: their worst gap between tokens against their steady one, by chunk size.

    python tools/bench_arrival.py [--batch 16] [--context 1024] [--prompt 8192] [--chunks 256,512,1024,2048] [--out FILE.json]

For each chunk size (prefill_chunk_tokens) an engine with random weights: `batch` streams decode; once each has some tokens, one prompt is
submitted. Steady: the median gap between tokens before the arrival; worst: the longest gap that touches the time from the newcomer's ACK to its
first token. All by the device's clock (device_ns of completion entries); the client's worst gap, the newcomer's time to its first token and the
number of steps that the streams made meanwhile stand beside it. Test: pytest tests/host/test_bench_arrival.py
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
from numpy.typing import NDArray  # noqa: E402
from step_engine import EngineBench  # noqa: E402
from step_requests import BenchError, Times, Wave  # noqa: E402
from step_rows import SHAPES  # noqa: E402
from step_stats import finish, header  # noqa: E402

from blinkimp.cli.terminal import set_up_logging  # noqa: E402
from blinkimp.host.device_protocol import DeviceError  # noqa: E402
from blinkimp.host.engine import EngineFaultError  # noqa: E402
from blinkimp.host.memory_plan import MemoryPlanError  # noqa: E402
from blinkimp.host.power import open_nvml  # noqa: E402
from blinkimp.nic_shim.queue_pair import QueuePairError  # noqa: E402

NUM_STEADY: Final = 48  # tokens of each stream before the arrival
NUM_AFTER: Final = 32  # and some for the time after it


def gaps_of(streams: Times, newcomer: Times) -> dict[str, Any]:
    """Steady and worst gaps of the running streams, in ms."""
    arrived_ns, began_ns = int(newcomer.accepted[0]), int(newcomer.device[0, 0])
    device_gaps = np.diff(streams.device, axis=1)  # [batch, max_tokens - 1]
    starts, ends = streams.device[:, :-1], streams.device[:, 1:]
    is_before = (starts >= streams.device[:, 0].max()) & (ends <= arrived_ns)
    is_beside = (ends > arrived_ns) & (starts < began_ns)
    is_after = (starts >= began_ns) & (ends <= streams.device[:, -1].min())
    if not (is_before.any() and is_beside.any()) or not bool((streams.device[:, -1] >= began_ns).all()):
        raise BenchError(
            f"{int(is_before.sum())} gaps before the arrival, {int(is_beside.sum())} beside it, streams' end "
            f"{(int(streams.device[:, -1].min()) - began_ns) / 1e6:.1f} ms after the newcomer's first token; expected some, some, at "
            "least 0; the streams are too short for this prompt: raise --chunks"
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


def measure(arguments: argparse.Namespace, chunk: int) -> list[dict[str, Any]]:
    """--repeats arrivals on one engine."""
    # At worst a prompt shares its steps with all streams; twice as many steps leave room for a scheduler that gives prompts less.
    max_tokens = NUM_STEADY + 2 * math.ceil(arguments.prompt / max(1, chunk - arguments.batch)) + NUM_AFTER
    max_context = max(arguments.context + max_tokens, arguments.prompt + 1)
    # A step of decodes and one chunk, and no more: the chunk is what is being looked at.
    settings = {"prefill_chunk_tokens": chunk, "max_step_tokens": chunk + max(arguments.batch, 256)}
    waves = [Wave(arguments.batch, arguments.context, max_tokens), Wave(1, arguments.prompt, 1, NUM_STEADY)]
    with EngineBench(
        arguments.shape, arguments.device, -(-max_context // 64) * 64, settings, arguments.timeout, None
    ) as bench:
        runs = []
        for _ in range(1 + arguments.repeats):  # the first one warms up
            streams, newcomer = bench.client.run(f"chunk {chunk}", waves)
            runs.append(gaps_of(streams, newcomer))
        return runs[1:]


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
        "--chunks", type=number_list, default=[256, 512, 1024, 2048], help="prefill_chunk_tokens to try"
    )
    parser.add_argument("--repeats", type=int, default=3, help="arrivals to measure for each chunk size")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one arrival may take")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    if min([1, arguments.batch, arguments.context, arguments.prompt, arguments.repeats, *arguments.chunks]) < 1:
        parser.error("expected positive numbers for --batch, --context, --prompt, --chunks and --repeats")
    set_up_logging("warning")
    report: dict[str, Any] = {
        **header("bench_arrival", argv, arguments.commit, open_nvml()),
        "shape": arguments.shape,
        **{name: getattr(arguments, name) for name in ("batch", "context", "prompt")},
        "chunks": [],
        "errors": [],
    }
    print(f"{'chunk':>6}{'steady ms':>11}{'worst gap':>11}{'ratio':>8}{'client worst':>14}{'newcomer TTFT ms':>18}")
    for chunk in arguments.chunks:
        try:
            runs = measure(arguments, chunk)
        except (BenchError, DeviceError, EngineFaultError, MemoryPlanError, QueuePairError) as error:
            report["errors"].append(f"chunk {chunk}: {error}")
            continue
        worst = max(runs, key=lambda run: float(run["ratio"]))
        report["chunks"].append({"chunk": chunk, "worst": worst, "runs": runs})
        print(
            f"{chunk:6}{worst['steady_tpot_ms']:11.3f}{worst['worst_gap_ms']:11.3f}{worst['ratio']:8.2f}"
            f"{worst['client_worst_gap_ms']:14.3f}{worst['newcomer_ttft_ms']:18.1f}"
        )
    return finish(report, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
