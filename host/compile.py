"""Compiles a kernel source to a cubin with NVRTC, and reads registers, stack and spills from the assembler's report.

No driver and no GPU are needed. What a kernel compiles from is DEVICE_DIR alone.
Called by: host/compile_cache.py. Test: pytest tests/compile/test_kernels.py tests/compile/test_compile_cache.py
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

DEVICE_DIR = Path(__file__).resolve().parent.parent / "device"
DEFAULT_ARCH = "sm_90a"  # wgmma and setmaxnreg need the `a`


class CompileError(RuntimeError):
    """NVRTC refused a source, or is not usable; the message holds source, options and the whole log."""


class FunctionReport(msgspec.Struct, frozen=True):
    """What the assembler says of one function. A callee that was not inlined has an entry of its own."""

    name: str
    is_entry: bool  # a __global__ function
    num_registers: int  # per thread; 0 for a callee (counted in its callers)
    stack_bytes: int  # per thread
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int  # static shared memory per block

    @property
    def has_spills(self) -> bool:
        return self.spill_store_bytes + self.spill_load_bytes > 0


def nvrtc_version() -> str:
    """Such as 13.0. Raises CompileError when NVRTC cannot be loaded."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CompileError(
            f"NVRTC cannot be loaded ({error}); install it: pip install 'nvidia-cuda-nvrtc>=13,<14'"
        ) from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"nvrtcVersion returned {status.name}; reinstall: pip install 'nvidia-cuda-nvrtc>=13,<14'")
    return f"{major}.{minor}"


def parse_report(log: str) -> tuple[FunctionReport, ...]:
    """The functions in the output of `-Xptxas=-v`. Raises CompileError when a line is not as expected: no report is no proof."""
    functions = []
    entry_name = ""
    current: dict[str, int] = {}
    name = ""

    def finish() -> None:
        if name:
            functions.append(FunctionReport(name=name, is_entry=name == entry_name, **current))

    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            entry_name = found[1]
        elif found := re.search(r"Function properties for (\S+)", line):
            finish()
            name = found[1]
            counts = ("num_registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes", "shared_bytes")
            current = dict.fromkeys(counts, 0)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            current.update(stack_bytes=stack, spill_store_bytes=stores, spill_load_bytes=loads)
        elif found := re.search(r"Used (\d+) registers", line):
            current["num_registers"] = int(found[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current["shared_bytes"] = int(shared[1])
    finish()
    entries = [function for function in functions if function.is_entry]
    if not entries or not all(entry.num_registers for entry in entries):
        raise CompileError(f"cannot read the assembler's report; expected the output of -Xptxas=-v, got:\n{log}")
    return tuple(functions)


def compile_cubin(
    source: Path, arch: str = DEFAULT_ARCH, defines: Mapping[str, str | int] | None = None
) -> tuple[bytes, tuple[FunctionReport, ...]]:
    """The cubin of `source` and the report on its functions. Raises CompileError."""
    nvrtc_version()  # a missing NVRTC is told apart from a refused source
    from cuda.core import Program, ProgramOptions

    macros = [(name, str(value)) for name, value in sorted((defines or {}).items())]
    # no_cache: the cache with the stated key is ours; a second one behind it would also make the cold compile time a lie.
    options = ProgramOptions(
        name=str(source),
        arch=arch,
        std="c++17",
        include_path=[str(DEVICE_DIR)],
        define_macro=macros or None,
        ptxas_options=["-v"],
        no_cache=True,
    )
    log = io.StringIO()
    try:
        code = Program(source.read_text(), "c++", options).compile("cubin", logs=log)
    except OSError as error:
        raise CompileError(
            f"kernel source {source} cannot be read ({error.strerror}); reinstall the package"
        ) from error
    except Exception as error:  # cuda.core's NVRTCError, whose message holds the compiler's log
        settings = " ".join([f"-arch={arch}", f"-I{DEVICE_DIR}", *(f"-D{name}={value}" for name, value in macros)])
        words = f"{error}\n{log.getvalue()}".replace("\0", "").strip()
        raise CompileError(f"NVRTC {nvrtc_version()} refused {source}\noptions: {settings}\n{words}") from error
    return bytes(code.code), parse_report(log.getvalue())
