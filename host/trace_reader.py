"""Reads an engine's trace while it runs: new events since the last look, op times, and how many events came too fast.

    with TraceReader(open_trace("blinkimp")) as reader:
        events = reader.read()  # [n] TRACE_EVENT, in order; reader.num_lost counts what was overwritten before it was read

Any number of readers may look at the same time: the device never waits for one. Used by blinkimp/trace/recorder.py, which writes
files, and tools/director_gap.py.
Test: pytest tests/host/test_trace.py
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region


class TraceReader:
    """Starts with the events that happen from now on; from_start: with the oldest that the ring still has."""

    def __init__(self, region: Region, *, from_start: bool = False) -> None:
        self._region = region
        self.header: dict[str, int] = {
            name: int(region.view(abi.TRACE_HEADER)[0][name])
            for name in abi.TRACE_HEADER.names or ()
            if name != "reserved"
        }
        self.num_lost = 0
        # TRACE_LINE's first word, right behind the header.
        self._producer_pos = np.frombuffer(region.buffer, np.uint64, 1, abi.TRACE_HEADER.itemsize)
        self._ring = np.frombuffer(
            region.buffer, abi.TRACE_EVENT, self.header["num_events"], self.header["events_offset"]
        )
        # What the writer may be overwriting right now is as good as lost.
        self._num_readable = self.header["num_events"] - abi.MAX_TRACE_BURST
        producer_pos = int(self._producer_pos[0])
        self._consumer_pos = max(0, producer_pos - self._num_readable) if from_start else producer_pos

    def read(self) -> NDArray[np.void]:
        """The events that are new since the last call. A copy."""
        producer_pos = int(
            self._producer_pos[0]
        )  # x86 keeps loads in order; pairs with publish_trace() of device/trace.cuh
        self._skip_to(producer_pos - self._num_readable)
        begin = self._consumer_pos
        num_events = len(self._ring)
        first, end = begin % num_events, begin % num_events + producer_pos - begin
        events = np.concatenate([self._ring[first : min(end, num_events)], self._ring[: max(0, end - num_events)]])
        self._consumer_pos = producer_pos
        # The writer went on meanwhile: what it may have overwritten while we copied is dropped from the front.
        num_torn = min(len(events), max(0, int(self._producer_pos[0]) - self._num_readable - begin))
        self.num_lost += num_torn
        whole: NDArray[np.void] = events[num_torn:]
        return whole

    def _skip_to(self, oldest_pos: int) -> None:
        if self._consumer_pos < oldest_pos:
            self.num_lost += oldest_pos - self._consumer_pos
            self._consumer_pos = oldest_pos

    def op_times(self, event: np.void) -> NDArray[np.uint64]:
        """Of an OP_TIMES event: [num_ops, num_workers, 2] ns, when a worker began an op and when it was done with its share; 0 where it
        had none. Read it before num_op_slots more steps were sampled."""
        if int(event["kind"]) != abi.TraceKind.OP_TIMES:
            raise ValueError(
                f"got an event of kind {int(event['kind'])}, expected OP_TIMES ({int(abi.TraceKind.OP_TIMES)})"
            )
        shape = (self.header["num_ops"], self.header["num_workers"], 2)
        count = shape[0] * shape[1] * 2
        offset = self.header["op_times_offset"] + int(event["argument"]) * count * 8
        return np.frombuffer(self._region.buffer, np.uint64, count, offset).reshape(shape).copy()

    def close(self) -> None:
        del self._ring, self._producer_pos
        self._region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def events_of(events: NDArray[np.void], kind: abi.TraceKind) -> NDArray[np.void]:
    found: NDArray[np.void] = events[events["kind"] == int(kind)]
    return found


def low_half(arguments: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The low 32 bits of packed arguments; device/trace_abi.h says what they are."""
    return arguments & np.uint64(0xFFFFFFFF)


def high_half(arguments: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return arguments >> np.uint64(32)
