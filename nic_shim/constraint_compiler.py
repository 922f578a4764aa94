"""Constraints to token automata, once for each: a cache in front of a worker process with a time limit.

compile() is called by nic_shim/compile_queue.py, on a thread of its own. Test: pytest tests/host/test_constraints.py

Invariants
I1  No constraint can keep a stream waiting: compiling happens in another process, which is killed once it has computed for
    COMPILE_TIMEOUT_S. On a machine that gives it less than all of a CPU that takes longer, but not beyond MOST_WAIT_FACTOR times: then the
    machine is too busy, and the constraint may be sent again. What is the machine's fault is not kept in the cache.
I2  The cache holds CACHE_BYTES at most; the least recently used goes first.
I3  A worker answers in order, so one whose answer was not read, for whatever reason, is ended: the next constraint has another.
I4  look_up() never waits for a compilation.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from blinkimp.complaints import quote
from blinkimp.nic_shim.constraint_table import ConstraintTable
from blinkimp.nic_shim.constraint_worker import LENGTH, Compiled
from blinkimp.protocol import Constraint, Error, ErrorCode

COMPILE_TIMEOUT_S: Final = 10.0  # of CPU time: what a constraint costs does not depend on who else computes
MOST_WAIT_FACTOR: Final = 6
LOOK_PERIOD_S: Final = 0.25  # at the CPU time
START_TIMEOUT_S: Final = 60.0  # of the worker, until it is ready
CACHE_BYTES: Final = 64 << 20
MAX_CONSTRAINT_CHARS: Final = 256 << 10
REMEDIES: Final = {"constraint_too_large": "simplify it", "busy": "send it again"}


class ConstraintProblem(Exception):  # noqa: N818  (it is the client's problem)
    """The constraint is refused; `error` is the reply, with id 0."""

    def __init__(self, code: ErrorCode, problem: str, constraint: Constraint) -> None:
        remedy = REMEDIES.get(code, "correct it; nic_shim/HTTP.md says what is supported")
        self.error = Error(
            0,
            code,
            f"the {constraint.kind} constraint cannot be used: {problem}",
            quote(constraint.value)[:120],
            "a constraint that this server can compile",
            remedy,
            final=True,
        )
        super().__init__(self.error.what)


class LoadedConstraint:
    """A compiled constraint, as requests carry it. Equal constraints share one."""

    def __init__(self, key: bytes, table: ConstraintTable) -> None:
        self.key = key
        self.table = table


def constraint_key(constraint: Constraint) -> bytes:
    """Equal constraints have the same."""
    return hashlib.sha256(msgspec.msgpack.encode(constraint)).digest()


class ConstraintCompiler:
    """One for each ingress; thread-safe, one compilation at a time."""

    def __init__(
        self,
        tokenizer: Path,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        slot_bytes: int,
        *,
        timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> None:
        eos_text = ",".join(map(str, eos_ids))
        self._arguments = [str(tokenizer), str(vocab_size), eos_text, str(slot_bytes)]
        self._is_possible = slot_bytes > 0 and bool(eos_ids)
        self._timeout_s = timeout_s
        self._compiling = threading.Lock()  # of the worker
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._cache_lock = threading.Lock()  # of the next two; held for moments (I4)
        self._cache: OrderedDict[bytes, LoadedConstraint | ConstraintProblem] = OrderedDict()
        self._cache_bytes = 0
        self.num_compiled = 0

    def look_up(self, constraint: Constraint) -> LoadedConstraint | ConstraintProblem | None:
        """What is known of it without compiling."""
        problem = self._problem(constraint)
        if problem is not None:
            return problem
        key = constraint_key(constraint)
        with self._cache_lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        return found

    def compile(self, constraint: Constraint) -> LoadedConstraint:
        """Raises ConstraintProblem."""
        with self._compiling:
            found = self.look_up(constraint)
            if found is None:
                key = constraint_key(constraint)
                found = self._compile(constraint, key)
                self._keep(key, found)
        if isinstance(found, ConstraintProblem):
            raise found.with_traceback(None)
        return found

    def close(self) -> None:
        """Does not wait for a compilation: its worker is killed, and its caller gets a problem, as does who comes later."""
        self._is_closed = True  # before the look at the worker: one that starts now sees it
        if self._compiling.acquire(blocking=False):
            self._end_worker()
            self._compiling.release()
        elif (worker := self._worker) is not None:
            worker.kill()  # the thread that compiles finds out, and ends it

    def _keep(self, key: bytes, found: LoadedConstraint | ConstraintProblem) -> None:
        with self._cache_lock:
            self._cache[key] = found
            self._cache_bytes += _bytes_of(found)
            while self._cache_bytes > CACHE_BYTES or len(self._cache) > 4096:
                self._cache_bytes -= _bytes_of(self._cache.popitem(last=False)[1])

    def _problem(self, constraint: Constraint) -> ConstraintProblem | None:
        value = constraint.value
        num_chars = len(value) if isinstance(value, str) else sum(map(len, value)) + len(value)
        if num_chars > MAX_CONSTRAINT_CHARS:
            problem = f"it has {num_chars} characters, expected at most {MAX_CONSTRAINT_CHARS}"
            return ConstraintProblem("constraint_too_large", problem, constraint)
        if isinstance(value, list) != (constraint.kind == "choice"):
            problem = "a choice has a list of texts, everything else one text"
            return ConstraintProblem("bad_constraint", problem, constraint)
        if constraint.kind == "choice" and not (value and all(value)):
            problem = "a choice needs texts that are not empty, at least one"
            return ConstraintProblem("bad_constraint", problem, constraint)
        if not self._is_possible:
            problem = "this engine has no room for constraints, or the model no end-of-sequence id"
            return ConstraintProblem("bad_constraint", problem, constraint)
        return None

    def _compile(self, constraint: Constraint, key: bytes) -> LoadedConstraint | ConstraintProblem:
        try:
            answer = self._ask(self._worker or self._start_worker(constraint), constraint)
        except BaseException as error:
            self._end_worker()  # I3
            if isinstance(error, TimeoutError):
                problem = f"compiling it takes more than {self._timeout_s:g} s"
                return ConstraintProblem("constraint_too_large", problem, constraint)
            if isinstance(error, OSError | EOFError):
                return ConstraintProblem("constraint_too_large", "compiling it takes too much memory", constraint)
            raise
        self.num_compiled += 1
        if answer.code:
            code: ErrorCode = "constraint_too_large" if answer.code == "constraint_too_large" else "bad_constraint"
            return ConstraintProblem(code, answer.problem, constraint)
        return LoadedConstraint(key, ConstraintTable.parse(answer.table))

    def _ask(self, worker: subprocess.Popen[bytes], constraint: Constraint) -> Compiled:
        """Raises TimeoutError for the constraint's own time, ConstraintProblem for that of a machine which has too little for it."""
        assert worker.stdin is not None and worker.stdout is not None
        pid, begin_s = worker.pid, _cpu_seconds(worker.pid)
        most_wait_s = MOST_WAIT_FACTOR * self._timeout_s
        began_at = time.monotonic()

        def is_over() -> bool:
            if _cpu_seconds(pid) - begin_s > self._timeout_s:
                return True
            if time.monotonic() > began_at + most_wait_s:
                raise ConstraintProblem(
                    "busy", f"it was not compiled within {most_wait_s:g} s, on a busy machine", constraint
                )
            return False

        payload = msgspec.msgpack.encode(constraint)
        worker.stdin.write(LENGTH.pack(len(payload)) + payload)
        worker.stdin.flush()
        (num_bytes,) = LENGTH.unpack(_read(worker.stdout.fileno(), LENGTH.size, is_over))
        return msgspec.msgpack.decode(_read(worker.stdout.fileno(), num_bytes, is_over), type=Compiled)

    def _start_worker(self, constraint: Constraint) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "blinkimp.nic_shim.constraint_worker", *self._arguments]
        give_up_at = time.monotonic() + START_TIMEOUT_S
        try:
            self._worker = worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert worker.stdout is not None
            if self._is_closed:  # close() may have looked before there was a worker to kill
                raise EOFError
            # It says that it is ready.
            _read(worker.stdout.fileno(), LENGTH.size, lambda: time.monotonic() > give_up_at)
        except (TimeoutError, OSError, EOFError) as error:
            problem = f"what compiles it did not start within {START_TIMEOUT_S:g} s ({type(error).__name__})"
            raise ConstraintProblem("busy", problem, constraint) from error
        return worker

    def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # what was not written has nowhere to go
                        continue


def _cpu_seconds(pid: int) -> float:
    """That a child of ours has computed. 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system


def _read(fd: int, num_bytes: int, is_over: Callable[[], bool]) -> bytes:
    """Raises TimeoutError, EOFError."""
    data = b""
    poller = select.poll()  # select() takes no descriptor beyond 1,023, and each connection of the ingress has one
    poller.register(fd, select.POLLIN)
    while len(data) < num_bytes:
        if not poller.poll(LOOK_PERIOD_S * 1000):
            if is_over():
                raise TimeoutError
            continue
        piece = os.read(fd, num_bytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _bytes_of(entry: LoadedConstraint | ConstraintProblem) -> int:
    return len(entry.table.data) if isinstance(entry, LoadedConstraint) else 1024
