"""A GPU whose steps this process launches (orchestrator = cpu, cpu-ahead): pinned memory for batches and results, and the scheduling thread.

    orchestrator = GpuOrchestrator(context, launch, model, params, step=kernel, begin_step=function, shape=shape, ahead=False)
    orchestrator.is_alive(), orchestrator.fault(), orchestrator.stop(10.0)

The kernels are the persistent kernel's own cubin, launched without its director's CTA for each step, and begin_step (device/step_kernel.cu). The
loop and its calls into the driver are native: device/emu/orchestrator_cuda.cpp.
Called by host/gpu_device.py. Test: pytest tests/host/test_cpu_orchestrator_cuda.py; pytest -m gpu tests/gpu/test_cpu_orchestrator_gpu.py
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Final, Protocol

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.cpu_orchestrator import END_STOPPED, DirectorMemory, OrchestratorThread, library
from blinkimp.host.device_protocol import Launch
from blinkimp.host.gpu_kernel import KernelShape
from blinkimp.host.program import Model

CUDA_DRIVER: Final = "libcuda.so.1"
MESSAGE_BYTES: Final = 512


class CudaLaunch(ctypes.Structure):
    """CudaLaunch of device/emu/orchestrator_cuda.cpp."""

    _fields_ = (
        ("driver_path", ctypes.c_char_p),
        ("context", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("begin_step", ctypes.c_uint64),
        ("persistent_kernel", ctypes.c_uint64),
        ("device_params", ctypes.c_uint64),
        ("batches", ctypes.c_uint64 * 2),
        ("device_batches", ctypes.c_uint64 * 2),
        ("abandoned", ctypes.c_uint64),
        ("num_threads", ctypes.c_uint32),
        ("shared_memory_bytes", ctypes.c_uint32),
        ("launches_ahead", ctypes.c_uint32),
        ("reserved0", ctypes.c_uint32),
    )


class StepContext(Protocol):
    """What is used of host/gpu_driver.py's GpuContext."""

    @property
    def handle(self) -> int: ...
    def register_host(self, address: int, num_bytes: int) -> int: ...
    def upload(self, address: int, values: np.ndarray[Any, Any]) -> None: ...
    def create_stream(self) -> Any: ...


class GpuOrchestrator:
    """Runs since the constructor returned."""

    def __init__(
        self,
        context: StepContext,
        launch: Launch,
        model: Model,
        params: np.ndarray[Any, Any],
        *,
        step: Any,
        begin_step: Any,
        shape: KernelShape,
        ahead: bool,
        driver: str,
    ) -> None:
        """`params`: [1] ENGINE_PARAMS of the kernels, over device memory; `step`, `begin_step`: their CUfunctions; `driver`: its library."""
        self._params = params
        exit_plan = np.zeros(1, abi.STEP_PLAN)
        exit_plan["flags"] = abi.PlanFlags.EXIT
        context.upload(int(params["plans"][0, 1]), exit_plan)  # each launch finds it after its step
        batch_bytes = -(-int(library().bk_update_batch_bytes()) // mmap.PAGESIZE) * mmap.PAGESIZE
        sampled_bytes = 2 * launch.sizes.max_batch * abi.SAMPLE_RESULT.itemsize
        num_bytes = 2 * batch_bytes + sampled_bytes * (1 + abi.MAX_TOP_LOGPROBS)
        self._pinned = mmap.mmap(-1, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        address = int(np.frombuffer(self._pinned, np.uint8).ctypes.data)
        device_address = context.register_host(address, len(self._pinned))
        self._memory = DirectorMemory()
        self._host_params = self._memory.params(
            launch,
            model.dims,
            len(model.ops),
            int(params["num_workers"][0]),
            address + 2 * batch_bytes,
            address + 2 * batch_bytes + sampled_bytes,
        )
        for name in ("cost_rows", "step_costs"):
            self._host_params[name] = params[name]
        self._order = CudaLaunch(
            driver_path=driver.encode(),
            context=context.handle,
            stream=int(context.create_stream()),
            begin_step=int(begin_step),
            persistent_kernel=int(step),
            device_params=params.ctypes.data,
            batches=(ctypes.c_uint64 * 2)(address, address + batch_bytes),
            device_batches=(ctypes.c_uint64 * 2)(device_address, device_address + batch_bytes),
            num_threads=shape.num_threads,
            shared_memory_bytes=shape.shared_memory_bytes,
            launches_ahead=int(ahead),
        )
        self._message = ctypes.create_string_buffer(MESSAGE_BYTES)
        self._thread = OrchestratorThread(self._loop)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def fault(self) -> str | None:
        """Why it ended, where the engine page does not say."""
        if self._thread.end() in (None, END_STOPPED):
            return None
        return self._message.value.decode(errors="replace") or "the scheduling thread ended; its messages stand above"

    def join(self, timeout_s: float) -> bool:
        return self._thread.join(timeout_s)

    def abandon(self) -> None:
        """What runs on the GPU is not waited for any longer."""
        self._thread.abandon()

    def _loop(self, abandoned_address: int) -> int:
        self._order.abandoned = abandoned_address
        order = ctypes.byref(self._order)
        return int(library().bk_orchestrate_cuda(self._host_params.ctypes.data, order, self._message, MESSAGE_BYTES))
