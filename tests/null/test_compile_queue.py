"""nic_shim/compile_queue.py: who waits for whom, with a compiler that compiles when the test says so.

Run: pytest tests/null/test_compile_queue.py
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from blinkimp.nic_shim import compile_queue
from blinkimp.nic_shim.compile_queue import Answer, CompileQueue, Ticket
from blinkimp.nic_shim.constraint_compiler import ConstraintProblem, LoadedConstraint
from blinkimp.nic_shim.http_errors import http_error_of
from blinkimp.protocol import Constraint, Error
from tests.support import PATIENCE_S


class Compiler:
    """Compiles one constraint for each release()."""

    def __init__(self) -> None:
        self.begun: queue.Queue[str] = queue.Queue()
        self.cache: dict[str, LoadedConstraint] = {}
        self.failures: dict[str, Exception] = {}
        self.is_closed = False
        self._allowed = threading.Semaphore(0)

    def look_up(self, constraint: Constraint) -> LoadedConstraint | None:
        return self.cache.get(str(constraint.value))

    def compile(self, constraint: Constraint) -> LoadedConstraint:
        name = str(constraint.value)
        if name in self.cache:
            return self.cache[name]
        self.begun.put(name)
        assert self._allowed.acquire(timeout=PATIENCE_S)
        if name in self.failures:
            raise self.failures.pop(name)
        table: Any = None
        self.cache[name] = LoadedConstraint(name.encode(), table)
        return self.cache[name]

    def release(self, num_constraints: int = 1) -> None:
        self._allowed.release(num_constraints)

    def close(self) -> None:
        self.is_closed = True
        self.release(1000)

    def next_begun(self) -> str:
        return self.begun.get(timeout=PATIENCE_S)


class Asker:
    """A caller, and what it has been answered: the names of its automata, or codes of errors."""

    def __init__(self, compile_queue: CompileQueue, caller: bytes) -> None:
        self._queue = compile_queue
        self._caller = caller
        self._answers: queue.Queue[str] = queue.Queue()

    def ask(self, name: str) -> Answer | Ticket:
        return self._queue.ask(self._caller, regex(name), lambda answer: self._answers.put(short(answer)))

    def tickets(self, *names: str) -> list[Ticket]:
        """All of which must wait."""
        asked = [self.ask(name) for name in names]
        tickets = [ticket for ticket in asked if isinstance(ticket, Ticket)]
        assert len(tickets) == len(asked), asked
        return tickets

    def answers(self, num_answers: int) -> list[str]:
        return [self._answers.get(timeout=PATIENCE_S) for _ in range(num_answers)]

    @property
    def has_no_answer(self) -> bool:
        return self._answers.empty()


def regex(name: str) -> Constraint:
    return Constraint("regex", name)


def short(answer: Answer) -> str:
    return answer.code if isinstance(answer, Error) else answer.key.decode()


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def asker(compiler: Compiler) -> Iterator[Callable[[str], Asker]]:
    stub: Any = compiler
    tested = CompileQueue(stub)
    yield lambda caller: Asker(tested, caller.encode())
    tested.close()
    assert compiler.is_closed


def test_what_is_known_does_not_wait(compiler: Compiler, asker: Callable[[str], Asker]) -> None:
    """I1."""
    asker("a").tickets("slow")
    assert compiler.next_begun() == "slow"
    table: Any = None
    compiler.cache["known"] = LoadedConstraint(b"known", table)
    assert asker("b").ask("known") is compiler.cache["known"]


def test_callers_take_turns(compiler: Compiler, asker: Callable[[str], Asker]) -> None:
    """I2. b comes while a's first is compiled and waits for that one alone; c for one of each."""
    a, b, c = asker("a"), asker("b"), asker("c")
    a.tickets(*(f"a{idx}" for idx in range(4)))
    assert compiler.next_begun() == "a0"
    b.tickets("b0", "b1", "b2")
    compiler.release()
    assert compiler.next_begun() == "b0"
    c.tickets("c0")
    compiler.release(7)
    assert [compiler.next_begun() for _ in range(6)] == ["a1", "c0", "b1", "a2", "b2", "a3"]
    assert a.answers(4) == ["a0", "a1", "a2", "a3"]
    assert b.answers(3) == ["b0", "b1", "b2"]
    assert c.answers(1) == ["c0"]


def test_what_nobody_waits_for_is_not_compiled(compiler: Compiler, asker: Callable[[str], Asker]) -> None:
    """I3, I5."""
    a, b = asker("a"), asker("b")
    (running,) = a.tickets("running")
    assert compiler.next_begun() == "running"
    gone, shared, kept = *a.tickets("gone", "shared"), b.tickets("shared")[0]
    a.tickets("last")
    tested = a._queue
    for ticket in (running, gone, shared):
        assert tested.withdraw(ticket)
        assert not tested.withdraw(ticket)
    compiler.release(3)
    assert compiler.next_begun() == "shared", "b waits for it"
    assert compiler.next_begun() == "last"
    assert (a.answers(1), b.answers(1)) == (["last"], ["shared"])
    assert not tested.withdraw(kept), "it has its answer"
    assert a.has_no_answer and b.has_no_answer
    assert "running" in compiler.cache, "what had begun is kept for the next"


def test_equal_constraints_are_compiled_once(compiler: Compiler, asker: Callable[[str], Asker]) -> None:
    a, b, c = asker("a"), asker("b"), asker("c")
    c.tickets("first", "same")
    assert compiler.next_begun() == "first"
    a.tickets("same", "same")
    b.tickets("other", "same")
    compiler.release()
    assert compiler.next_begun() == "same"
    a.tickets("same")
    compiler.release()
    assert a.answers(3) == ["same"] * 3
    assert b.answers(1) == ["same"], "though another of its own comes first"
    assert c.answers(2) == ["first", "same"]
    assert compiler.next_begun() == "other"
    compiler.release()
    assert b.answers(1) == ["other"]
    assert compiler.begun.empty()


@pytest.mark.parametrize("code", ["bad_constraint", "busy", "internal_error"])
def test_a_failure_is_answered_and_the_queue_goes_on(
    compiler: Compiler, asker: Callable[[str], Asker], code: Any
) -> None:
    """What another attempt may change is the answer of the one caller alone."""
    is_defect = code == "internal_error"
    failure = ValueError("a defect") if is_defect else ConstraintProblem(code, "so it is", regex("fails"))
    compiler.failures["fails"] = failure
    a, b = asker("a"), asker("b")
    a.tickets("fails", "fails", "works")
    b.tickets("fails")
    compiler.release(4)
    assert a.answers(3) == [code, code, "works"]
    assert b.answers(1) == [code if code == "bad_constraint" else "fails"]


@pytest.mark.parametrize("limit", ["MAX_WAITING_PER_CALLER", "MAX_WAITING"])
def test_so_many_wait_and_no_more(
    compiler: Compiler, asker: Callable[[str], Asker], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """I4."""
    monkeypatch.setattr(compile_queue, limit, 3)
    a, b = asker("a"), asker("b")
    first, *_ = a.tickets("0", "1", "2")
    assert compiler.next_begun() == "0"
    error = a.ask("3")
    assert isinstance(error, Error) and error.code == "busy" and error.final
    assert "fewer than 3" in error.expected and "send it again" in error.remedy
    assert http_error_of(error).status == 429
    assert isinstance(a.ask("2"), Ticket), "one that waits already takes no more room"
    assert isinstance(b.ask("4"), Ticket) == (limit == "MAX_WAITING_PER_CALLER")
    (other,) = a.tickets("1")
    assert a._queue.withdraw(other) and isinstance(a.ask("3"), Error), "another waits for it yet"
    compiler.release()
    assert a.answers(1) == ["0"]
    assert isinstance(a.ask("3"), Ticket)
    assert not a._queue.withdraw(first)


def test_what_waits_at_the_end_is_not_compiled(compiler: Compiler, asker: Callable[[str], Asker]) -> None:
    a = asker("a")
    a.tickets("running", "waits")
    assert compiler.next_begun() == "running"
    a._queue.close()
    a.ask("late")
    assert set(compiler.cache) == {"running"}
