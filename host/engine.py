"""The engine: provisions a device for one model, watches it, drains it, stops it. No token passes through here.

    with Engine(config) as engine:      # choose device -> plan memory -> create shared memory -> start device
        ...                             # ingresses attach to the queue pairs by the engine's name
        engine.check()                  # raises EngineFaultError; a few times a second
        engine.drain(30.0)
                                        # leaving: STOP, wait, remove the shared memory

Called by host/supervisor.py (`blinkimp serve`), blinkimp/cli and tests. Test: pytest tests/host/test_engine.py
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from blinkimp import ring_abi as abi
from blinkimp.config import Config, cache_folder, model_folder
from blinkimp.host.checkpoint import Checkpoint, read_model_config
from blinkimp.host.device_protocol import DEFAULT_SPIN_BUDGET_NS, Device, DeviceError, Launch, Progress
from blinkimp.host.dummy_weights import DummyWeights
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.fault_report import ADVICE, FaultReport, make_fault_report
from blinkimp.host.memory_plan import MemoryPlan, plan_memory
from blinkimp.host.metrics_memory import new_about
from blinkimp.host.parking import Doorbell, WakeThread
from blinkimp.host.program import num_program_ops, num_weight_elements
from blinkimp.host.shared_memory import EngineLock, EngineRegions, QueuePairGeometry, create_engine_regions
from blinkimp.host.trace_info import engine_info
from blinkimp.host.trace_memory import TraceGeometry, trace_geometry
from blinkimp.host.tuning import write_tuning
from blinkimp.host.watchdog import Symptom, Verdict, Watchdog
from blinkimp.logs import log_event
from blinkimp.ring_abi import DType, EngineCommand, EngineState

_log = logging.getLogger(__name__)

# Without a heartbeat for this long a device hangs (config: stall_timeout_s). Both devices beat during a step too, however long it is; the
# emulated one shares its CPUs with whatever else runs there. The GPU's is longer than any wait inside a step, which ends in a fault record.
STALL_TIMEOUT_S: Final = {"gpu": 2 * DEFAULT_SPIN_BUDGET_NS / 1e9, "emulated": 30.0}
STOP_TIMEOUT_S: Final = 10.0  # from COMMAND_STOP to the device's end
ABANDON_TIMEOUT_S: Final = 1.0  # the same for a device that has not begun: it may be loading for minutes
_POLL_S: Final = 0.002


class EngineFaultError(RuntimeError):
    """The device died, hangs, or reported a fault. verdict: of the watchdog, None where the engine is not started."""

    def __init__(self, message: str, verdict: Verdict | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


def choose_device(config: Config) -> Device:
    """The device that config.device asks for. auto: a usable GPU, else the emulated device, and why, on stderr."""
    if config.load_format == "null" and config.device == "gpu":
        raise DeviceError(
            "load_format=null runs no model: got device=gpu, expected the emulated one; use device=emulated"
        )
    if config.load_format == "null":
        return EmulatedDevice(config.num_threads or 1, config.orchestrator)  # others would only wait for the first
    if config.device == "emulated":
        return EmulatedDevice(config.num_threads, config.orchestrator)
    try:
        from blinkimp.host.gpu_device import GpuDevice

        return GpuDevice(kernel=config.kernel, orchestrator=config.orchestrator)
    except (ImportError, RuntimeError) as error:  # no cuda-python; GpuError: no driver, no GPU, or not one we run on
        if config.device == "gpu":
            raise DeviceError(
                f"device=gpu, but no GPU can be used: {error}; use device=emulated, or see `blinkimp doctor`"
            ) from error
        _log.warning("no GPU can be used (%s): running on the emulated device, on the CPU", error)
        return EmulatedDevice(config.num_threads, config.orchestrator)


def num_workers_of(config: Config) -> int:
    """Of the device that choose_device() would choose; no context is made on a GPU."""
    if config.device != "emulated" and config.load_format != "null":
        try:
            from blinkimp.host.gpu_driver import probe_gpu
            from blinkimp.host.gpu_kernel import choose_kernel

            gpu = probe_gpu()
            choose_kernel(config.kernel, gpu.compute_capability, gpu.name)
            return gpu.num_workers
        except (ImportError, RuntimeError):  # as in choose_device()
            pass
    return choose_device(msgspec.structs.replace(config, device="emulated")).num_workers


def resolve_compute(config: Config, folder: Path, device: Device) -> DType:
    """The type of GEMM inputs: what was asked for, else what the device and the checkpoint have."""
    if device.kind == "gpu":
        if config.compute_dtype == "f32":
            raise DeviceError(
                "compute_dtype is f32, but the GPU computes in bf16; use compute_dtype=bf16 or auto, or device=emulated"
            )
        return DType.BF16
    if config.load_format == "null":
        return DType.BF16
    if config.compute_dtype != "auto":
        return DType.F32 if config.compute_dtype == "f32" else DType.BF16
    provider = DummyWeights(0) if config.load_format == "dummy" else Checkpoint(folder)
    return DType(provider.compute_dtype)


class Engine:
    """One engine of this process. start() or `with`; stop() is idempotent."""

    def __init__(
        self,
        config: Config,
        *,
        device: Device | None = None,
        progress: Progress | None = None,
        lock: EngineLock | None = None,
        num_restarts: int = 0,
    ) -> None:
        """lock: of a supervisor that holds the engine's name already. num_restarts: engines that it had before this one."""
        self.config = config
        self.num_restarts = num_restarts
        self._lock = lock
        self.device = device or choose_device(config)
        self.folder = model_folder(config)
        self.model = read_model_config(self.folder)
        self.compute = resolve_compute(config, self.folder, self.device)
        self.plan: MemoryPlan = self._plan()
        self._progress = progress
        self._regions: EngineRegions | None = None
        self._page: Any = None
        self._watchdog: Watchdog | None = None
        self._wake: WakeThread | None = None
        self._is_halted = False

    # ---- Life --------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Returns once the director runs. Raises DeviceError, SharedMemoryError or UnsupportedModelError, leaving nothing behind."""
        config, sizes = self.config, self.plan.sizes
        _log.info("%s; model %s\n%s", self.device.describe(), self.folder, self.plan.table())
        self._regions = create_engine_regions(
            config.engine_name,
            num_queue_pairs=sizes.num_queue_pairs,
            geometry=QueuePairGeometry(config.num_submissions, config.num_completions, config.arena_bytes),
            max_context=sizes.max_context,
            vocab_size=self.model.vocab,
            max_requests=sizes.max_requests_per_queue_pair,
            num_constraint_slots=sizes.num_constraint_slots,
            constraint_slot_bytes=sizes.constraint_slot_bytes,
            trace=self._trace_geometry(),
            about=new_about(
                config.served_model_name or config.model,
                self.device.kind,
                max_batch=sizes.max_batch,
                max_step_tokens=sizes.max_step_tokens,
                max_context=sizes.max_context,
                has_prefix_cache=config.prefix_cache,
            ),
            lock=self._lock,
            num_restarts=self.num_restarts,
        )
        self._page = self._regions.engine_page.view(abi.ENGINE_PAGE)
        started_at = time.monotonic()
        try:
            self.device.start(self._launch(self._regions), self._progress)
        except BaseException:
            self._command(EngineCommand.STOP)
            self.device.stop(ABANDON_TIMEOUT_S)
            self._release()
            raise
        stall_timeout_s = config.stall_timeout_s or STALL_TIMEOUT_S[self.device.kind]
        self._watchdog = Watchdog(self._regions.engine_page, self.device, stall_timeout_s)
        if config.park_after_s > 0 and self.device.kind == "gpu":
            doorbell = Doorbell(self._regions.engine_page, self._regions.queue_pairs)
            self._wake = WakeThread(doorbell, self.device.resume)
        seconds = time.monotonic() - started_at
        text = f"engine {config.engine_name} runs after {seconds:.1f} s"
        log_event(_log, logging.INFO, "engine_running", text, engine_name=config.engine_name, seconds=round(seconds, 3))

    def check(self) -> None:
        """Raises EngineFaultError when the device is dead, hangs, or has faulted."""
        if self._watchdog is None:
            raise EngineFaultError(f"engine {self.config.engine_name} is not started; expected start() before check()")
        verdict = self._watchdog.check()
        if verdict is None and self._wake is not None and self._wake.failure is not None:
            verdict = Verdict(Symptom.CUDA_ERROR, self._wake.failure)
        if verdict is not None:
            text = f"engine {self.config.engine_name}: {verdict.text}; restart the engine; {ADVICE[verdict.symptom]}"
            raise EngineFaultError(text, verdict)

    def drain(self, timeout_s: float, should_give_up: Callable[[], bool] = lambda: False) -> bool:
        """No new requests from now on; waits until the others have ended and are published. False: some have not, by then."""
        self._command(EngineCommand.DRAIN)
        deadline = time.monotonic() + timeout_s
        while self.is_busy():
            self.check()
            if time.monotonic() >= deadline or should_give_up():
                return False
            time.sleep(_POLL_S)
        return True

    def is_busy(self) -> bool:
        """Whether a drain has not been noticed yet, or requests are still on their way."""
        return self.status()["state"] in (EngineState.RUNNING, EngineState.PARKED) or self.num_requests() > 0

    def num_requests(self) -> int:
        """In the batch, waiting for it, or for their ingress to read."""
        status = self.status()
        return status["num_running"] + status["num_waiting"] + status["num_finishing"]

    def halt(self) -> bool:
        """STOP: what still runs is finished as `draining`; the device ends. The shared memory stays until stop()."""
        if self._regions is None or self._is_halted:
            return True
        self._is_halted = True
        self._command(EngineCommand.STOP)  # a parked engine is woken by it, to say that it has stopped
        ended = self.device.stop(STOP_TIMEOUT_S)
        if self._wake is not None:
            self._wake.close()
            self._wake = None
        return ended

    def stop(self) -> None:
        """halt(), then removes the shared memory."""
        self.halt()
        self._release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def tune(
        self,
        *,
        max_running: int | None = None,
        step_tokens: int | None = None,
        prefill_chunk_tokens: int | None = None,
        aging_ms: int | None = None,
        timeout_s: float = 10.0,
    ) -> dict[str, int]:
        """Limits of the schedule, from the next step on (host/tuning.py). Returns them as they stand now."""
        if self._page is None:
            raise EngineFaultError(f"engine {self.config.engine_name} is not started; expected start() before tune()")
        words = {"max_running": max_running, "step_tokens": step_tokens}
        words |= {"prefill_chunk_tokens": prefill_chunk_tokens, "aging_ms": aging_ms}
        return write_tuning(self._page, timeout_s, **words)

    def fault_report(self, verdict: Verdict) -> FaultReport:
        """All that is known of a fault that check() raised."""
        return make_fault_report(
            verdict,
            self._page,
            engine_name=self.config.engine_name,
            model=str(self.folder),
            device=self.device.describe(),
            num_restarts=self.num_restarts,
        )

    def abandon(self) -> None:
        """After a fault: ends the device by force. The shared memory stays as it is, for whoever looks; this process must end next."""
        self._is_halted = True
        try:
            self.device.stop(0.0)
        except RuntimeError as error:  # a context that is lost refuses every call; it goes with the process
            _log.debug("the device could not be stopped: %s", error)

    # ---- What it is doing --------------------------------------------------------------------------------------------
    def status(self) -> dict[str, int]:
        """StatusLines (device/ring_abi.h) by name. Each word is right by itself; two of them may be a loop apart."""
        if self._page is None:
            raise EngineFaultError(f"engine {self.config.engine_name} is not started; expected start() before status()")
        record = self._page["status"][0]
        return {name: int(record[name]) for name in abi.STATUS_LINES.names or () if name != "reserved"}

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _release(self) -> None:
        if self._regions is not None:
            self._page = self._watchdog = None
            self._regions.unlink()
            self._regions = None

    def _command(self, command: EngineCommand) -> None:
        # One aligned word with one writer, this host; the director polls it.
        self._page["control"]["command"][0] = int(command)

    def _trace_geometry(self) -> TraceGeometry | None:
        config = self.config
        if config.trace_events == 0:
            return None
        num_ops = num_program_ops(self.model, config.load_format)
        info = engine_info(config, self.model, self.device.describe(), asdict(self.plan.sizes), num_ops)
        return trace_geometry(config, num_ops, self.device.num_workers, info)

    def _plan(self) -> MemoryPlan:
        item_bytes = 2 if self.compute == DType.BF16 else 4
        runs_model = self.config.load_format != "null"  # without one no sampler walks a constraint's automaton
        return plan_memory(
            self.config if runs_model else msgspec.structs.replace(self.config, constraint_slots=0),
            self.model,
            kind=self.device.kind,
            kv_dtype=self.compute,
            weight_bytes=num_weight_elements(self.model) * item_bytes if runs_model else 0,
            available_bytes=self.device.memory_available_bytes(),
            workspace_bytes=lambda sizes: self.device.workspace_bytes(self.model, sizes),
        )

    def _launch(self, regions: EngineRegions) -> Launch:
        return Launch(
            model_folder=self.folder,
            model=self.model,
            load_format=self.config.load_format,
            null_step_ns=self.config.null_step_us * 1000,
            compute=self.compute,
            kv_dtype=self.compute,
            sizes=self.plan.sizes,
            num_threads=self.config.num_threads,
            cache_dir=cache_folder(self.config),
            ingress_timeout_ns=int(self.config.ingress_timeout_s * 1e9),
            spin_budget_ns=DEFAULT_SPIN_BUDGET_NS,
            traces_ops=self.config.trace_events > 0 and self.config.trace_op_period > 0,
            parked_after_ns=int(self.config.park_after_s * 1e9),
            regions=regions,
        )
