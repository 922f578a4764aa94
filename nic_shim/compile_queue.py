"""Constraints that wait to be compiled: one is compiled at a time, and callers take turns.

    found = queue.ask(caller, constraint, answer)    its automaton or an error where it is known, else a Ticket: answer() is called later
    queue.withdraw(ticket)                           nobody waits for it any more

A caller is an API key or a CURVE key, where there are none a connection. Used by nic_shim/message_handler.py and
nic_shim/http_constraint.py. Test: pytest tests/null/test_compile_queue.py

Invariants
I1  What the cache knows is answered at once, whatever is being compiled.
I2  A constraint waits for those that its caller asked for before, and for at most one of each other caller between two of them.
I3  What nobody waits for is not compiled, unless it is being compiled already.
I4  At most MAX_WAITING_PER_CALLER constraints of a caller wait, MAX_WAITING of all; the one that is being compiled counts. Any number of
    requests may wait for the same one: quotas and connections bound them.
I5  Each ticket gets one answer, or none where withdraw() or close() came first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

from blinkimp.complaints import quote
from blinkimp.nic_shim.constraint_compiler import (
    ConstraintCompiler,
    ConstraintProblem,
    LoadedConstraint,
    constraint_key,
)
from blinkimp.protocol import Constraint, Error

log = logging.getLogger("blinkimp.ingress")

MAX_WAITING_PER_CALLER: Final = 128
MAX_WAITING: Final = 1024

Answer: TypeAlias = LoadedConstraint | Error  # an Error has id 0


class _Job:
    """A constraint that a caller waits for."""

    def __init__(self, caller: bytes, key: bytes, constraint: Constraint) -> None:
        self.caller = caller
        self.key = key
        self.constraint = constraint
        self.tickets: dict[Ticket, None] = {}
        self.is_running = False


class Ticket:
    """One who waits for an answer."""

    def __init__(self, job: _Job, answer: Callable[[Answer], None]) -> None:
        self.job = job
        self.answer = answer


class CompileQueue:
    """One for each ingress; any thread may call it. Owns the compiler."""

    def __init__(self, compiler: ConstraintCompiler) -> None:
        self._compiler = compiler
        self._lock = threading.Lock()  # of what follows
        self._waiting: OrderedDict[bytes, OrderedDict[bytes, _Job]] = OrderedDict()  # by caller, in turn; none is empty
        self._is_running = False
        self._is_closed = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blinkimp-compile")

    def ask(self, caller: bytes, constraint: Constraint, answer: Callable[[Answer], None]) -> Answer | Ticket:
        """answer() is called on the queue's thread, and only where this returns a ticket; perhaps before it does."""
        found = self._compiler.look_up(constraint)  # I1
        if found is not None:
            return found.error if isinstance(found, ConstraintProblem) else found
        key = constraint_key(constraint)
        with self._lock:
            jobs = self._waiting.get(caller, OrderedDict())
            job = jobs.get(key)
            if job is None:
                error = self._no_room(constraint, len(jobs))
                if error is not None:
                    return error
                job = jobs[key] = _Job(caller, key, constraint)
                self._waiting[caller] = jobs
            ticket = Ticket(job, answer)
            job.tickets[ticket] = None
            if not self._is_running and not self._is_closed:
                self._is_running = True
                self._pool.submit(self._run)
        return ticket

    def withdraw(self, ticket: Ticket) -> bool:
        """True: there will be no answer. False: it has been given, or is about to be."""
        job = ticket.job
        with self._lock:
            if ticket not in job.tickets:
                return False
            del job.tickets[ticket]
            if not job.tickets and not job.is_running:  # I3
                self._remove(job.caller, job.key)
            return True

    def close(self) -> None:
        """Ends the compiler, whatever it compiles; what waits gets no answer."""
        with self._lock:
            self._is_closed = True
        self._compiler.close()
        self._pool.shutdown(wait=True)

    def _no_room(self, constraint: Constraint, num_of_caller: int) -> Error | None:
        num_waiting = sum(map(len, self._waiting.values()))
        if num_of_caller < MAX_WAITING_PER_CALLER and num_waiting < MAX_WAITING:
            return None
        is_own = num_of_caller >= MAX_WAITING_PER_CALLER
        return Error(
            0,
            "busy",
            f"the {constraint.kind} constraint cannot be compiled now: too many {'of this caller' if is_own else 'of all callers'} wait",
            f"{num_of_caller if is_own else num_waiting} that wait, and {quote(constraint.value)[:60]}",
            f"fewer than {MAX_WAITING_PER_CALLER if is_own else MAX_WAITING}",
            "send it again when some are compiled; one that has been compiled need not wait",
            final=True,
        )

    def _remove(self, caller: bytes, key: bytes) -> _Job | None:
        jobs = self._waiting.get(caller)
        job = jobs.pop(key, None) if jobs is not None else None
        if not jobs:
            self._waiting.pop(caller, None)
        return job

    # ---- The queue's thread ----------------------------------------------------------------------------------------
    def _run(self) -> None:
        while (job := self._next()) is not None:
            answer = self._compile(job.constraint)
            for ticket in self._end(job, answer):
                ticket.answer(answer)

    def _next(self) -> _Job | None:
        with self._lock:
            if self._is_closed or not self._waiting:
                self._is_running = False
                return None
            job = next(iter(next(iter(self._waiting.values())).values()))
            job.is_running = True
            return job

    def _compile(self, constraint: Constraint) -> Answer:
        try:
            return self._compiler.compile(constraint)
        except ConstraintProblem as problem:
            return problem.with_traceback(None).error  # the cache keeps it, and its traceback this frame
        except Exception as error:  # a defect: it must not take the other constraints with it
            log.exception("a constraint could not be compiled")
            return Error(
                0,
                "internal_error",
                f"the server failed on the {constraint.kind} constraint",
                type(error).__name__,
                "a constraint that is compiled or refused",
                "report this with the ingress's log: it is a defect",
                final=True,
            )

    def _end(self, job: _Job, answer: Answer) -> list[Ticket]:
        """Those who get the answer: all who wait for this constraint, but only its own caller where another attempt may end differently."""
        is_final = not isinstance(answer, Error) or answer.code not in ("busy", "internal_error")
        with self._lock:
            tickets: list[Ticket] = []
            for caller in list(self._waiting) if is_final else [job.caller]:
                done = self._remove(caller, job.key)
                if done is not None:
                    tickets += done.tickets
                    done.tickets = {}
            if job.caller in self._waiting:  # only now, so that who came meanwhile is before it (I2)
                self._waiting.move_to_end(job.caller)
            return tickets
