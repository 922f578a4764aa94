"""An HTTP request's constraint: compiled in its turn, while the client is there and the request has time.

Called by nic_shim/http_app.py, on the event loop. Test: pytest tests/null/test_http_constraint.py
"""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.types import Receive

from blinkimp.nic_shim.compile_queue import Answer, CompileQueue, Ticket
from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.http_errors import HttpError, http_error_of
from blinkimp.nic_shim.http_exchange import disconnected
from blinkimp.nic_shim.http_request_log import CLOSED_STATUS
from blinkimp.protocol import Constraint, Error


class OverdueError(Exception):
    """The request's time was over before its constraint was compiled: it may not run."""


async def compile_constraint(
    queue: CompileQueue, request: Request, constraint: Constraint | None, deadline_ns: int
) -> LoadedConstraint | None:
    """None where there is none. Raises HttpError, and OverdueError behind the deadline (of LiveRequest)."""
    if constraint is None:
        return None
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Answer] = loop.create_future()

    def settle(answer: Answer) -> None:
        if not answered.done():
            answered.set_result(answer)

    def hand_over(answer: Answer) -> None:  # on the queue's thread
        loop.call_soon_threadsafe(settle, answer)

    # Without keys all callers are one to the gate. Here a connection is one, as over ZeroMQ: else one client would hold up all.
    caller = request.state.caller or repr(request.client).encode()
    found = queue.ask(caller, constraint, hand_over)
    if isinstance(found, Ticket):
        await _wait_for(answered, queue, found, request.receive, deadline_ns)
        found = answered.result()
    if isinstance(found, Error):
        raise http_error_of(found)
    return found


async def _wait_for(
    answered: asyncio.Future[Answer], queue: CompileQueue, ticket: Ticket, receive: Receive, deadline_ns: int
) -> None:
    """Until there is an answer. Gives the place in the queue up where the client goes (HttpError) or the time does (OverdueError)."""
    gone = asyncio.get_running_loop().create_task(disconnected(receive))
    try:
        while not answered.done() and not gone.done() and (left_ns := deadline_ns - time.monotonic_ns()) >= 0:
            await asyncio.wait((answered, gone), timeout=left_ns / 1e9, return_when=asyncio.FIRST_COMPLETED)
        is_gone = gone.done()
    finally:
        gone.cancel()
        queue.withdraw(ticket)
    if answered.done():
        return
    if is_gone:
        raise HttpError(
            CLOSED_STATUS,
            "the client has gone: got a closed connection while its constraint waited, expected somebody to answer; send it again",
            code="client_gone",
        )
    raise OverdueError
