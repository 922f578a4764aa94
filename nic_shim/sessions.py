"""The clients of a ZeroMQ ingress: what each is owed, and sending it without ever waiting for anybody.

A session is the state of one ROUTER identity. It exists while something is owed to the client or runs for it, no longer.
Called by nic_shim/message_handler.py and nic_shim/zmq_ingress.py, from one thread. Test: pytest tests/host/test_zmq_ingress.py

Invariants
I1  A client that stops reading costs: the frames that ZeroMQ holds for it (SEND_HWM), one frame here, MAX_CONTROL_MESSAGES
    replies, and 8 bytes plus text for each token of its requests, of which it may have max_requests_per_client. Nothing of
    its output is lost while it stays within stall_timeout_s.
I2  What one client is owed is sent in order; tokens that arrived between two sends share a message.
I3  A client that is gone (EHOSTUNREACH), or that reads nothing for stall_timeout_s, has its requests cancelled. A connection that closes
    makes us look for who is gone at once, also among those who are owed nothing at the moment.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import AliveReply, ServerMessage, encode_server_messages

MAX_CONTROL_MESSAGES = 256  # replies that wait for one client; more are dropped: it floods and does not read
MAX_TOKENS_PER_FRAME = 4096
MAX_CONTROL_PER_FRAME = 64
ALIVE_PERIOD_S = 1.0  # a client with requests hears from us this often, and its loss is found out
RETRY_PERIOD_S = 0.005  # between attempts at a client whose pipe is full


class SendResult(enum.Enum):
    SENT = 1
    FULL = 2  # the client does not read: try again later
    GONE = 3


@dataclass
class SessionCounters:
    clients_gone: int = 0
    clients_stalled: int = 0
    replies_dropped: int = 0
    frames_sent: int = 0
    bytes_sent: int = 0


class Session:
    """One client."""

    def __init__(self, identity: bytes, caller: bytes) -> None:
        self.identity = identity
        self.caller = caller  # whose quotas count: its CURVE key, else the connection itself
        self.requests: dict[int, LiveRequest] = {}  # by the client's id; until their end is in a frame
        self.dirty: dict[LiveRequest, None] = {}  # requests with something to send
        self.control: deque[ServerMessage] = deque()
        self.frame: bytes | None = None  # built, not yet taken by ZeroMQ
        self.blocked_since: float | None = None
        self.retry_at = 0.0
        self.last_sent_at = time.monotonic()

    @property
    def is_idle(self) -> bool:
        return not (self.requests or self.control or self.frame)

    def build_frame(self) -> bytes | None:
        """The next frame, whose content leaves the session; None when nothing is owed."""
        messages: list[ServerMessage] = []
        while self.control and len(messages) < MAX_CONTROL_PER_FRAME:
            messages.append(self.control.popleft())
        num_tokens_left = MAX_TOKENS_PER_FRAME
        for request in list(self.dirty):
            if request.has_unsent():
                tokens = request.take_tokens(num_tokens_left)
                num_tokens_left -= len(tokens.token_ids)
                messages.append(tokens)
            if not request.has_unsent():
                del self.dirty[request]
                if request.end is not None:
                    messages.append(request.end)
                    del self.requests[request.client_id]
            if num_tokens_left <= 0:
                break
        return encode_server_messages(messages) if messages else None


class SessionTable:
    """All sessions. `send(identity, frame)` never blocks; `cancel(request)` stops one in the engine."""

    def __init__(
        self,
        send: Callable[[bytes, bytes], SendResult],
        cancel: Callable[[LiveRequest], None],
        *,
        stall_timeout_s: float,
    ) -> None:
        self.sessions: dict[bytes, Session] = {}
        self.counters = SessionCounters()
        self.num_requests = 0  # of all sessions
        self._num_requests_of: dict[bytes, int] = {}  # by caller; none is 0
        self._send = send
        self._cancel = cancel
        self._stall_timeout_s = stall_timeout_s
        self._ready: dict[Session, None] = {}  # sessions that are owed something
        self._blocked: dict[Session, None] = {}

    @property
    def is_idle(self) -> bool:
        return not self.sessions

    def open(self, identity: bytes, caller: bytes) -> Session:
        session = self.sessions.get(identity)
        if session is None:
            session = self.sessions[identity] = Session(identity, caller)
        return session

    def num_requests_of(self, caller: bytes) -> int:
        return self._num_requests_of.get(caller, 0)

    def _count(self, session: Session, num_more: int) -> None:
        if num_more:
            self.num_requests += num_more
            self._num_requests_of[session.caller] = self.num_requests_of(session.caller) + num_more
            if not self._num_requests_of[session.caller]:
                del self._num_requests_of[session.caller]

    def settle(self, session: Session) -> None:
        """A session that nothing is owed to, and nothing runs for, goes. (A message need not have an answer.)"""
        if session.is_idle:
            self.sessions.pop(session.identity, None)

    def add_request(self, session: Session, request: LiveRequest) -> None:
        session.requests[request.client_id] = request
        self._count(session, 1)

    # ---- Owe -------------------------------------------------------------------------------------------------------
    def reply(self, session: Session, message: ServerMessage) -> None:
        if len(session.control) >= MAX_CONTROL_MESSAGES:
            self.counters.replies_dropped += 1
            return
        session.control.append(message)
        self._ready[session] = None

    def touch(self, requests: Iterable[LiveRequest]) -> None:
        """These have new tokens or have ended."""
        for request in requests:
            session: Session = request.session
            if session.requests.get(request.client_id) is request:  # else its client is gone
                session.dirty[request] = None
                self._ready[session] = None

    # ---- Send ------------------------------------------------------------------------------------------------------
    def flush(self) -> None:
        """Sends what can be sent now."""
        now = time.monotonic()
        for session in list(self._ready):
            if session.blocked_since is None or now >= session.retry_at:
                self._flush_session(session, now)

    def _flush_session(self, session: Session, now: float) -> None:
        while True:
            if session.frame is None:
                num_before = len(session.requests)
                session.frame = session.build_frame()
                self._count(session, len(session.requests) - num_before)
            if session.frame is None:
                break
            result = self._send(session.identity, session.frame)
            if result is SendResult.FULL:
                session.blocked_since = session.blocked_since or now
                session.retry_at = now + RETRY_PERIOD_S
                self._blocked[session] = None
                if now - session.blocked_since > self._stall_timeout_s:
                    self.counters.clients_stalled += 1
                    self.drop(session)
                return
            if result is SendResult.GONE:
                self.counters.clients_gone += 1
                self.drop(session)
                return
            self.counters.frames_sent += 1
            self.counters.bytes_sent += len(session.frame)
            session.frame = None
            session.last_sent_at = now
            session.blocked_since = None
            self._blocked.pop(session, None)
        self._ready.pop(session, None)
        self.settle(session)

    def drop(self, session: Session) -> None:
        """Forgets a client (I3)."""
        for request in session.requests.values():
            self._cancel(request)
        self._count(session, -len(session.requests))
        session.requests.clear()
        session.dirty.clear()
        session.control.clear()
        session.frame = None
        self._ready.pop(session, None)
        self._blocked.pop(session, None)
        self.sessions.pop(session.identity, None)

    def probe(self, period_s: float = ALIVE_PERIOD_S) -> None:
        """A sign of life to clients with requests that have not heard from us for so long; it also finds out who is gone."""
        now = time.monotonic()
        for session in list(self.sessions.values()):
            if session.requests and session.blocked_since is None and now - session.last_sent_at >= period_s:
                self.reply(session, AliveReply(unknown_ids=[]))

    @property
    def has_blocked(self) -> bool:
        return bool(self._blocked)
