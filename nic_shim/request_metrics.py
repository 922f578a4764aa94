"""What an ingress counts of its requests, in its slot of the metrics' shared memory (host/metrics_memory.py).

    metrics.first_token(request)    once a request; a later token costs a subtraction and an append to `gaps_ns`
    metrics.ended(request)          once a request, when LiveRequest.end is set
    metrics.publish(...)            each turn of the loop: ten times a second it looks at what has gathered

Called by nic_shim/engine_link.py and nic_shim/live_request.py, all from the link's thread, but for publish_gauges().
Test: pytest tests/null/test_request_metrics.py tests/host/test_metrics.py

Invariants
I1  Every request that reached the link is counted once in finished_*, in the latency and in the two length histograms.
I2  What a client has been told is counted: ended() runs before the end is sent.
"""

from __future__ import annotations

import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from blinkimp.host.metrics_memory import HISTOGRAMS, INGRESS_COUNTERS, NUM_WORDS, about, bounds_of, slots, word
from blinkimp.host.shared_memory import Region, SharedMemoryError, open_metrics
from blinkimp.protocol import Error

if TYPE_CHECKING:
    from blinkimp.nic_shim.live_request import LiveRequest

PUBLISH_PERIOD_S: Final = 0.1
FEW_GAPS: Final = 24  # so many are faster one by one than by numpy

# Reasons of a Finish -> finished_reason. HTTP's finish_reason has the same names.
FINISHED: Final = {"eos": "stop", "stop_id": "stop", "stop": "stop", "length": "length", "timeout": "timeout"}

Slot = Any  # memoryview of float64, or an array where there is no engine


@dataclass
class Siblings:
    """The choices of one prompt."""

    num_choices: int
    num_left: int
    most_output_tokens: int = 0


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds; None where it did not get so far."""

    ttft_s: float | None
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    e2e_s: float


def times_of(request: LiveRequest) -> Times:
    """Of a request that has ended. Phases are on the device's clock, the others on this machine's."""
    finished_ns = getattr(request.end, "finished_ns", 0)
    accepted_ns, started_ns, first_ns = request.accepted_ns, request.started_ns, request.first_token_ns

    def between(begin_ns: int, end_ns: int) -> float | None:
        # A clock that stood elsewhere before the engine was started anew must not make a time negative.
        return max(0, end_ns - begin_ns) / 1e9 if begin_ns and end_ns else None

    return Times(
        between(request.received_ns, request.first_seen_ns),
        between(accepted_ns, started_ns),
        between(started_ns, first_ns),
        between(first_ns, finished_ns),
        max(0, request.ended_ns - request.received_ns) / 1e9,
    )


def finished_reason(request: LiveRequest) -> str:
    end = request.end
    if end is None or isinstance(end, Error):
        return "error"
    return FINISHED.get(end.reason, "abort")


class _Histogram:
    __slots__ = ("_bounds", "_bucket", "_sum")

    def __init__(self, name: str, max_context: int) -> None:
        self._bounds = bounds_of(name, max_context)
        self._bucket, self._sum = word(f"{name}_bucket_0"), word(f"{name}_sum")

    def observe(self, slot: Slot, value: float) -> None:
        slot[self._bucket + bisect_left(self._bounds, value)] += 1.0
        slot[self._sum] += value

    def observe_all(self, slot: Slot, values: np.ndarray[Any, Any]) -> None:
        found = np.searchsorted(self._bounds, values, side="left")
        for idx, count in enumerate(np.bincount(found).tolist()):
            if count:
                slot[self._bucket + idx] += count
        slot[self._sum] += float(values.sum())


class RequestMetrics:
    """Of the ingress on one queue pair."""

    def __init__(self, engine_name: str, queue_pair_idx: int) -> None:
        self.gaps_ns: list[int] = []  # between tokens, since the last fold
        self.is_http = False
        self.num_refused: Callable[[], int] = int  # since this process started
        self.num_outstanding: Callable[[], int] = int
        self.on_end: Callable[[LiveRequest], None] | None = None  # after the counting: the log line
        self._engine_name = engine_name
        self._queue_pair_idx = queue_pair_idx
        self._region: Region | None = None
        self._slot: Slot = array("d", bytes(8 * NUM_WORDS))
        self._histograms: dict[str, _Histogram] = {}
        self._publish_at = 0.0
        self.reopen()

    def reopen(self) -> None:
        """Maps the region that has the engine's name now. Without one, what is counted is nobody's."""
        max_context = 0
        try:
            region = open_metrics(self._engine_name, writable=True)
        except SharedMemoryError:
            self._slot = array("d", bytes(8 * NUM_WORDS))
        else:
            self.close()
            self._region, max_context = region, about(region).max_context
            self._slot = slots(region)[self._queue_pair_idx]
        self._histograms = {name: _Histogram(name, max_context) for name in HISTOGRAMS}

    def close(self) -> None:
        if self._region is not None:
            self._slot = array("d", bytes(8 * NUM_WORDS))
            self._region.close()
            self._region = None

    @property
    def slot(self) -> Slot:
        return self._slot

    # ---- Requests --------------------------------------------------------------------------------------------------
    def first_token(self, request: LiveRequest) -> None:
        request.first_seen_ns = time.monotonic_ns()
        self._observe("time_to_first_token_seconds", (request.first_seen_ns - request.received_ns) / 1e9)
        self._slot[_PROMPT_TOKENS] += len(request.prompt_ids)

    def ended(self, request: LiveRequest) -> None:
        times = times_of(request)
        num_outputs, num_prompt = len(request.output_ids), len(request.prompt_ids)
        self._slot[word(f"finished_{finished_reason(request)}")] += 1.0
        self._observe("e2e_request_latency_seconds", times.e2e_s)
        self._observe("request_prompt_tokens", num_prompt)
        self._observe("request_generation_tokens", num_outputs)
        self._observe("request_params_max_tokens", request.max_tokens)
        if times.queue_s is not None:
            self._observe("request_queue_time_seconds", times.queue_s)
        if times.prefill_s is not None:
            self._observe("request_prefill_time_seconds", times.prefill_s)
            self._observe("request_prefill_kv_computed_tokens", num_prompt - request.num_cached_tokens)
        if times.decode_s is not None:
            self._observe("request_decode_time_seconds", times.decode_s)
            self._observe("request_time_per_output_token_seconds", times.decode_s / max(1, num_outputs - 1))
            self._observe("request_inference_time_seconds", times.decode_s + (times.prefill_s or 0.0))
        self._count_siblings(request.siblings, num_outputs)
        self.fold_gaps()
        if self.on_end is not None:
            self.on_end(request)

    def _count_siblings(self, siblings: Siblings | None, num_outputs: int) -> None:
        siblings = siblings or Siblings(1, 1)
        siblings.num_left -= 1
        siblings.most_output_tokens = max(siblings.most_output_tokens, num_outputs)
        if siblings.num_left == 0:
            self._observe("request_params_n", siblings.num_choices)
            self._observe("request_max_num_generation_tokens", siblings.most_output_tokens)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(self._slot, value)

    def fold_gaps(self) -> None:
        """The times between tokens into their histogram."""
        if not self.gaps_ns:
            return
        gaps_ns, self.gaps_ns = self.gaps_ns, []
        histogram = self._histograms["inter_token_latency_seconds"]
        if len(gaps_ns) <= FEW_GAPS:
            for gap_ns in gaps_ns:
                histogram.observe(self._slot, max(0, gap_ns) / 1e9)
        else:
            histogram.observe_all(self._slot, np.maximum(np.array(gaps_ns, np.int64), 0) / 1e9)

    # ---- The ingress itself ----------------------------------------------------------------------------------------
    def publish(self, now: float, counters: Any, num_waiting: int) -> None:
        """Counters of this process, and what has gathered. `counters`: a LinkCounters."""
        if now < self._publish_at:
            return
        self._publish_at = now + PUBLISH_PERIOD_S
        self.fold_gaps()
        slot = self._slot
        # dataclasses.asdict() leaves a tuple a call to CPython's free list of up to 2,000: an idle ingress grew by 70 KB a minute.
        values = vars(counters)
        for name in INGRESS_COUNTERS:
            slot[word(f"ingress_{name}")] = float(self.num_refused() if name == "refused" else values[name])
        slot[word("ingress_num_waiting")] = float(num_waiting)
        slot[word("ingress_pid")] = float(os.getpid())
        slot[word("ingress_is_http")] = float(self.is_http)
        self.publish_gauges()

    def publish_gauges(self) -> None:
        """As they stand now; any thread of this process."""
        self._slot[word("ingress_num_outstanding")] = float(self.num_outstanding())


_PROMPT_TOKENS: Final = word("prompt_tokens")
