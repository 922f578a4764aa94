"""Results of a lab run: a folder with one JSON file per cell, so that a run that was interrupted goes on where it stopped.

    store = Store(folder); if store.get(key) is None: store.put(key, measure())

A file is written whole or not at all. Called by the other modules of blinkimp/lab. Test: pytest tests/null/test_lab.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.outputs import OutputError, make_folder, replacing

SUFFIX: Final = ".cell.json"


class Store:
    """Cells by key; a key is a few words joined by `__`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The cell, or None where it was not measured yet, or failed."""
        path = self._path(key)
        if not path.exists():
            return None
        cell = read_cell(path)
        return None if "error" in cell else cell

    def prepare(self) -> None:
        """Before anything is measured. Raises OutputError where no cell could be written."""
        make_folder(self.folder)

    def put(self, key: str, cell: dict[str, Any]) -> None:
        """Raises OutputError; the cell is printed then, in place of the file: it took minutes."""
        try:
            make_folder(self.folder)
            write_json(self._path(key), cell)
        except OutputError:
            print(json.dumps({"key": key, **cell}))
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every cell that is there, by key."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            yield read_cell(path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def difference_of(cell: Mapping[str, Any], load: Mapping[str, Any]) -> str:
    """Settings of `load` (LoadOptions.to_json) that a measured cell had otherwise, as the end of a line; empty: none."""
    measured = cell["report"]["load"]
    others = [
        f"{name} {measured[name]} (asked for: {value})"
        for name, value in load.items()
        if name in measured and measured[name] != value
    ]
    return f", with {', '.join(others)}; remove the cell, or take another folder, to measure it anew" if others else ""


def write_json(path: Path, content: object) -> None:
    """Whole or not at all. Raises OutputError."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def key_of(*words: object) -> str:
    """A file name out of words, which may hold any characters."""
    return "__".join(re.sub(r"[^A-Za-z0-9.-]+", "-", str(word)).strip("-") or "none" for word in words)


def read_cell(path: Path) -> dict[str, Any]:
    try:
        cell = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path}: got {error}, expected a cell of a lab run; remove the file, and run the lab again"
        ) from error
    if not isinstance(cell, dict):
        raise LoadError(f"{path}: got {type(cell).__name__}, expected a map; remove the file, and run the lab again")
    if "kind" not in cell or not cell.keys() & {"report", "error"}:
        raise LoadError(
            f"{path}: got a map of {', '.join(cell) or 'nothing'}, expected a kind and a report or an error; remove the file, and run the lab again"
        )
    return cell
