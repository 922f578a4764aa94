"""Device code on emulated warps (tests/host/simt) or emulated Hopper CTAs (tests/host/simt90), compiled into a library for ctypes.

Used by tests/host/test_*_simt.py. Run: pytest tests/host/test_attention_simt.py
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from tests.support import ROOT

SIMT = ROOT / "tests" / "host" / "simt"
SIMT90 = ROOT / "tests" / "host" / "simt90"
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build_simt(source: Path, folder: Path, optimization: str = "-O2") -> ctypes.CDLL:
    """The emulation beside the source goes before the common one, and that before the device's headers."""
    library = folder / f"{source.stem}.so"
    includes = [f"-I{path}" for path in (source.parent, SIMT, ROOT / "device")]
    command = ["g++", *FLAGS, optimization, *includes, "-o", str(library), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    return ctypes.CDLL(str(library))
