"""blinkimp's side of tools/bench_step.py: an engine with random weights, and its rows measured through a real queue pair.

    with EngineBench(config_of(...), timeout_s=60) as bench: bench.measure(row, num_tokens=64, energy_s=1.5)

Called by tools/bench_step.py and tools/bench_arrival.py. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from step_cost import H200, Limits, StepCost, decode_cost, prefill_cost
from step_requests import BenchError, Client, Wave, steady_state
from step_rows import SHAPES, Row
from step_stats import spread

from blinkimp import ring_abi as abi
from blinkimp.cli.terminal import LoadingBars
from blinkimp.config import Config, load_config
from blinkimp.host.device_protocol import Device
from blinkimp.host.engine import Engine
from blinkimp.host.power import PowerMeter, PowerSource
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort

ATTACH_TIMEOUT_S: Final = 60.0
MIN_PREFILLS: Final = 7  # measured ones of each length, after one that warms up
MAX_PREFILLS: Final = 100
MAX_DECODE_STEPS: Final = 2000
NUM_PINGS: Final = 400
PING_TIMEOUT_NS: Final = 60_000_000_000


def config_of(folder: Path, shape: str, device: str, max_context: int, settings: dict[str, Any]) -> Config:
    """An engine with random weights of a shape; config.json is written to `folder`."""
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return Config(
        model=str(folder),
        load_format="dummy",
        device=device,  # type: ignore[arg-type]  # one of its choices: argparse has seen to it
        engine_name=f"bench-{secrets.token_hex(4)}",
        num_queue_pairs=1,
        num_requests=512,
        max_context=max_context,
        **{"cache_dir": load_config().cache_dir} | settings,
    )


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
            "weights_gb_per_s": round(weight_bytes / 1e9 / weights_s, 6),
            "start_s": round(time.monotonic() - self._began, 3),
        }


class EngineBench:
    """A running engine of a shape with one queue pair attached, while inside `with`."""

    def __init__(
        self,
        shape: str,
        device: str,
        max_context: int,
        settings: dict[str, Any],
        timeout_s: float,
        source: PowerSource | None,
        sampling: str = "greedy",
        gpu_defines: Mapping[str, str] | None = None,
    ) -> None:
        """gpu_defines: macros of the GPU's kernel, besides its shape's."""
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._config = config_of(folder, shape, device, max_context, settings)
        self._timeout_s, self._source, self._sampling = timeout_s, source, sampling
        self._gpu_defines = gpu_defines

    def __enter__(self) -> Self:
        try:
            bars = self._stack.enter_context(LoadingBars())
            watch = LoadWatch(bars)
            self.engine = Engine(self._config, device=self._device(), progress=watch)
            watch.begin()
            self._stack.enter_context(self.engine)
            self.load = {"weight_bytes": self.engine.plan.weight_bytes, **watch.report(self.engine.plan.weight_bytes)}
            self._port = self._stack.enter_context(QueuePairPort.open(self._config.engine_name, 0))
            self._port.attach(ATTACH_TIMEOUT_S)
            self._port.start_heartbeat()
            self.client = Client(self.engine, self._port, bars, self._timeout_s, self._sampling)
            self._meter = self._stack.enter_context(PowerMeter(self._source))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _device(self) -> Device | None:
        """None: the one that the configuration asks for."""
        if not self._gpu_defines:
            return None
        from blinkimp.host.gpu_device import GpuDevice

        return GpuDevice(kernel=self._config.kernel, orchestrator=self._config.orchestrator, defines=self._gpu_defines)

    def describe(self) -> dict[str, Any]:
        plan = self.engine.plan
        return {
            "device": self.engine.device.describe(),
            "load": self.load,
            "memory_plan": {**dataclasses.asdict(plan), "kv_bytes": plan.kv_bytes, "free_bytes": plan.free_bytes},
        }

    def idle_power_w(self, seconds: float) -> float | None:
        """Mean power of the engine with nothing to do."""
        if self._source is None:
            return None
        begin_ns = time.monotonic_ns()
        time.sleep(seconds)
        return self._meter.power_w(begin_ns, time.monotonic_ns())

    def ping_us(self) -> dict[str, float]:
        """Commit of a PING to the sight of its PONG, on an idle engine: an upper bound of commit to first poll, Python's calls included."""
        times_ns = []
        for idx in range(NUM_PINGS):
            began_ns = time.perf_counter_ns()
            if self._port.try_ping(idx, began_ns) != PortStatus.OK:
                raise BenchError("ping: the submission ring takes none; expected an idle engine")
            while not len(self._port.poll()):
                if time.perf_counter_ns() - began_ns > PING_TIMEOUT_NS:
                    raise BenchError(
                        f"ping: no answer within {PING_TIMEOUT_NS / 1e9:g} s; expected one in microseconds; see the engine's log"
                    )
            times_ns.append(time.perf_counter_ns() - began_ns)
            time.sleep(0.0005)
        p10, median, p90 = np.percentile(times_ns[NUM_PINGS // 10 :], [10, 50, 90]) / 1e3
        return {"median_us": round(median, 2), "p10_us": round(p10, 2), "p90_us": round(p90, 2)}

    @property
    def item_bytes(self) -> int:
        return 2 if self.engine.compute == abi.DType.BF16 else 4

    # ---- Rows --------------------------------------------------------------------------------------------------------
    def measure(self, row: Row, num_tokens: int, energy_s: float, limits: Limits = H200) -> dict[str, Any]:
        """One row. On a GPU it is repeated for energy_s, as its limit tells in advance; else `num_tokens` decode steps."""
        if row.phase == "decode":
            cost = decode_cost(self.engine.model, self.item_bytes, row.batch, row.context)
            return self._decode(
                row, num_tokens, self._num_repeats(cost, limits, energy_s, num_tokens, MAX_DECODE_STEPS)
            )
        cost = prefill_cost(self.engine.model, self.item_bytes, row.context)
        return self._prefill(row, self._num_repeats(cost, limits, energy_s, MIN_PREFILLS, MAX_PREFILLS), cost)

    def _num_repeats(self, cost: StepCost, limits: Limits, energy_s: float, least: int, most: int) -> int:
        if self.engine.device.kind != "gpu":
            return least
        return min(most, max(least, math.ceil(energy_s / cost.limit_s(limits))))

    def _decode(self, row: Row, least_steps: int, wanted_steps: int) -> dict[str, Any]:
        """`batch` requests at once; only steps that decode all of them count, and their mean context is the row's."""
        sizes = self.engine.plan.sizes
        # Tokens that the first request may have before the last one's prompt is through; a step's rows are prompts' after decodes'.
        num_chunk_rows = max(1, min(sizes.prefill_chunk_tokens, sizes.max_step_tokens - row.batch))
        num_lead = math.ceil(row.batch * row.context / num_chunk_rows) + 2
        mean_lead = num_lead / 2 if row.batch > 1 else 0
        # Half of the steps come before the mean: a quarter of the context is left to the prompts.
        num_steps = max(least_steps, min(wanted_steps, int(1.5 * (row.context - mean_lead))))
        context = row.context - round(mean_lead + num_steps / 2)
        if context < 1:
            raise BenchError(
                f"{row.label}: {num_steps} steps and {num_lead} steps of prompts do not fit into a mean context of {row.context}; "
                "expected a longer context, fewer --tokens, or less --energy-s"
            )
        (times,) = self.client.run(row.label, [Wave(row.batch, context, num_steps + num_lead)])
        rows, columns = steady_state(times.device)
        if len(rows) < row.batch * num_steps:
            raise BenchError(
                f"{row.label}: {len(rows)} times between tokens while all decode, expected {row.batch * num_steps}; raise --tokens"
            )
        device_ns = times.device[rows, columns] - times.device[rows, columns - 1]
        client_ns = times.client[rows, columns] - times.client[rows, columns - 1]
        begin_ns, end_ns = int(times.client[rows, columns - 1].min()), int(times.client[rows, columns].max())
        gaps_us = [gap_ns / 1e3 for at_ns, gap_ns in self.client.gaps if begin_ns < at_ns <= end_ns]
        gap = (
            {"median": round(float(np.median(gaps_us)), 3), "p90": round(float(np.percentile(gaps_us, 90)), 3)}
            if gaps_us  # a few short steps may go by without a look at the status page
            else None
        )
        return {
            "name": row.name,
            **({"director_gap_us": gap} if gap else {}),
            "mean_context": round(context + float(columns.mean()), 1),
            "num_steps": len(rows) // row.batch,
            "device": spread(device_ns),
            "client": spread(client_ns),
            "energy_j": self._meter.energy_j(begin_ns, end_ns),
            "energy_s": (end_ns - begin_ns) / 1e9,
            "energy_steps": len(rows) / row.batch,
        }

    def _prefill(self, row: Row, num_runs: int, cost: StepCost) -> dict[str, Any]:
        """A lone request: from its submission to its first token at the client, and from ACK to token by the device's clock."""
        runs = [self.client.run(row.label, [Wave(1, row.context, 1)])[0] for _ in range(1 + num_runs)][1:]
        begin_ns, end_ns = int(runs[0].submitted[0]), int(runs[-1].client[0, 0])
        return {
            "name": row.name,
            "mean_context": float(row.context),
            "num_steps": num_runs,
            "device": spread(np.array([times.device[0, 0] - times.accepted[0] for times in runs])),
            "client": spread(np.array([times.client[0, 0] - times.submitted[0] for times in runs])),
            "energy_j": self._meter.energy_j(begin_ns, end_ns),
            "energy_s": (end_ns - begin_ns) / 1e9,
            "energy_steps": num_runs,
        }
