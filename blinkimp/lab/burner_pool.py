"""Interference that rests between cells, for its start takes a second or two: numba compiles, and threads touch gigabytes.

    with Burners() as burners:
        with burners.burning("stream+bz2", 64, cpus) as burner: ...      started
        with burners.burning("none", 0, cpus): ...                       nothing runs
        with burners.burning("stream+bz2", 64, cpus) as burner: ...      gone on with

What rests is stopped (SIGSTOP): no thread of it runs, and it has its memory still. So few are kept.
Called by blinkimp/lab/interference.py and evidence.py. Test: pytest tests/host/test_lab_burners.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from blinkimp.lab.burner import Interference

MAX_RESTING: Final = 3  # up to two gigabytes each


class Burners:
    """At most MAX_RESTING of them; the one that has rested longest ends first. All end with the `with`."""

    def __init__(self) -> None:
        self._resting: dict[tuple[str, int, frozenset[int]], Interference] = {}  # the longest first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:  # all of them, whatever one of them raises
            for burner in self._resting.values():
                stack.push(burner)
        self._resting.clear()

    @contextlib.contextmanager
    def burning(self, kind: str, num_threads: int, cpus: set[int]) -> Iterator[Interference]:
        """units_per_s of what it yields stands when the block has ended."""
        key = kind, num_threads, frozenset(cpus)
        burner = self._resting.pop(key, None)
        if burner is None:
            burner = Interference(kind, num_threads, cpus).__enter__()
        else:
            burner.go_on()
        with contextlib.ExitStack() as stack:
            stack.push(burner)  # ends, unless all goes well
            yield burner
            if burner.can_rest:
                burner.rest()
                stack.pop_all()
                self._resting[key] = burner
        while len(self._resting) > MAX_RESTING:
            self._resting.pop(next(iter(self._resting))).__exit__(None, None, None)
