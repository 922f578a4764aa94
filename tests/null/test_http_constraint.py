"""nic_shim/http_constraint.py: a client that goes or has no time left gives its place up, and one that stays has its answer.

Run: pytest tests/null/test_http_constraint.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from blinkimp.nic_shim.compile_queue import Answer, CompileQueue, Ticket
from blinkimp.nic_shim.constraint_compiler import ConstraintProblem, LoadedConstraint
from blinkimp.nic_shim.http_constraint import OverdueError, compile_constraint
from blinkimp.nic_shim.http_errors import HttpError
from blinkimp.nic_shim.live_request import NO_DEADLINE
from blinkimp.protocol import Constraint
from tests.support import PATIENCE_S

CONSTRAINT = Constraint("regex", "[a-z]")
NO_TABLE: Any = None
COMPILED = LoadedConstraint(b"", NO_TABLE)


class FakeQueue:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.callers: list[bytes] = []
        self.asked = asyncio.Event()
        self._answer: Callable[[Answer], None] | None = None
        self.num_withdrawn = 0
        job: Any = None
        self.ticket = Ticket(job, lambda _: None)

    def ask(self, caller: bytes, _: Constraint, answer: Callable[[Answer], None]) -> Answer | Ticket:
        self.callers.append(caller)
        self._answer = answer
        self.asked.set()
        return self.ticket

    def answer(self, answer: Answer) -> None:
        assert self._answer is not None, "nothing was asked for"
        self._answer(answer)

    def withdraw(self, ticket: Ticket) -> bool:
        assert ticket is self.ticket
        self.num_withdrawn += 1
        return True


def request_of(receive: Callable[[], Any], caller: bytes) -> Any:
    return SimpleNamespace(state=SimpleNamespace(caller=caller), client=("127.0.0.1", 4711), receive=receive)


async def compiled(queue: Any, request: Any, deadline_ns: int) -> LoadedConstraint | None:
    tested: CompileQueue = queue
    return await asyncio.wait_for(compile_constraint(tested, request, CONSTRAINT, deadline_ns), PATIENCE_S)


async def begun(
    key: bytes = b"", deadline_ns: int = NO_DEADLINE
) -> tuple[FakeQueue, asyncio.Queue[dict[str, str]], asyncio.Task[LoadedConstraint | None]]:
    """A request whose constraint has been asked for, and the messages of its client."""
    queue, messages = FakeQueue(), asyncio.Queue[dict[str, str]]()
    task = asyncio.create_task(compiled(queue, request_of(messages.get, key), deadline_ns))
    await asyncio.wait_for(queue.asked.wait(), PATIENCE_S)
    return queue, messages, task


def test_a_client_that_goes_gives_its_place_up() -> None:
    async def scenario() -> None:
        queue, messages, task = await begun()
        assert not queue.num_withdrawn
        messages.put_nowait({"type": "http.request"})
        messages.put_nowait({"type": "http.disconnect"})
        with pytest.raises(HttpError, match="the client has gone") as caught:
            await task
        assert (caught.value.status, queue.num_withdrawn) == (499, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("time_s", [-1.0, 0.02])
def test_a_request_without_time_gives_its_place_up(time_s: float) -> None:
    async def scenario() -> None:
        deadline_ns = time.monotonic_ns() + int(time_s * 1e9)
        queue, messages, task = await begun(deadline_ns=deadline_ns)
        with pytest.raises(OverdueError):
            await task
        assert time.monotonic_ns() > deadline_ns, "not a moment before: it would run without"
        assert queue.num_withdrawn == 1
        await asyncio.sleep(0)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.sleep(0)
        assert messages.qsize() == 1, "whoever runs the request is the one to learn of it"

    asyncio.run(scenario())


@pytest.mark.parametrize("deadline_ns", [0, NO_DEADLINE])
def test_none_means_that_there_is_no_constraint_however_late_it_is(deadline_ns: int) -> None:
    async def scenario() -> None:
        queue: Any = FakeQueue()
        request = request_of(asyncio.Queue[dict[str, str]]().get, b"")
        assert await compile_constraint(queue, request, None, deadline_ns) is None
        assert not queue.callers, "nothing to ask for"

    asyncio.run(scenario())


def test_an_answer_within_the_time_counts() -> None:
    async def scenario() -> None:
        queue, _, task = await begun(deadline_ns=time.monotonic_ns() + int(PATIENCE_S * 1e9))
        queue.answer(COMPILED)
        assert await task is COMPILED

    asyncio.run(scenario())


def test_a_client_that_stays_has_its_answer_and_may_still_go() -> None:
    async def scenario() -> None:
        queue, messages, task = await begun()
        await asyncio.to_thread(queue.answer, COMPILED)
        assert await task is COMPILED
        await asyncio.sleep(0)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.sleep(0)
        assert messages.qsize() == 1, "whoever runs the request is the one to learn of it"

    asyncio.run(scenario())


def test_an_error_is_the_reply_to_this_request() -> None:
    async def scenario() -> None:
        queue, _, task = await begun()
        queue.answer(ConstraintProblem("busy", "the machine has no time", CONSTRAINT).error)
        with pytest.raises(HttpError, match="no time") as caught:
            await task
        assert (caught.value.status, caught.value.retry_after_s) == (429, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize(("key", "caller"), [(b"digest", b"digest"), (b"", b"('127.0.0.1', 4711)")])
def test_a_caller_is_a_key_or_else_a_connection(key: bytes, caller: bytes) -> None:
    async def scenario() -> None:
        queue, _, task = await begun(key)
        assert queue.callers == [caller]
        queue.answer(COMPILED)
        await task

    asyncio.run(scenario())
