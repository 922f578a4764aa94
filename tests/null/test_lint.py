"""Habits that a machine can check: raw asm and atomics in one place, includes, head comments, files that docstrings name, file length, ruff, mypy.

Run: pytest tests/null/test_lint.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, load_tool

MAX_LINES = 400
JUSTIFICATION = "Longer than"  # in the head comment of a longer file: "Longer than 400 lines because ..."
NUM_HEAD_LINES = 40
C_SUFFIXES = (".h", ".cuh", ".cu", ".cpp")

SOURCES: list[Path] = load_tool("count_lines").source_files()
C_SOURCES = [path for path in SOURCES if path.suffix in C_SUFFIXES]
DEVICE_SOURCES = [path for path in C_SOURCES if path.is_relative_to(ROOT / "device")]
PYTHON_SOURCES = [path for path in SOURCES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_comments(text: str) -> str:
    """The text with // and /* */ comments blanked, so that line numbers stay."""
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def matches(paths: list[Path], pattern: str) -> list[str]:
    """file:line: text of every line of code that matches."""
    found = []
    for path in paths:
        for line_idx, line in enumerate(without_comments(path.read_text()).splitlines()):
            if re.search(pattern, line):
                found.append(f"{name_of(path)}:{line_idx + 1}: {line.strip()}")
    return found


def test_the_sources_are_found() -> None:
    """The checks below would pass on an empty list."""
    assert ROOT / "device" / "ring_abi.h" in DEVICE_SOURCES
    assert ROOT / "host" / "compile.py" in PYTHON_SOURCES
    assert len(SOURCES) > 60


def test_raw_asm_and_atomics_live_in_ptx_headers_only() -> None:
    """STYLE: so that every ordered access has a name, and the CPU build a branch for it."""
    pattern = (
        r"\basm\b|__asm|__atomic_|__nv_atomic|\batomic(Add|CAS|Exch|Max|Min|Or|And|Sub|Xor)\b|std::atomic|\bvolatile\b"
        r"|__threadfence|__sync_synchronize|__ldcg|__ldcv|__stcg|__stwt"
    )
    others = [path for path in DEVICE_SOURCES if not path.name.startswith("ptx")]
    found = matches(others, pattern)
    assert not found, "\n".join(found)


def test_device_includes_are_angled_and_know_no_framework() -> None:
    """NVRTC looks for "x" in the current directory first; a framework header would tie the kernel to it."""
    found = matches(DEVICE_SOURCES, r'#\s*include\s*"')
    assert not found, "\n".join(found)
    found = matches(DEVICE_SOURCES, r"#\s*include\s*<(Python|pybind|torch|ATen|c10|nanobind|tvm|cutlass|cute)")
    assert not found, "\n".join(found)


def test_gpu_headers_use_no_slow_or_missing_headers() -> None:
    """NVRTC has no <stdint.h>; libcu++ and cooperative_groups cost 650 ms of every compilation."""
    gpu_sources = [path for path in DEVICE_SOURCES if path.parent == ROOT / "device"]
    found = matches(
        gpu_sources, r"#\s*include\s*<(cuda/|cooperative_groups|stdint|cstdint|c?std[a-z]+|vector|string|atomic)"
    )
    assert not found, "\n".join(found)


def test_names_say_what_is_counted() -> None:
    """A bare size, len or tail does not say bytes, items or positions. (`head` is an attention head here.)"""
    types = r"(?:u8|u16|u32|u64|i32|int|unsigned|size_t|std::size_t|uint32_t|uint64_t)"
    found = matches(C_SOURCES, rf"\b{types}\*?\s+(?:size|len|length|tail)\b")
    assert not found, "\n".join(found)


def test_arrays_and_pointers_in_structs_say_shape_or_owner() -> None:
    """An array or pointer member carries a comment on its line or the line above, unless it is `reserved`."""
    silent = []
    member = re.compile(r"^\s+(?:const\s+)?[\w:]+(?:\s*\*+\s*|\s+)(\w+)\s*(\[[^\]]+\])?\s*(?:=[^;]*)?;")
    for path in DEVICE_SOURCES:
        lines = path.read_text().splitlines()
        depth_of_struct: int | None = None
        depth = 0
        for line_idx, line in enumerate(lines):
            code = re.sub(r"//.*", "", line)
            if depth_of_struct is None and re.match(r"\s*(?:struct|class)\s+(?:alignas\([^)]*\)\s+)?\w+[^;]*\{", code):
                depth_of_struct = depth
            elif depth_of_struct is not None and depth == depth_of_struct + 1 and (found := member.match(code)):
                is_array_or_pointer = found[2] is not None or "*" in code.split("=")[0]
                explained = "//" in line or (line_idx > 0 and lines[line_idx - 1].strip().startswith("//"))
                if is_array_or_pointer and not explained and not found[1].startswith("reserved"):
                    silent.append(f"{name_of(path)}:{line_idx + 1}: {line.strip()}")
            depth += code.count("{") - code.count("}")
            if depth_of_struct is not None and depth <= depth_of_struct:
                depth_of_struct = None
    assert not silent, "\n".join(silent)


def head_of(path: Path) -> str:
    """The comment or docstring that opens a file."""
    text = path.read_text()
    if path.suffix == ".py":
        found = re.match(r'(?:#![^\n]*\n)?"""(.*?)"""', text, flags=re.DOTALL)
        return found[1] if found else ""
    lines = []
    for line in text.splitlines()[:NUM_HEAD_LINES]:
        if not line.startswith("//"):
            break
        lines.append(line)
    return "\n".join(lines)


def test_every_file_opens_with_what_it_does_and_how_it_is_tested() -> None:
    without_head = [name_of(path) for path in SOURCES if len(head_of(path)) < 40]
    assert not without_head, "\n".join(without_head)
    shared = {"__init__.py", "__main__.py", "support.py"}  # names of packages and shared pieces of tests
    untested = [
        name_of(path)
        for path in SOURCES
        if path.name not in shared
        and not re.search(r"\b(?:Tests?|Run|Used by)\b|tests/|test_\w+\.py|its own test", head_of(path))
    ]
    assert not untested, "\n".join(untested)


def test_docstrings_name_files_that_exist() -> None:
    """From the repository's root, or beside the file; * stands for anything."""
    has_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    missing = [
        f"{name_of(path)}: {name}"
        for path in PYTHON_SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, has_docstring)
        for name in re.findall(r"[\w.*][\w./*-]*\.py\b", ast.get_docstring(node) or "")
        if not any(any(folder.glob(name)) for folder in (ROOT, path.parent))
    ]
    assert not missing, "\n".join(missing)


def test_files_are_short_or_say_why_not() -> None:
    generated = {ROOT / "blinkimp" / "ring_abi.py"}
    long_files = [
        f"{name_of(path)}: {num_lines} lines"
        for path in SOURCES
        if path not in generated
        and (num_lines := len(path.read_text().splitlines())) > MAX_LINES
        and JUSTIFICATION not in head_of(path)
    ]
    assert not long_files, "\n".join(long_files)


def run_tool(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def test_ruff_check() -> None:
    run_tool("ruff", "check", ".")


def test_ruff_format() -> None:
    run_tool("ruff", "format", "--check", ".")


def test_mypy_strict() -> None:
    """The package as it is imported, and the tools."""
    run_tool("mypy", "-p", "blinkimp")
    run_tool("mypy", "tools")


def test_line_count_runs() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "count_lines.py"], check=True, capture_output=True, text=True
    )
    assert re.search(r"^total +\d+ +\d+", result.stdout, flags=re.MULTILINE)


def test_every_tool_answers_help() -> None:
    """One that reads no arguments does its work instead: tools/gen_config_table.py wrote the README."""
    tools = [path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()]
    silent = {path.name for path in tools if "parse_args" not in path.read_text()}
    assert len(tools) > 20 and silent == {"stream_clients.py"}, "the one that tools/bench_streams.py starts for itself"
