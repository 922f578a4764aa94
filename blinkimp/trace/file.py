"""The file of a recorded trace: written by blinkimp/trace/recorder.py and tools/bench_trace.py, mapped by everything else.

    trace = TraceFile(Path("run.trace"))
    trace.events                    # [n] TRACE_EVENT, mapped, not read: device, ingress and sampled events as they came
    trace.metadata, trace.clock     # engine, model, what was lost; device times to host times
    trace.op_samples                # [m] step, time_ns, times[num_ops, num_workers, 2]

TRACE.md has the layout. A recording that was cut off can still be read: its events end where the file ends, and the clocks are aligned from
them. Test: pytest tests/null/test_trace_file.py

Invariants
I1  The header names every other part by offset, and says how many records it has; numpy maps them without this module.
I2  is_complete is written last, after a flush: a file that says so is whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from blinkimp import __version__
from blinkimp import ring_abi as abi
from blinkimp.host.trace_info import EngineInfo
from blinkimp.trace.clock import Clock, ClockRecord, align, bounds_of
from blinkimp.trace.errors import TraceError

FILE_MAGIC: Final = 0x31304654_4B4E4C42  # "BLNKTF01"
FILE_VERSION: Final = 1
METADATA_OFFSET: Final = 4096
EVENTS_OFFSET: Final = 256 << 10  # metadata that does not fit before it goes to the end of the file

FILE_HEADER: Final = np.dtype(
    [
        ("magic", "<u8"),
        ("file_version", "<u4"),
        ("abi_version", "<u4"),
        ("trace_version", "<u4"),
        ("event_bytes", "<u4"),
        ("events_offset", "<u8"),
        ("num_events", "<u8"),
        ("metadata_offset", "<u8"),
        ("metadata_bytes", "<u8"),
        ("op_samples_offset", "<u8"),
        ("num_op_samples", "<u8"),
        ("num_ops", "<u4"),
        ("num_workers", "<u4"),
        ("begin_ns", "<u8"),  # host clock: when the recording began and ended
        ("end_ns", "<u8"),
        ("is_complete", "<u4"),
        ("reserved", "<u4"),
    ]
)


class Lost(msgspec.Struct):
    """Events that were overwritten before they were read."""

    device: int = 0
    ingress: int = 0
    op_samples: int = 0


class Metadata(msgspec.Struct):
    """The JSON part."""

    written_by: str = f"blinkimp {__version__}"
    recorded_at: str = ""
    engine_id: int = 0
    engine: EngineInfo = msgspec.field(default_factory=EngineInfo)
    clock: ClockRecord = msgspec.field(default_factory=ClockRecord)
    lost: Lost = msgspec.field(default_factory=Lost)
    num_queue_pairs: int = 0
    num_pings: int = 0
    sample_period_s: float = 0.0  # of RINGS, BATCH, PAGES; they are written when they change
    ended_by: str = ""  # time, interrupt, or what became of the engine


def op_sample_dtype(num_ops: int, num_workers: int) -> np.dtype[np.void]:
    """times: when a worker began an op, and when it was done with its share; device clock, 0 where it had none."""
    return np.dtype([("step", "<u8"), ("time_ns", "<u8"), ("times", "<u8", (num_ops, num_workers, 2))])


class TraceFileWriter:
    """Appends; finish() makes the file complete."""

    def __init__(self, path: Path, *, num_ops: int = 0, num_workers: int = 0, begin_ns: int = 0) -> None:
        self.path = path
        self.num_events = self.num_op_samples = 0
        self._header = np.zeros(1, FILE_HEADER)
        self._header["magic"], self._header["file_version"] = FILE_MAGIC, FILE_VERSION
        self._header["abi_version"], self._header["trace_version"] = abi.ABI_VERSION, abi.TRACE_VERSION
        self._header["event_bytes"], self._header["events_offset"] = abi.TRACE_EVENT.itemsize, EVENTS_OFFSET
        self._header["num_ops"], self._header["num_workers"] = num_ops, num_workers
        self._header["begin_ns"] = begin_ns
        if path.exists() and not path.is_file():  # it is mapped when it is finished, and read again
            raise TraceError(f"{path} cannot be written: it is no file, expected one, or a new name; choose another -o")
        try:
            self._file = path.open("wb")
            # Op samples are kept aside until it is known where the events end.
            self._op_samples = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  (closed by close())
        except OSError as error:
            raise TraceError(
                f"{path} cannot be written: {error.strerror}; expected a folder that exists and may be written to; choose another -o"
            ) from error
        os.fchmod(self._file.fileno(), 0o600)  # tokens are what somebody was told
        try:
            with self._told():
                self._file.write(self._header.tobytes())
                self._file.seek(EVENTS_OFFSET)
        except TraceError:
            self.close()
            raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raises TraceError where the file system refuses."""
        try:
            yield
        except OSError as error:
            raise TraceError(
                f"{self.path}: cannot be written ({error.strerror}) after {self.num_events} events; those that reached it can be read; "
                "make room, or choose another -o"
            ) from error

    def append(self, events: NDArray[np.void]) -> None:
        assert events.dtype == abi.TRACE_EVENT, events.dtype
        with self._told():
            self._file.write(np.ascontiguousarray(events).data.cast("B"))
        self.num_events += len(events)

    def append_op_sample(self, step: int, time_ns: int, times: NDArray[np.uint64]) -> None:
        with self._told():
            self._op_samples.write(np.array([step, time_ns], np.uint64).tobytes() + times.tobytes())
        self.num_op_samples += 1

    def finish(self, metadata: Metadata, end_ns: int) -> None:
        """The clock is aligned from the events, unless metadata has one already."""
        with self._told():
            self._finish(metadata, end_ns)
        self.close()

    def _finish(self, metadata: Metadata, end_ns: int) -> None:
        header = self._header
        self._file.seek(0, os.SEEK_END)
        self._file.truncate(max(self._file.tell(), EVENTS_OFFSET))
        self._file.flush()
        if not metadata.clock.knots:
            metadata.clock = align(bounds_of(_map_events(self.path, EVENTS_OFFSET, self.num_events))).record
        header["num_events"], header["num_op_samples"], header["end_ns"] = self.num_events, self.num_op_samples, end_ns
        header["op_samples_offset"] = self._file.seek(0, os.SEEK_END)
        self._op_samples.seek(0)
        while block := self._op_samples.read(1 << 20):
            self._file.write(block)
        text = msgspec.json.encode(metadata)
        fits = METADATA_OFFSET + len(text) <= EVENTS_OFFSET
        header["metadata_offset"] = self._file.seek(METADATA_OFFSET) if fits else self._file.seek(0, os.SEEK_END)
        header["metadata_bytes"] = len(text)
        self._file.write(text)
        for is_complete in (0, 1):  # I2
            header["is_complete"] = is_complete
            self._file.seek(0)
            self._file.write(header.tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        for file in (self._file, self._op_samples):
            with contextlib.suppress(
                OSError
            ):  # of what is buffered still: finish() has left nothing, and a failure before was told
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map_events(path: Path, offset: int, num_events: int) -> NDArray[np.void]:
    if num_events == 0:
        return np.zeros(0, abi.TRACE_EVENT)
    events: NDArray[np.void] = np.memmap(path, abi.TRACE_EVENT, "r", offset, (num_events,))
    return events


class TraceFile:
    """A recorded trace. Raises TraceError for what is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(FILE_HEADER.itemsize)
                num_bytes = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise TraceError(
                f"{path}: cannot be read ({error.strerror}); expected a file that `blinkimp trace record` wrote; check the name"
            ) from error
        header = self._checked(head)
        self.header = header
        self.is_complete = bool(header["is_complete"])
        self.begin_ns, self.end_ns = int(header["begin_ns"]), int(header["end_ns"])
        offset = int(header["events_offset"])
        num_events = int(header["num_events"])
        if not self.is_complete:
            num_events = max(0, num_bytes - offset) // abi.TRACE_EVENT.itemsize
        dtype = op_sample_dtype(int(header["num_ops"]), int(header["num_workers"]))
        num_op_samples = int(header["num_op_samples"]) if self.is_complete else 0
        needed = max(
            offset + num_events * abi.TRACE_EVENT.itemsize if num_events else 0,
            int(header["op_samples_offset"]) + num_op_samples * dtype.itemsize if num_op_samples else 0,
        )
        if num_bytes < needed:
            raise TraceError(
                f"{path}: has {num_bytes} bytes, expected at least {needed} for what its header says; it was cut short: copy it again"
            )
        self.events = _map_events(path, offset, num_events)
        self.op_samples: NDArray[np.void] = np.zeros(0, dtype)
        if num_op_samples:
            self.op_samples = np.memmap(path, dtype, "r", int(header["op_samples_offset"]), (num_op_samples,))
        self.metadata = self._metadata()
        if not self.is_complete:
            self.metadata.clock = align(bounds_of(self.events)).record
        self.clock = Clock(self.metadata.clock)

    def _checked(self, head: bytes) -> np.void:
        if int.from_bytes(head[:8], "little") == FILE_MAGIC and len(head) < FILE_HEADER.itemsize:
            raise TraceError(
                f"{self.path}: has {len(head)} bytes, expected at least the {FILE_HEADER.itemsize} of a header; it was cut short: copy it again"
            )
        if int.from_bytes(head[:8], "little") != FILE_MAGIC:
            raise TraceError(
                f"{self.path}: begins with {head[:8]!r}, expected {FILE_MAGIC.to_bytes(8, 'little')!r}; it is not a trace of "
                "`blinkimp trace record`"
            )
        header: np.void = np.frombuffer(head, FILE_HEADER, 1)[0]
        for name, expected in (
            ("file_version", FILE_VERSION),
            ("trace_version", abi.TRACE_VERSION),
            ("event_bytes", abi.TRACE_EVENT.itemsize),
        ):
            if int(header[name]) != expected:
                raise TraceError(
                    f"{self.path}: {name} is {int(header[name])}, expected {expected}; it was recorded by another version of blinkimp: "
                    "read it with that version"
                )
        return header

    def _metadata(self) -> Metadata:
        if not self.is_complete:
            return Metadata(ended_by="cut off: the recorder was killed, or still runs")
        with self.path.open("rb") as file:
            file.seek(int(self.header["metadata_offset"]))
            try:
                return msgspec.json.decode(file.read(int(self.header["metadata_bytes"])), type=Metadata)
            except msgspec.DecodeError as error:
                raise TraceError(
                    f"{self.path}: its metadata cannot be read ({error}); expected JSON; the file is damaged"
                ) from error

    @property
    def seconds(self) -> float:
        """Of the recording."""
        return max(0, self.end_ns - self.begin_ns) / 1e9

    def op_kinds(self) -> list[str]:
        """[num_ops]; `qkv` of `layer.3.qkv`."""
        names = self.metadata.engine.op_names or [f"op.{idx}" for idx in range(int(self.header["num_ops"]))]
        return [name.rpartition(".")[2] for name in names]


def make_events(rows: list[tuple[int, int, int, int, int, int]]) -> NDArray[Any]:
    """Of (time_ns, kind, queue_pair_idx, step, request_id, argument)."""
    return np.array(rows, abi.TRACE_EVENT)
