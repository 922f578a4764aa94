#!/usr/bin/env python3
"""Builds the native library: device/emu/*.cpp (host side of the queue pair, emulated device) into one plain shared object.

    python tools/build_native.py                        -> blinkimp/_native.so, which blinkimp/native.py loads
    python tools/build_native.py --sanitize thread      -> build/native/libblinkimp-thread.so, and the environment to run it in

Standard library only, because setup.py uses it too (it may run in an isolated build environment). A build carries a marker with the
hash of its sources and flags; an up-to-date library is left alone.

Called by: setup.py, tests/conftest.py, people. Test: pytest tests/compile/test_native_build.py
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICE = ROOT / "device"
DEFAULT_OUTPUT = ROOT / "blinkimp" / "_native.so"

BASE_FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", "-fvisibility=default"]
OPTIMISED_FLAGS = ["-O3"]
# -O1 keeps the accesses that a sanitizer must see; frame pointers and line tables (-g1) make its stacks readable.
SANITIZE_FLAGS = {
    "thread": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
    "address": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address"],
    "undefined": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
}
RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so", "undefined": "libubsan.so"}


class BuildError(Exception):
    """The library could not be built; the message says what is missing or holds the compiler's whole output."""


def find_compiler() -> str:
    """$CXX, else g++, clang++ or c++."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if path := shutil.which(name):
            return path
    raise BuildError(
        f"no C++ compiler: looked for {', '.join(wanted)} on PATH. A C++17 compiler is needed to build blinkimp's native library "
        "(queue pair and emulated device); install one (Debian, Ubuntu: apt-get install g++) or set CXX to its path"
    )


def source_files() -> list[Path]:
    sources = sorted((DEVICE / "emu").glob("*.cpp"))
    if not sources:
        raise BuildError(f"no sources: expected *.cpp in {DEVICE / 'emu'}")
    return sources


def compile_flags(sanitize: str | None) -> list[str]:
    return [*BASE_FLAGS, *(SANITIZE_FLAGS[sanitize] if sanitize else OPTIMISED_FLAGS)]


def source_key(compiler: str, flags: list[str]) -> str:
    """Hash of every file that can reach the library, the flags and the compiler's version."""
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout)
    digest.update("\0".join(flags).encode())
    for path in sorted(path for path in DEVICE.rglob("*") if path.suffix in (".h", ".cuh", ".cpp")):
        digest.update(str(path.relative_to(DEVICE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def marker_of(key: str) -> bytes:
    return f"blinkimp-native sources={key}".encode()


def run(command: list[str]) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"compiler failed ({result.returncode}): {' '.join(command)}\n{result.stdout}{result.stderr}")
    sys.stderr.write(result.stderr)


def build(output: Path = DEFAULT_OUTPUT, sanitize: str | None = None, werror: bool = False) -> bool:
    """Builds `output` unless it is up to date; returns whether it compiled. Several processes may build the same output at once."""
    compiler = find_compiler()
    flags = [*compile_flags(sanitize), *(["-Werror"] if werror else [])]
    marker = marker_of(source_key(compiler, flags))
    if output.exists() and marker in output.read_bytes():
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="blinkimp-native-") as scratch_name:
        scratch = Path(scratch_name)
        marker_source = scratch / "build_marker.cpp"
        marker_source.write_text(f'extern "C" const char* bk_build_marker() {{ return "{marker.decode()}"; }}\n')
        sources = [*source_files(), marker_source]
        objects = [scratch / f"{source.stem}.o" for source in sources]
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for job in [
                pool.submit(run, [compiler, *flags, f"-I{DEVICE}", "-c", str(source), "-o", str(target)])
                for source, target in zip(sources, objects, strict=True)
            ]:
                job.result()
        library = output.with_name(f".{output.name}.{os.getpid()}.so")
        try:
            run([compiler, *flags, "-shared", *map(str, objects), "-o", str(library)])
            os.replace(library, output)  # never a half-written library under its final name
        finally:
            library.unlink(missing_ok=True)
    return True


def sanitizer_environment(sanitize: str, output: Path) -> dict[str, str]:
    """What a Python process needs in its environment to load a sanitizer build. TSan also wants `setarch -R` (no address randomisation)."""
    found = subprocess.run(
        [find_compiler(), f"-print-file-name={RUNTIMES[sanitize]}"], check=True, capture_output=True, text=True
    )
    # Python itself leaks on purpose at exit, so leak checking would only report the interpreter.
    options = {"thread": ("TSAN_OPTIONS", "halt_on_error=1"), "address": ("ASAN_OPTIONS", "detect_leaks=0")}
    name, value = options.get(sanitize, ("UBSAN_OPTIONS", "print_stacktrace=1"))
    return {"BLINKIMP_NATIVE_LIBRARY": str(output), "LD_PRELOAD": found.stdout.strip(), name: value}


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds blinkimp's native library from device/emu/*.cpp.")
    parser.add_argument(
        "--sanitize",
        choices=sorted(SANITIZE_FLAGS),
        help="instrumented build, under build/native/ unless --out is given",
    )
    parser.add_argument(
        "--out", type=Path, help=f"where to write the library (default: {DEFAULT_OUTPUT.relative_to(ROOT)})"
    )
    parser.add_argument("--werror", action="store_true", help="warnings are errors")
    arguments = parser.parse_args()
    default = (
        ROOT / "build" / "native" / f"libblinkimp-{arguments.sanitize}.so" if arguments.sanitize else DEFAULT_OUTPUT
    )
    output = (arguments.out or default).absolute()
    try:
        compiled = build(output, arguments.sanitize, arguments.werror)
    except BuildError as error:
        print(f"build_native: {error}", file=sys.stderr)
        return 1
    print(f"{'built' if compiled else 'up to date:'} {output}")
    if arguments.sanitize:
        print(
            "run with: "
            + " ".join(f"{key}={value}" for key, value in sanitizer_environment(arguments.sanitize, output).items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
