"""Sweeps: scenarios of lengths x concurrency (closed loop) or rate (open loop), a cell each; and the Pareto frontier of what they show.

InferenceX's scenarios are 1k1k, 1k8k and 8k1k at concurrency 4 to 256, ten requests for each of the users. Called by blinkimp/cli/lab.py.
Test: pytest tests/null/test_lab.py tests/host/test_lab_sweep.py
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.bench.load_plan import LoadOptions
from blinkimp.bench.openai_backend import OpenAiBackend
from blinkimp.bench.runner import Progress, Target, run_load
from blinkimp.bench.zmq_backend import ZmqBackend
from blinkimp.host.power import PowerSource
from blinkimp.lab.store import Store, difference_of, key_of

REQUESTS_PER_USER: Final = 10  # of a closed loop, as InferenceX has it
RANGE_RATIO: Final = 0.8


@dataclass(frozen=True)
class Scenario:
    """Prompt and output tokens at most."""

    name: str
    input_len: int
    output_len: int


def parse_scenario(text: str) -> Scenario:
    """`1k1k`, `8k1k`, or `512x128`."""
    if found := re.fullmatch(r"(\d+)k(\d+)k", text):
        return Scenario(text, int(found[1]) * 1024, int(found[2]) * 1024)
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return Scenario(text, int(found[1]), int(found[2]))
    raise LoadError(f"scenario: got {text!r}, expected such as 1k1k, 8k1k or 512x128 (prompt and output tokens)")


@dataclass(frozen=True)
class Point:
    """One cell of a sweep."""

    scenario: Scenario
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"concurrency {self.concurrency}" if self.concurrency is not None else f"rate {self.rate:g}"

    def load(
        self,
        *,
        range_ratio: float,
        duration_s: float,
        warmup_s: float,
        seed: int,
        requests_per_user: int,
    ) -> LoadOptions:
        common: dict[str, Any] = {
            "lengths": "range",
            "input_len": self.scenario.input_len,
            "output_len": self.scenario.output_len,
            "range_ratio": range_ratio,
            "seed": seed,
        }
        if self.concurrency is not None:
            return LoadOptions(
                concurrency=self.concurrency, num_requests=self.concurrency * requests_per_user, **common
            )
        return LoadOptions(rate=self.rate, duration_s=duration_s, warmup_s=warmup_s, **common)


def points_of(scenarios: Sequence[Scenario], concurrencies: Sequence[int], rates: Sequence[float]) -> list[Point]:
    points = [Point(scenario, concurrency=number) for scenario in scenarios for number in concurrencies]
    points += [Point(scenario, rate=rate) for scenario in scenarios for rate in rates]
    if not points:
        raise LoadError("sweep: got no scenario with a concurrency or a rate; expected at least one")
    return points


# ---- Whose cells they are --------------------------------------------------------------------------------------------
def target_words(target: Target) -> dict[str, Any]:
    """What a cell says of the server that it was measured on."""
    backend = ZmqBackend.name if target.connect is not None else OpenAiBackend.name
    address = target.connect if target.connect is not None else target.url
    return {
        "backend": backend,
        "address": address,
        "model": target.model_name,
        "chat": target.chat,
        "num_gpus": target.num_gpus,
    }


def check_targets(store: Store, keys: Sequence[str], target: Target) -> None:
    """Raises LoadError where a cell was measured on another server: it would stand for this one. With a label the address may be another: an
    engine that was started anew. Cells of earlier versions say the backend and the model only."""
    now = target_words(target)
    for key in keys:
        if (cell := store.get(key)) is None:
            continue
        measured = cell.get("target", {}) | {name: cell["report"][name] for name in ("backend", "model_id")}
        measured["model"] = measured.pop("model_id")  # what the server served, asked for by name or not
        changed = [
            f"{name} {measured[name]} (asked for: {value})"
            for name, value in now.items()
            if name in measured and measured[name] != value
            if not (name == "address" and target.label) and not (name == "model" and value is None)
        ]
        if changed:
            raise LoadError(
                f"{store.folder}: {key} was measured with {', '.join(changed)}; expected cells of one server under one name; "
                "give this one a --label of its own, or take another folder"
            )


# ---- Measuring -------------------------------------------------------------------------------------------------------
def run_sweep(
    points: Sequence[Point],
    target: Target,
    store: Store,
    *,
    range_ratio: float = RANGE_RATIO,
    duration_s: float = 60.0,
    warmup_s: float = 5.0,
    requests_per_user: int = REQUESTS_PER_USER,
    seed: int = 0,
    source: PowerSource | None = None,
    idle_w: float | None = None,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = print,
    stop_after_s: float | None = None,
) -> int:
    """Measures the cells that are not there yet; returns how many failed. A cell that fails is written down and tried again next time.
    stop_after_s: no cell begins later than that."""
    num_failed = 0
    deadline = None if stop_after_s is None else time.monotonic() + stop_after_s
    keys = [key_of("sweep", target.label or "engine", point.scenario.name, point.name) for point in points]
    store.prepare()
    check_targets(store, keys, target)
    for number, (point, key) in enumerate(zip(points, keys, strict=True)):
        progress("cells", number, len(points))
        load = point.load(
            range_ratio=range_ratio,
            duration_s=duration_s,
            warmup_s=warmup_s,
            seed=seed,
            requests_per_user=requests_per_user,
        )
        if (before := store.get(key)) is not None:
            say(f"{point.scenario.name}, {point.name}: measured before{difference_of(before, load.to_json())}")
            continue
        if deadline is not None and time.monotonic() > deadline:
            say(f"stopped after {stop_after_s:g} s; the same command goes on with {point.scenario.name}, {point.name}")
            break
        cell: dict[str, Any] = {
            "kind": "sweep",
            "engine": target.label or "engine",
            "scenario": point.scenario.name,
            "concurrency": point.concurrency,
            "rate": point.rate,
            "target": target_words(target),
        }
        try:
            cell["report"] = asyncio.run(run_load(load, target, progress=progress, source=source, idle_w=idle_w))
            figures = cell["report"]
            if not figures["completed"]:
                raise LoadError(
                    f"none of {figures['failed']} requests completed: {next(iter(figures['error_counts']), 'no words')}"
                )
            line = (
                f"{figures['output_throughput']:.1f} output tokens/s, TTFT p99 {figures['p99_ttft_ms']:.1f} ms, "
                f"TPOT p99 {figures['p99_tpot_ms']:.2f} ms, {figures['failed']} failed"
            )
        except LoadError as error:
            num_failed += 1
            cell["error"] = str(error)
            line = f"failed: {error}"
        store.put(key, cell)  # first: a terminal that is gone does not cost a cell
        say(f"{point.scenario.name}, {point.name}: {line}")
    return num_failed


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other exceeds in one coordinate without falling short in the other; ascending in the first."""
    frontier: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], -point[1])):
        if not frontier or y > frontier[-1][1]:
            frontier.append((x, y))
    return frontier[::-1]
