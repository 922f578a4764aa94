"""The CUDA driver of fake_cuda/fake_cuda.cpp: built, opened and told what to do.

Used by tests/host/test_cpu_orchestrator_cuda.py and test_gpu_device_scheduled.py.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from blinkimp import native
from blinkimp.host.gpu_kernel import SHARED_MEMORY_BYTES
from tests.support import ROOT

CONTEXT, STREAM, BEGIN_STEP, PERSISTENT_KERNEL = 0x11, 0x22, 0x33, 0x44  # its handles


class Script(ctypes.Structure):
    """Script of fake_cuda.cpp."""

    _fields_ = (
        ("run_step", ctypes.c_void_p),
        ("fails_at_step", ctypes.c_uint32),
        ("records_fault", ctypes.c_uint32),
        ("hangs_at_step", ctypes.c_uint32),
        ("step_delay_us", ctypes.c_uint32),
    )


def build_fake_driver(folder: Path) -> Path:
    library = folder / "libcuda.so.1"
    source = ROOT / "tests" / "host" / "fake_cuda" / "fake_cuda.cpp"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    options += [f"-DBK_SHARED_MEMORY_BYTES={SHARED_MEMORY_BYTES}", f"-I{ROOT / 'device'}"]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    return library


def open_fake_driver(library: Path, **script: int) -> ctypes.CDLL:
    """script: words of Script. To be closed with fake_cuda_close()."""
    fake = ctypes.CDLL(str(library))
    run_step = ctypes.cast(native.load().bk_reference_run, ctypes.c_void_p).value
    fake.fake_cuda_open(ctypes.byref(Script(run_step=run_step, **script)))
    return fake
