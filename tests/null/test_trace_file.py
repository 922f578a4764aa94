"""The file of a trace: what is written is read back, and what is no trace is refused with a reason. Run: pytest tests/null/test_trace_file.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import TraceKind
from blinkimp.trace.errors import TraceError
from blinkimp.trace.file import EVENTS_OFFSET, FILE_HEADER, Metadata, TraceFile, TraceFileWriter, make_events
from tests.support import files_of_at_most


def written(path: Path, num_events: int = 1000, metadata: Metadata | None = None) -> TraceFile:
    with TraceFileWriter(path, num_ops=3, num_workers=2, begin_ns=10) as writer:
        for first in range(0, num_events, 300):
            rows = range(first, min(first + 300, num_events))
            writer.append(make_events([(i, int(TraceKind.TOKEN), 1, 2 * i, 3 * i, 4 * i) for i in rows]))
        for step in range(4):
            writer.append_op_sample(step, 7 * step, np.arange(12, dtype=np.uint64).reshape(3, 2, 2) + step)
        writer.finish(metadata or Metadata(ended_by="time"), 2_000_000_010)
    return TraceFile(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    trace = written(tmp_path / "a.trace")
    assert (len(trace.events), trace.seconds, trace.is_complete) == (1000, 2.0, True)
    assert trace.events["time_ns"].tolist() == list(range(1000)) and trace.events["argument"][999] == 3996
    assert trace.op_samples["step"].tolist() == [0, 1, 2, 3] and trace.op_samples["times"][3].max() == 14
    assert trace.metadata.ended_by == "time" and not trace.clock.is_known
    assert (tmp_path / "a.trace").stat().st_mode & 0o077 == 0, "tokens are private"


def test_numpy_maps_it_as_the_document_says(tmp_path: Path) -> None:
    """TRACE.md's three lines."""
    written(tmp_path / "a.trace")
    header = np.fromfile(tmp_path / "a.trace", FILE_HEADER, 1)[0]
    events = np.memmap(
        tmp_path / "a.trace", abi.TRACE_EVENT, "r", int(header["events_offset"]), (int(header["num_events"]),)
    )
    assert events["request_id"].tolist() == list(range(0, 3000, 3))


def test_metadata_that_does_not_fit_goes_to_the_end(tmp_path: Path) -> None:
    metadata = Metadata()
    metadata.engine.op_names = [f"layer.{idx}.qkv" for idx in range(40_000)]
    trace = written(tmp_path / "a.trace", 1000, metadata)
    assert int(trace.header["metadata_offset"]) > EVENTS_OFFSET
    assert trace.metadata.engine.op_names[-1] == "layer.39999.qkv" and len(trace.events) == 1000


def test_an_empty_trace_is_one(tmp_path: Path) -> None:
    assert len(written(tmp_path / "a.trace", 0).events) == 0


def test_a_disk_that_fills_is_told_and_leaves_what_reached_it(tmp_path: Path) -> None:
    path, events = tmp_path / "a.trace", make_events([(i, int(TraceKind.TOKEN), 0, i, i, i) for i in range(1000)])
    with (
        files_of_at_most(EVENTS_OFFSET + 50_000),
        pytest.raises(TraceError, match=r"a\.trace: cannot be written \(.*after \d+ events; .*make room"),
        TraceFileWriter(path) as writer,
    ):
        for _ in range(100):
            writer.append(events)
    trace = TraceFile(path)
    assert not trace.is_complete and 1000 <= len(trace.events) <= 50_000 // events.itemsize
    with files_of_at_most(100), pytest.raises(TraceError, match="cannot be written"):
        TraceFileWriter(tmp_path / "b.trace")
    with pytest.raises(TraceError, match="/dev/full cannot be written: it is no file"):
        TraceFileWriter(Path("/dev/full"))


def test_a_trace_that_ends_in_its_header_was_cut_short(tmp_path: Path) -> None:
    written(path := tmp_path / "a.trace")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TraceError, match=r"has 40 bytes, expected at least the \d+ of a header; it was cut short"):
        TraceFile(path)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    for other in (b"", b"x" * 5000):
        path.write_bytes(other)
        with pytest.raises(TraceError, match="is not a trace"):
            TraceFile(path)
    with pytest.raises(TraceError, match="check the name"):
        TraceFile(tmp_path / "missing")
    written(path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: EVENTS_OFFSET + 100])
    with pytest.raises(TraceError, match="cut short"):
        TraceFile(path)
    content[8] = 99
    path.write_bytes(content)
    with pytest.raises(TraceError, match="another version"):
        TraceFile(path)
    with pytest.raises(TraceError, match="choose another -o"):
        TraceFileWriter(tmp_path / "no such folder" / "a.trace")
