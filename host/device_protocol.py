"""What the engine host asks of a device: the GPU (host/gpu_device.py) and the emulated one (host/emulated_device.py) look alike.

Life: memory_available_bytes / workspace_bytes (planning) -> start -> [running: watch is_alive, fault] -> stop. The commands
RUN, DRAIN and STOP do not go through here: the host writes them to the engine page, where the director reads them.
Called by host/engine.py. Test: pytest tests/host/test_engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from blinkimp.host.memory_plan import DeviceKind, EngineSizes
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.shared_memory import EngineRegions
from blinkimp.ring_abi import DType

Progress = Callable[[str, int, int], None]  # stage ("weights", "compile", ...), done, total

DEFAULT_SPIN_BUDGET_NS: Final = (
    5_000_000_000  # a wait inside a step; the slowest step known takes a quarter of a second
)


class DeviceError(RuntimeError):
    """A device could not start, or died; the message says why and what to do."""


@dataclass(frozen=True)
class Launch:
    """Everything a device needs to start."""

    model_folder: Path
    model: ModelConfig
    load_format: Literal["auto", "dummy", "null"]
    null_step_ns: int  # of load_format null: from step to step
    compute: DType
    kv_dtype: DType
    sizes: EngineSizes
    num_threads: int  # emulated device; 0 = as many as there are CPUs
    cache_dir: Path  # of compiled kernels
    ingress_timeout_ns: int
    spin_budget_ns: int
    parked_after_ns: int  # 0 = never
    traces_ops: bool  # the trace has room for op times
    regions: EngineRegions  # created by the host, not yet read by any director


class Device(Protocol):
    kind: DeviceKind

    @property
    def num_workers(self) -> int:
        """Worker CTAs, or interpreter threads."""

    def describe(self) -> str:
        """One line for the operator: which device this is."""

    def memory_available_bytes(self) -> int:
        """Memory an engine may use now, weights included."""

    def workspace_bytes(self, model: ModelConfig, sizes: EngineSizes) -> int:
        """What the interpreter's workspaces take for these sizes."""

    def start(self, launch: Launch, progress: Progress | None = None) -> None:
        """Loads the model and starts the director. Returns once it runs, or raises DeviceError."""

    def is_alive(self) -> bool:
        """False once the kernel or the process has ended, for whatever reason."""

    def resume(self) -> None:
        """The engine has parked (EngineState.PARKED) and is wanted: goes on where it was. A device that sees to that itself does nothing."""

    def fault(self) -> str | None:
        """Why it ended, where the engine page does not say (a signal, a driver error); None while alive or after a clean end."""

    def stop(self, timeout_s: float) -> bool:
        """After COMMAND_STOP was written: waits for the end and frees everything. Past the timeout it is ended by force: False."""
