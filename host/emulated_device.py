"""The emulated device, seen from the host: starts host/emulated_process.py, hears its loading, watches the process.

A process of its own, as a GPU is a machine of its own: the host may be stopped or be slow without a token being late.
Implements host/device_protocol.py. Called by host/engine.py. Test: pytest tests/host/test_engine.py
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.available_memory import host_memory_available_bytes
from blinkimp.host.child_process import ChildProcess
from blinkimp.host.cpu_orchestrator import (
    END_STOPPED,
    DirectorMemory,
    OrchestratorKind,
    OrchestratorThread,
    check_combination,
)
from blinkimp.host.device_protocol import DeviceError, Launch, Progress
from blinkimp.host.emulated_process import EXIT_STOPPED, Event, Order, workspace_bytes
from blinkimp.host.host_memory import fill_sizes
from blinkimp.host.memory_plan import DeviceKind, EngineSizes
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.program import model_dims
from blinkimp.host.step_channel import StepChannel
from blinkimp.ring_abi import DType, EngineState

_log = logging.getLogger(__name__)

ABANDON_S: Final = 1.0  # for a scheduling thread that was told that its device is dead


class EmulatedDevice:
    kind: DeviceKind = "emulated"

    def __init__(self, num_threads: int = 0, orchestrator: OrchestratorKind = "gpu") -> None:
        """`orchestrator`: where the director is, in the device's process or in this one (host/ORCHESTRATOR.md)."""
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._child: ChildProcess | None = None
        self._error = ""
        self._orchestrator = orchestrator
        self._thread: OrchestratorThread | None = None  # of a director in this process
        self._memory = DirectorMemory()  # its tables

    @property
    def num_workers(self) -> int:
        return self._num_threads

    def describe(self) -> str:
        scheduled = "" if self._orchestrator == "gpu" else f", scheduled by this process ({self._orchestrator})"
        return f"emulated device, {self._num_threads} CPU threads{scheduled}"

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
        check_combination(self._orchestrator, launch)
        channel = None if self._orchestrator == "gpu" else StepChannel.create(launch.sizes)
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
            channel_fd=-1 if channel is None else channel.fd,
        )
        loaded: list[Event] = []

        def on_line(line: bytes) -> None:
            try:
                event = msgspec.json.decode(line, type=Event)
            except msgspec.DecodeError:  # it was killed in the middle of a line
                return
            if event.error:
                self._error = event.error
            elif event.stage == "loaded":
                loaded.append(event)
            elif progress is not None:
                progress(event.stage, event.done, event.total)

        self._child = ChildProcess(
            "emulated device",
            "blinkimp.host.emulated_process",
            stdin=msgspec.json.encode(order),
            on_line=on_line,
            pass_fds=() if channel is None else (channel.fd,),
        )
        if channel is not None:
            channel.close_descriptor()
        # Then all words on the progress were passed on, too: they come by a thread that reads a pipe.
        self._wait(lambda: not loaded)
        if channel is not None:
            self._start_director(launch, channel, loaded[0])
        status = launch.regions.engine_page.view(abi.ENGINE_PAGE)["status"]
        self._wait(lambda: int(status["state"][0]) == EngineState.STARTING)

    def is_alive(self) -> bool:
        if self._child is None or not self._child.is_alive():
            if self._thread is not None:
                self._thread.abandon()  # it would wait for a step that nobody runs
            return False
        return self._thread is None or self._thread.is_alive()

    def resume(self) -> None:
        """Its process has stayed, and looks for itself."""

    def fault(self) -> str | None:
        if self._thread is not None and self._thread.end() not in (None, END_STOPPED) and not self._error:
            self._error = self._child_fault() or "the scheduling thread ended; its messages stand above"
        return self._error or self._child_fault()

    def _child_fault(self) -> str | None:
        if self._child is None or self._child.is_alive() or self._child.returncode() == EXIT_STOPPED:
            return None
        return self._error or self._child.describe_exit()

    def stop(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        if self._thread is not None and not self._thread.join(timeout_s if self.is_alive() else ABANDON_S):
            self._thread.abandon()
            self._thread.join(ABANDON_S)
        if self._child is None or self._child.wait(max(0.0, deadline - time.monotonic())):
            return True
        _log.warning("%s and did not stop within %g s: it is killed", self._child.describe_exit(), timeout_s)
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        return False

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _wait(self, is_busy: Callable[[], bool]) -> None:
        """Raises DeviceError when the device ends first."""
        while is_busy():
            if not self.is_alive():
                raise DeviceError(self.fault() or "the emulated device ended before it started")
            time.sleep(0.002)

    def _start_director(self, launch: Launch, channel: StepChannel, loaded: Event) -> None:
        dims = np.frombuffer(loaded.dims, abi.MODEL_DIMS)
        params = self._memory.params(
            launch,
            dims,
            loaded.num_ops,
            self._num_threads,
            channel.sampled_address,
            channel.top_logprobs_address,
        )
        self._thread = channel.start_loop(params, ahead=self._orchestrator == "cpu-ahead")
