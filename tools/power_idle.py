#!/usr/bin/env python3
"""Power of an idle GPU, of one with a context, and of an idle engine on it, with and without parking; and what the first token after an idle
time costs.

    python tools/power_idle.py [--seconds 10] [--park-after 1.0] [--out FILE.json]

A GPU on which a process has a CUDA context draws more than one without any, whatever runs: that is the least an engine can come down to. So
power is told of four states: no context (of this process), a context with nothing to run, an engine that polls, an engine that has parked.
Parking: after park_after_s without work the persistent kernel ends, and a submission launches it again. Each engine is measured after it has
served once; then lone prompts of --prompt tokens come after idle times long enough to park, beside prompts that come at once.
Test: pytest tests/host/test_power_idle.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
from step_engine import EngineBench  # noqa: E402
from step_requests import BenchError, Wave  # noqa: E402
from step_rows import SHAPES  # noqa: E402
from step_stats import finish, header, spread  # noqa: E402

from blinkimp.cli.terminal import set_up_logging  # noqa: E402
from blinkimp.config import keys  # noqa: E402
from blinkimp.host.device_protocol import DeviceError  # noqa: E402
from blinkimp.host.engine import EngineFaultError  # noqa: E402
from blinkimp.host.gpu_driver import GpuContext, GpuError  # noqa: E402
from blinkimp.host.memory_plan import MemoryPlanError  # noqa: E402
from blinkimp.host.power import PowerSource, idle_power_w, open_nvml  # noqa: E402
from blinkimp.nic_shim.queue_pair import QueuePairError  # noqa: E402

SETTLE_S: Final = 3.0  # of clocks, before power is looked at
PARK_S: Final = 1.0  # more than park_after_s without work, and an engine that can park has done so
NUM_PROMPTS: Final = 7


def context_power_w(source: PowerSource, seconds: float) -> float | None:
    """Mean power of the GPU while this process has a context on it, as every engine has, and nothing to run."""
    context = GpuContext()
    try:
        context.allocate(1 << 20, "a first use of the context", zero=True)
        time.sleep(SETTLE_S)
        return idle_power_w(source, seconds)
    finally:
        context.close()


def first_token_ns(bench: EngineBench, num_tokens: int) -> int:
    """Of a lone prompt, from its submission to its first token at the client."""
    (times,) = bench.client.run("prompt", [Wave(1, num_tokens, 1)])
    return int(times.client[0, 0] - times.submitted[0])


def watts(power_w: float | None) -> str:
    return "-" if power_w is None else f"{power_w:.1f} W"


def measure(arguments: argparse.Namespace, park_after_s: float | None) -> dict[str, Any]:
    """An engine that parks after so long, or (None) never."""
    source = open_nvml()
    settings = {} if park_after_s is None else {"park_after_s": park_after_s}
    idle_s = (park_after_s or 0.0) + PARK_S
    with EngineBench(arguments.shape, arguments.device, 2048, settings, 60.0, source) as bench:
        first_token_ns(bench, arguments.prompt)
        time.sleep(idle_s + SETTLE_S)
        power_w = bench.idle_power_w(arguments.seconds)
        prompt_at_once, prompt_after_idle = [], []
        for _ in range(NUM_PROMPTS):
            time.sleep(idle_s)
            prompt_after_idle.append(first_token_ns(bench, arguments.prompt))
            prompt_at_once.append(first_token_ns(bench, arguments.prompt))
        return {
            "park_after_s": park_after_s,
            "idle_power_w": None if power_w is None else round(power_w, 2),
            "first_token_at_once": spread(np.array(prompt_at_once, np.int64)),
            "first_token_after_idle": spread(np.array(prompt_after_idle, np.int64)),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("auto", "gpu", "emulated"), default="gpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long power is looked at")
    parser.add_argument("--park-after", type=float, default=1.0, help="park_after_s of the engine that parks")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompts after an idle time")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    set_up_logging("warning")
    source = open_nvml()
    if source is None and arguments.device == "gpu":
        print("power_idle: no GPU tells its power (NVML is missing); expected an NVIDIA driver", file=sys.stderr)
        return 1
    idle_w, context_w = idle_power_w(source, arguments.seconds), None
    errors: list[str] = []
    if arguments.device != "emulated" and source is not None:
        try:
            context_w = context_power_w(source, arguments.seconds)
        except GpuError as error:
            errors.append(f"a context with nothing to run: {error}")
        time.sleep(SETTLE_S)
    report: dict[str, Any] = {
        **header("power_idle", argv, arguments.commit, source),
        "shape": arguments.shape,
        "idle_gpu_w": idle_w,
        "idle_context_w": context_w,
        "engines": [],
        "errors": errors,
    }
    can_park = "park_after_s" in keys()
    if not can_park:
        report["errors"].append("this version has no setting park_after_s; only an engine without parking was measured")
    never: list[float | None] = [0.0 if can_park else None]  # 0: never
    for park_after_s in never + ([arguments.park_after] if can_park else []):
        try:
            report["engines"].append(measure(arguments, park_after_s))
        except (BenchError, DeviceError, EngineFaultError, GpuError, MemoryPlanError, QueuePairError) as error:
            report["errors"].append(f"park_after_s {park_after_s}: {error}")
    print(
        f"idle GPU: {watts(idle_w)} without a context of this process, {watts(context_w)} with one and nothing to run"
    )
    for engine in report["engines"]:
        parks = f"parks after {engine['park_after_s']:g} s" if engine["park_after_s"] else "never parks"
        power_w, at_once, later = (
            engine[key] for key in ("idle_power_w", "first_token_at_once", "first_token_after_idle")
        )
        print(
            f"engine that {parks}: idle {watts(power_w)}; first token of {arguments.prompt} tokens {at_once['median_ms']:.3f} ms at once, "
            f"{later['median_ms']:.3f} ms after an idle time (p90 {later['p90_ms']:.3f})"
        )
    return finish(report, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
