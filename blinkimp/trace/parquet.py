"""A trace as a Parquet file: one row an event, times by the host's clock, names in place of numbers.

    export_parquet(trace, Path("run.parquet"))       # polars.read_parquet("run.parquet").group_by("kind").len()

Columns: time_ns (host clock; int64), raw_time_ns (as the writer stamped it), kind (dictionary of names), source (director, ingress, recorder),
queue_pair, step, request_id, low and high (the halves of the argument; device/trace_abi.h says what they are). The file's metadata has the
trace's own under `blinkimp`. Needs pyarrow (pip install 'blinkimp[trace]'). Called by blinkimp/cli/trace.py.
Test: pytest tests/null/test_trace_exports.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from blinkimp.outputs import replacing
from blinkimp.ring_abi import TraceKind
from blinkimp.trace.errors import TraceError
from blinkimp.trace.file import TraceFile

ROW_GROUP: Final = 1 << 20
SOURCES: Final = ("director", "ingress", "recorder")
NUM_KINDS: Final = 128


def export_parquet(trace: TraceFile, path: Path, *, progress: Callable[[int], None] = lambda _: None) -> int:
    """Returns the number of rows. Raises OutputError."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise TraceError("Parquet: pyarrow is not there, expected it; pip install 'blinkimp[trace]'") from error
    names = [f"kind_{kind}" for kind in range(NUM_KINDS)]
    for kind in TraceKind:
        names[int(kind)] = kind.name.lower()
    kind_names, source_names = arrow.array(names), arrow.array(SOURCES)
    schema = arrow.schema(
        [
            ("time_ns", arrow.int64()),
            ("raw_time_ns", arrow.uint64()),
            ("kind", arrow.dictionary(arrow.int8(), arrow.string())),
            ("source", arrow.dictionary(arrow.int8(), arrow.string())),
            ("queue_pair", arrow.uint16()),
            ("step", arrow.uint32()),
            ("request_id", arrow.uint64()),
            ("low", arrow.uint32()),
            ("high", arrow.uint32()),
        ],
        metadata={"blinkimp": msgspec.json.encode(trace.metadata)},
    )
    events = trace.events
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for begin in range(0, max(1, len(events)), ROW_GROUP):
            part = events[begin : begin + ROW_GROUP]
            kinds = np.ascontiguousarray(part["kind"])
            sources = (kinds >= int(TraceKind.RECEIVED)).astype(np.int8) + (kinds >= int(TraceKind.RINGS))
            raw: Any = np.ascontiguousarray(part["time_ns"])
            times = np.where(sources == 0, trace.clock.to_host(raw), raw.astype(np.int64))
            argument = part["argument"]
            columns = [
                arrow.array(times),
                arrow.array(raw),
                arrow.DictionaryArray.from_arrays((kinds % NUM_KINDS).astype(np.int8), kind_names),
                arrow.DictionaryArray.from_arrays(sources.astype(np.int8), source_names),
                *(arrow.array(np.ascontiguousarray(part[name])) for name in ("queue_pair_idx", "step", "request_id")),
                arrow.array((argument & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
                arrow.array((argument >> np.uint64(32)).astype(np.uint32)),
            ]
            writer.write_batch(arrow.RecordBatch.from_arrays(columns, schema=schema))
            progress(begin + len(part))
    return len(events)
