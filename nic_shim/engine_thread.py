"""The thread between an event loop and a queue pair: takes requests from the loop, hands back in batches what the engine says.

Asyncio costs tens of microseconds an event, so tokens do not come one by one: this thread drains the completion ring in bulk, detokenises,
and gives the loop one callback a turn with all that is new. Used by the HTTP ingress. Test: pytest tests/host/test_http_ingress.py

Invariants
I1  A LiveRequest belongs to this thread from submit() on; the loop only sees the messages that it makes.
I2  Every request that was submitted gets exactly one Finish or Error, also when this thread fails.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.garbage import Collector
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.memory_limit import MemoryLimit
from blinkimp.protocol import Error, Finish, Tokens

_log = logging.getLogger("blinkimp.ingress")

BUSY_WAIT_S: Final = 0.002  # longest sleep while requests run; completions and new requests end it early
IDLE_WAIT_MS: Final = 20
MAX_TOKENS_PER_MESSAGE: Final = 1 << 20
MEMORY_CHECK_TURNS: Final = 1024

Delivery = tuple[Any, list[Tokens | Finish | Error]]  # a request's session, and what is new for it


class EngineThread:
    """Owns the link. deliver(batch) and on_failure(error) run on `loop`."""

    def __init__(
        self,
        link: EngineLink,
        loop: AbstractEventLoop,
        deliver: Callable[[list[Delivery]], None],
        on_failure: Callable[[BaseException], None],
        *,
        max_memory_bytes: int,
    ) -> None:
        self.link = link
        self.num_batches = 0
        self._loop = loop
        self._deliver = deliver
        self._on_failure = on_failure
        self._memory = MemoryLimit(max_memory_bytes)
        # Appended by the loop, emptied here; deque's methods are atomic.
        self._inbox: deque[tuple[bool, LiveRequest]] = deque()
        self._live: dict[LiveRequest, None] = {}
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self._event_fd, select.POLLIN)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blinkimp-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and detaches. Any thread."""
        self._stop.set()
        self._wake()
        self._thread.join()
        os.close(self._event_fd)
        self._memory.close()

    # ---- For the loop ----------------------------------------------------------------------------------------------
    def submit(self, request: LiveRequest) -> None:
        self._inbox.append((True, request))
        self._wake()

    def cancel(self, requests: Iterable[LiveRequest]) -> None:
        """Stops them; harmless for those that have ended. Their last messages still come."""
        self._inbox.extend((False, request) for request in requests)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._event_fd, 1)

    # ---- The thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            num_turns = 0
            collector = Collector()
            while not self._stop.is_set():
                touched = self._take_inbox()
                touched.update(dict.fromkeys(self.link.pump()))
                touched.update(self.link.poll())
                touched.update(dict.fromkeys(self.link.keep_attached()))
                self._hand_over(touched)
                if self.link.trace is not None:
                    self.link.trace.handed_over()
                num_turns += 1
                collector.look(time.monotonic())
                if num_turns % MEMORY_CHECK_TURNS == 0:
                    self._memory.check()
                self._wait()
        except BaseException as error:  # the process cannot go on without this thread: the loop ends it
            _log.exception("the engine thread failed")
            self._fail_all(error)
        finally:
            self.link.close()

    def _take_inbox(self) -> dict[LiveRequest, None]:
        touched: dict[LiveRequest, None] = {}
        while self._inbox:
            is_new, request = self._inbox.popleft()
            if is_new:
                self._live[request] = None
                self.link.submit(request)
            elif request in self._live:
                self.link.cancel(request)
            if request.end is not None:
                touched[request] = None
        return touched

    def _hand_over(self, touched: dict[LiveRequest, None]) -> None:
        batch: list[Delivery] = []
        for request in touched:
            messages: list[Tokens | Finish | Error] = []
            if request not in self._live:
                continue
            if request.has_unsent():
                messages.append(request.take_tokens(MAX_TOKENS_PER_MESSAGE))
            if request.end is not None:
                messages.append(request.end)
                del self._live[request]
            if messages:
                batch.append((request.session, messages))
        if batch:
            self.num_batches += 1
            self._loop.call_soon_threadsafe(self._deliver, batch)

    def _wait(self) -> None:
        if self._inbox:
            return
        if self.link.has_work:
            self.link.wait(BUSY_WAIT_S, self._event_fd)
        else:
            self._poller.poll(IDLE_WAIT_MS)
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return

    def _fail_all(self, error: BaseException) -> None:
        message = Error(
            0, "internal_error", "the ingress failed", type(error).__name__, "tokens",
            "submit again; the ingress is started anew, and its log says what happened", final=True,
        )  # fmt: skip
        for is_new, request in self._inbox:
            if is_new:
                self._live[request] = None
        batch: list[Delivery] = []
        for request in self._live:
            end = Error(
                request.client_id, message.code, message.what, message.got, message.expected, message.remedy, True
            )
            batch.append((request.session, [end]))
        self._loop.call_soon_threadsafe(self._deliver, batch)
        self._loop.call_soon_threadsafe(self._on_failure, error)
