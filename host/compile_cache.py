"""The cache of compiled kernels: a cubin is compiled once for a given device/ tree, option set, architecture and NVRTC.

An entry is a folder <cache>/kernels/<source>-<arch>-<key>/ with kernel.cubin (plain, readable by cuobjdump) and entry.json.
Invariants:
  I1  an entry is complete under its final name: it is written and fsynced in a temporary folder, then renamed.
  I2  what is returned has the digest that entry.json states; an entry for which that fails is removed with a warning and rebuilt.
  I3  the key covers every byte NVRTC could include, options, architecture, NVRTC version and SCHEMA; nothing else changes a cubin.
Several processes may share a cache: they may compile the same thing, and the first rename wins.
Called by: host/gpu_device.py, blinkimp/cli/compile.py. Test: pytest tests/compile/test_compile_cache.py
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from blinkimp.host import compile as compiler
from blinkimp.host.compile import DEFAULT_ARCH, CompileError, FunctionReport
from blinkimp.outputs import OutputError, make_folder

SCHEMA = 1  # of the entry's files and of the options that compile_cubin() fixes; raise it when either changes
KEY_DIGITS = 32

logger = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True):
    """entry.json."""

    cubin_sha256: str
    compile_ns: int
    functions: tuple[FunctionReport, ...]


class CompiledKernel(msgspec.Struct, frozen=True):
    """A cubin, where it lies, and what is known of it."""

    cubin: bytes
    path: Path
    functions: tuple[FunctionReport, ...]
    from_cache: bool
    compile_ns: int  # of the compilation, also when it was an earlier one
    load_ns: int  # of this call


def expect_cached() -> bool:
    """BLINKIMP_EXPECT_CACHED: is a compilation an error? Raises CompileError for a value other than 0 and 1."""
    value = os.environ.get("BLINKIMP_EXPECT_CACHED", "0")
    if value not in ("0", "1"):
        raise CompileError(f"BLINKIMP_EXPECT_CACHED: got {value!r}, expected 0 or 1; unset it to allow compiling")
    return value == "1"


def includable_files() -> list[Path]:
    """What NVRTC can reach under device/, sorted."""
    return sorted(path for path in compiler.DEVICE_DIR.rglob("*") if path.suffix in (".h", ".cuh", ".cu"))


def cubin_key(source: Path, arch: str, defines: Mapping[str, str | int]) -> str:
    """I3."""
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little") + data)

    add(str(SCHEMA), compiler.nvrtc_version(), arch)
    add(*(f"{name}={value}" for name, value in sorted(defines.items())))
    add(source.name, source.read_bytes())
    for path in includable_files():
        add(str(path.relative_to(compiler.DEVICE_DIR)), path.read_bytes())
    return digest.hexdigest()[:KEY_DIGITS]


def _read(folder: Path) -> tuple[bytes, Entry] | None:
    """The entry in `folder`; None when there is none or, after a warning, when it is corrupt (then it is removed). I2."""
    if not folder.exists():
        return None
    try:
        entry = msgspec.json.decode((folder / "entry.json").read_bytes(), type=Entry)
        cubin = (folder / "kernel.cubin").read_bytes()
        if hashlib.sha256(cubin).hexdigest() == entry.cubin_sha256:
            return cubin, entry
        reason = "the cubin's digest differs from entry.json"
    except (OSError, msgspec.MsgspecError) as error:
        reason = str(error)
    logger.warning("compile cache: %s is corrupt (%s); compiling again", folder, reason)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(folder: Path, cubin: bytes, entry: Entry) -> None:
    """I1. Losing the race against another process is fine: it has published the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        _write_durably(scratch / "kernel.cubin", cubin)
        _write_durably(scratch / "entry.json", msgspec.json.encode(entry))
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:  # the folder exists and is not empty
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _not_written(folder: Path, error: OSError) -> CompileError:
    return CompileError(
        f"compile cache: {folder} cannot be written ({error}); expected a folder of this user's with free space; choose another cache_dir"
    )


def get_kernel(
    source: str | Path,
    cache_dir: Path,
    arch: str = DEFAULT_ARCH,
    defines: Mapping[str, str | int] | None = None,
    *,
    must_keep: bool = False,
) -> CompiledKernel:
    """The cubin of a source (a name under device/, or a path), from the cache or compiled now. Raises CompileError. must_keep: what is not in
    the cache must come into it, or nothing is compiled; otherwise a cache that cannot be written is a warning."""
    start_ns = time.perf_counter_ns()
    path = compiler.DEVICE_DIR / source  # an absolute path stays itself
    defines = defines or {}
    if not path.is_file():
        raise CompileError(
            f"kernel source {path} does not exist; expected a file under {compiler.DEVICE_DIR}; reinstall the package"
        )
    key = cubin_key(path, arch, defines)
    folder = cache_dir / "kernels" / f"{path.stem}-{arch}-{key}"
    found = _read(folder)
    if found is None:
        if expect_cached():
            raise CompileError(
                f"{path.name} for {arch} is not in the compile cache (expected {folder}), and BLINKIMP_EXPECT_CACHED=1 forbids to "
                "compile it; run `blinkimp compile` with the same cache_dir first"
            )
        if must_keep:
            try:
                make_folder(folder.parent)
            except OutputError as error:
                raise CompileError(f"compile cache: {error} (cache_dir)") from error
        compile_start_ns = time.perf_counter_ns()
        cubin, functions = compiler.compile_cubin(path, arch, defines)
        compile_ns = time.perf_counter_ns() - compile_start_ns
        entry = Entry(hashlib.sha256(cubin).hexdigest(), compile_ns, functions)
        try:
            _publish(folder, cubin, entry)
        except OSError as error:
            if must_keep:
                raise _not_written(folder, error) from error
            logger.warning("compile cache: cannot write %s (%s); every start will compile", folder, error)
    else:
        cubin, entry = found
    load_ns = time.perf_counter_ns() - start_ns
    return CompiledKernel(cubin, folder / "kernel.cubin", entry.functions, found is not None, entry.compile_ns, load_ns)
