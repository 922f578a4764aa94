"""A trace as Chrome's JSON trace events, which ui.perfetto.dev and chrome://tracing open.

    export_perfetto(trace, Path("run.json.gz"))       # .gz: compressed

Processes (pid) and threads (tid):
    1 director   steps; when it parked and came back
    2 SMs        a thread a worker: its ops, in the steps whose op times were sampled
    3 requests   lanes: a request takes the first free one; inside it its phases, and its chunks, tokens, stalls and preemptions as instants
    4 ingress    a thread a queue pair: looks at the completion ring
    5 counters   batch, pages, rings, rows of a step
Times are the host's, in microseconds from the first event. The format: "Trace Event Format" of the Chromium project. Written as it goes, so a
large trace does not need memory; --from, --to and max_events bound what a browser is given. Called by blinkimp/cli/trace.py.
Test: pytest tests/null/test_trace_exports.py
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.outputs import replacing
from blinkimp.ring_abi import FinishReason, TraceKind
from blinkimp.trace.errors import TraceError
from blinkimp.trace.figures import MOMENTS, PHASES, lives_of, samples_of
from blinkimp.trace.file import TraceFile
from blinkimp.trace.scan import ScanTable, scan

DIRECTOR, SMS, REQUESTS, INGRESS, COUNTERS = 1, 2, 3, 4, 5
PROCESS_NAMES: Final = {
    DIRECTOR: "director",
    SMS: "SMs",
    REQUESTS: "requests",
    INGRESS: "ingress",
    COUNTERS: "counters",
}
INSTANTS: Final = {
    TraceKind.CHUNK: "chunk",
    TraceKind.TOKEN: "token",
    TraceKind.STALLED: "credit stall",
    TraceKind.PREEMPTED: "preempted",
    TraceKind.CANCEL_ASKED: "cancel asked",
}
REQUEST_ARGUMENTS: Final = (
    *("prompt_tokens", "max_tokens", "cached_tokens", "num_tokens", "num_stalls", "num_preemptions", "queue_pair"),
)
MAX_EVENTS: Final = 5_000_000  # a browser is slow long before
MARKS: Final = {TraceKind.PARKED: "parked", TraceKind.RESUMED: "resumed"}

JsonEvent = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """Of the trace: seconds from its first event."""

    from_s: float = 0.0
    to_s: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 <= self.from_s < self.to_s:
            raise TraceError(
                f"--from {self.from_s:g} --to {self.to_s:g}: expected 0 <= from < to, in seconds from the trace's begin"
            )


class Exporter:
    """Makes the events. Host times are ns; `base_ns` becomes 0."""

    def __init__(self, trace: TraceFile, window: Window) -> None:
        self.trace = trace
        self.table: ScanTable = scan(trace.events)
        clock = trace.clock
        self.lives = lives_of(self.table, clock)
        firsts = clock.to_host(self.table.steps["start"][self.table.steps["start"] > 0])[:1].tolist()
        firsts += [self.lives.base_ns] if len(self.table.requests) else []
        if clock.is_known:
            firsts += [int(times[0]) for times, _ in samples_of(self.table.samples).values()]
        self.base_ns = min(firsts, default=0)
        self.from_ns = self.base_ns + int(window.from_s * 1e9)
        self.to_ns = self.base_ns + int(min(window.to_s, 1e9) * 1e9)

    def us(self, host_ns: int) -> float:
        return round((host_ns - self.base_ns) / 1e3, 3)

    def slice(self, pid: int, tid: int, name: str, begin_ns: int, end_ns: int, **arguments: Any) -> JsonEvent:
        duration = round(max(0, end_ns - begin_ns) / 1e3, 3)
        return {
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "name": name,
            "ts": self.us(begin_ns),
            "dur": duration,
            "args": arguments,
        }

    def instant(self, pid: int, tid: int, name: str, at_ns: int, **arguments: Any) -> JsonEvent:
        return {"ph": "i", "s": "t", "pid": pid, "tid": tid, "name": name, "ts": self.us(at_ns), "args": arguments}

    def counter(self, name: str, at_ns: int, value: int) -> JsonEvent:
        return {"ph": "C", "pid": COUNTERS, "tid": 0, "name": name, "ts": self.us(at_ns), "args": {"value": value}}

    def inside(self, begin_ns: NDArray[np.int64], end_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of what overlaps the window."""
        return np.nonzero((begin_ns > 0) & (end_ns >= self.from_ns) & (begin_ns <= self.to_ns))[0]

    # ---- Tracks --------------------------------------------------------------------------------------------------------
    def metadata(self) -> Iterator[JsonEvent]:
        for pid, name in PROCESS_NAMES.items():
            yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
            yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}
        yield self.thread(DIRECTOR, 1, "steps")
        for worker in range(int(self.trace.header["num_workers"])):
            yield self.thread(SMS, worker, f"worker {worker}")
        for idx in range(max(1, self.trace.metadata.num_queue_pairs)):
            yield self.thread(INGRESS, idx, f"queue pair {idx}")

    def thread(self, pid: int, tid: int, name: str) -> JsonEvent:
        return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}

    def steps(self) -> Iterator[JsonEvent]:
        steps, clock = self.table.steps, self.trace.clock
        begin, end, commit = (clock.to_host(steps[name]) for name in ("start", "end", "commit"))
        # A step's commit overlaps the next step: director steps must not overlap on a thread, so a step ends with its last arrival.
        for idx in self.inside(begin, np.where(end > 0, end, begin)).tolist():
            if not end[idx]:
                continue
            row = steps[idx]
            num_seqs, num_rows = int(row["num_seqs"]), int(row["num_rows"])
            name = f"decode {num_seqs}" if num_rows <= num_seqs else f"{num_rows} rows of {num_seqs}"
            arguments = {
                "step": (self.table.first_step + idx) & 0xFFFFFFFF,
                "rows": num_rows,
                "requests": num_seqs,
                "tokens": int(row["num_tokens"]),
                "ended": int(row["num_ended"]),
                "commit_us": round((int(commit[idx]) - int(end[idx])) / 1e3, 3) if commit[idx] else None,
            }
            yield self.slice(DIRECTOR, 1, name, int(begin[idx]), int(end[idx]), **arguments)
            yield self.counter("rows of a step", int(begin[idx]), num_rows)

    def ops(self) -> Iterator[JsonEvent]:
        names = self.trace.metadata.engine.op_names or self.trace.op_kinds()
        for sample in self.trace.op_samples:
            times = self.trace.clock.to_host(sample["times"])
            whole = times[times > 0]
            if not len(whole) or whole.max() < self.from_ns or whole.min() > self.to_ns:
                continue
            for op_idx, op in enumerate(times.tolist()):
                for worker, (begin_ns, done_ns) in enumerate(op):
                    if begin_ns and done_ns:
                        yield self.slice(SMS, worker, names[op_idx], begin_ns, done_ns, step=int(sample["step"]))

    def requests(self) -> Iterator[JsonEvent]:
        """Requests, their phases, and then what happened in them, on the same lanes."""
        table = self.table.requests
        if not len(table):
            return
        lives = self.lives
        base = lives.base_ns
        moments = np.stack([lives.at[name] for name in MOMENTS])
        known = np.isfinite(moments)
        has_times = np.asarray(known.any(0))
        # The director stamps what it does with a request by the time of its turn: that may be microseconds before POLLED.
        ordered = np.fmax.accumulate(moments, axis=0)
        # Whole nanoseconds before the base is added: a float would round a clock's reading.
        begin_ns = np.where(has_times, np.where(known, moments, np.inf).min(0), 0).astype(np.int64) + base
        end_ns = np.where(has_times, np.where(known, moments, -np.inf).max(0), 0).astype(np.int64) + base
        chosen = [idx for idx in self.inside(begin_ns, end_ns).tolist() if has_times[idx]]
        chosen.sort(key=lambda idx: int(begin_ns[idx]))
        lanes = _lanes([(int(begin_ns[idx]), int(end_ns[idx])) for idx in chosen])
        for lane in range(max(lanes, default=-1) + 1):
            yield self.thread(REQUESTS, lane, f"lane {lane}")
        lane_of: dict[int, int] = {}
        for idx, lane in zip(chosen, lanes, strict=True):
            row = table[idx]
            lane_of[int(row["id"])] = lane
            reason = FinishReason(int(row["reason"])).name.lower() if row["finished"] else "unfinished"
            arguments = {name: int(row[name]) for name in REQUEST_ARGUMENTS}
            name = f"{int(row['prompt_tokens'])} + {int(row['num_tokens'])} tokens"
            yield self.slice(
                REQUESTS,
                lane,
                name,
                int(begin_ns[idx]),
                int(end_ns[idx]),
                id=hex(int(row["id"])),
                reason=reason,
                **arguments,
            )
            for phase_idx, phase in enumerate(PHASES):
                first, second = ordered[phase_idx, idx], ordered[phase_idx + 1, idx]
                if known[phase_idx : phase_idx + 2, idx].all() and second > first:
                    yield self.slice(REQUESTS, lane, phase, int(first) + base, int(second) + base)
        yield from self._instants(lane_of)

    def _instants(self, lane_of: dict[int, int]) -> Iterator[JsonEvent]:
        for chunk in self._chunks():
            wanted = chunk[np.isin(chunk["kind"], [int(kind) for kind in INSTANTS])]
            is_device = wanted["kind"] < int(TraceKind.RECEIVED)
            times = np.where(is_device, self.trace.clock.to_host(wanted["time_ns"]), wanted["time_ns"].astype(np.int64))
            for event, at_ns in zip(wanted[keep := self._in_window(times)], times[keep].tolist(), strict=True):
                lane = lane_of.get(int(event["request_id"]))
                if lane is not None:
                    kind, argument = TraceKind(int(event["kind"])), int(event["argument"])
                    yield self.instant(
                        REQUESTS, lane, INSTANTS[kind], at_ns, low=argument & 0xFFFFFFFF, high=argument >> 32
                    )

    def ingress(self) -> Iterator[JsonEvent]:
        for chunk in self._chunks():
            drained = chunk[chunk["kind"] == int(TraceKind.DRAINED)]
            times = drained["time_ns"].astype(np.int64)
            for event, at_ns in zip(drained[keep := self._in_window(times)], times[keep].tolist(), strict=True):
                idx, argument = int(event["queue_pair_idx"]), int(event["argument"])
                yield self.instant(INGRESS, idx, "drained", at_ns, requests=argument & 0xFFFFFFFF)
                yield self.counter(f"qp{idx} unfinished", at_ns, argument >> 32)

    def marks(self) -> Iterator[JsonEvent]:
        for chunk in self._chunks():
            marks = chunk[np.isin(chunk["kind"], [int(kind) for kind in MARKS])]
            times = self.trace.clock.to_host(marks["time_ns"])
            for event, at_ns in zip(marks[keep := self._in_window(times)], times[keep].tolist(), strict=True):
                yield self.instant(DIRECTOR, 1, MARKS[TraceKind(int(event["kind"]))], at_ns)

    def counters(self) -> Iterator[JsonEvent]:
        for name, (times, values) in samples_of(self.table.samples).items():
            keep = self._in_window(times)
            for at_ns, value in zip(times[keep].tolist(), values[keep].tolist(), strict=True):
                yield self.counter(name, at_ns, value)

    def _in_window(self, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (times >= self.from_ns) & (times <= self.to_ns)
        return found

    def _chunks(self) -> Iterator[NDArray[np.void]]:
        for begin in range(0, len(self.trace.events), 1 << 20):
            yield self.trace.events[begin : begin + (1 << 20)]


def _lanes(spans: list[tuple[int, int]]) -> list[int]:
    """The lane of each span, ascending by begin: the lowest one that is free. Slices of a thread must nest or not touch."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # end, lane
    lanes = []
    num_lanes = 0
    for begin, end in spans:
        while busy and busy[0][0] < begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, num_lanes = num_lanes, num_lanes + 1
        heapq.heappush(busy, (end, lane))
        lanes.append(lane)
    return lanes


def export_perfetto(
    trace: TraceFile,
    path: Path,
    *,
    window: Window | None = None,
    max_events: int = MAX_EVENTS,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[int, bool]:
    """Returns the number of events written, and whether that is all of them. Raises OutputError."""
    exporter = Exporter(trace, window or Window())
    tracks = [exporter.metadata, exporter.steps, exporter.requests, exporter.ops, exporter.marks]
    if trace.clock.is_known:  # else what the host stamped cannot stand beside what the device did
        tracks[3:3] = [exporter.counters, exporter.ingress]
    engine = trace.metadata.engine
    about = {
        "engine": engine.engine_name,
        "device": engine.device,
        "recorded_at": trace.metadata.recorded_at,
        "clock_error_us": round(trace.clock.error_ns / 1e3, 3) if trace.clock.is_known else None,
        "lost_events": trace.metadata.lost.device + trace.metadata.lost.ingress,
    }
    opener: Any = gzip.open if path.suffix == ".gz" else open
    num_written = 0
    with replacing(path) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        file.write(f'{{"displayTimeUnit":"ns","otherData":{json.dumps(about)},"traceEvents":[\n')
        for track in tracks:
            for event in track():
                if num_written >= max_events:
                    break
                file.write((",\n" if num_written else "") + json.dumps(event, separators=(",", ":")))
                num_written += 1
                if num_written % 10_000 == 0:
                    progress(num_written)
        file.write("\n]}\n")
    return num_written, num_written < max_events
