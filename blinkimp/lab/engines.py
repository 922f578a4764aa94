"""Engines that the lab measures: started from a command or running already, pinned to CPUs by the role of each of their processes.

    with RunningEngine(spec, timeout_s=300) as engine: engine.pin(placement); engine.pids

Placement `reserved`: ingress processes and the lab's client have CPUs of their own (they stand for a SmartNIC and a remote host), and so has the
emulated device (it stands for a GPU); everything else of the engine shares the other CPUs with the interference. `sharing`: all of them are
everywhere. Called by blinkimp/lab/interference.py. Test: pytest tests/host/test_lab_interference.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from blinkimp.bench.errors import LoadError
from blinkimp.bench.runner import Target, make_backend
from blinkimp.lab.host_monitor import first_sibling, set_affinity, tree_of

RESERVED_PROCESSES: Final = r"nic_shim\.\w+|emulated_process"  # command lines of ingresses and of the emulated device
STOP_TIMEOUT_S: Final = 30.0
PROBE_S: Final = 2.0

PlacementName = Literal["reserved", "sharing"]


@dataclass(frozen=True)
class Placement:
    """CPUs of the parts."""

    name: PlacementName
    reserved: frozenset[int]  # client, ingress, emulated device
    contested: frozenset[int]  # the rest of the engine, and the interference


def placement_of(name: PlacementName, num_reserved: int, cpus: set[int]) -> Placement:
    """The first num_reserved of `cpus` are kept free of interference, whole cores where a core is several CPUs: what runs beside one on its core
    is interference too. Raises LoadError when nothing would be left."""
    if name == "sharing":
        return Placement(name, frozenset(cpus), frozenset(cpus))
    ordered = sorted(cpus, key=lambda cpu: (first_sibling(cpu), cpu))
    if not 0 < num_reserved < len(ordered):
        raise LoadError(
            f"reserved CPUs: got {num_reserved} of {len(ordered)}, expected at least 1, and at least 1 left for the interference; "
            "set --reserved-cpus, or use --placements sharing"
        )
    return Placement(name, frozenset(ordered[:num_reserved]), frozenset(ordered[num_reserved:]))


def words_of_command(whose: str, command: str) -> list[str]:
    """As a shell splits it. Raises LoadError."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise LoadError(
            f"{whose}: got the command {command!r} ({error}); expected one that a shell could read; close its quotes"
        ) from error


@dataclass(frozen=True)
class EngineSpec:
    """An engine by name: where it answers, and the command that starts it (None: it runs already)."""

    name: str
    address: str
    command: str | None = None
    vocab_size: int | None = None  # of prompts, where the server does not tell

    @classmethod
    def of(cls, words: Sequence[str]) -> EngineSpec:
        if not 2 <= len(words) <= 3 or "://" not in words[1]:
            raise LoadError(
                f"engine: got {list(words)}, expected NAME ADDRESS [COMMAND], such as persistent tcp://127.0.0.1:5601 "
                "'blinkimp serve --bind tcp://127.0.0.1:5601'"
            )
        command = words[2] if len(words) == 3 else None
        if command is not None:
            words_of_command(f"engine {words[0]}", command)
        return cls(words[0], words[1], command)

    def target(self, *, num_gpus: int = 1, vocab_size: int | None = None) -> Target:
        is_http = self.address.startswith("http")
        return Target(
            connect=None if is_http else self.address,
            url=self.address if is_http else None,
            num_gpus=num_gpus,
            vocab_size=vocab_size or self.vocab_size,
            label=self.name,
        )


class RunningEngine:
    """Up while inside `with`. log: a file for what it says, which goes to this process's output otherwise."""

    def __init__(self, spec: EngineSpec, timeout_s: float, log: Path | None = None) -> None:
        self.spec, self._timeout_s, self._log = spec, timeout_s, log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self.spec.command is not None:
            with contextlib.ExitStack() as stack:
                output = None if self._log is None else stack.enter_context(self._log.open("ab"))
                try:
                    self._process = subprocess.Popen(
                        words_of_command(f"engine {self.spec.name}", self.spec.command),
                        start_new_session=True,
                        stdout=output,
                        stderr=output,
                    )
                except OSError as error:
                    raise LoadError(
                        f"engine {self.spec.name}: {error}; expected a command that can be run; check it"
                    ) from error
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int | None:
        """Of the process that was started, which leads a process group of its own."""
        return None if self._process is None else self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    @property
    def processes(self) -> dict[int, str]:
        """pid -> command line of all of it; empty for an engine that the lab did not start."""
        return {} if self._process is None else tree_of(self._process.pid)

    def pin(self, placement: Placement) -> None:
        for pid, command in self.processes.items():
            is_reserved = re.search(RESERVED_PROCESSES, command) is not None
            set_affinity(pid, set(placement.reserved if is_reserved else placement.contested))

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                asyncio.run(probe(self.spec.target()))
                return
            except LoadError as error:
                if self._process is not None and self.has_ended:
                    raise LoadError(
                        f"engine {self.spec.name}: its command ended with status {self._process.returncode}, expected it to serve; "
                        f"its messages stand {'above' if self._log is None else f'in {self._log}'}"
                    ) from error
                if time.monotonic() > deadline:
                    raise LoadError(
                        f"engine {self.spec.name}: no answer within {self._timeout_s:g} s: {error}"
                    ) from error
            time.sleep(0.2)

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what is left of its group
        self._process.wait()


async def probe(target: Target) -> None:
    """Raises LoadError unless the target answers."""
    backend = make_backend(target, lambda record: None)
    try:
        await backend.open(PROBE_S)
    finally:
        await backend.close()
