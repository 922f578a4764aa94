"""The synchronous client of a blinkimp server.

    from blinkimp.client import Client

    with Client("tcp://127.0.0.1:5555") as client:
        for chunk in client.submit("def read_file(path):", max_tokens=64, temperature=0):
            print(chunk.text, end="", flush=True)
        completion = client.generate([1, 2, 3], max_tokens=8)      # token ids, whole result
        print(client.health().status, client.stats().engine["num_running"])

Several streams of one client may run at once; the client belongs to one thread. It outlives restarts of the server: requests go on
where they stopped. Test: pytest tests/host/test_clients.py
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import zmq

from blinkimp.client_core import CallState, Chunk, ClientCore, Completion, RequestState
from blinkimp.client_errors import (
    BadRequestError,
    ClientError,
    ClosedError,
    EndpointError,
    RequestRefusedError,
    ServerTimeoutError,
)
from blinkimp.client_request import deadline_of, timeout_of
from blinkimp.protocol import Finish, GetHealth, GetStats, Health, Stats
from blinkimp.transport import Security, detect_lost_hosts

__all__ = [
    "BadRequestError",
    "Chunk",
    "Client",
    "ClientError",
    "ClosedError",
    "Completion",
    "EndpointError",
    "RequestRefusedError",
    "ServerTimeoutError",
    "TokenStream",
]

DEFAULT_TIMEOUT_S = 30.0
MAX_PORT = 65535


def configure_socket(socket: zmq.Socket[Any], security: Security | None) -> None:
    """What the sync and the async client's DEALER sockets have in common."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    detect_lost_hosts(socket)
    if security is not None:
        security(socket)


def connect_socket(socket: zmq.Socket[Any], endpoint: str, context: zmq.Context[Any]) -> None:
    """Raises EndpointError, and ends the context, which has no other socket yet: an open one would keep the process from ending."""
    try:
        port = endpoint.rpartition(":")[2]
        if endpoint.startswith("tcp://") and port.isdecimal() and int(port) > MAX_PORT:
            raise zmq.ZMQError(errno.EINVAL)  # libzmq would connect to another port, without a word
        socket.connect(endpoint)
    except (zmq.ZMQError, AttributeError, TypeError, UnicodeEncodeError) as error:  # the latter of what is no text
        context.destroy()
        reason = zmq.strerror(error.errno or 0) if isinstance(error, zmq.ZMQError) else "no text that is UTF-8"
        raise EndpointError(
            f"endpoint: got {endpoint!r} ({reason}), expected a server's, such as "
            "tcp://127.0.0.1:5555 or ipc:///run/blinkimp; correct it"
        ) from None


class Client:
    """One connection. timeout_s: how long the server may be silent while something is asked of it."""

    def __init__(
        self, endpoint: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, security: Security | None = None
    ) -> None:
        timeout_s = timeout_of(timeout_s)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        configure_socket(self._socket, security)
        connect_socket(self._socket, endpoint, self._context)
        self._core = ClientCore(endpoint, self._send, timeout_s=timeout_s, now=time.monotonic())

    def close(self) -> None:
        """Cancels what runs and disconnects; a stream that had not ended raises ClosedError."""
        if self._socket.closed:
            return
        self._core.close()
        self._socket.setsockopt(zmq.LINGER, 200)  # for the cancels
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- Requests --------------------------------------------------------------------------------------------------
    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = True,
        detokenize: bool = True,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> TokenStream:
        """Starts a request with text or token ids; iterate over the result.

        sampling: fields of blinkimp.protocol.Sampling (temperature, top_k, top_p, min_p, seed, max_tokens, stop_token_ids,
        ignore_eos). deadline_s: time for the whole request; then it is cancelled and ServerTimeoutError raised. Raises BadRequestError
        for what cannot be sent.
        """
        now = time.monotonic()
        deadline = deadline_of(deadline_s, now)
        state = self._core.submit(prompt, sampling, now, stream=stream, detokenize=detokenize)
        return TokenStream(self, state, deadline)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        detokenize: bool = True,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Completion:
        """The whole completion, in one message."""
        return self.submit(prompt, stream=False, detokenize=detokenize, deadline_s=deadline_s, **sampling).result()

    def stats(self) -> Stats:
        reply = self._ask(GetStats)
        assert isinstance(reply, Stats)
        return reply

    def health(self) -> Health:
        reply = self._ask(GetHealth)
        assert isinstance(reply, Health)
        return reply

    def _ask(self, kind: type[GetStats] | type[GetHealth]) -> Stats | Health:
        call: CallState = self._core.ask(kind, time.monotonic())
        while call.reply is None:
            if call.failure is not None:
                raise call.failure
            self._pump(None)
        return call.reply

    # ---- Socket ----------------------------------------------------------------------------------------------------
    def _send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _pump(self, deadline: float | None) -> None:
        """Waits for the server's next frame, the next tick or the deadline, and handles what there is."""
        now = time.monotonic()
        wait_s = self._core.seconds_to_tick(now)
        if deadline is not None:
            wait_s = min(wait_s, max(0.0, deadline - now))
        if self._socket.poll(max(1, int(wait_s * 1000))):
            while True:
                try:
                    frame = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._core.handle(frame, time.monotonic())
        self._core.tick(time.monotonic())


class TokenStream:
    """One running request: iterate over its chunks, or take the `result()`."""

    def __init__(self, client: Client, state: RequestState, deadline: float | None) -> None:
        self._client = client
        self._state = state
        self._deadline = deadline
        self._taken: list[Chunk] = []

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        state = self._state
        while not state.chunks:
            if state.failure is not None:
                raise state.failure
            if state.finish is not None:
                raise StopIteration
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._client._core.forget(state)
                state.failure = ServerTimeoutError(
                    f"the request had {len(state.output_ids)} of {state.submit.sampling.max_tokens} tokens at its deadline; "
                    "expected all; raise deadline_s or ask for fewer"
                )
                raise state.failure
            self._client._pump(self._deadline)
        chunk = state.chunks.popleft()
        self._taken.append(chunk)
        return chunk

    def text_pieces(self) -> Iterator[str]:
        """Only the text, as it becomes whole."""
        for chunk in self:
            if chunk.text:
                yield chunk.text

    def tokens(self) -> Iterator[int]:
        """Only the token ids, one at a time."""
        for chunk in self:
            yield from chunk.token_ids

    def result(self) -> Completion:
        """Waits for the end; what was iterated over before is part of it."""
        for _ in self:
            pass
        return self._state.completion(self._taken)

    @property
    def finish(self) -> Finish | None:
        """The server's last message, once it is here."""
        return self._state.finish

    def cancel(self) -> None:
        """Asks the server to stop; the stream ends with finish reason "cancelled" unless it ended before."""
        self._client._core.cancel(self._state)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        """Leaving early cancels."""
        if not self._state.is_ended:
            self._client._core.forget(self._state)
