"""What `blinkimp top` shows, as plain data: two looks at an engine, and what happened in between.

    watcher = Watcher("blinkimp"); watcher.look(); time.sleep(1); watcher.look()["rates"]["output_tokens_per_s"]

The keys are what `blinkimp top --once --json` prints; they do not change their meaning. Called by blinkimp/cli/top.py.
Test: pytest tests/host/test_top.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from blinkimp.host.engine_view import EngineView, QueuePairView, look
from blinkimp.host.power import PowerError, PowerSource, open_nvml
from blinkimp.host.shared_memory import SHM_DIR, EngineNotFoundError, engine_is_alive

Snapshot = dict[str, Any]

_FINISHED: Final = ("eos", "stop_id", "length", "cancelled", "draining", "timeout", "constraint")
_TOTALS: Final = (
    *("requests_accepted", "requests_rejected", "preemptions", "credit_stalls", "ingress_drops"),
    *("prompt_tokens", "output_tokens"),
)


def running_engines() -> list[str]:
    """Names of this machine's engines."""
    names = (page.name.removeprefix("blinkimp.").removesuffix(".engine") for page in SHM_DIR.glob("blinkimp.*.engine"))
    return sorted(name for name in names if engine_is_alive(name))


def _check_alive(engine_name: str) -> None:
    if engine_is_alive(engine_name):
        return
    others = ", ".join(name for name in running_engines() if name != engine_name)
    remedy = f"others run: {others}; give one with --engine-name" if others else "start one with `blinkimp serve`"
    raise EngineNotFoundError(f"no engine named {engine_name!r} runs; expected one to look at; {remedy}")


class Watcher:
    """Raises SharedMemoryError where no engine of that name runs, at look() too."""

    def __init__(self, engine_name: str) -> None:
        _check_alive(engine_name)
        self._engine_name = engine_name
        self._before: EngineView | None = None
        self._heartbeat_changed_ns = time.monotonic_ns()
        self._gpu: PowerSource | None = None
        self._has_looked_for_gpu = False

    def look(self) -> Snapshot:
        _check_alive(self._engine_name)
        view = look(self._engine_name)
        before = self._before
        if (
            before is None or before.engine_id != view.engine_id
        ):  # the first look at this engine: nothing has happened yet
            before = view
        if before is view or before.status["heartbeat"] != view.status["heartbeat"]:
            self._heartbeat_changed_ns = view.at_ns
        self._before = view
        return {
            "engine": self._engine(view),
            "batch": _batch(view),
            "rates": _rates(before, view),
            "step": _step(before, view),
            "pages": {"total": view.status["num_pages"]}
            | {name: view.status[f"num_pages_{name}"] for name in ("used", "cached", "free")},
            "prefix_cache": _prefix_cache(view),
            "totals": _totals(view),
            "queue_pairs": [_queue_pair(before, view, pair) for pair in view.queue_pairs],
            "gpu": self._gpu_reading(view),
        }

    def _engine(self, view: EngineView) -> Snapshot:
        about = view.about
        return {
            "name": view.engine_name,
            "model": about.model_name,
            "device": about.device,
            "state": view.state,
            "host_pid": view.host_pid,
            "restarts": view.num_restarts,
            "uptime_s": round(max(0.0, time.time() - about.started_unix_s), 1) if about.started_unix_s else None,
            "heartbeat": view.status["heartbeat"],
            "heartbeat_age_s": round((view.at_ns - self._heartbeat_changed_ns) / 1e9, 3),
            "max_context": about.max_context,
            "fault": view.fault if view.fault["code"] else None,
        }

    def _gpu_reading(self, view: EngineView) -> Snapshot | None:
        if view.about.device != "gpu":
            return None
        if not self._has_looked_for_gpu:
            self._has_looked_for_gpu, self._gpu = True, open_nvml()
        if self._gpu is None:
            return None
        try:
            reading = self._gpu.read()
        except PowerError:
            return None
        return {
            "name": self._gpu.name,
            "power_w": reading.power_w,
            "sm_clock_mhz": reading.sm_clock_mhz,
            "memory_clock_mhz": reading.memory_clock_mhz,
        }


def _batch(view: EngineView) -> Snapshot:
    status, limit = view.status, view.control["max_running"]
    max_batch = view.about.max_batch
    return {
        "running": status["num_running"],
        "waiting": status["num_waiting"],
        "finishing": status["num_finishing"],
        "max_batch": max_batch,
        "max_running": min(limit, max_batch) if limit else max_batch,
    }


def _rates(before: EngineView, view: EngineView) -> Snapshot:
    seconds = (view.at_ns - before.at_ns) / 1e9

    def rate(name: str) -> float:
        return _per_second(view.status[name] - before.status[name], seconds)

    finished = sum(view.status[f"finished_{name}"] - before.status[f"finished_{name}"] for name in _FINISHED)
    return {
        "interval_s": round(seconds, 3),
        "output_tokens_per_s": rate("output_tokens"),
        "prompt_tokens_per_s": rate("prompt_tokens"),
        "cached_prompt_tokens_per_s": rate("prefix_hit_tokens"),
        "requests_accepted_per_s": rate("requests_accepted"),
        "requests_finished_per_s": _per_second(finished, seconds),
        "steps_per_s": rate("step"),
    }


def _per_second(num: float, seconds: float) -> float:
    return round(max(0.0, num) / seconds, 2) if seconds > 0 else 0.0


def _step(before: EngineView, view: EngineView) -> Snapshot:
    num_steps = sum(view.step_counts) - sum(before.step_counts)
    num_rows = view.num_step_rows - before.num_step_rows
    return {
        "count": view.status["step"],
        "last_ms": round(view.status["step_ns_last"] / 1e6, 4),
        "gap_us": round(view.status["gap_ns_last"] / 1e3, 2),
        "mean_rows": round(num_rows / num_steps, 2) if num_steps > 0 else 0.0,
    }


def _prefix_cache(view: EngineView) -> Snapshot:
    queried, hit = view.status["prefix_query_tokens"], view.status["prefix_hit_tokens"]
    return {"query_tokens": queried, "hit_tokens": hit, "hit_rate": round(hit / queried, 4) if queried else None}


def _totals(view: EngineView) -> Snapshot:
    finished = {name: view.status[f"finished_{name}"] for name in _FINISHED}
    return {name: view.status[name] for name in _TOTALS} | {"finished": finished}


def _queue_pair(before: EngineView, view: EngineView, pair: QueuePairView) -> Snapshot:
    idx = pair.queue_pair_idx
    seconds = (view.at_ns - before.at_ns) / 1e9
    num_tokens = view.ingress(idx, "tokens") - before.ingress(idx, "tokens")
    return {
        "idx": idx,
        "protocol": _protocol(view, pair),
        "owner_pid": pair.owner_pid,
        "owner": process_name(pair.owner_pid),
        "is_attached": pair.is_attached,
        "submissions_used": pair.num_submissions_used,
        "num_submissions": pair.num_submissions,
        "completions_used": pair.num_completions_used,
        "num_completions": pair.num_completions,
        "outstanding": view.ingress(idx, "num_outstanding") if pair.owner_pid else 0,
        "waiting": view.ingress(idx, "num_waiting") if pair.owner_pid else 0,
        "tokens_per_s": _per_second(num_tokens, seconds),
        "ring_full": view.ingress(idx, "ring_full"),
        "arena_full": view.ingress(idx, "arena_full"),
    }


def _protocol(view: EngineView, pair: QueuePairView) -> str | None:
    """Of the ingress: what it says itself, once it has."""
    if not pair.owner_pid:
        return None
    if view.ingress(pair.queue_pair_idx, "pid") != pair.owner_pid:
        return "?"
    return "http" if view.ingress(pair.queue_pair_idx, "is_http") else "zmq"


def process_name(pid: int) -> str | None:
    """As the kernel has it; None where it has gone."""
    if not pid:
        return None
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None
