"""A thin layer over the CUDA driver API: one context, plain device memory, registered host memory, cooperative launches.

Every return code is checked; a failure raises GpuError with the call, the driver's words and a remedy where one is known. Managed memory and
multicast objects are never used. Called by host/gpu_device.py, host/gpu_weights.py and the GPU tests. Test: pytest -m gpu tests/gpu
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray


class GpuError(RuntimeError):
    """A failed driver call, or no usable GPU."""


REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_OUT_OF_MEMORY": "lower num_pages or kv_memory_fraction, or free the GPU",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel was compiled for another architecture: run `blinkimp doctor`",
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "the grid does not fit on the GPU at once: another process holds part of it",
}


def check(result: Any, call: str) -> Any:
    """The values behind a driver result tuple. Raises GpuError when its first member is not CUDA_SUCCESS."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        remedy = REMEDIES.get(status.name, "see `blinkimp doctor`")
        raise GpuError(f"{call}: got {status.name}, expected CUDA_SUCCESS; {remedy}")
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class GpuProperties:
    """What the plan of a kernel needs to know of a device."""

    name: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    total_bytes: int
    driver_version: int

    @property
    def num_workers(self) -> int:
        """Worker CTAs: every SM but the director's."""
        return self.num_multiprocessors - 1

    @property
    def arch(self) -> str:
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def probe_gpu(device_idx: int = 0) -> GpuProperties:
    """Properties of a GPU without a context on it. Raises GpuError where there is no driver or no device."""
    try:
        check(driver.cuInit(0), "cuInit")
    except GpuError:
        raise
    except RuntimeError as error:  # cuda.bindings found no libcuda
        raise GpuError(
            "cuInit: got no libcuda.so.1 to load, expected an installed NVIDIA driver; install one, or use device=emulated"
        ) from error
    device = check(driver.cuDeviceGet(device_idx), "cuDeviceGet")
    attribute = driver.CUdevice_attribute

    def get(which: driver.CUdevice_attribute) -> int:
        return int(check(driver.cuDeviceGetAttribute(which, device), f"cuDeviceGetAttribute({which.name})"))

    name = bytes(check(driver.cuDeviceGetName(128, device), "cuDeviceGetName")).split(b"\0")[0].decode()
    return GpuProperties(
        name,
        (
            get(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            get(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        get(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        int(check(driver.cuDeviceTotalMem(device), "cuDeviceTotalMem")),
        int(check(driver.cuDriverGetVersion(), "cuDriverGetVersion")),
    )


class GpuContext:
    """The primary context of one GPU and everything allocated in it; close() frees all of it."""

    def __init__(self, device_idx: int = 0) -> None:
        self.properties = probe_gpu(device_idx)
        self._device = check(driver.cuDeviceGet(device_idx), "cuDeviceGet")
        context = check(driver.cuDevicePrimaryCtxRetain(self._device), "cuDevicePrimaryCtxRetain")
        check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        self._context = context
        self._allocations: set[int] = set()  # addresses
        self._registered: list[int] = []
        self._modules: list[Any] = []
        self.stream = check(driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)), "cuStreamCreate")

    @property
    def handle(self) -> int:
        """The CUcontext, for native code."""
        return int(self._context)

    def make_current(self) -> None:
        """For a thread other than the one that made the context."""
        check(driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    # ---- Memory --------------------------------------------------------------------------------------------------
    def free_bytes(self) -> int:
        free, _total = check(driver.cuMemGetInfo(), "cuMemGetInfo")
        return int(free)

    def allocate(self, num_bytes: int, what: str, *, zero: bool = False) -> int:
        """Address of num_bytes of device memory (256-byte aligned)."""
        num_bytes = max(num_bytes, 256)
        address = int(check(driver.cuMemAlloc(num_bytes), f"cuMemAlloc({num_bytes} bytes for {what})"))
        self._allocations.add(address)
        if zero:
            self.fill(address, 0, num_bytes)
        return address

    def free(self, address: int) -> None:
        check(driver.cuMemFree(address), "cuMemFree")
        self._allocations.remove(address)

    def fill(self, address: int, value: int, num_bytes: int) -> None:
        self.start_fill(address, value, num_bytes, self.stream)
        self.synchronize()

    def start_fill(self, address: int, value: int, num_bytes: int, stream: Any) -> None:
        """Behind what the stream has; does not wait."""
        check(driver.cuMemsetD8Async(address, value, num_bytes, stream), "cuMemsetD8Async")

    def upload(self, address: int, values: NDArray[Any]) -> None:
        """Copies an array to device memory; returns when it is there."""
        contiguous = np.ascontiguousarray(values)
        if contiguous.nbytes:
            check(
                driver.cuMemcpyHtoDAsync(address, contiguous.ctypes.data, contiguous.nbytes, self.stream),
                "cuMemcpyHtoDAsync",
            )
            self.synchronize()

    def download(self, address: int, values: NDArray[Any]) -> None:
        """Fills a contiguous array from device memory."""
        check(driver.cuMemcpyDtoHAsync(values.ctypes.data, address, values.nbytes, self.stream), "cuMemcpyDtoHAsync")
        self.synchronize()

    def register_host(self, address: int, num_bytes: int) -> int:
        """Pins host memory (whole pages, from a page's begin) and maps it; returns its device address."""
        num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        check(driver.cuMemHostRegister(address, num_bytes, flags), f"cuMemHostRegister({num_bytes} bytes)")
        self._registered.append(address)
        return int(check(driver.cuMemHostGetDevicePointer(address, 0), "cuMemHostGetDevicePointer"))

    def unregister_host(self, address: int) -> None:
        check(driver.cuMemHostUnregister(address), "cuMemHostUnregister")
        self._registered.remove(address)

    def start_upload(self, address: int, values: NDArray[Any], stream: Any) -> None:
        """Starts the copy of a contiguous array of registered host memory; the array stays as it is until the stream is past it."""
        call = f"cuMemcpyHtoDAsync({values.nbytes} bytes)"
        check(driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, stream), call)

    def create_event(self) -> Any:
        return check(driver.cuEventCreate(int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)), "cuEventCreate")

    def record_event(self, event: Any, stream: Any) -> None:
        check(driver.cuEventRecord(event, stream), "cuEventRecord")

    def wait_event(self, event: Any) -> None:
        """Until the event's last record is past; at once where it was never recorded."""
        check(driver.cuEventSynchronize(event), "cuEventSynchronize")

    def destroy_event(self, event: Any) -> None:
        check(driver.cuEventDestroy(event), "cuEventDestroy")

    # ---- Kernels -------------------------------------------------------------------------------------------------
    def load_kernel(self, cubin: bytes, name: str, shared_memory_bytes: int = 0) -> Any:
        """A function of a cubin, with its dynamic shared memory limit raised."""
        module = check(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
        self._modules.append(module)
        function = check(driver.cuModuleGetFunction(module, name.encode()), f"cuModuleGetFunction({name})")
        if shared_memory_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(
                driver.cuFuncSetAttribute(function, attribute, shared_memory_bytes),
                f"cuFuncSetAttribute({shared_memory_bytes} bytes)",
            )
        return function

    def launch(
        self,
        function: Any,
        num_blocks: int,
        num_threads: int,
        arguments: Sequence[Any],
        *,
        shared_memory_bytes: int = 0,
        cooperative: bool = False,
        stream: Any = None,
    ) -> None:
        """Launches with ctypes scalars or one-element numpy structs as arguments; does not wait."""
        addresses = [a.ctypes.data if isinstance(a, np.ndarray) else ctypes.addressof(a) for a in arguments]
        packed = (ctypes.c_void_p * len(addresses))(*addresses)
        call = driver.cuLaunchCooperativeKernel if cooperative else driver.cuLaunchKernel
        shape = (num_blocks, 1, 1, num_threads, 1, 1, shared_memory_bytes, self.stream if stream is None else stream)
        rest = () if cooperative else (0,)
        check(call(function, *shape, ctypes.addressof(packed), *rest), call.__name__)

    def create_stream(self) -> Any:
        return check(driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)), "cuStreamCreate")

    def stream_is_done(self, stream: Any) -> bool:
        """False while work runs. Raises GpuError when the context was lost to a fault."""
        (status,) = driver.cuStreamQuery(stream)
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check((status,), "cuStreamQuery")
        return True

    def synchronize(self, stream: Any = None) -> None:
        check(driver.cuStreamSynchronize(self.stream if stream is None else stream), "cuStreamSynchronize")

    def close(self) -> None:
        """Frees what is left. After a fault the context is gone with everything in it, so errors are not raised here."""
        for address in self._registered:
            driver.cuMemHostUnregister(address)
        for address in list(self._allocations):
            driver.cuMemFree(address)
        for module in self._modules:
            driver.cuModuleUnload(module)
        self._registered.clear()
        self._allocations.clear()
        self._modules.clear()
        driver.cuDevicePrimaryCtxRelease(self._device)
