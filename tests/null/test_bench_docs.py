"""Files that the load generator's docstrings name exist.

Run: pytest tests/null/test_bench_docs.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

FILES = [
    *sorted((ROOT / "blinkimp/bench").glob("*.py")),
    *map(ROOT.joinpath, ("blinkimp/trace/synthetic.py", "tests/scripted_server.py")),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_docstring_names_files_that_exist(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    names = re.findall(r"[\w./]+\.py\b", text)
    folders = [ROOT, path.parent, ROOT / "tests/host"]
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []
