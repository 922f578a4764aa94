"""The asyncio client of a blinkimp server: blinkimp.client with `async` in front.

    async with AsyncClient("tcp://127.0.0.1:5555") as client:
        async for chunk in client.submit("def read_file(path):", max_tokens=64):
            print(chunk.text, end="", flush=True)
        completions = await asyncio.gather(*(client.generate(prompt) for prompt in prompts))

The event loop watches the socket while the client is open; streams of one client run concurrently. Test: pytest tests/host/test_clients.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import zmq

from blinkimp.client import DEFAULT_TIMEOUT_S, configure_socket, connect_socket
from blinkimp.client_core import CallState, Chunk, ClientCore, Completion, RequestState
from blinkimp.client_errors import BadRequestError, ClientError, ClosedError, RequestRefusedError, ServerTimeoutError
from blinkimp.client_request import deadline_of, timeout_of
from blinkimp.protocol import Finish, GetHealth, GetStats, Health, Stats
from blinkimp.transport import Security

__all__ = [
    "AsyncClient",
    "AsyncTokenStream",
    "BadRequestError",
    "Chunk",
    "ClientError",
    "ClosedError",
    "Completion",
    "RequestRefusedError",
    "ServerTimeoutError",
]

TICK_PERIOD_S = 0.25


class AsyncClient:
    """One connection, to be used as `async with`. timeout_s: how long the server may be silent while something is asked of it."""

    def __init__(
        self, endpoint: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, security: Security | None = None
    ) -> None:
        timeout_s = timeout_of(timeout_s)
        # A plain socket and the event loop's add_reader: several times faster than zmq.asyncio, and sends need no await.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        configure_socket(self._socket, security)
        connect_socket(self._socket, endpoint, self._context)
        self._core = ClientCore(endpoint, self._send, timeout_s=timeout_s, now=time.monotonic())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._failure: ClientError | None = None

    async def __aenter__(self) -> AsyncClient:
        self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what runs and disconnects; a stream that had not ended raises ClosedError."""
        if self._socket.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        if self._ticker is not None:
            self._ticker.cancel()
        self._core.close()
        self._socket.setsockopt(zmq.LINGER, 200)  # for the cancels
        self._socket.close()
        self._context.term()

    # ---- Requests --------------------------------------------------------------------------------------------------
    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = True,
        detokenize: bool = True,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> AsyncTokenStream:
        """Starts a request; see blinkimp.client.Client.submit. To be called in the running event loop."""
        self._start()
        now = time.monotonic()
        deadline = deadline_of(deadline_s, now)
        state = self._core.submit(prompt, sampling, now, stream=stream, detokenize=detokenize)
        return AsyncTokenStream(self, state, deadline)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        detokenize: bool = True,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Completion:
        """The whole completion, in one message."""
        return await self.submit(
            prompt, stream=False, detokenize=detokenize, deadline_s=deadline_s, **sampling
        ).result()

    async def stats(self) -> Stats:
        reply = await self._ask(GetStats)
        assert isinstance(reply, Stats)
        return reply

    async def health(self) -> Health:
        reply = await self._ask(GetHealth)
        assert isinstance(reply, Health)
        return reply

    async def _ask(self, kind: type[GetStats] | type[GetHealth]) -> Stats | Health:
        self._start()
        call: CallState = self._core.ask(kind, time.monotonic())
        changed = asyncio.Event()
        call.wake = changed.set
        try:
            while call.reply is None:
                if call.failure is not None:
                    raise call.failure
                await changed.wait()
                changed.clear()
        finally:
            self._core.forget(call)
        return call.reply

    # ---- Socket ----------------------------------------------------------------------------------------------------
    def _send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            # The descriptor is edge-triggered, and this send may have eaten an edge that announced input.
            if self._loop is not None:
                self._loop.call_soon(self._drain)
        return True

    def _start(self) -> None:
        self._core.check_open()
        if self._failure is not None:
            raise self._failure
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._drain)
            self._tick()

    def _tick(self) -> None:
        assert self._loop is not None, "_tick() before _start()"
        self._drain()
        self._core.tick(time.monotonic())
        self._ticker = self._loop.call_later(TICK_PERIOD_S, self._tick)

    def _drain(self) -> None:
        """Reads until ZeroMQ has nothing more: only then does the descriptor announce the next input."""
        while not self._socket.closed and self._failure is None:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._core.handle(frame, time.monotonic())
            except (
                ClientError
            ) as failure:  # a server that does not speak the protocol: everything that waits must hear of it
                self._failure = failure
                self._core.fail_all(failure)


class AsyncTokenStream:
    """One running request: iterate over its chunks with `async for`, or await the `result()`."""

    def __init__(self, client: AsyncClient, state: RequestState, deadline: float | None) -> None:
        self._client = client
        self._state = state
        self._deadline = deadline
        self._taken: list[Chunk] = []
        self._changed = asyncio.Event()
        state.wake = self._changed.set

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        state = self._state
        while not state.chunks:
            if state.failure is not None:
                raise state.failure
            if state.finish is not None:
                raise StopAsyncIteration
            self._changed.clear()
            await self._wait()
        chunk = state.chunks.popleft()
        self._taken.append(chunk)
        return chunk

    async def _wait(self) -> None:
        left_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            await asyncio.wait_for(self._changed.wait(), left_s)
        except TimeoutError:
            state = self._state
            self._client._core.forget(state)
            state.failure = ServerTimeoutError(
                f"the request had {len(state.output_ids)} of {state.submit.sampling.max_tokens} tokens at its deadline; "
                "expected all; raise deadline_s or ask for fewer"
            )

    async def text_pieces(self) -> AsyncIterator[str]:
        """Only the text, as it becomes whole."""
        async for chunk in self:
            if chunk.text:
                yield chunk.text

    async def tokens(self) -> AsyncIterator[int]:
        """Only the token ids, one at a time."""
        async for chunk in self:
            for token in chunk.token_ids:
                yield token

    async def result(self) -> Completion:
        """Waits for the end; what was iterated over before is part of it."""
        async for _ in self:
            pass
        return self._state.completion(self._taken)

    @property
    def finish(self) -> Finish | None:
        """The server's last message, once it is here."""
        return self._state.finish

    def cancel(self) -> None:
        """Asks the server to stop; the stream ends with finish reason "cancelled" unless it ended before."""
        self._client._core.cancel(self._state)

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leaving early cancels."""
        if not self._state.is_ended:
            self._client._core.forget(self._state)
