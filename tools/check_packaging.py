#!/usr/bin/env python3
"""Proves that what is published works: the wheel (built from the sdist), `pip install .`, `pip install -e .`, from an empty directory.

Each install goes into a fresh virtual environment that sees the dependencies of the environment running this script (a .pth file), so
that nothing is downloaded twice. Checked: the sdist holds links as links and builds the same wheel; the wheel holds only blinkimp/
with the device sources, the embedded model and the native library; no top-level `device` or `host` appears; the console script runs;
without a compiler the package still installs, its client imports, and the native library's absence is explained.

Called by: .ci/run (`python tools/check_packaging.py`, needs the `dev` extra). It is its own test: it exits 1 at the first failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEEL_MUST_HOLD = (
    "blinkimp/_native.so",
    "blinkimp/ring_abi.py",
    "blinkimp/py.typed",
    "blinkimp/device/ring_abi.h",
    "blinkimp/device/ptx.cuh",
    "blinkimp/device/persistent_kernel.cu",
    "blinkimp/host/compile.py",
    "blinkimp/nic_shim/__init__.py",
    "blinkimp/nic_shim/grafana_dashboard.json",
    "blinkimp/models/embedded/config.json",
)

# Runs in the installed environment, in an empty directory.
IMPORT_PROBE = """
import importlib.util, pathlib, sys
import blinkimp, blinkimp.client, blinkimp.native, blinkimp.ring_abi, blinkimp.host.compile, blinkimp.nic_shim
package = pathlib.Path(blinkimp.__file__).resolve().parent
assert (package / "device" / "ring_abi.h").is_file(), package
assert blinkimp.native.load().bk_build_marker
for name in ("device", "host", "nic_shim", "tools"):
    assert importlib.util.find_spec(name) is None, f"{name} leaked into the import namespace"
print(package)
"""
NO_COMPILER_PROBE = """
import blinkimp.client, blinkimp.native
try:
    blinkimp.native.load()
except blinkimp.native.NativeLibraryError as error:
    assert "compiler" in str(error), error
else:
    raise SystemExit("the native library loaded although no compiler was there to build it")
"""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    # PYTHONPATH would let the source tree answer in place of the installed package.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "BLINKIMP_"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise SystemExit(f"check_packaging: {' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def make_environment(path: Path) -> Path:
    """A fresh virtual environment that also sees this environment's packages, but not its blinkimp; returns its python."""
    venv.create(path, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = path / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "blinkimp" not in entry.name and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    (path / "lib" / version / "site-packages" / "borrowed.pth").write_text(f"{borrowed}\n")
    return path / "bin" / "python"


def check_installed(python: Path, scratch: Path) -> None:
    empty = Path(tempfile.mkdtemp(dir=scratch))
    run([python, "-c", IMPORT_PROBE], cwd=empty)
    assert "blinkimp" in run([python.parent / "blinkimp", "--help"], cwd=empty)
    assert not list(empty.iterdir()), f"the package wrote into the current directory: {list(empty.iterdir())}"


def pip_install(python: Path, *arguments: str | Path, **environment: str) -> None:
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run([python, "-m", "pip", "install", *flags, *arguments], cwd=python.parent, **environment)


def check_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-linux_" in wheel.name, f"{wheel.name}: expected the tag py3-none-linux_*"
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"blinkimp"}, f"the wheel holds {sorted(tops)}, expected only blinkimp"
    missing = [name for name in WHEEL_MUST_HOLD if name not in names]
    assert not missing, f"the wheel lacks {missing}"
    in_tree = {
        f"blinkimp/{path.relative_to(ROOT)}"
        for path in (ROOT / "device").rglob("*")
        if path.suffix in (".h", ".cuh", ".cu")
    }
    assert in_tree <= set(names), (
        f"the wheel lacks device sources {sorted(in_tree - set(names))}; NVRTC needs all of them"
    )
    stray = [name for name in names if name.endswith((".pyc", ".o")) or "__pycache__" in name or "/tests/" in name]
    assert not stray, f"the wheel holds {stray}"


def copy_of_tree(target: Path) -> Path:
    """What a clone of the working tree would hold: build outputs of the real tree must not help, nor be touched."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignore))


def main() -> int:
    start = time.monotonic()

    def done(what: str) -> None:
        print(f"ok {time.monotonic() - start:6.1f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory(prefix="blinkimp-packaging-") as scratch_name:
        scratch = Path(scratch_name)
        tree = copy_of_tree(scratch / "tree")
        # `python -m build` makes the sdist, then the wheel from the unpacked sdist: so the sdist is complete.
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch / "dist", tree], cwd=scratch)
        (wheel,) = (scratch / "dist").glob("*.whl")
        (sdist,) = (scratch / "dist").glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            links = [member.name.partition("/")[2] for member in archive if member.issym()]
        expected = ["blinkimp/device", "blinkimp/host", "blinkimp/nic_shim", "tools/editable/blinkimp"]
        assert sorted(links) == expected, f"the sdist holds the links {sorted(links)}, expected {expected}"
        done(f"sdist {sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB")
        check_wheel(wheel)
        done(f"wheel {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, built from the sdist")

        installs: dict[str, list[str | Path]] = {"the wheel": [wheel], ".": [tree], "-e .": ["-e", tree]}
        for what, arguments in installs.items():
            python = make_environment(scratch / f"venv-{len(list(scratch.iterdir()))}")
            pip_install(python, *arguments)
            check_installed(python, scratch)
            done(f"pip install {what}: imports, native library, console script")

        python = make_environment(scratch / "venv-no-compiler")
        pip_install(python, copy_of_tree(scratch / "tree-no-compiler"), CXX="/nonexistent/c++")
        run([python, "-c", NO_COMPILER_PROBE], cwd=scratch)
        done("pip install . without a compiler: installs, and says what is missing")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
