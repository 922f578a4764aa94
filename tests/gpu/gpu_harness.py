"""For kernel tests: compile a .cu of tests/gpu/kernels with NVRTC, read its resource usage, run it on numpy arrays.

    kernel = compile_kernel("attention_test.cu", ["-DHEAD_DIM=128"])         no GPU needed; .usage has registers and spills
    with KernelRunner() as runner:
        values = runner.array(np_array)          device copy; runner.poisoned(shape, dtype) for outputs
        runner.run(kernel, "entry", num_blocks, num_threads, [values, 7, 0.5, np_struct], shared_memory_bytes, cooperative=True)
        out = values.numpy()
Arguments: DeviceArray -> its address, int -> u32, float -> f32, numpy record [1] -> the struct by value.
Used by tests/gpu/test_*.py and tests/compile/test_kernel_resources.py.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from blinkimp.host.compile_cache import get_kernel
from tests.support import ROOT

KERNELS = Path(__file__).resolve().parent / "kernels"
ARCH = "sm_90a"
POISON_BYTE = 0xFF  # NaN in every float format, a huge count in every integer one


class CompileError(AssertionError):
    """NVRTC refused a kernel; the message holds the options and the whole log."""


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one entry."""

    num_registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class CompiledKernel:
    cubin: bytes = field(repr=False)
    log: str = field(repr=False)
    usage: dict[str, Usage]


def parse_usage(log: str) -> dict[str, Usage]:
    """Entry name -> usage, from the log of -Xptxas=-v."""
    usage = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, stack, stores, loads, registers in pattern.findall(log):
        usage[name] = Usage(int(registers), int(stack), int(stores), int(loads))
    return usage


@functools.cache
def _compile(path: Path, options: tuple[str, ...]) -> CompiledKernel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cuda.bindings import nvrtc

    def check(result: Any, call: str) -> Any:
        status, *values = result
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{call}: {status.name}"
        return values[0] if values else None

    flags = [f"-arch={ARCH}", "-std=c++17", "-default-device", *options, f"-I{ROOT / 'device'}", "-Xptxas=-v"]
    program = check(nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []), "nvrtcCreateProgram")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    # One byte more than asked: b" " * 1 is the object that every b" " in the process shares, and it would be overwritten.
    log_buffer = b" " * (check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize") + 1)
    check(nvrtc.nvrtcGetProgramLog(program, log_buffer), "nvrtcGetProgramLog")
    log = log_buffer.rstrip(b"\0 ").decode(errors="replace")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{path}: got {status.name}, expected NVRTC_SUCCESS; options {' '.join(flags)}\n{log}")
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return CompiledKernel(cubin, log, parse_usage(log))


@functools.cache
def kernel_cache() -> Path:
    """Where kernels of device/ are kept: BLINKIMP_CACHE_DIR, if set, for many runs; else a folder that goes with this process."""
    if folder := os.environ.get("BLINKIMP_CACHE_DIR"):
        return Path(folder)
    temporary = tempfile.TemporaryDirectory(prefix="blinkimp-kernels-")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)


def device_kernel(source: str, defines: Mapping[str, str] | None = None) -> bytes:
    """The cubin of a source of device/, as an engine compiles it."""
    return get_kernel(source, kernel_cache(), defines=defines).cubin


def compile_kernel(file_name: str, options: list[str] | None = None) -> CompiledKernel:
    """tests/gpu/kernels/<file_name> to a cubin, once per process and set of options."""
    return _compile(KERNELS / file_name, tuple(options or ()))


class DeviceArray:
    """An array in device memory; freed with its runner."""

    def __init__(self, runner: KernelRunner, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.runner, self.address, self.shape, self.dtype = runner, address, shape, dtype
        self.num_bytes = int(np.prod(shape)) * dtype.itemsize

    def numpy(self) -> np.ndarray[Any, Any]:
        values = np.empty(self.shape, self.dtype)
        self.runner.context.download(self.address, values)
        return values

    def set(self, values: np.ndarray[Any, Any]) -> None:
        assert values.dtype == self.dtype and values.shape == self.shape
        self.runner.context.upload(self.address, values)

    def poison(self) -> None:
        self.runner.context.fill(self.address, POISON_BYTE, self.num_bytes)


class KernelRunner:
    """A GPU context for one test module."""

    def __init__(self) -> None:
        from blinkimp.host.gpu_driver import GpuContext

        self.context = GpuContext()
        self.functions: dict[tuple[int, str], Any] = {}

    @property
    def num_multiprocessors(self) -> int:
        return self.context.properties.num_multiprocessors

    def __enter__(self) -> KernelRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.close()

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return DeviceArray(self, self.context.allocate(num_bytes, "a test"), shape, np.dtype(dtype))

    def array(self, values: np.ndarray[Any, Any]) -> DeviceArray:
        device_array = self._allocate(values.shape, values.dtype)
        device_array.set(values)
        return device_array

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        device_array = self._allocate(shape, dtype)
        self.context.fill(device_array.address, 0, device_array.num_bytes)
        return device_array

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        device_array = self._allocate(shape, dtype)
        device_array.poison()
        return device_array

    def free(self, *arrays: DeviceArray) -> None:
        for device_array in arrays:
            self.context.free(device_array.address)

    def run(
        self,
        kernel: CompiledKernel,
        entry: str,
        num_blocks: int,
        num_threads: int,
        arguments: list[Any],
        shared_memory_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Launches and waits."""
        key = (id(kernel), entry)
        if key not in self.functions:
            self.functions[key] = self.context.load_kernel(kernel.cubin, entry, shared_memory_bytes)
        packed: list[Any] = []
        for argument in arguments:
            if isinstance(argument, DeviceArray):
                packed.append(ctypes.c_uint64(argument.address))
            elif isinstance(argument, float):
                packed.append(ctypes.c_float(argument))
            elif isinstance(argument, int):
                packed.append(ctypes.c_uint32(argument))
            else:
                packed.append(argument)
        self.context.launch(
            self.functions[key],
            num_blocks,
            num_threads,
            packed,
            shared_memory_bytes=shared_memory_bytes,
            cooperative=cooperative,
        )
        self.context.synchronize()
