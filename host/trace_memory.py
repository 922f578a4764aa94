"""The trace's shared memory: `/dev/shm/blinkimp.<engine>.trace` and, for each ingress, `.trace.qp<i>`, made by the engine host where
`trace_events` is not 0.

The layout is that of device/trace_abi.h. Called by host/shared_memory.py, host/engine.py, blinkimp/cli/checks.py; fill_trace() by the devices.
Test: pytest tests/host/test_trace.py
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.config import Config

NUM_TRACED_STEPS: Final = 16  # steps whose op times the trace keeps


@dataclass(frozen=True)
class TraceGeometry:
    """num_events: a power of two. op_period 0: no op times. info: JSON that describes the engine (host/trace_info.py)."""

    num_events: int
    op_period: int = 0
    num_op_slots: int = 0
    num_ops: int = 0
    num_workers: int = 0
    info: bytes = b""

    def __post_init__(self) -> None:
        if self.num_events < abi.LEAST_TRACE_EVENTS or self.num_events & (self.num_events - 1):
            raise ValueError(
                f"trace_events is {self.num_events}; expected 0 (off) or a power of two, at least {abi.LEAST_TRACE_EVENTS}"
            )
        if self.op_period and not (self.num_op_slots and self.num_ops and self.num_workers):
            raise ValueError(f"{self}: op times need num_op_slots, num_ops and num_workers, each at least 1")

    @property
    def events_offset(self) -> int:
        return abi.TRACE_REGION.itemsize

    @property
    def op_times_offset(self) -> int:
        return self.events_offset + self.num_events * abi.TRACE_EVENT.itemsize

    @property
    def slot_bytes(self) -> int:
        """Of one step's op times."""
        return self.num_ops * self.num_workers * 2 * 8

    @property
    def info_offset(self) -> int:
        return self.op_times_offset + (self.num_op_slots * self.slot_bytes if self.op_period else 0)

    @property
    def region_bytes(self) -> int:
        return -(-(self.info_offset + len(self.info)) // mmap.PAGESIZE) * mmap.PAGESIZE

    def header(self, engine_id: int, num_queue_pairs: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        """[1] TRACE_HEADER"""
        header = np.zeros(1, abi.TRACE_HEADER)
        header["magic"], header["version"] = abi.TRACE_MAGIC, abi.TRACE_VERSION
        header["engine_id"], header["num_queue_pairs"] = engine_id, num_queue_pairs
        for name in ("num_events", "events_offset", "region_bytes", "op_times_offset"):
            header[name] = getattr(self, name)
        for name in ("op_period", "num_op_slots", "num_ops", "num_workers"):
            header[name] = getattr(self, name) if self.op_period else 0
        if self.info:
            header["info_offset"], header["info_bytes"] = self.info_offset, len(self.info)
        return header


def trace_geometry(config: Config, num_ops: int, num_workers: int, info: bytes = b"") -> TraceGeometry | None:
    """What the configuration asks for, of a program of num_ops on num_workers; None: no trace. Raises ValueError."""
    if config.trace_events == 0:
        return None
    if config.trace_op_period == 0:
        return TraceGeometry(config.trace_events, info=info)
    return TraceGeometry(
        config.trace_events,
        op_period=config.trace_op_period,
        num_op_slots=NUM_TRACED_STEPS,
        num_ops=num_ops,
        num_workers=num_workers,
        info=info,
    )


INGRESS_TRACE = TraceGeometry(abi.LEAST_TRACE_EVENTS)  # some ten events a request: seconds of the busiest ingress


class TraceMemory(Protocol):
    """A host.shared_memory.Region."""

    def view(self, dtype: np.dtype[Any], offset_bytes: int = 0) -> np.ndarray[Any, Any]: ...


def fill_trace(region: TraceMemory, address: int, params: np.ndarray[Any, Any]) -> None:
    """The trace's words of [1] ENGINE_PARAMS; `address`: of the region, as the device sees it. Raises unless the op times fit what the
    region was made for: a worker writes without asking."""
    header = region.view(abi.TRACE_HEADER)[0]
    params["trace"] = address
    if not int(header["op_period"]):
        return
    for name in ("num_ops", "num_workers"):
        got, expected = int(params[name][0]), int(header[name])
        if got != expected:
            raise ValueError(
                f"the trace has room for {name} {expected}, the program has {got}; set trace_op_period to 0"
            )
    params["trace_op_times"] = address + int(header["op_times_offset"])
    params["trace_op_period"], params["num_trace_op_slots"] = header["op_period"], header["num_op_slots"]
