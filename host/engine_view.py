"""What anybody of the engine's user can see of it: one look at its shared memory, read-only, without a word to any of its processes.

    view = look("blinkimp")         raises EngineNotFoundError where no engine has that name
    view.status["num_running"], view.queue_pairs[0].owner_pid, view.slots[0][word("prompt_tokens")]

So it works while the host is stopped, and costs the engine nothing. Each word is right by itself; two of them may be a director loop apart.
Called by nic_shim/http_metrics.py and blinkimp/cli/top.py. Test: pytest tests/host/test_metrics.py tests/host/test_top.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from blinkimp import ring_abi as abi
from blinkimp.host.metrics_memory import About, about, slots, word
from blinkimp.host.shared_memory import Region, open_engine_page, open_metrics, open_queue_pair


@dataclass(frozen=True)
class QueuePairView:
    queue_pair_idx: int
    owner_pid: int  # of the ingress; 0 = free
    is_attached: bool
    num_submissions: int  # of the ring
    num_submissions_used: int  # written and not yet taken
    num_completions: int
    num_completions_used: int  # published and not yet read


@dataclass(frozen=True)
class EngineView:
    engine_name: str
    engine_id: int
    host_pid: int
    num_restarts: int  # engines of this name that faulted before, under the same supervisor
    at_ns: int  # monotonic clock of this machine
    status: dict[str, int]  # StatusLines
    control: dict[str, int]  # ControlLine
    fault: dict[str, int]  # FaultRecord; code 0 = none
    step_counts: list[int]  # StepCounts.by_rows
    num_step_rows: int
    about: About
    slots: list[list[float]]  # by queue pair; host/metrics_memory.py
    queue_pairs: list[QueuePairView]

    @property
    def state(self) -> str:
        try:
            return abi.EngineState(self.status["state"]).name.lower()
        except ValueError:  # a damaged page
            return f"unknown_{self.status['state']}"

    def ingress(self, queue_pair_idx: int, name: str) -> int:
        """One of INGRESS_COUNTERS or INGRESS_GAUGES."""
        return int(self.slots[queue_pair_idx][word(f"ingress_{name}")])

    def total(self, name: str) -> float:
        """A word of the slots, over all ingresses."""
        idx = word(name)
        return sum(slot[idx] for slot in self.slots)


def _words(record: object) -> dict[str, int]:
    names = record.dtype.names  # type: ignore[attr-defined]  # a numpy record
    return {name: int(record[name]) for name in names if name != "reserved"}  # type: ignore[index]


def look(engine_name: str, *, with_queue_pairs: bool = True) -> EngineView:
    """Raises SharedMemoryError."""
    with open_engine_page(engine_name) as page, open_metrics(engine_name) as metrics:
        record = page.view(abi.ENGINE_PAGE)[0].copy()
        about_engine, words = about(metrics), [slot.tolist() for slot in slots(metrics)]
    num_queue_pairs = int(record["header"]["num_queue_pairs"]) if with_queue_pairs else 0
    queue_pairs = []
    for idx in range(num_queue_pairs):
        with open_queue_pair(engine_name, idx, writable=False) as region:
            queue_pairs.append(_queue_pair(region, idx))
    header = record["header"]
    return EngineView(
        engine_name,
        int(header["engine_id"]),
        int(header["host_pid"]),
        int(header["num_restarts"]),
        time.monotonic_ns(),
        _words(record["status"]),
        _words(record["control"]),
        _words(record["fault"]),
        record["step_counts"]["by_rows"].tolist(),
        int(record["step_counts"]["num_rows"]),
        about_engine,
        words,
        queue_pairs,
    )


def _queue_pair(region: Region, idx: int) -> QueuePairView:
    record = region.view(abi.QUEUE_PAIR)[0].copy()
    header, ingress, director = record["header"], record["ingress"], record["director"]
    epoch = int(director["epoch"])
    is_attached = epoch == int(ingress["epoch"]) and epoch % 2 == 1

    def used(producer_pos: int, consumer_pos: int, num_entries: int) -> int:
        # The two positions are read one after the other, and what an ingress left behind when it was killed is not cleared.
        return min(max(0, producer_pos - consumer_pos), num_entries) if is_attached else 0

    num_submissions, num_completions = int(header["num_submissions"]), int(header["num_completions"])
    return QueuePairView(
        idx,
        int(ingress["owner_pid"]),
        is_attached,
        num_submissions,
        used(int(ingress["submission_producer_pos"]), int(director["submission_consumer_pos"]), num_submissions),
        num_completions,
        used(int(director["completion_producer_pos"]), int(ingress["completion_consumer_pos"]), num_completions),
    )
