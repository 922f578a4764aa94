"""What an ingress writes about its requests: events in a ring of its own (device/trace_abi.h), beside the device's.

    trace = open_ingress_trace_writer("blinkimp", 0)       # None where the engine keeps no trace: then nothing below is called
    trace.committed(request, claimed_ns)                   # it stands on the submission ring
    trace.drained(touched, num_unfinished)                 # after a look at the completion ring that found something
    trace.handed_over()                                    # after what is new went to the clients' connections

Seven events a request and one for each look that found something, none for a token; one costs about a microsecond. Times are those of
time.monotonic_ns(). Called by nic_shim/engine_link.py and the ingresses' loops, from one thread. Test: pytest tests/host/test_ingress_trace.py

Invariants
I1  A request's events stand in the ring in the order of the kinds; those after COMMITTED only after it.
I2  A request is watched from COMMITTED until all of it was handed over, or it ended and its client does not want it: nothing stays.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from typing import Final

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import SharedMemoryError, open_ingress_trace
from blinkimp.host.shared_region import Region
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Error

_EVENT: Final = struct.Struct("<QHHIQQ")  # TraceEvent
_EVENT_BYTES: Final = abi.TRACE_EVENT.itemsize


class _Watch:
    """What a request has come to."""

    __slots__ = ("has_begun", "is_shown", "num_sent")

    def __init__(self, num_sent: int) -> None:
        self.num_sent = num_sent  # output tokens that its client had before
        self.has_begun = False
        self.is_shown = False


class IngressTrace:
    """The writer. One at a time for a queue pair: whoever is attached."""

    def __init__(self, region: Region, queue_pair_idx: int) -> None:
        assert _EVENT.size == _EVENT_BYTES
        self._region = region
        self._queue_pair_idx = queue_pair_idx
        header = region.view(abi.TRACE_HEADER)[0]
        self._mask = int(header["num_events"]) - 1
        self._events_offset = int(header["events_offset"])
        self._buffer = region.buffer
        self._published = region.buffer[abi.TRACE_HEADER.itemsize :][:8].cast("Q")
        self._producer_pos = int(self._published[0])  # of an ingress before this one
        self._watched: dict[LiveRequest, _Watch] = {}  # on the ring
        self._unshown: dict[
            LiveRequest, _Watch
        ] = {}  # whose first output, or last, was read and may not have been handed over

    @property
    def num_watched(self) -> int:
        return len(self._watched) + len(self._unshown)

    def committed(self, request: LiveRequest, claimed_ns: int) -> None:
        """`request` has just been put on the ring; claimed_ns: before that."""
        now_ns = time.monotonic_ns()
        is_again = request.num_resumed > 0 or request in self._watched
        ring_id = request.ring_id
        if not is_again:
            lengths = len(request.prompt_ids) | request.max_tokens << 32
            self._write(request.received_ns, abi.TRACE_RECEIVED, ring_id, lengths)
        self._write(claimed_ns, abi.TRACE_CLAIMED, ring_id, int(is_again))
        self._write(now_ns, abi.TRACE_COMMITTED, ring_id, 0)
        self._publish()
        self._watched[request] = _Watch(request.num_sent)

    def drained(self, touched: Iterable[LiveRequest], num_unfinished: int) -> None:
        """`touched` have new output or have ended."""
        now_ns = time.monotonic_ns()
        num_touched = 0
        watched = self._watched
        for request in touched:
            num_touched += 1
            watch = watched.get(request)
            if watch is None or (watch.has_begun and request.end is None):
                continue
            if not watch.has_begun and len(request.output_ids) > request.num_resumed:
                watch.has_begun = True
                self._unshown[request] = watch
                self._write(now_ns, abi.TRACE_FIRST_DRAINED, request.ring_id, 0)
            if request.end is not None:
                self._unshown[request] = self._watched.pop(request)
                self._write(now_ns, abi.TRACE_FINISH_DRAINED, request.ring_id, int(isinstance(request.end, Error)))
        if num_touched:
            self._write(now_ns, abi.TRACE_DRAINED, 0, num_touched | num_unfinished << 32)
            self._publish()

    def handed_over(self) -> None:
        """Looks which of the requests with unread output have been sent something since."""
        if not self._unshown:
            return
        now_ns = time.monotonic_ns()
        for request, watch in list(self._unshown.items()):
            has_ended = request.end is not None
            if not watch.is_shown and request.num_sent > watch.num_sent:
                watch.is_shown = True
                self._write(now_ns, abi.TRACE_STREAMED, request.ring_id, request.num_sent)
            is_over = has_ended and not request.has_unsent()
            if is_over:
                self._write(now_ns, abi.TRACE_ENDED, request.ring_id, len(request.output_ids))
            if is_over or (request.cancelled if has_ended else watch.is_shown):
                del self._unshown[request]
        self._publish()

    def cancelled(self, request: LiveRequest) -> None:
        """Its client does not want it any more; it may have ended by that, where it was not on the ring."""
        watch = self._watched.get(request)
        if watch is None:
            return
        self._write(time.monotonic_ns(), abi.TRACE_CANCEL_ASKED, request.ring_id, 0)
        self._publish()
        if request.end is not None:
            del self._watched[request]

    def close(self) -> None:
        del self._published, self._buffer
        self._region.close()

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _write(self, time_ns: int, kind: int, request_id: int, argument: int) -> None:
        position = self._producer_pos
        offset = self._events_offset + (position & self._mask) * _EVENT_BYTES
        _EVENT.pack_into(self._buffer, offset, time_ns, kind, self._queue_pair_idx, 0, request_id, argument)
        self._producer_pos = position + 1

    def _publish(self) -> None:
        # x86 keeps stores in order; pairs with TraceReader.read() of host/trace_reader.py.
        self._published[0] = self._producer_pos


def open_ingress_trace_writer(engine_name: str, queue_pair_idx: int) -> IngressTrace | None:
    """None where the engine keeps no trace."""
    try:
        region = open_ingress_trace(engine_name, queue_pair_idx, writable=True)
    except SharedMemoryError:
        return None
    return IngressTrace(region, queue_pair_idx)
