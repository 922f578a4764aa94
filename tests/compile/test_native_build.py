"""tools/build_native.py and blinkimp/native.py: a clean build without warnings, rebuilds only when needed, errors that help.

Run: pytest tests/compile/test_native_build.py
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blinkimp import native
from tests.support import load_tool, python_path

build_native = load_tool("build_native")


@pytest.fixture
def small_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device/ folder with one source, so that a build takes a fraction of a second."""
    device = tmp_path / "device"
    (device / "emu").mkdir(parents=True)
    (device / "value.h").write_text("constexpr int kValue = 7;\n")
    (device / "emu" / "one.cpp").write_text('#include <value.h>\nextern "C" int bk_value() { return kValue; }\n')
    monkeypatch.setattr(build_native, "DEVICE", device)
    return tmp_path


def test_the_real_library_builds_without_warnings(tmp_path: Path) -> None:
    output = tmp_path / "library.so"
    assert build_native.build(output, werror=True)
    marker = ctypes.CDLL(str(output)).bk_build_marker
    marker.restype = ctypes.c_char_p
    assert marker().startswith(b"blinkimp-native sources=")


def test_rebuilds_exactly_when_a_header_changes(small_tree: Path) -> None:
    output = small_tree / "library.so"
    assert build_native.build(output)
    assert ctypes.CDLL(str(output)).bk_value() == 7
    assert not build_native.build(output)
    (small_tree / "device" / "value.h").write_text("constexpr int kValue = 8;\n")
    assert build_native.build(output)
    fresh_name = shutil.copy(output, small_tree / "again.so")  # the loader knows open libraries by name
    assert ctypes.CDLL(str(fresh_name)).bk_value() == 8


def test_a_compile_error_carries_the_command_and_the_log(small_tree: Path) -> None:
    (small_tree / "device" / "emu" / "one.cpp").write_text("int broken( { }\n")
    with pytest.raises(build_native.BuildError, match=r"(?s)one\.cpp.*error:"):
        build_native.build(small_tree / "library.so")
    assert not (small_tree / "library.so").exists()
    assert not list(small_tree.glob(".library*"))


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build_native.BuildError, match="apt-get install"):
        build_native.build(tmp_path / "library.so")


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(native.NativeLibraryError, match=r"C\+\+17 compiler"):
        native.load.__wrapped__()


def test_a_library_that_cannot_be_opened_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bad.so").write_bytes(b"not a library")
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, str(tmp_path / "bad.so"))
    with pytest.raises(native.NativeLibraryError, match="cannot be loaded"):
        native.load.__wrapped__()


@pytest.mark.parametrize("sanitize", ["thread", "address", "undefined"])
def test_sanitizer_builds_load_in_a_python_process(small_tree: Path, sanitize: str) -> None:
    output = small_tree / f"{sanitize}.so"
    build_native.build(output, sanitize)
    environment = {**os.environ, **build_native.sanitizer_environment(sanitize, output), "PYTHONPATH": python_path()}
    program = "from blinkimp import native; print(native.load().bk_value())"
    prefix = ["setarch", os.uname().machine, "-R"] if sanitize == "thread" else []
    result = subprocess.run(
        [*prefix, sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "7"
