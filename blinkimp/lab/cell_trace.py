"""A trace of one cell: where a server of ours spent the time that the client saw.

    with CellTrace("evidence-persistent-1", path) as trace: ...the load...
    cell["trace"] = trace.figures()

Attached before the load and read when it is over: the rings of a traced engine hold a cell (`lost` says where they did not), and nothing runs beside
what is measured. Clocks are aligned from the requests themselves. Keeping a trace costs the engine a percent (trace/TRACE.md), so traced cells are
not mixed with others.
Called by blinkimp/lab/evidence.py; shown by evidence_traces.py. Test: pytest tests/host/test_evidence.py -k trace
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from blinkimp.bench.errors import LoadError
from blinkimp.host.shared_memory import SharedMemoryError
from blinkimp.trace.errors import TraceError
from blinkimp.trace.figures import figures_of
from blinkimp.trace.file import TraceFile
from blinkimp.trace.recorder import Recorder

KEPT: Final = ("trace", "steps", "ops", "requests")  # occupancy is sampled by whoever looks meanwhile, and nobody does


def trace_flags(engine: str) -> list[str]:
    """Of `blinkimp serve`. Scheduled by the host, a trace has the host's clock and no times of ops."""
    return ["--trace-events", "1048576", *(["--trace-op-period", "64"] if engine == "persistent" else [])]


class CellTrace:
    """From the constructor on. Raises LoadError where the engine keeps no trace, or the file cannot be written."""

    def __init__(self, engine_name: str, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._recorder = Recorder(engine_name, path, pings=False)
        except (TraceError, SharedMemoryError, OSError) as error:
            raise LoadError(f"no trace of {engine_name}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.close()

    def figures(self) -> dict[str, Any]:
        """Of all that happened since; the trace stays at its path. Call it once, in the `with`."""
        try:
            self._recorder.run(0.0)
            figures = figures_of(TraceFile(self._path))
        except (TraceError, OSError) as error:
            raise LoadError(f"trace {self._path}: {error}") from error
        figures["trace"].pop("file")
        return {name: figures[name] for name in KEPT}
