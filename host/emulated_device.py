"""The emulated device, seen from the host: starts host/emulated_process.py, hears its loading, watches the process.

A process of its own, as a GPU is a machine of its own: the host may be stopped or be slow without a token being late.
Implements host/device_protocol.py. Called by host/engine.py. Test: pytest tests/host/test_engine.py
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import msgspec
import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.child_process import ChildProcess
from blinkimp.host.device_protocol import DeviceError, Launch, Progress
from blinkimp.host.emulated_process import EXIT_STOPPED, Event, Order, fill_sizes, workspace_bytes
from blinkimp.host.memory_plan import DeviceKind, EngineSizes
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.program import model_dims
from blinkimp.ring_abi import DType, EngineState

_log = logging.getLogger(__name__)


class EmulatedDevice:
    kind: DeviceKind = "emulated"

    def __init__(self, num_threads: int = 0) -> None:
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._child: ChildProcess | None = None
        self._error = ""

    @property
    def num_workers(self) -> int:
        return self._num_threads

    def describe(self) -> str:
        return f"emulated device, {self._num_threads} CPU threads"

    def memory_available_bytes(self) -> int:
        return host_memory_available_bytes()

    def workspace_bytes(self, model: ModelConfig, sizes: EngineSizes) -> int:
        params = np.zeros(1, dtype=abi.ENGINE_PARAMS)
        # Types and EOS ids change no workspace; the widest are taken.
        fill_sizes(params, sizes, model_dims(model, DType.F32, DType.F32, ()), self._num_threads)
        return sum(workspace_bytes(params))

    @property
    def pid(self) -> int:
        assert self._child is not None, "only after start()"
        return self._child.pid

    def start(self, launch: Launch, progress: Progress | None = None) -> None:
        order = Order(
            engine_name=launch.regions.engine_name,
            model_folder=str(launch.model_folder),
            load_format=launch.load_format,
            null_step_ns=launch.null_step_ns,
            compute=int(launch.compute),
            kv_dtype=int(launch.kv_dtype),
            sizes=launch.sizes,
            num_threads=self._num_threads,
            ingress_timeout_ns=launch.ingress_timeout_ns,
            spin_budget_ns=launch.spin_budget_ns,
            parked_after_ns=launch.parked_after_ns,
            has_trace=launch.regions.trace is not None,
        )

        def on_line(line: bytes) -> None:
            event = msgspec.json.decode(line, type=Event)
            if event.error:
                self._error = event.error
            elif progress is not None:
                progress(event.stage, event.done, event.total)

        self._child = ChildProcess(
            "emulated device", "blinkimp.host.emulated_process", stdin=msgspec.json.encode(order), on_line=on_line
        )
        status = launch.regions.engine_page.view(abi.ENGINE_PAGE)["status"]
        while int(status["state"][0]) == EngineState.STARTING:
            if not self.is_alive():
                raise DeviceError(self.fault() or "the emulated device ended before it started")
            time.sleep(0.002)

    def is_alive(self) -> bool:
        return self._child is not None and self._child.is_alive()

    def resume(self) -> None:
        """Its process has stayed, and looks for itself."""

    def fault(self) -> str | None:
        if self._child is None or self._child.is_alive() or self._child.returncode() == EXIT_STOPPED:
            return None
        return self._error or self._child.describe_exit()

    def stop(self, timeout_s: float) -> bool:
        if self._child is None or self._child.wait(timeout_s):
            return True
        _log.warning("%s and did not stop within %g s: it is killed", self._child.describe_exit(), timeout_s)
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        return False


def host_memory_available_bytes() -> int:
    """What the kernel says can be had without swapping, or what the control group leaves, if that is less."""
    available = _meminfo_bytes("MemAvailable")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        current = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available  # no limit that we can see (control groups of version 1, or none)
    return available if limit == "max" else max(0, min(available, int(limit) - current))


def _meminfo_bytes(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise DeviceError(f"/proc/meminfo has no {field}; expected Linux 3.14 or newer")
