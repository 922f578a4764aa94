"""What the regions of an engine take of shared memory, and whether there is room for them.

Called by host/shared_memory.py (nothing is created unless all of it fits) and blinkimp/cli/checks.py (`blinkimp doctor`).
Test: pytest tests/null/test_shared_memory.py tests/null/test_cli_checks.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blinkimp import ring_abi as abi
from blinkimp.host.available_memory import host_memory_available_bytes
from blinkimp.host.engine_lock import SHM_DIR
from blinkimp.host.metrics_memory import MetricsGeometry
from blinkimp.host.trace_memory import INGRESS_TRACE, TraceGeometry


@dataclass(frozen=True)
class SharedRoom:
    """free_bytes: of the file system, which may be larger than what there is of memory_bytes behind it."""

    needed_bytes: int
    trace_bytes: int  # of those
    free_bytes: int
    memory_bytes: int

    @property
    def is_enough(self) -> bool:
        return self.needed_bytes <= min(self.free_bytes, self.memory_bytes)


def shared_room(
    num_queue_pairs: int, queue_pair_bytes: int, trace: TraceGeometry | None, folder: Path = SHM_DIR
) -> SharedRoom:
    trace_bytes = 0 if trace is None else trace.region_bytes + num_queue_pairs * INGRESS_TRACE.region_bytes
    fixed_bytes = MetricsGeometry(num_queue_pairs).region_bytes + abi.ENGINE_PAGE.itemsize
    needed_bytes = num_queue_pairs * queue_pair_bytes + trace_bytes + fixed_bytes
    found = os.statvfs(folder)
    return SharedRoom(needed_bytes, trace_bytes, found.f_bavail * found.f_frsize, host_memory_available_bytes())
