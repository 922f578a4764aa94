"""An ingress's tie to the engine: puts requests on the ring, routes completions back, and survives the engine's absences.

Called by nic_shim/message_handler.py and nic_shim/zmq_ingress.py, or by nic_shim/engine_thread.py, all from one thread.
Test: pytest tests/host/test_engine_link.py tests/host/test_zmq_ingress.py tests/host/test_recovery_link.py
Longer than 400 lines because all that moves a request from one place to another (I1) stands together.

Problem   The director drops an ingress that it takes for dead, and an engine may be started anew. Clients should see a pause.
Rule      After an attach every unfinished request is submitted again, with the output it already has at the end of its prompt.
Hazard    A FINISH may be lost with the epoch while its last token was read: reason_to_stop() finds that before a resubmission.
Hazard    A request that no engine survives must not be submitted for ever: crash_suspects.py.

Invariants
I1  A request is in exactly one place: waiting (waiting_requests.py, or behind other suspects), on the ring (ring_requests.py), or ended.
I2  No more are on the ring, abandoned ones included, than the queue pair's share of the request table, unless the engine drains and rejects
    them: behind a submission that the director cannot take a CANCEL would wait too, and no deadline runs before it is taken (device/RING.md, 5).
I3  Tokens of a request arrive with index 0, 1, 2, ... over all its submissions; anything else is counted and ends the request with an error.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import SharedMemoryError, engine_is_alive
from blinkimp.nic_shim.arrival_capture import ArrivalCapture
from blinkimp.nic_shim.crash_suspects import CrashSuspects
from blinkimp.nic_shim.engine_watch import EngineWatch
from blinkimp.nic_shim.ingress_trace import open_ingress_trace_writer
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairError, QueuePairPort, WaitEvent
from blinkimp.nic_shim.request_errors import fail_crashed, fail_lost, fail_out_of_order, fail_rejected, fail_too_large
from blinkimp.nic_shim.request_metrics import RequestMetrics
from blinkimp.nic_shim.ring_requests import RingRequests
from blinkimp.nic_shim.waiting_requests import WaitingRequests

LEASE_S = 5.0  # the loop renews it each turn; a loop that hangs for longer must be dropped
ATTACH_RETRY_S = 0.1
OVERDUE_PERIOD_S = 0.05  # between looks for those that wait and whose time is up
REOPEN_PERIOD_S = 0.25  # between looks for an engine of the same name
MAX_COMPLETIONS_PER_POLL = 16384

_KIND_SHIFT, _REASON_SHIFT = abi.COMMIT_KIND_SHIFT, abi.COMMIT_REASON_SHIFT
_TOKEN = int(abi.COMPLETION_TOKEN)


@dataclass
class LinkCounters:
    attaches: int = 0
    resubmissions: int = 0
    ring_full: int = 0
    arena_full: int = 0
    stray_completions: int = 0  # of a former life (ring_requests.py, R1)
    broken_sequences: int = 0  # I3
    engine_losses: int = 0  # another engine took the place of one that had not stopped in order
    crash_failures: int = 0  # requests that failed because engines crashed with them
    tokens: int = 0


class EngineLink:
    """One attached queue pair and the requests on it."""

    def __init__(
        self, engine_name: str, queue_pair_idx: int, *, eos_ids: tuple[int, ...], loss_timeout_s: float
    ) -> None:
        self.engine_name = engine_name
        self.queue_pair_idx = queue_pair_idx
        self.eos_ids = frozenset(eos_ids)
        self.loss_timeout_s = loss_timeout_s
        self.counters = LinkCounters()
        self.watch = EngineWatch(engine_name)
        self.port = QueuePairPort.open(engine_name, queue_pair_idx)
        self.metrics = RequestMetrics(engine_name, queue_pair_idx)
        self.trace = open_ingress_trace_writer(engine_name, queue_pair_idx)  # None: the engine keeps none
        self._capture: ArrivalCapture | None = None
        self._waiting = WaitingRequests()
        self._ring = RingRequests()
        self._has_new_room = False  # since the last pump()
        self._attached = False
        self._asked = False  # an attach is under way
        self._retry_at = 0.0
        self._reopen_at = 0.0
        self._overdue_at = 0.0
        self._lost_since: float | None = None
        self._suspects = CrashSuspects()
        self.is_ending = False  # set by the ingress, any thread: no engine is waited for that nobody starts
        self._was_orphaned = self._no_engine_comes = False

    # ---- Attach ----------------------------------------------------------------------------------------------------
    def attach(self, timeout_s: float) -> None:
        """The first attach: raises QueuePairError where the queue pair is taken or the engine does not answer."""
        self.port.attach(timeout_s)
        self.port.start_heartbeat(lease_s=LEASE_S)
        self._attached = True
        self.counters.attaches += 1

    def close(self) -> None:
        self.port.close()
        self.watch.close()
        self.metrics.close()
        if self.trace is not None:
            self.trace.close()
        if self._capture is not None:
            self._capture.close()

    def capture_arrivals(self, folder: Path) -> None:
        """From now on requests are written down, prompts and all (nic_shim/arrival_capture.py). Before the first of them."""
        self._capture = ArrivalCapture(folder, self.engine_name, self.queue_pair_idx)

    @property
    def is_attached(self) -> bool:
        return self._attached

    @property
    def num_live(self) -> int:
        return len(self._waiting) + len(self._suspects) + len(self._ring.live)

    @property
    def has_work(self) -> bool:
        """Whether completions may come, or something waits to go out. An engine that may never answer again is not waited for with cancels."""
        return bool(self._ring.live or self._waiting) or (self._ring.has_cancels and self._lost_since is None)

    # ---- Requests --------------------------------------------------------------------------------------------------
    def submit(self, request: LiveRequest) -> None:
        """Takes the request; it goes to the ring as soon as there is room. Call pump() afterwards."""
        request.observer = self.metrics.ended
        if self._capture is not None:
            self._capture.arrived(request)
        reason = request.reason_to_stop(self.eos_ids)
        if reason:
            request.finish(reason)
        elif request.is_overdue():  # before its prompt and its constraint were ready
            request.finish(abi.FINISH_TIMEOUT)
        else:
            self._waiting.add(request, has_place=self._has_room(len(self._waiting)))

    def cancel(self, request: LiveRequest) -> None:
        """Stops the request: at once where it is still waiting, else by the director's FINISH."""
        request.cancelled = True
        if request.end is not None:
            return
        if request.ring_id not in self._ring.live:
            if self._stops_waiting(request):
                request.finish(abi.FINISH_CANCELLED)
        elif self._lost_since is not None:  # nobody is there to say FINISH
            self._end_unheard(request, abi.FINISH_CANCELLED)
        else:
            self._ring.cancel(request)
        if self.trace is not None:
            self.trace.cancelled(request)

    def pump(self) -> list[LiveRequest]:
        """Writes what waits to the ring, as far as there is room. Returns the requests that ended by that."""
        ended: list[LiveRequest] = []
        self._has_new_room = False
        if self._lost_since is not None:  # a dead engine's ring takes nothing that would be run
            return ended
        if self._suspects and self._has_room() and (suspect := self._suspects.next()) is not None:
            self._waiting.put_first(suspect)
        while self._attached and (ring_id := self._ring.first_cancel) is not None:
            if not self._took(self.port.try_cancel(ring_id)):
                return ended
            self._ring.take_first_cancel()
        while self._attached and (request := self._waiting.first) is not None and self._has_room():
            if request.num_crashes and self._suspects.hold(request):
                self._waiting.take_first()
                continue
            slot = None
            if request.constraint is not None:
                if self._ring.slots.is_blocked(self.port, request.constraint):
                    self._waiting.block_first()
                    continue
                status, slot = self._ring.slots.try_load(self.port, request.constraint)
                if not self._took(status):
                    break
            claimed_ns = time.monotonic_ns() if self.trace is not None else 0
            status = self.port.try_submit(
                self._ring.next_id,
                request.ring_prompt(),
                request.ring_sampling(),
                constraint_slot=slot,
                **request.ring_options(),
            )
            if status == PortStatus.TOO_LARGE:
                self._waiting.take_first()
                fail_too_large(request, self.port.arena_bytes)
                ended.append(request)
                continue
            if not self._took(status):
                break
            self._waiting.take_first()
            self._ring.enter(request, slot)
            request.num_resumed = len(request.output_ids)
            if self.trace is not None:
                self.trace.committed(request, claimed_ns)
        return ended

    def _has_room(self, num_before: int = 0) -> bool:
        """Whether the director would take one more, after so many others (I2)."""
        share = self.port.max_requests
        return not share or len(self._ring) + num_before < share or self.watch.state == abi.EngineState.DRAINING

    def _leave_ring(self, ring_id: int) -> None:
        """The engine is done with it. Its place may be taken until the step that runs is over: a request for it waits so long in the ring."""
        self._has_new_room = True
        if self._ring.leave(ring_id):
            self._waiting.unblock()

    def _took(self, status: PortStatus) -> bool:
        if status == PortStatus.OK:
            return True
        if status == PortStatus.RING_FULL:
            self.counters.ring_full += 1
        elif status == PortStatus.ARENA_FULL:
            self.counters.arena_full += 1
        else:  # DETACHED, STOLEN, CORRUPT: keep_attached() acts on it
            self._attached = False
        return False

    # ---- Completions -----------------------------------------------------------------------------------------------
    def poll(self) -> dict[LiveRequest, None]:
        """Drains the completion ring. Returns the requests that have something new, in order of arrival."""
        touched: dict[LiveRequest, None] = {}
        num_read = num_tokens = 0
        live, metrics = self._ring.live, self.metrics
        while num_read < MAX_COMPLETIONS_PER_POLL:
            entries = self.port.poll()
            if not len(entries):
                break
            num_read += len(entries)
            for commit, token, ring_id, index, logprob, device_ns in entries.tolist():
                kind = commit >> _KIND_SHIFT & 0xFF
                request = live.get(ring_id)
                if request is None:
                    if not self._ring.is_abandoned(ring_id):
                        self.counters.stray_completions += 1
                    elif kind in (abi.COMPLETION_FINISH, abi.COMPLETION_REJECT):
                        self._leave_ring(ring_id)
                    continue
                if kind == _TOKEN:
                    if index != len(request.output_ids) or request.num_top_missing:
                        self._break(request, index)
                    else:
                        num_tokens += 1
                        if request.last_token_ns:
                            metrics.gaps_ns.append(device_ns - request.last_token_ns)
                        else:
                            metrics.first_token(request)
                        request.last_token_ns = device_ns
                        if request.push_token(token, logprob, device_ns):
                            self._end_here(request, device_ns)
                elif kind == abi.COMPLETION_TOP:
                    if not request.push_top(token, logprob):
                        self._break(request, index)
                    elif request.is_stopped:
                        self._end_here(request, device_ns)
                elif kind == abi.COMPLETION_ACK:
                    request.accepted_ns = request.accepted_ns or device_ns
                    continue
                elif kind == abi.COMPLETION_START:
                    request.started_ns = request.started_ns or device_ns
                    continue
                elif kind == abi.COMPLETION_FINISH:
                    self._leave_ring(ring_id)
                    if not request.num_resumed:
                        request.num_cached_tokens = int(logprob)
                    request.finish(commit >> _REASON_SHIFT & 0xFF, device_ns)
                elif kind == abi.COMPLETION_REJECT:
                    self._leave_ring(ring_id)
                    fail_rejected(request, commit >> _REASON_SHIFT & 0xFF, token)
                touched[request] = None
        self.counters.tokens += num_tokens
        if self.trace is not None:
            self.trace.drained(touched, self.num_live)
        return touched

    def _end_here(self, request: LiveRequest, device_ns: int) -> None:
        """The output holds a stop string: the request ends now, the engine is told to stop."""
        self._ring.abandon(request)
        request.finish(0, device_ns)

    def _break(self, request: LiveRequest, index: int) -> None:
        self.counters.broken_sequences += 1
        self._ring.abandon(request)
        fail_out_of_order(request, index)

    def wait(self, timeout_s: float, fd: int) -> WaitEvent:
        """Sleeps, unless the last poll() has made room for what waits."""
        if self._has_new_room and self._waiting.first is not None:
            return WaitEvent.COMPLETION
        return self.port.wait(timeout_s, fd)

    # ---- Staying attached ------------------------------------------------------------------------------------------
    def keep_attached(self) -> list[LiveRequest]:
        """To be called each turn: renews the lease, attaches again after a drop. Returns requests that ended by a loss."""
        now = time.monotonic()
        self.port.renew_lease(LEASE_S)
        self.watch.look()
        if self._capture is not None:
            self._capture.look(now)
        self.metrics.publish(now, self.counters, self.num_live - len(self._ring.live))
        if self._attached and self.port.state != PortStatus.OK:
            self._attached = False
        ended = [] if self._attached else self._attach_again(now)
        is_lost = not self._attached or self.watch.is_lost
        self._lost_since = (self._lost_since or now) if is_lost else None
        if now >= self._overdue_at:
            self._overdue_at = now + OVERDUE_PERIOD_S
            ended += self._end_overdue()
        # A parked engine would not be heard dying.
        if now >= self._reopen_at and (is_lost or self.watch.state == abi.EngineState.PARKED):
            ended += self._look_around(now)
        if self._lost_since is not None and (now - self._lost_since > self.loss_timeout_s or self._no_engine_comes):
            ended += self._give_up(now - self._lost_since)
        if self.trace is not None:
            self.trace.drained(ended, self.num_live)
        return ended

    def _end_overdue(self) -> list[LiveRequest]:
        """Of those that wait; the engine watches over the time of what is on the ring."""
        overdue = self._waiting.take_overdue(time.monotonic_ns())
        overdue += [request for request in self._suspects if request.is_overdue()]
        for request in overdue:
            self._end_unheard(request, abi.FINISH_TIMEOUT)
        return overdue

    def _look_around(self, now: float) -> list[LiveRequest]:
        """Several times a second while no engine answers."""
        self._reopen_at = now + REOPEN_PERIOD_S
        overdue = [request for request in self._ring.live.values() if request.is_overdue()]
        for request in overdue:
            self._end_unheard(request, abi.FINISH_TIMEOUT)
        # Only at the second look: what an engine said last was read in between.
        is_orphaned = self.is_ending and not engine_is_alive(self.engine_name)
        self._no_engine_comes, self._was_orphaned = is_orphaned and self._was_orphaned, is_orphaned
        return overdue + self._look_for_new_engine()

    def _stops_waiting(self, request: LiveRequest) -> bool:
        """Takes it from wherever it waits."""
        return self._waiting.remove(request) or self._suspects.remove(request)

    def _end_unheard(self, request: LiveRequest, reason: int) -> None:
        """Ends a request without the engine, which is told if it comes back."""
        if request.ring_id in self._ring.live:
            self._ring.abandon(request)
        else:
            self._stops_waiting(request)
        request.drop_partial()
        request.finish(request.reason_to_stop(self.eos_ids) or reason)

    def _attach_again(self, now: float) -> list[LiveRequest]:
        if self._asked:
            status = self.port.attach_answered()
            if status == PortStatus.OK:
                self._asked = False
                self._attached = True
                self.counters.attaches += 1
                return self._resubmit()
            self._asked = status == PortStatus.PENDING
        if not self._asked and now >= self._retry_at:
            self._retry_at = now + ATTACH_RETRY_S
            self._asked = self.port.try_attach() == PortStatus.OK
        return []

    def _look_for_new_engine(self) -> list[LiveRequest]:
        """An engine started anew has new regions under the old names: take its queue pair in place of ours. Returns requests that it
        must not be given (crash_suspects.py)."""
        try:
            port = QueuePairPort.open(self.engine_name, self.queue_pair_idx)
        except (SharedMemoryError, QueuePairError):
            return []
        last_state, last = self.watch.state, self.watch.counters()
        if port.engine_id == self.port.engine_id or not self.watch.reopen():
            port.close()
            return []
        guilty = []
        if last_state != abi.EngineState.STOPPED:
            self.counters.engine_losses += 1
            guilty = self._suspects.note_crash(
                self._ring.live.values(), last.get("num_running", 0) + last.get("num_waiting", 0)
            )
        self.port.close()
        self.port = port
        self.metrics.reopen()
        if self.trace is not None:
            self.trace.close()
        self.trace = open_ingress_trace_writer(self.engine_name, self.queue_pair_idx)
        self.port.start_heartbeat(lease_s=LEASE_S)
        self._attached = self._asked = False
        for request in guilty:
            self._ring.leave(request.ring_id)
            self.counters.crash_failures += 1
            fail_crashed(request)
        return guilty

    def _resubmit(self) -> list[LiveRequest]:
        """What was on the ring of the former epoch goes first, in the order of its submission. Returns what needs no engine."""
        self._waiting.unblock()
        ended = []
        for request in reversed(self._ring.clear()):
            request.drop_partial()
            reason = abi.FINISH_CANCELLED if request.cancelled else request.reason_to_stop(self.eos_ids)
            if reason:
                request.finish(reason)
                ended.append(request)
            else:
                self._waiting.put_first(request)
                self.counters.resubmissions += 1
        return ended

    def _give_up(self, lost_s: float) -> list[LiveRequest]:
        """Nobody is waited for any longer. An engine that only stood still has them yet: it hears of their end if it goes on."""
        ended = [*self._ring.live.values(), *self._waiting, *self._suspects]
        for request in list(self._ring.live.values()):
            self._ring.abandon(request)
        self._waiting.clear()
        self._suspects.release()
        for request in ended:
            fail_lost(request, self.engine_name, lost_s, self.loss_timeout_s)
        return ended
