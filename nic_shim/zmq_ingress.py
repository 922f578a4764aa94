"""The ZeroMQ ingress: a ROUTER socket on one side, a queue pair on the other, one loop on a thread of its own in between.

    python -m blinkimp.nic_shim.zmq_ingress --engine NAME --queue-pair 0 --bind tcp://127.0.0.1:5555 --tokenizer FOLDER

Run as a process by `blinkimp serve` (several at once: each its own queue pair and endpoint); PROTOCOL.md describes the wire.
SIGTERM drains: no new requests, running ones finish (bounded by --drain-timeout), then exit 0; a second one ends it at once.
Test: pytest tests/host/test_zmq_ingress.py

One turn of the loop: read messages, write to the ring, drain completions, send, look after the attachment, wait. Nothing in it
blocks: not on a client that does not read, not on a full ring, not on a long prompt.
"""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from blinkimp.host.child_process import EXIT_MISCONFIGURED
from blinkimp.host.shared_memory import SharedMemoryError
from blinkimp.logs import fail_start, log_event, set_up_logging
from blinkimp.native import NativeLibraryError
from blinkimp.nic_shim.curve import CurveServer
from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.garbage import Collector, calm_collector
from blinkimp.nic_shim.ingress_flags import add_ingress_flags, add_limit_flags, eos_ids_of, limits_of
from blinkimp.nic_shim.ingress_limits import ZmqLimits
from blinkimp.nic_shim.ipc_path import check_free, file_id
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.memory_limit import MemoryLimit
from blinkimp.nic_shim.message_handler import MessageHandler
from blinkimp.nic_shim.queue_pair import QueuePairError
from blinkimp.nic_shim.request_log import log_zmq_request
from blinkimp.nic_shim.sessions import SendResult, SessionTable
from blinkimp.nic_shim.tokenizer import Tokenizer, TokenizerError
from blinkimp.transport import Security, detect_lost_hosts, is_loopback

log = logging.getLogger("blinkimp.ingress")

SEND_HWM = 64  # frames that ZeroMQ holds for one client
# A frame beyond max_request_bytes is refused with a reply; one beyond this factor of it closes the connection unread.
HARD_LIMIT_FACTOR = 16
# Receive queues without a limit: a full one lets any client's ZMTP ping abort this process (see blinkimp/transport.py). The loop
# reads faster than a client can send large messages, and max_memory_bytes is the bound.
# A young connection seems to leak: a queue of ZeroMQ's is two blocks of 256 messages, 64 bytes each, whose pages count once messages reach
# them. Up to 64 KB a connection over its first 512 messages each way (measured: not a page more from there on).
RECV_HWM = 0
MESSAGES_PER_TURN = 256
BUSY_WAIT_S = 0.002  # longest sleep while requests run; completions and messages end it early
IDLE_WAIT_MS = 20
HOUSEKEEPING_PERIOD_S = 0.05
PROBES_AFTER_CLOSING = 3
ATTACH_TIMEOUT_S = 10.0
CANCEL_GRACE_S = 1.0  # after a drain that timed out: for the engine's FINISH, and for clients to read it
LINGER_MS = 1000  # at the end: for what ZeroMQ still holds


class ZmqIngress:
    """One ingress. start() attaches and binds; drain() lets it end; join() waits for that."""

    def __init__(
        self,
        engine_name: str,
        queue_pair_idx: int,
        bind: str,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int] | None = None,
        limits: ZmqLimits | None = None,
        security: Security | None = None,
        curve: CurveServer | None = None,
    ) -> None:
        limits = limits or ZmqLimits()
        self.error: BaseException | None = None
        self.link = EngineLink(
            engine_name,
            queue_pair_idx,
            eos_ids=tuple(tokenizer.eos_ids if eos_ids is None else eos_ids),
            loss_timeout_s=limits.loss_timeout_s,
        )
        self.sessions = SessionTable(self._send, self._cancel, stall_timeout_s=limits.stall_timeout_s)
        self.handler = MessageHandler(self.link, self.sessions, tokenizer, limits)
        self.link.metrics.num_refused = lambda: self.handler.counters.refused
        self.link.metrics.num_outstanding = lambda: self.sessions.num_requests
        self.link.metrics.on_end = functools.partial(log_zmq_request, log)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._bind = bind
        self._limits = limits
        self._memory = MemoryLimit(limits.max_memory_bytes)
        self._security = security
        self._curve = curve
        self._thread: threading.Thread | None = None
        self._drain_deadline: float | None = None  # set once by drain(), read by the loop
        self._cancelled_at: float | None = None  # when the drain ran out of patience
        self._stop = threading.Event()
        self._fd = -1
        self._closings: zmq.Socket[bytes] | None = None  # tells of connections that have closed
        self._socket_file: tuple[int, int] | None = None  # of an ipc endpoint, once it is bound
        self._num_probes = 0  # that are due because of one

    def start(self) -> str:
        """Attaches, binds, starts the loop. Returns the endpoint, with the port that a wildcard became."""
        try:
            self.link.attach(ATTACH_TIMEOUT_S)
            self._open_socket()
        except BaseException:
            self._close()
            raise
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._fd = self._socket.fileno()
        # From here on the socket belongs to the loop's thread (starting a thread is the full fence that ZeroMQ asks for).
        self._thread = threading.Thread(target=self._run, name="blinkimp-ingress", daemon=True)
        self._thread.start()
        return endpoint

    def _open_socket(self) -> None:
        socket = self._socket
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a client that is gone is an error, not a silent drop
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.RCVHWM, RECV_HWM)
        socket.setsockopt(zmq.MAXMSGSIZE, self._limits.max_request_bytes * HARD_LIMIT_FACTOR)
        detect_lost_hosts(socket)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        if self._security is not None:
            self._security(socket)
        if self._curve is not None:
            self._curve.start(self._context)
            self._curve.secure(socket)
        self._closings = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            check_free(self._bind)  # libzmq would take the path away from whoever has it
        except OSError as error:
            raise OSError(f"cannot bind {self._bind}: {error}") from None
        try:
            socket.bind(self._bind)
        except zmq.ZMQError as error:
            raise OSError(
                f"cannot bind {self._bind}: {zmq.strerror(error.errno or 0)}; expected a free endpoint such as tcp://127.0.0.1:5555; "
                "choose another port or path, or stop what holds it"
            ) from error
        self._socket_file = file_id(self._bind)

    def drain(self, timeout_s: float) -> None:
        """No new requests from now on; ends when all are finished, or cancels what is left after timeout_s. Any thread."""
        self._drain_deadline = time.monotonic() + timeout_s

    def stop(self) -> None:
        """Ends at the next turn, whatever runs. Any thread."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the loop's end; True when it has ended. Raises what ended it, if that was an error."""
        assert self._thread is not None, "join() before start()"
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if self.error is not None:
            raise self.error
        return True

    # ---- The loop --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            housekeeping_at = 0.0
            collector = Collector()
            while not self._stop.is_set():
                self._receive()
                self.handler.take_prepared()
                self.sessions.touch(self.link.pump())
                self.sessions.touch(self.link.poll())
                self.sessions.flush()
                if self.link.trace is not None:
                    self.link.trace.handed_over()
                self.sessions.touch(self.link.keep_attached())
                now = time.monotonic()
                if now >= housekeeping_at:
                    housekeeping_at = now + HOUSEKEEPING_PERIOD_S
                    collector.look(now)
                    self._look_for_gone_clients()
                    self._memory.check()
                if self._drain_deadline is not None and self._is_drained(now, self._drain_deadline):
                    break
                self._wait()
        except BaseException as error:  # on a thread of our own: join() raises it
            log.exception("the ingress's loop failed")
            self.error = error
        finally:
            self._close()

    def _receive(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                if self._curve is None:
                    identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                    caller = None
                else:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                    identity, *frames = [part.bytes for part in parts]
                    caller = str(parts[0].get("User-Id")).encode()  # the client's public key, see curve.py
            except zmq.Again:
                return
            self.handler.handle(identity, frames, caller)

    def _look_for_gone_clients(self) -> None:
        """The monitor says that a connection closed, not whose: all that have not heard from us since are asked, and asked once more, as
        the ROUTER socket itself learns of it a little later."""
        assert self._closings is not None, "opened with the socket"
        while self._closings.poll(0):
            self._closings.recv_multipart()
            self._num_probes = PROBES_AFTER_CLOSING
        if self._num_probes:
            self._num_probes -= 1
            self.sessions.probe(HOUSEKEEPING_PERIOD_S / 2)
        else:
            self.sessions.probe()

    def _send(self, identity: bytes, frame: bytes) -> SendResult:
        try:
            self._socket.send_multipart((identity, frame), zmq.NOBLOCK)
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return SendResult.GONE
            raise
        return SendResult.SENT

    def _cancel(self, request: LiveRequest) -> None:
        self.handler.cancel(request)

    def _wait(self) -> None:
        # The descriptor is edge-triggered and a send may have eaten the edge: ask ZeroMQ itself before relying on it.
        if self._socket.poll(0):
            return
        if self.link.has_work or self.sessions.has_blocked or self.handler.num_preparing:
            self.link.wait(BUSY_WAIT_S, self._fd)
        else:
            self._socket.poll(IDLE_WAIT_MS)

    def _is_drained(self, now: float, deadline: float) -> bool:
        if not self.handler.is_draining:
            self.handler.is_draining = self.link.is_ending = True
            log_event(log, logging.INFO, "draining", num_unfinished=self.sessions.num_requests)
        if self.sessions.is_idle and not self.link.has_work:
            return True
        if now <= deadline:
            return False
        if self._cancelled_at is None:
            log.warning("drain timed out: cancelling %d requests", self.sessions.num_requests)
            self._cancelled_at = now
            for session in list(self.sessions.sessions.values()):
                for request in session.requests.values():
                    self._cancel(request)
        return now - self._cancelled_at > CANCEL_GRACE_S

    def _close(self) -> None:
        if self._closings is not None:
            self._socket.disable_monitor()
            self._closings.close()
        # libzmq leaves the file. While the socket is open nobody else's has its number, so this one is ours and not a successor's.
        if self._socket_file is not None and file_id(self._bind) == self._socket_file:
            Path(self._bind.removeprefix("ipc://")).unlink(missing_ok=True)
        self._socket.close()
        if self._curve is not None:
            self._curve.stop()
        self._context.term()  # waits LINGER_MS at most for unsent frames
        self.handler.close()
        self.link.close()
        self._memory.close()


# ---- The process -----------------------------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blinkimp.nic_shim.zmq_ingress",
        description="Serves one engine's queue pair to ZeroMQ clients (nic_shim/PROTOCOL.md).",
        epilog="Prints `ready ENDPOINT` once clients can connect. SIGTERM drains and exits 0.",
    )
    add_ingress_flags(parser)
    parser.add_argument(
        "--bind", required=True, help="endpoint, e.g. tcp://127.0.0.1:5555, tcp://127.0.0.1:*, ipc:///path"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="tokenizer.json, or the checkpoint folder that holds it"
    )
    parser.add_argument("--curve-key", type=Path, help="CURVE: this server's secret key (nic_shim/curve.py makes one)")
    parser.add_argument(
        "--curve-clients", type=Path, help="CURVE: public keys of the clients that may connect, one a line"
    )
    add_limit_flags(parser, ZmqLimits)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    set_up_logging(arguments.log_level, arguments.log_format, f"zmq ingress {arguments.queue_pair}", in_background=True)
    try:
        limits = limits_of(arguments, ZmqLimits)
        if (arguments.curve_key is None) != (arguments.curve_clients is None):
            raise ValueError(
                "--curve-key and --curve-clients go together: got one of them, expected both or neither; give both"
            )
        curve = CurveServer(arguments.curve_key, arguments.curve_clients) if arguments.curve_key is not None else None
        transport, _, address = arguments.bind.partition("://")
        if transport == "tcp" and curve is None and not is_loopback(address.rpartition(":")[0]):
            log.warning(
                "%s can be reached by other machines, and anybody may connect; --curve-key and --curve-clients say who may",
                arguments.bind,
            )
        ingress = ZmqIngress(
            arguments.engine,
            arguments.queue_pair,
            arguments.bind,
            Tokenizer(arguments.tokenizer),
            eos_ids=eos_ids_of(arguments),
            limits=limits,
            curve=curve,
        )
        if arguments.capture_arrivals is not None:
            ingress.link.capture_arrivals(arguments.capture_arrivals)
        endpoint = ingress.start()
    except (SharedMemoryError, QueuePairError, TokenizerError, NativeLibraryError, OSError, ValueError) as error:
        fail_start("blinkimp ingress", error, arguments.log_format)
        return 1 if isinstance(error, SharedMemoryError | QueuePairError) else EXIT_MISCONFIGURED

    def on_signal(number: int, _frame: object) -> None:
        if ingress.handler.is_draining:
            ingress.stop()
        ingress.drain(arguments.drain_timeout)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    calm_collector()
    print(f"ready {endpoint}", flush=True)
    while not ingress.join(0.5):  # a timeout, so that the main thread runs signal handlers
        pass
    log_event(log, logging.INFO, "ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
