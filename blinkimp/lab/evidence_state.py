"""What a folder of evidence remembers between calls: the grid that is wanted, what each call ran on, and an engine that was left behind.

Called by blinkimp/lab/evidence.py and evidence_report.py. Test: pytest tests/host/test_evidence.py tests/null/test_evidence_plan.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from blinkimp.bench.errors import LoadError
from blinkimp.lab.evidence_plan import EvidenceGrid
from blinkimp.lab.host_monitor import read_text
from blinkimp.lab.store import write_json

END_TIMEOUT_S: Final = 60.0


class Calls:
    """calls.json: what each call ran on, and how long engines took to start; written after every change."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "calls.json"
        self.all: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else []

    def begin(self, facts: dict[str, Any]) -> None:
        self.all.append({**facts, "starts": [], "cells": []})
        self._save()

    def add_start(self, engine: str, seconds: float) -> None:
        self.all[-1]["starts"].append({"engine": engine, "seconds": round(seconds, 1)})
        self._save()

    def add_cell(self, key: str, seconds: float) -> None:
        self.all[-1]["cells"].append({"key": key, "seconds": round(seconds, 1)})
        self._save()

    def start_s(self, engine: str, default_s: float) -> float:
        """The longest start seen on this machine, else a guess."""
        here = [call for call in self.all if call["host"] == self.all[-1]["host"]] if self.all else []
        seen = [start["seconds"] for call in here for start in call["starts"] if start["engine"] == engine]
        return max(seen, default=default_s)

    def _save(self) -> None:
        write_json(self._path, self.all)


def write_grid(folder: Path, grid: EvidenceGrid) -> None:
    """Raises LoadError where the folder has cells of another grid: they would not be comparable."""
    path, words = folder / "grid.json", json.loads(json.dumps(grid.to_json()))
    if path.exists():
        before = json.loads(path.read_text())
        check_same(folder, before, words)
        words = merged(before, words)
    write_json(path, words)


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    scenarios = ("open_scenario", "closed_scenario")
    fixed = ("interference", "seconds", "warmup_s", "num_cpus", "num_reserved", "seed", *scenarios)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in fixed if before[name] != now[name]]
    was_traced, is_traced = (words.get("is_traced", False) for words in (before, now))
    changed += [f"is_traced {was_traced} -> {is_traced}"] if was_traced != is_traced else []
    if changed:
        raise LoadError(
            f"{folder}: its cells were measured otherwise: {', '.join(changed)}; expected the same; give the same options, or another folder"
        )


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What has ever been wanted of a folder: a call for some engines or loads does not forget the others."""
    engines = {engine["name"]: engine for engine in [*before["engines"], *now["engines"]]}  # each where it came first
    result = {**now, "engines": list(engines.values())}
    for name in ("rates", "users", "threads"):
        result[name] = sorted({*before[name], *now[name]})
    result["placements"] = list(dict.fromkeys([*before["placements"], *now["placements"]]))
    return result


def folders_of(folder: Path) -> list[Path]:
    """The folder itself, or those in it, by name, where processes that measured side by side had one each. Raises LoadError where there is no run."""
    found = [folder] if (folder / "grid.json").exists() else sorted(path.parent for path in folder.glob("*/grid.json"))
    if not found:
        raise LoadError(
            f"{folder}/grid.json: no such file, nor in a folder below; expected a folder of `blinkimp lab evidence`; check --resume"
        )
    return found


def read_grid(folders: Sequence[Path]) -> EvidenceGrid:
    """Of all of them. Raises LoadError where they were not measured alike."""
    words, *others = (json.loads((folder / "grid.json").read_text()) for folder in folders)
    for folder, more in zip(folders[1:], others, strict=True):
        check_same(folder, words, more)
        words = merged(words, more)
    return EvidenceGrid.from_json(words)


def start_time(pid: int) -> str:
    """Of a process, in ticks since boot; empty when it is gone. Tells it from a later one with its id."""
    text = read_text(Path(f"/proc/{pid}/stat"))
    return text.rpartition(")")[2].split()[19] if text else ""


def end_leftover(folder: Path, say: Callable[[str], None]) -> None:
    """An engine of a call that was killed still holds the GPU."""
    path = folder / "engine.json"
    if not path.exists():
        return
    left = json.loads(path.read_text())
    if left["host"] == socket.gethostname() and left["started"] and start_time(left["pid"]) == left["started"]:
        say(f"ending engine {left['engine']}, which a call before has left behind")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(left["pid"], signal.SIGKILL)
        deadline = time.monotonic() + END_TIMEOUT_S
        while start_time(left["pid"]) and time.monotonic() < deadline:
            time.sleep(0.05)
    path.unlink()
