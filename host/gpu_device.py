"""The GPU as a device: compiles and loads the persistent kernel, places the weights, registers the queue pairs, launches once.

After start() nothing of this process is on the path of a token: it may be stopped, or busy, and the kernel serves on. With orchestrator = cpu
it is the other way round, to measure what that costs: a thread of this process launches each step (host/gpu_orchestrator.py).
Implements host/device_protocol.py. Called by host/engine.py. Test: pytest -m gpu tests/gpu/test_engine_gpu.py
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from blinkimp import ring_abi as abi
from blinkimp.host.compile_cache import CompiledKernel, get_kernel
from blinkimp.host.cpu_orchestrator import OrchestratorKind, check_combination
from blinkimp.host.device_protocol import DeviceError, Launch, Progress
from blinkimp.host.gpu_driver import GpuContext, GpuError
from blinkimp.host.gpu_kernel import (
    BEGIN_STEP_NAME,
    KERNEL_NAME,
    PACK_SOURCE,
    STEP_SOURCE,
    KernelChoice,
    KernelChoiceError,
    KernelShape,
    choose_kernel,
    kernel_shape,
)
from blinkimp.host.gpu_memory import allocate_engine, workspace_sizes
from blinkimp.host.gpu_orchestrator import CUDA_DRIVER, GpuOrchestrator
from blinkimp.host.gpu_weights import GpuTarget
from blinkimp.host.memory_plan import DeviceKind, EngineSizes
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.program import Model, load_model
from blinkimp.host.step_costs import step_costs
from blinkimp.host.trace_memory import fill_trace
from blinkimp.ring_abi import EngineState

_log = logging.getLogger(__name__)

IDLE_SLEEP_NS: Final = 500  # between polls of a director that waits for credit or for a first attach
START_TIMEOUT_S: Final = 20.0  # from the launch to the director's first sign of life
# Kernels, the context's growth, and packing pad: kept free when memory is planned.
RESERVED_BYTES: Final = 1 << 30


class GpuDevice:
    """One GPU. Raises GpuError at once where there is none that a kernel runs on. defines: macros that the kernel has besides its shape's, for
    experiments (tools/bench_trace.py)."""

    kind: DeviceKind = "gpu"

    def __init__(
        self,
        device_idx: int = 0,
        kernel: KernelChoice = "auto",
        orchestrator: OrchestratorKind = "gpu",
        defines: Mapping[str, str] | None = None,
    ) -> None:
        self._defines = dict(defines or {})
        self._context = GpuContext(device_idx)
        properties = self._context.properties
        try:
            self._kernel_kind = choose_kernel(kernel, properties.compute_capability, properties.name)
        except KernelChoiceError as error:
            self._context.close()
            raise GpuError(str(error)) from error
        self._stream: Any = None
        self._relaunch: Callable[[], None] | None = None
        self._page: Any = None
        self._error: str | None = None
        self._model: Model | None = None
        self._orchestrator_kind = orchestrator
        self._orchestrator: GpuOrchestrator | None = None  # where this process launches each step

    @property
    def num_workers(self) -> int:
        return self._context.properties.num_workers

    def describe(self) -> str:
        properties = self._context.properties
        version = properties.driver_version
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        scheduled = (
            "" if self._orchestrator_kind == "gpu" else f", scheduled by this process ({self._orchestrator_kind})"
        )
        return f"{properties.name}, {self._kernel_kind} kernel, {self.num_workers} worker SMs, driver for CUDA {cuda}{scheduled}"

    def memory_available_bytes(self) -> int:
        self._context.make_current()
        return max(0, self._context.free_bytes() - RESERVED_BYTES)

    def workspace_bytes(self, model: ModelConfig, sizes: EngineSizes) -> int:
        return sum(workspace_sizes(model, sizes))

    def start(self, launch: Launch, progress: Progress | None = None) -> None:
        check_combination(self._orchestrator_kind, launch)
        if self._orchestrator_kind != "gpu" and launch.traces_ops:
            raise DeviceError(
                "trace_op_period is not 0, expected 0 with orchestrator=cpu: events would have the host's clock, op times the GPU's; "
                "set trace_op_period to 0"
            )
        self._context.make_current()
        try:
            shape = kernel_shape(launch.model, self.num_workers, self._kernel_kind, self._context.properties.arch)
            kernel = self._compile(launch, shape, progress)
            self._launch(launch, shape, kernel, self._load(launch, progress))
        except GpuError as error:
            raise DeviceError(str(error)) from error
        status = launch.regions.engine_page.view(abi.ENGINE_PAGE)["status"]
        deadline = time.monotonic() + START_TIMEOUT_S
        while int(status["state"][0]) == EngineState.STARTING:
            if not self.is_alive():
                raise DeviceError(self.fault() or "the persistent kernel ended before it started")
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"the director showed no sign of life for {START_TIMEOUT_S:g} s after the launch; see `blinkimp doctor`"
                )
            time.sleep(0.001)

    def is_alive(self) -> bool:
        if self._orchestrator is not None:
            return self._orchestrator.is_alive()
        if self._stream is None or self._error is not None:
            return False
        self._context.make_current()
        try:
            if not self._context.stream_is_done(self._stream):
                return True
            # The kernel has left: for good, or to be launched again. It says so before it leaves; if it was launched again since the
            # look above, the state says something else by now, but the stream is busy.
            is_parked = int(self._page["status"]["state"][0]) == EngineState.PARKED
            return is_parked or not self._context.stream_is_done(self._stream)
        except GpuError as error:
            self._error = str(error)
            return False

    def resume(self) -> None:
        if self._relaunch is None:
            raise DeviceError("resume() before start(): there is no kernel to launch again")
        self._context.make_current()
        self._relaunch()

    def fault(self) -> str | None:
        return self._error if self._orchestrator is None else self._orchestrator.fault()

    def stop(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        ended = not self.is_alive()
        if not ended and self._orchestrator is not None:
            self._orchestrator.abandon()
        if not ended:
            _log.warning(
                "the persistent kernel did not stop within %g s; its context goes with this process", timeout_s
            )
            return False  # freeing memory under a running kernel would wait for it, for ever
        self._context.make_current()
        self._context.close()
        self._stream = self._orchestrator = None
        return True

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _compile(self, launch: Launch, shape: KernelShape, progress: Progress | None) -> CompiledKernel:
        if progress is not None:
            progress("compile", 0, 2)
        arch = self._context.properties.arch
        self._pack = get_kernel(PACK_SOURCE, launch.cache_dir, arch)
        if progress is not None:
            progress("compile", 1, 2)
        defines = shape.defines() | self._defines
        if launch.traces_ops:
            defines = defines | {"BK_TRACE_OPS": "1"}
        kernel = get_kernel(shape.source, launch.cache_dir, arch, defines)
        if progress is not None:
            progress("compile", 2, 2)
        if self._orchestrator_kind != "gpu":
            self._begin_step = get_kernel(STEP_SOURCE, launch.cache_dir, arch)
        source = "loaded from the cache" if kernel.from_cache else "compiled"
        _log.info("persistent kernel %s in %.2f s", source, kernel.load_ns / 1e9)
        return kernel

    def _load(self, launch: Launch, progress: Progress | None) -> Model:
        started_at = time.monotonic()
        target = GpuTarget(self._context, launch.model, self._pack.cubin, self.num_workers)
        try:
            self._model = load_model(
                launch.model_folder,
                target,
                compute="bf16",
                max_context=launch.sizes.max_context,
                load_format=launch.load_format,
                progress=None if progress is None else (lambda done, total: progress("weights", done, total)),
            )
            target.finish()
        finally:
            target.close()
        seconds = time.monotonic() - started_at
        _log.info(
            "weights: %.2f GB in %.1f s (%.2f GB/s)", target.num_bytes / 1e9, seconds, target.num_bytes / 1e9 / seconds
        )
        return self._model

    def _launch(self, launch: Launch, shape: KernelShape, kernel: CompiledKernel, model: Model) -> None:
        context, regions = self._context, launch.regions
        params = allocate_engine(context, launch.model, launch.sizes, model.dims, model.ops)
        params["num_workers"] = self.num_workers
        params["cost_rows"], params["step_costs"] = step_costs(launch.model, shape, self.num_workers)
        params["idle_sleep_ns"] = IDLE_SLEEP_NS
        params["ingress_timeout_ns"] = launch.ingress_timeout_ns
        params["spin_budget_ns"] = launch.spin_budget_ns
        params["parked_after_ns"] = launch.parked_after_ns
        params["engine_page"] = context.register_host(regions.engine_page.address, regions.engine_page.region_bytes)
        for i, region in enumerate(regions.queue_pairs):
            params["queue_pairs"][0, i] = context.register_host(region.address, region.region_bytes)
        if regions.trace is not None:
            address = context.register_host(regions.trace.address, regions.trace.region_bytes)
            fill_trace(regions.trace, address, params)
        function = context.load_kernel(kernel.cubin, KERNEL_NAME, shape.shared_memory_bytes)
        if self._orchestrator_kind != "gpu":
            context.synchronize()
            self._orchestrator = GpuOrchestrator(
                context,
                launch,
                model,
                params,
                step=function,
                begin_step=context.load_kernel(self._begin_step.cubin, BEGIN_STEP_NAME),
                shape=shape,
                ahead=self._orchestrator_kind == "cpu-ahead",
                driver=CUDA_DRIVER,
            )
            return
        self._stream = context.create_stream()
        self._page = regions.engine_page.view(abi.ENGINE_PAGE)

        def start_kernel() -> None:
            context.launch(
                function,
                self.num_workers + 1,
                shape.num_threads,
                [params],
                shared_memory_bytes=shape.shared_memory_bytes,
                cooperative=True,
                stream=self._stream,
            )

        def relaunch() -> None:
            # Plans and arrivals are counted from 0 by each launch. Nothing waits here, a first token does: the stream has all of it in order,
            # behind the last CTAs of the launch before.
            context.start_fill(int(params["grid_words"][0]), 0, abi.GRID_WORDS_BYTES, self._stream)
            start_kernel()

        self._relaunch = relaunch
        context.synchronize()
        start_kernel()
