"""A room for measurements of several lab processes on one machine: with each other only where the interference is the same.

    room = Room(Path("evidence/room"))
    with room.enter("64", patience_s=60) as others: ...        None: too late; else how many were there already

Engines on different GPUs of a host may be measured side by side, each with CPUs of its own, but memory and its bandwidth are everyone's: an
isolated cell beside another process's burners would not be isolated. So a cell goes in at once where nobody is in, or all who are in name the same
level (the number of threads, and what else the caller tells apart), and waits otherwise. Loops over 0, 64, 0, 64 threads fall into step by that:
who waits for 64 is joined by whoever is done with 0. Loops over levels that differ may take turns, one waiting while the other measures: level() is
for who can do something at the level that is there.
Invariants:
  I1  everyone in the room has the same level.
  I2  who has ended, kill -9 included, is not in the room: an entry holds pid and start time, and whoever looks drops those that are gone.
  I3  the file is read and written under its lock alone.
Called by blinkimp/lab/evidence.py and interference.py. Test: pytest tests/host/test_lab_room.py
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from blinkimp.lab.evidence_state import start_time

PERIOD_S: Final = 0.05  # between two looks of one who waits

Entries = list[dict[str, Any]]  # {"pid", "started", "level"}


class Room:
    """Of one process, which is in it at most once at a time."""

    def __init__(
        self, path: Path, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._sleep, self._clock = path, sleep, clock
        path.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def enter(self, level: str, patience_s: float) -> Iterator[int | None]:
        """How many others were in already; None: the room did not become free in time, and one is not in it."""
        deadline = self._clock() + patience_s
        while (others := self._try_enter(level)) is None and self._clock() < deadline:
            self._sleep(PERIOD_S)
        try:
            yield others
        finally:
            if others is not None:
                self._change(lambda entries: [entry for entry in entries if entry["pid"] != os.getpid()])

    def level(self) -> str | None:
        """Of those who are in it right now; None: nobody is."""
        levels: list[str] = []

        def look(entries: Entries) -> Entries:
            levels.extend(entry["level"] for entry in entries[:1])  # I1: all have the first one's
            return entries

        self._change(look)
        return levels[0] if levels else None

    def _try_enter(self, level: str) -> int | None:
        others: int | None = None

        def go_in(entries: Entries) -> Entries:
            nonlocal others
            if any(entry["level"] != level for entry in entries):  # I1
                return entries
            others = len(entries)
            return [*entries, {"pid": os.getpid(), "started": start_time(os.getpid()), "level": level}]

        self._change(go_in)
        return others

    def _change(self, change: Callable[[Entries], Entries]) -> None:
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # I3; closing the file gives it back
            file.seek(0)
            text = file.read()
            before: Entries = json.loads(text) if text else []
            after = change([entry for entry in before if start_time(entry["pid"]) == entry["started"]])  # I2
            file.truncate(0)
            file.write(json.dumps(after))
