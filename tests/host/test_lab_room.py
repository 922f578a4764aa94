"""blinkimp/lab/room.py: measurements of several processes are together only at the same level of interference.

Run: pytest tests/host/test_lab_room.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.lab.evidence_state import folders_of, read_grid
from blinkimp.lab.room import Room
from tests.support import PATIENCE_S, python_path

# Goes in at a level, says so, and leaves when its stdin ends.
VISITOR = """
import sys
from pathlib import Path
from blinkimp.lab.room import Room
with Room(Path(sys.argv[1])).enter(sys.argv[2], float(sys.argv[3])) as others:
    print(others, flush=True)
    sys.stdin.read()
"""


class Visitor:
    def __init__(self, path: Path, level: int) -> None:
        command = [sys.executable, "-c", VISITOR, str(path), str(level), str(PATIENCE_S)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": python_path()}
        )

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        self.process.communicate(timeout=PATIENCE_S)


def within(path: Path, level: int, patience_s: float = 0.0) -> int | None:
    with Room(path).enter(str(level), patience_s) as others:
        return others


def test_the_same_level_joins_and_another_waits_until_all_have_left(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "room"
    first, second = Visitor(path, 64), Visitor(path, 64)
    assert {first.said(), second.said()} == {"0", "1"}
    assert within(path, 0) is None and within(path, 64) == 2
    third = Visitor(path, 0)
    first.leave()
    assert within(path, 0) is None
    second.leave()
    assert third.said() == "0"
    assert within(path, 64) is None
    third.leave()
    assert within(path, 64) == 0 and json.loads(path.read_text()) == []


def test_the_level_of_those_who_are_in_can_be_looked_at(tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    assert room.level() is None
    with room.enter("64", 0.0):
        assert Room(tmp_path / "room").level() == "64"
        assert [entry["level"] for entry in json.loads((tmp_path / "room").read_text())] == ["64"], (
            "looking changes nothing"
        )
    assert room.level() is None


def test_who_was_killed_is_not_in_the_room(tmp_path: Path) -> None:
    path = tmp_path / "room"
    visitor = Visitor(path, 64)
    assert visitor.said() == "0"
    visitor.process.kill()
    visitor.process.communicate()
    assert within(path, 0) == 0


def test_an_entry_of_an_earlier_process_with_the_same_id_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "room"
    path.write_text(json.dumps([{"pid": 1, "started": "of another boot", "level": "64"}]))
    assert within(path, 0) == 0


def test_an_error_inside_leaves_the_room(tmp_path: Path) -> None:
    path = tmp_path / "room"
    with pytest.raises(LoadError, match="in the middle"), Room(path).enter("64", 0.0):
        raise LoadError("in the middle")
    assert within(path, 0) == 0


def test_patience_is_counted_by_the_clock(tmp_path: Path) -> None:
    path, now_s = tmp_path / "room", [0.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    visitor = Visitor(path, 64)
    assert visitor.said() == "0"
    with Room(path, sleep, lambda: now_s[0]).enter("0", 2.0) as others:
        assert others is None and 2.0 <= now_s[0] < 2.2
    visitor.leave()


def test_levels_never_meet(tmp_path: Path) -> None:
    """Four processes, thirty visits each at levels drawn at random; each visit leaves a mark while it lasts."""
    walker = """
import random, sys, time
from pathlib import Path
from blinkimp.lab.room import Room
seed, folder = int(sys.argv[1]), Path(sys.argv[2])
draw = random.Random(seed)
for visit in range(30):
    level = draw.choice([0, 64])
    with Room(folder / "room").enter(str(level), 600) as others:
        assert others is not None
        mark = folder / f"{level}.{seed}.{visit}.mark"
        mark.touch()
        time.sleep(0.001)
        assert not list(folder.glob(f"{64 - level}.*.mark")), "another level is here"
        mark.unlink()
"""
    begun = [
        subprocess.Popen([sys.executable, "-c", walker, str(seed), str(tmp_path)], env={"PYTHONPATH": python_path()})
        for seed in range(4)
    ]
    assert [process.wait(PATIENCE_S) for process in begun] == [0] * 4


# ---- The folders of processes side by side ---------------------------------------------------------------------------
def grid_file(folder: Path, engine: str, **changes: object) -> None:
    words = {
        "engines": [{"name": engine, "transports": ["http"], "start_s": 1.0, "is_cpu_on_path": True}],
        "rates": [8.0],
        "open_scenario": "512x128",
        "users": [],
        "closed_scenario": "1k1k",
        "threads": [0, 64],
        "placements": ["reserved"],
        "interference": "stream",
        "seconds": 20.0,
        "warmup_s": 2.0,
        "num_cpus": 16,
        "num_reserved": 2,
        "seed": 0,
    }
    folder.mkdir(parents=True)
    (folder / "grid.json").write_text(json.dumps(words | changes))


def test_folders_side_by_side_are_one_grid(tmp_path: Path) -> None:
    grid_file(tmp_path / "2-cpu", "cpu")
    grid_file(tmp_path / "1-persistent", "persistent", rates=[2.0, 8.0])
    folders = folders_of(tmp_path)
    assert [folder.name for folder in folders] == ["1-persistent", "2-cpu"] and folders_of(folders[1]) == folders[1:]
    grid = read_grid(folders)
    assert [engine.name for engine in grid.engines] == ["persistent", "cpu"] and grid.rates == (2.0, 8.0)


def test_folders_measured_otherwise_are_not_one(tmp_path: Path) -> None:
    grid_file(tmp_path / "1", "persistent")
    grid_file(tmp_path / "2", "cpu", num_cpus=8)
    with pytest.raises(LoadError, match="num_cpus 16 -> 8"):
        read_grid(folders_of(tmp_path))
    with pytest.raises(LoadError, match="check --resume"):
        folders_of(tmp_path / "1" / "cells")
