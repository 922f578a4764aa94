"""Loads the native library (queue pair functions, emulated device) that tools/build_native.py compiles from device/emu/*.cpp.

Each caller declares the ctypes signatures of the functions it uses in its own module; this one only finds and opens the file.
Called by: host/ and nic_shim/ modules. Test: pytest tests/compile/test_native_build.py
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "BLINKIMP_NATIVE_LIBRARY"  # another build, e.g. one with a sanitizer


class NativeLibraryError(RuntimeError):
    """The native library is missing or cannot be loaded; the message says how to get it."""


def library_path() -> Path:
    """The file that load() opens; it may not exist."""
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(override) if override else Path(__file__).resolve().parent / "_native.so"


@functools.cache
def load() -> ctypes.CDLL:
    """The native library, opened once a process. Raises NativeLibraryError with the remedy when there is none."""
    path = library_path()
    if not path.is_file():
        source = f"${ENVIRONMENT_VARIABLE}" if os.environ.get(ENVIRONMENT_VARIABLE) else "the installed package"
        raise NativeLibraryError(
            f"blinkimp's native library is missing: expected {path} (from {source}). It is compiled when the package is installed and "
            "needs a C++17 compiler (g++ >= 9 or clang++ >= 10; Debian, Ubuntu: apt-get install g++). Install one, then run "
            "`pip install --force-reinstall --no-deps .`, or `python tools/build_native.py` in a source tree"
        )
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(
            f"blinkimp's native library {path} cannot be loaded: {error}. It was built for another machine or compiler, or a sanitizer "
            "build lacks its LD_PRELOAD; build it again: `python tools/build_native.py` in a source tree, or reinstall the package"
        ) from error
