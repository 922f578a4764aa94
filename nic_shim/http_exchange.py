"""One HTTP request that runs in the engine: its choices, what has arrived for them, and the wait for more.

Made by nic_shim/http_generate.py, filled by the engine thread's batches. All on the event loop. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Receive

from blinkimp.nic_shim.engine_thread import Delivery, EngineThread
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Error, Finish, Tokens


class ClientGoneError(Exception):
    """The client has closed the connection; nobody is there to answer."""


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Exchange:
    """`choices[i]` has client_id i. on_end runs once, when every choice has ended, and everything else that the exchange waits for:
    then it is out of the engine, and lets go of the choices, whose `session` it is: what it was goes without the collector.
    on_close runs once, when besides nobody reads any more: the reply has been sent, or there is none.
    Helpers are requests whose output is no choice's."""

    def __init__(self, engine: EngineThread, on_end: Callable[[], None], on_close: Callable[[Exchange], None]) -> None:
        self.choices: list[LiveRequest] = []  # while any of them runs
        self.num_unfinished = 0  # choices, and 1 while held
        self._is_held = False
        self._helpers: set[LiveRequest] = set()  # that run
        self._engine = engine
        self._on_end = on_end
        self._on_close = on_close
        self._is_closed = False
        self._pending: list[Tokens | Finish | Error] = []
        self._waiter: asyncio.Future[None] | None = None
        self.is_gone = False
        self._watcher: asyncio.Task[None] | None = None

    def start(self, requests: list[LiveRequest], receive: Receive, *, is_held: bool = False) -> None:
        """Submits the choices; from now on a disconnect cancels them. is_held: there will be helpers, until release() or close()."""
        self.choices = requests
        self._is_held = is_held
        self.num_unfinished = len(requests) + is_held
        for request in requests:
            self._engine.submit(request)
        self._watcher = asyncio.get_running_loop().create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        await disconnected(receive)
        self.is_gone = True
        self.cancel()
        self._wake()

    def abandon(self) -> None:
        """Ends an exchange that was never started."""
        self._on_end()
        self._on_close(self)

    def cancel(self) -> None:
        """Stops what still runs. Harmless when nothing does."""
        if self.num_unfinished:
            self._engine.cancel([*self.choices, *self._helpers])

    def close(self) -> None:
        """Nobody reads any more: what runs is cancelled."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self.cancel()
        self.release()
        self._is_closed = True
        if self.num_unfinished == 0:
            self._on_close(self)

    # ---- Helpers ---------------------------------------------------------------------------------------------------
    def start_helper(self, request: LiveRequest) -> None:
        """Raises ClientGoneError."""
        assert self._is_held, "start(is_held=True) says that there will be helpers"
        if self.is_gone:
            raise ClientGoneError
        self._helpers.add(request)
        self._engine.submit(request)

    def end_helper(self, request: LiveRequest) -> None:
        """Its end has come, or nobody waits for it any more."""
        if request.end is None:
            self._engine.cancel([request])
        self._helpers.discard(request)

    def release(self) -> None:
        """There will be no more helpers."""
        if self._is_held:
            self._is_held = False
            self._count_end()

    def _count_end(self) -> None:
        self.num_unfinished -= 1
        if self.num_unfinished == 0:
            self.choices = []  # not clear(): the list is the caller's as well
            self._on_end()
            if self._is_closed:
                self._on_close(self)

    # ---- What comes ------------------------------------------------------------------------------------------------
    def push(self, messages: list[Tokens | Finish | Error]) -> None:
        """What the engine said for one choice, in order."""
        self._pending += messages
        if not isinstance(messages[-1], Tokens):
            self._count_end()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[Tokens | Finish | Error]:
        """All that has arrived since the last call, at least one message. Raises ClientGoneError."""
        while not self._pending:
            if self.is_gone:
                raise ClientGoneError
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.is_gone:
            raise ClientGoneError
        messages, self._pending = self._pending, []
        return messages


def deliver(batch: list[Delivery]) -> None:
    """The engine thread's batches end here."""
    exchange: Any
    for exchange, messages in batch:
        exchange.push(messages)
