"""POSIX shared memory of one engine: the engine page, one region per queue pair, and the lock that says it lives.

Names in /dev/shm: `blinkimp.<engine>.engine`, `.qp<i>`, `.metrics`, `.lock`, and `.trace`, `.trace.qp<i>` where there is one. The engine host
creates them (`create_engine_regions`); the ingress, the emulated device and the command line open them (`open_queue_pair`,
`open_engine_page`, `open_metrics`, `open_trace`). The layout is that of device/ring_abi.h; that of the metrics, host/metrics_memory.py.
Test: pytest tests/null/test_shared_memory.py

Invariants
I1  A region is complete (sized, zeroed, header filled) before its final name exists: it is made under a temporary name and
    renamed. The engine page appears last, so whoever can open it finds every queue pair.
I2  Regions are created and removed only under the engine's lock (host/engine_lock.py).
I3  Nothing is created unless all of it fits: /dev/shm may be larger than the memory behind it, and filling that ends in the kernel's
    out-of-memory killer, not in an error.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.engine_lock import (
    SHM_DIR,
    EngineAlreadyRunningError,
    EngineLock,
    EngineNotFoundError,
    SharedMemoryError,
    check_engine_name,
    engine_is_alive,
)
from blinkimp.host.metrics_memory import HEADER_BYTES, LAYOUT, MAGIC, About, MetricsGeometry, header_words
from blinkimp.host.shared_region import Region, create_region, open_region
from blinkimp.host.shared_room import shared_room
from blinkimp.host.trace_memory import INGRESS_TRACE, TraceGeometry

__all__ = [
    "SHM_DIR",
    "EngineAlreadyRunningError",
    "EngineLock",
    "EngineNotFoundError",
    "EngineRegions",
    "QueuePairGeometry",
    "Region",
    "SharedMemoryError",
    "create_engine_regions",
    "discard_regions",
    "engine_is_alive",
    "engine_page_name",
    "metrics_name",
    "open_engine_page",
    "open_ingress_trace",
    "open_metrics",
    "open_queue_pair",
    "open_trace",
    "queue_pair_name",
    "remove_dead_engines",
]

LINE_BYTES = 128  # offsets inside a region are multiples of it, so that no ring shares a line with another


def engine_page_name(engine_name: str) -> str:
    return f"blinkimp.{check_engine_name(engine_name)}.engine"


def queue_pair_name(engine_name: str, queue_pair_idx: int) -> str:
    return f"blinkimp.{check_engine_name(engine_name)}.qp{queue_pair_idx}"


def metrics_name(engine_name: str) -> str:
    return f"blinkimp.{check_engine_name(engine_name)}.metrics"


def trace_name(engine_name: str) -> str:
    return f"blinkimp.{check_engine_name(engine_name)}.trace"


def ingress_trace_name(engine_name: str, queue_pair_idx: int) -> str:
    return f"{trace_name(engine_name)}.qp{queue_pair_idx}"


def _align(num_bytes: int, alignment_bytes: int) -> int:
    return -(-num_bytes // alignment_bytes) * alignment_bytes


@dataclass(frozen=True)
class QueuePairGeometry:
    """Entry counts of a queue pair and where its parts lie. Counts and arena_bytes are powers of two."""

    num_submissions: int = 1024
    num_completions: int = 8192
    arena_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name, least in (("num_submissions", 2), ("num_completions", 2), ("arena_bytes", 4096)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise SharedMemoryError(f"{name} is {value}; expected a power of two, at least {least}")

    @property
    def submissions_offset(self) -> int:
        return _align(abi.QUEUE_PAIR.itemsize, LINE_BYTES)

    @property
    def completions_offset(self) -> int:
        return _align(self.submissions_offset + self.num_submissions * abi.SUBMISSION_ENTRY.itemsize, LINE_BYTES)

    @property
    def arena_offset(self) -> int:
        # A page of its own: request bodies are read with wide loads.
        return _align(self.completions_offset + self.num_completions * abi.COMPLETION_ENTRY.itemsize, mmap.PAGESIZE)

    @property
    def region_bytes(self) -> int:
        return _align(self.arena_offset + self.arena_bytes, mmap.PAGESIZE)


class EngineRegions:
    """Everything one engine shares, held by its host. `unlink()` takes the names away; maps of others stay valid."""

    def __init__(self, engine_name: str, engine_id: int, lock: EngineLock) -> None:
        self.engine_name = engine_name
        self.engine_id = engine_id
        self.lock = lock
        self.engine_page: Region  # set last by create_engine_regions
        self.queue_pairs: list[Region] = []
        self.trace: Region | None = None
        self.metrics: Region | None = None
        self.ingress_traces: list[Region] = []  # one a queue pair, where there is a trace

    def unlink(self) -> None:
        """Removes the names (engine page first, so that nobody attaches half-way), unmaps, and gives the lock back."""
        _remove_regions(self.engine_name)
        for region in (*self.queue_pairs, *self.ingress_traces, self.trace, self.metrics):
            if region is not None:
                region.close()
        if hasattr(self, "engine_page"):  # absent when creation failed half-way
            self.engine_page.close()
        self.lock.release()


def create_engine_regions(
    engine_name: str,
    *,
    num_queue_pairs: int,
    geometry: QueuePairGeometry,
    max_context: int,
    vocab_size: int,
    max_requests: int = 0,
    num_constraint_slots: int = 0,
    constraint_slot_bytes: int = 0,
    trace: TraceGeometry | None = None,
    engine_id: int | None = None,
    lock: EngineLock | None = None,
    num_restarts: int = 0,
    about: About | None = None,
) -> EngineRegions:
    """Creates the engine page, the queue pairs, the metrics and the trace. A live engine of this name is refused; what dead ones left is removed.
    max_requests: that the director holds of a queue pair, 0 = not said. `lock`: of a supervisor that holds the name already; num_restarts:
    engines that it had before this one."""
    if not 1 <= num_queue_pairs <= abi.MAX_QUEUE_PAIRS:
        raise SharedMemoryError(f"num_queue_pairs is {num_queue_pairs}; expected 1 to {abi.MAX_QUEUE_PAIRS}")
    regions = EngineRegions(engine_name, engine_id or (secrets.randbits(63) | 1), lock or EngineLock(engine_name))
    try:
        _remove_regions(engine_name)
        remove_dead_engines()
        _check_room(engine_name, num_queue_pairs, geometry, trace)
        for queue_pair_idx in range(num_queue_pairs):
            header = np.zeros(1, dtype=abi.QUEUE_PAIR_HEADER)
            _fill_queue_pair_header(header, geometry, regions.engine_id, queue_pair_idx, max_context, vocab_size)
            header["max_requests"] = max_requests
            header["num_constraint_slots"] = num_constraint_slots
            header["constraint_slot_bytes"] = constraint_slot_bytes
            name = queue_pair_name(engine_name, queue_pair_idx)
            regions.queue_pairs.append(create_region(name, geometry.region_bytes, header))
        metrics = MetricsGeometry(num_queue_pairs)
        metrics_header = metrics.header(regions.engine_id, about or About(max_context=max_context))
        regions.metrics = create_region(metrics_name(engine_name), metrics.region_bytes, metrics_header)
        if trace is not None:
            header = trace.header(regions.engine_id, num_queue_pairs)
            regions.trace = create_region(trace_name(engine_name), trace.region_bytes, header)
            regions.trace.buffer[trace.info_offset : trace.info_offset + len(trace.info)] = trace.info
            header = INGRESS_TRACE.header(regions.engine_id, num_queue_pairs)
            for queue_pair_idx in range(num_queue_pairs):
                name = ingress_trace_name(engine_name, queue_pair_idx)
                regions.ingress_traces.append(create_region(name, INGRESS_TRACE.region_bytes, header))
        header = np.zeros(1, dtype=abi.ENGINE_HEADER)
        header["magic"] = abi.ENGINE_PAGE_MAGIC
        header["abi_version"] = abi.ABI_VERSION
        header["num_queue_pairs"] = num_queue_pairs
        header["engine_id"] = regions.engine_id
        header["host_pid"] = os.getpid()
        header["num_restarts"] = num_restarts
        regions.engine_page = create_region(engine_page_name(engine_name), abi.ENGINE_PAGE.itemsize, header)
    except BaseException:
        regions.unlink()
        raise
    return regions


def _check_room(
    engine_name: str, num_queue_pairs: int, geometry: QueuePairGeometry, trace: TraceGeometry | None
) -> None:
    """I3"""
    room = shared_room(num_queue_pairs, geometry.region_bytes, trace)
    if room.is_enough:
        return
    scarce = (
        f"{SHM_DIR} has {room.free_bytes} bytes free"
        if room.free_bytes < room.memory_bytes
        else f"{room.memory_bytes} bytes of memory are available"
    )
    raise SharedMemoryError(
        f"engine {engine_name} needs {room.needed_bytes} bytes of shared memory ({num_queue_pairs} queue pairs of {geometry.region_bytes}, "
        f"trace {room.trace_bytes}), but {scarce}; lower num_queue_pairs, arena_bytes, num_completions or trace_events, or give the container more "
        "(--shm-size, --memory)"
    )


def open_queue_pair(engine_name: str, queue_pair_idx: int, *, writable: bool = True) -> Region:
    """Maps one queue pair, after checking every word of its header. Not writable: to look at it (`blinkimp top`)."""
    name = queue_pair_name(engine_name, queue_pair_idx)
    region = open_region(name, abi.QUEUE_PAIR.itemsize, writable=writable)
    try:
        _check_queue_pair_header(region, queue_pair_idx)
    except BaseException:
        region.close()
        raise
    return region


def open_engine_page(engine_name: str, *, writable: bool = False) -> Region:
    """Maps the engine page; only the host and the device ask for it writable."""
    region = open_region(engine_page_name(engine_name), abi.ENGINE_PAGE.itemsize, writable=writable)
    header = region.view(abi.ENGINE_HEADER)[0]
    try:
        _expect(region.name, "magic", int(header["magic"]), abi.ENGINE_PAGE_MAGIC)
        _expect(region.name, "abi_version", int(header["abi_version"]), abi.ABI_VERSION)
        _expect(region.name, "region size", region.region_bytes, abi.ENGINE_PAGE.itemsize)
    except BaseException:
        del header
        region.close()
        raise
    return region


def open_metrics(engine_name: str, *, writable: bool = False) -> Region:
    """Maps the metrics; an ingress asks for them writable, and writes to its own slot only."""
    region = open_region(metrics_name(engine_name), HEADER_BYTES, writable=writable)
    try:
        words = header_words(region)
        _expect(region.name, "magic", words["magic"], MAGIC)
        _expect(region.name, "layout", words["layout"], LAYOUT)
        _expect(region.name, "region size", region.region_bytes, MetricsGeometry(words["num_slots"]).region_bytes)
    except BaseException:
        region.close()
        raise
    return region


def open_trace(engine_name: str, *, writable: bool = False) -> Region:
    """Maps the trace; only the device asks for it writable."""
    try:
        region = open_region(trace_name(engine_name), abi.TRACE_REGION.itemsize, writable=writable)
    except EngineNotFoundError:
        raise EngineNotFoundError(
            f"{SHM_DIR / trace_name(engine_name)} does not exist; expected an engine that runs with trace_events > 0; "
            f"start it with `--trace-events {abi.LEAST_TRACE_EVENTS * 16}`"
        ) from None
    return _checked_trace(region)


def open_ingress_trace(engine_name: str, queue_pair_idx: int, *, writable: bool = False) -> Region:
    """Maps an ingress's trace; only that ingress asks for it writable. Raises EngineNotFoundError where nothing is traced."""
    name = ingress_trace_name(engine_name, queue_pair_idx)
    return _checked_trace(open_region(name, abi.TRACE_REGION.itemsize, writable=writable))


def _checked_trace(region: Region) -> Region:
    header = region.view(abi.TRACE_HEADER)[0]
    try:
        _expect(region.name, "magic", int(header["magic"]), abi.TRACE_MAGIC)
        _expect(region.name, "version", int(header["version"]), abi.TRACE_VERSION)
        _expect(region.name, "region size", region.region_bytes, int(header["region_bytes"]))
    except BaseException:
        del header
        region.close()
        raise
    return region


def _fill_queue_pair_header(
    header: np.ndarray[Any, Any],
    geometry: QueuePairGeometry,
    engine_id: int,
    queue_pair_idx: int,
    max_context: int,
    vocab_size: int,
) -> None:
    header["magic"] = abi.QUEUE_PAIR_MAGIC
    header["abi_version"] = abi.ABI_VERSION
    header["header_bytes"] = abi.QUEUE_PAIR.itemsize
    header["region_bytes"] = geometry.region_bytes
    header["submission_entry_bytes"] = abi.SUBMISSION_ENTRY.itemsize
    header["num_submissions"] = geometry.num_submissions
    header["completion_entry_bytes"] = abi.COMPLETION_ENTRY.itemsize
    header["num_completions"] = geometry.num_completions
    header["arena_bytes"] = geometry.arena_bytes
    header["submissions_offset"] = geometry.submissions_offset
    header["completions_offset"] = geometry.completions_offset
    header["arena_offset"] = geometry.arena_offset
    header["engine_id"] = engine_id
    header["queue_pair_idx"] = queue_pair_idx
    header["max_context"] = max_context
    header["vocab_size"] = vocab_size


def _check_queue_pair_header(region: Region, queue_pair_idx: int) -> None:
    header = region.view(abi.QUEUE_PAIR_HEADER)[0]
    name = region.name
    _expect(name, "magic", int(header["magic"]), abi.QUEUE_PAIR_MAGIC)
    _expect(name, "abi_version", int(header["abi_version"]), abi.ABI_VERSION)
    _expect(name, "header_bytes", int(header["header_bytes"]), abi.QUEUE_PAIR.itemsize)
    _expect(name, "submission_entry_bytes", int(header["submission_entry_bytes"]), abi.SUBMISSION_ENTRY.itemsize)
    _expect(name, "completion_entry_bytes", int(header["completion_entry_bytes"]), abi.COMPLETION_ENTRY.itemsize)
    _expect(name, "queue_pair_idx", int(header["queue_pair_idx"]), queue_pair_idx)
    geometry = QueuePairGeometry(
        int(header["num_submissions"]), int(header["num_completions"]), int(header["arena_bytes"])
    )
    _expect(name, "submissions_offset", int(header["submissions_offset"]), geometry.submissions_offset)
    _expect(name, "completions_offset", int(header["completions_offset"]), geometry.completions_offset)
    _expect(name, "arena_offset", int(header["arena_offset"]), geometry.arena_offset)
    _expect(name, "region_bytes", int(header["region_bytes"]), geometry.region_bytes)
    _expect(name, "region size", region.region_bytes, geometry.region_bytes)


def _expect(name: str, what: str, got: int, expected: int) -> None:
    if got != expected:
        raise SharedMemoryError(
            f"{SHM_DIR / name}: {what} is {got:#x}, expected {expected:#x}; "
            "the engine was started by another version of blinkimp, or the file is damaged: restart the engine with this version"
        )


def remove_dead_engines() -> list[str]:
    """Removes what killed hosts of this user left, whatever their names: memory that nobody else would ever free. Returns the names."""
    removed = []
    for path in SHM_DIR.glob("blinkimp.*.lock"):
        engine_name = path.name.removeprefix("blinkimp.").removesuffix(".lock")
        try:
            if path.lstat().st_uid != os.geteuid() or engine_is_alive(engine_name):
                continue
            lock = EngineLock(engine_name)
        except (SharedMemoryError, OSError):
            continue  # it has just been started or removed, or is not an engine's
        _remove_regions(engine_name)
        lock.release()
        removed.append(engine_name)
    return removed


def discard_regions(lock: EngineLock) -> None:
    """Removes what a dead engine process left, for the supervisor that holds the name."""
    _remove_regions(lock.engine_name)


def _remove_regions(engine_name: str) -> None:
    """Takes away the names of this engine's regions, half-made ones too. Only under the engine's lock (I2)."""
    engine_page = engine_page_name(engine_name)
    (SHM_DIR / engine_page).unlink(missing_ok=True)
    ours = re.compile(rf"blinkimp\.{engine_name}\.(engine|trace(\.qp\d+)?|metrics|qp\d+)(\.new-.*)?")
    for path in SHM_DIR.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)
