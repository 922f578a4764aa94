"""Exports of a trace: the JSON is what Chrome's trace event format asks for, and both have every event.

Run: pytest tests/null/test_trace_exports.py
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blinkimp.cli import main
from blinkimp.outputs import OutputError
from blinkimp.ring_abi import TraceKind
from blinkimp.trace.errors import TraceError
from blinkimp.trace.parquet import export_parquet
from blinkimp.trace.perfetto import PROCESS_NAMES, Window, export_perfetto
from blinkimp.trace.synthetic import OFFSET_NS
from tests.null.test_trace_figures import OPS, SHAPE, make_file
from tests.support import files_of_at_most, python_path

PHASES_OF = {"M": {"name", "args"}, "X": {"name", "ts", "dur"}, "i": {"name", "ts", "s"}, "C": {"name", "ts", "args"}}


def exported(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    found: dict[str, Any] = json.loads(text)
    return found


def check_format(document: dict[str, Any]) -> None:
    """Required members of each phase; names of all processes and threads; slices of a thread nest."""
    assert document["displayTimeUnit"] == "ns"
    named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
    slices = defaultdict(list)
    for event in document["traceEvents"]:
        assert PHASES_OF[event["ph"]] <= event.keys() and {"pid", "tid"} <= event.keys(), event
        if event["ph"] == "M":
            if event["name"] in named:
                named[event["name"]].add((event["pid"], event["tid"]))
                assert isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        elif event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append(
                (round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3))
            )
        else:
            assert event["s"] in ("t", "p", "g")
    assert {pid for pid, _ in named["process_name"]} == set(PROCESS_NAMES)
    assert slices.keys() <= named["thread_name"], "every track has a name"
    for spans in slices.values():
        stack: list[int] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while stack and stack[-1] <= begin:
                stack.pop()
            assert not stack or end <= stack[-1] + 1, "slices of a thread nest"
            stack.append(end)


@pytest.mark.parametrize("name", ["out.json", "out.json.gz"])
def test_a_perfetto_file_has_all_tracks(tmp_path: Path, name: str) -> None:
    trace = make_file(tmp_path / "a.trace")
    num_written, is_whole = export_perfetto(trace, tmp_path / name)
    document = exported(tmp_path / name)
    check_format(document)
    events = document["traceEvents"]
    assert is_whole and len(events) == num_written
    by_pid = Counter((PROCESS_NAMES[event["pid"]], event["ph"]) for event in events)
    num_requests = sum(event["name"] == "300 + 10 tokens" for event in events)
    num_steps = by_pid["director", "X"]
    assert num_requests == len(set(trace.events["request_id"].tolist()) - {0})
    assert num_steps == (trace.events["kind"] == int(TraceKind.STEP_START)).sum()
    assert by_pid["SMs", "X"] == 3 * len(OPS) * 2
    assert by_pid["requests", "X"] == num_requests * 9, "the request and its eight phases"
    assert by_pid["requests", "i"] == num_requests * (10 + 2), "tokens and chunks"
    assert by_pid["counters", "C"] == num_steps + 2 * 5
    assert {event["name"] for event in events if event["pid"] == 2 and event["ph"] == "X"} == set(OPS)
    assert document["otherData"]["clock_error_us"] == 0.5


def test_lanes_hold_no_more_than_run_at_once(tmp_path: Path) -> None:
    """A wave's requests overlap the next wave's queueing: twice the batch at most."""
    export_perfetto(make_file(tmp_path / "a.trace"), tmp_path / "out.json")
    lanes = {event["tid"] for event in exported(tmp_path / "out.json")["traceEvents"] if event["pid"] == 3}
    assert SHAPE.batch <= len(lanes) <= 2 * SHAPE.batch


def test_a_window_and_a_limit_bound_the_file(tmp_path: Path) -> None:
    trace = make_file(tmp_path / "a.trace")
    whole, _ = export_perfetto(trace, tmp_path / "whole.json")
    some, is_whole = export_perfetto(trace, tmp_path / "some.json", window=Window(0.05, 0.15))
    assert is_whole and some < whole / 2
    check_format(exported(tmp_path / "some.json"))
    steps = [
        event["ts"]
        for event in exported(tmp_path / "some.json")["traceEvents"]
        if event["pid"] == 1 and event["ph"] == "X"
    ]
    assert 0 < len(steps) < 16 and min(steps) >= 0.05e6 - SHAPE.step_ns / 1e3 and max(steps) <= 0.15e6
    few, is_whole = export_perfetto(trace, tmp_path / "few.json", max_events=100)
    assert few == 100 and not is_whole and len(exported(tmp_path / "few.json")["traceEvents"]) == 100
    with pytest.raises(TraceError, match="expected 0 <= from < to"):
        Window(3, 1)


def test_an_export_never_costs_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link, other = tmp_path / "a.trace", tmp_path / "link.gz", tmp_path / "out.json"
    make_file(path)
    link.symlink_to(path)
    before = path.read_bytes()
    for flags in (
        ["--perfetto", str(path)],
        ["--perfetto", str(link.with_suffix("")), "--gzip"],
        ["--parquet", str(path)],
        ["--perfetto", str(other), "--parquet", str(other)],
    ):
        assert main(["trace", "export", str(path), *flags]) == 1
        assert "the same file as" in capsys.readouterr().err
    assert path.read_bytes() == before and not other.exists()


def test_an_export_over_its_own_trace_does_not_pull_the_mapping_away(tmp_path: Path) -> None:
    """In a process of its own: it would die by SIGBUS, where the file was truncated first."""
    make_file(path := tmp_path / "a.trace")
    program = (
        "import sys; from pathlib import Path; from blinkimp.trace.file import TraceFile; "
        "from blinkimp.trace.perfetto import export_perfetto; path = Path(sys.argv[1]); export_perfetto(TraceFile(path), path)"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    assert subprocess.run([sys.executable, "-c", program, path], env=environment, check=False).returncode == 0
    check_format(exported(path))


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    trace, path = make_file(tmp_path / "a.trace"), tmp_path / "out.json"
    path.write_text("old")

    exports: list[Callable[..., Any]] = [export_perfetto]
    if importlib.util.find_spec("pyarrow"):
        exports.append(export_parquet)
    for export in exports:
        with files_of_at_most(1000), pytest.raises(OutputError, match="cannot be written"):
            export(trace, path)
    assert path.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["a.trace", "out.json"]


def test_a_trace_whose_clocks_are_not_aligned_shows_the_device_alone(tmp_path: Path) -> None:
    trace = make_file(tmp_path / "a.trace")
    trace.clock.__init__(type(trace.metadata.clock)())  # type: ignore[misc]
    export_perfetto(trace, tmp_path / "out.json")
    document = exported(tmp_path / "out.json")
    check_format(document)
    assert document["otherData"]["clock_error_us"] is None
    assert max(event.get("ts", 0) for event in document["traceEvents"]) < 10e6, "no host time beside a device's"


def test_parquet_has_a_row_for_each_event(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    trace = make_file(tmp_path / "a.trace")
    assert export_parquet(trace, tmp_path / "out.parquet") == len(trace.events)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.num_rows == len(trace.events)
    assert table["raw_time_ns"].to_numpy().tolist() == trace.events["time_ns"].tolist()
    kinds = Counter(table["kind"].to_pylist())
    assert kinds["token"] == (trace.events["kind"] == int(TraceKind.TOKEN)).sum() and kinds["rings"] == 5
    sources = table["source"].to_pylist()
    assert set(sources) == {"director", "ingress", "recorder"}
    difference = (table["raw_time_ns"].to_numpy().astype("int64") - table["time_ns"].to_numpy()).tolist()
    assert {value for value, source in zip(difference, sources, strict=True) if source == "director"} == {OFFSET_NS}
    assert {value for value, source in zip(difference, sources, strict=True) if source != "director"} == {0}
    assert b"blinkimp" in table.schema.metadata
