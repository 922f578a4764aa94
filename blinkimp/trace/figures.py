"""What a trace comes to: steps, ops, requests, occupancy. Definitions are in TRACE.md; tables of them in blinkimp/trace/tables.py.

    figures = figures_of(TraceFile(path))         # plain dictionaries, as `blinkimp trace stats --json` prints them

Called by blinkimp/cli/trace.py, blinkimp/trace/diff.py. Test: pytest tests/null/test_trace_figures.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.ring_abi import FinishReason, TraceKind
from blinkimp.trace.clock import Clock
from blinkimp.trace.file import TraceFile
from blinkimp.trace.scan import DEVICE_TIMES, HOST_TIMES, ScanTable, bucket_value_ns, scan

# A request's life, cut where something happened: phase i goes from moment i to moment i + 1, and their sum is the whole.
MOMENTS: Final = (
    *("received", "claimed", "committed", "polled", "admitted", "first_token", "finished", "finish_drained", "ended"),
)
PHASES: Final = ("ingress", "commit", "ring", "queue", "prefill", "decode", "drain", "hand-over")
PHASE_MEANINGS: Final = {
    "ingress": "received by the ingress until it writes to the ring",
    "commit": "writing to the submission ring",
    "ring": "until the director has taken it (as well as the clocks are aligned)",
    "queue": "waiting for pages and a place in the batch",
    "prefill": "in the batch until the first token",
    "decode": "first token to the last one",
    "drain": "until the ingress has read the end (as well as the clocks are aligned)",
    "hand-over": "until all was handed to the client's connection",
}
BATCH_EDGES: Final = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257)  # sequences of a step: [edge, next edge)
NUM_BINS: Final = 60  # of occupancy over time
MS: Final = 1e6


@dataclass(frozen=True)
class Lives:
    """Requests with all times by the host's clock; float ns, NaN where it did not happen."""

    table: NDArray[np.void]  # rows of ScanTable.requests
    at: dict[str, NDArray[np.float64]]
    base_ns: int  # what they count from

    def between(self, first: str, second: str) -> NDArray[np.float64]:
        """ns of the requests that have both."""
        found = self.at[second] - self.at[first]
        return found[np.isfinite(found)]


def lives_of(table: ScanTable, clock: Clock) -> Lives:
    requests = table.requests
    at: dict[str, NDArray[np.float64]] = {}
    raw = {name: requests[name].astype(np.int64) for name in HOST_TIMES}
    raw |= {name: clock.to_host(requests[name]) for name in DEVICE_TIMES}
    if not clock.is_known:  # times of two clocks: what is between them is not a duration
        raw |= {name: np.zeros(len(requests), np.int64) for name in HOST_TIMES}
    base = min((int(times[times != 0].min()) for times in raw.values() if (times != 0).any()), default=0)
    for name, times in raw.items():
        # Floats of whole clock readings would round; from the trace's own beginning they are exact.
        at[name] = np.where(times == 0, np.nan, (times - base).astype(np.float64))
    return Lives(requests, at, base)


def spread(values_ns: NDArray[np.float64], unit_ns: float = MS) -> dict[str, float]:
    """Mean and quantiles in `unit_ns`; empty where there are none."""
    if not len(values_ns):
        return {}
    scaled = np.asarray(values_ns, np.float64) / unit_ns
    p50, p90, p99, most = np.percentile(scaled, [50, 90, 99, 100])
    named = {"mean": float(scaled.mean()), "p50": p50, "p90": p90, "p99": p99, "max": most}
    return {name: round(float(value), 6) for name, value in named.items()} | {"n": len(scaled)}


# ---- Steps -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Steps:
    """Complete ones, in order."""

    table: NDArray[np.void]  # STEP_FIELDS
    time_ns: NDArray[np.float64]  # plan published to last arrival
    gap_ns: NDArray[np.float64]  # to the next step's plan, NaN where nobody was waiting for it or it is not there

    @property
    def has_prompts(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.table["num_rows"] > self.table["num_seqs"]
        return found


def steps_of(table: ScanTable) -> Steps:
    steps = table.steps
    whole = (steps["start"] > 0) & (steps["end"] > 0)
    gap = np.full(len(steps), np.nan)
    if len(steps) > 1:
        follows = whole[:-1] & whole[1:] & (steps["commit"][:-1] > 0)
        goes_on = steps["num_seqs"][:-1] > steps["num_ended"][:-1]  # a request of the step wanted the next one
        gap[:-1] = np.where(follows & goes_on, steps["start"][1:] - steps["end"][:-1], np.nan)
    time_ns = (steps["end"] - steps["start"]).astype(np.float64)
    return Steps(steps[whole], time_ns[whole], gap[whole])


def batch_label(idx: int) -> str:
    first, last = BATCH_EDGES[idx], BATCH_EDGES[idx + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


def batch_idx(num_seqs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the batch's class, for batch_label()."""
    found: NDArray[np.int64] = np.clip(np.searchsorted(BATCH_EDGES, num_seqs, "right") - 1, 0, len(BATCH_EDGES) - 2)
    return found


def step_classes(steps: Steps) -> dict[str, NDArray[np.int64]]:
    """Rows of `steps` by what they did: `decode 5-8`, `prompts 5-8`."""
    classes = batch_idx(steps.table["num_seqs"])
    found = {}
    for prompts, word in ((False, "decode"), (True, "with prompts")):
        for idx in range(len(BATCH_EDGES) - 1):
            rows = np.nonzero((classes == idx) & (steps.has_prompts == prompts))[0]
            if len(rows):
                found[f"{word} {batch_label(idx)}"] = rows
    return found


def step_figures(steps: Steps) -> dict[str, Any]:
    if not len(steps.table):
        return {}
    gaps = steps.gap_ns[np.isfinite(steps.gap_ns)]
    span_s = float(steps.table["end"].max() - steps.table["start"].min()) / 1e9
    by_class = {
        name: {
            "step_ms": spread(steps.time_ns[rows]),
            "tokens_per_s": round(float(steps.table["num_tokens"][rows].sum() / steps.time_ns[rows].sum() * 1e9), 1),
            "rows": round(float(steps.table["num_rows"][rows].mean()), 1),
        }
        for name, rows in step_classes(steps).items()
    }
    return {
        "num": len(steps.table),
        "tokens": int(steps.table["num_tokens"].sum()),
        "busy_fraction": round(float(steps.time_ns.sum() / 1e9 / span_s), 4) if span_s else None,
        "step_ms": spread(steps.time_ns),
        "gap_us": spread(gaps, 1e3),
        "by_class": by_class,
    }


# ---- Ops ---------------------------------------------------------------------------------------------------------------
def op_spans_ns(trace: TraceFile) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[samples, ops] each: from the end of the op before to this one's end on the slowest worker (their sum is the step); and the mean time
    that a worker spent in it."""
    raw = trace.op_samples["times"].astype(np.int64)
    # From the trace's own first: a float would round a clock's reading to 256 ns.
    times = np.where(raw == 0, np.nan, (raw - raw[raw != 0].min(initial=1 << 62)).astype(np.float64))
    if not len(times):
        nothing = np.zeros((0, times.shape[1]))
        return nothing, nothing
    with np.errstate(all="ignore"):
        first = np.nanmin(times[:, 0, :, 0], axis=1)
        done = np.nanmax(times[..., 1], axis=2)
        busy = np.nanmean(times[..., 1] - times[..., 0], axis=2)
    return np.diff(np.concatenate([first[:, None], done], axis=1), axis=1), busy


def op_figures(trace: TraceFile) -> dict[str, Any]:
    if not len(trace.op_samples):
        return {}
    spans, busy = op_spans_ns(trace)
    kinds = np.array(trace.op_kinds())
    total = float(np.nansum(spans, axis=1).mean())
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        mine = kinds == kind
        span, work = float(np.nansum(spans[:, mine], axis=1).mean()), float(np.nansum(busy[:, mine], axis=1).mean())
        found[kind] = {
            "ms_a_step": round(span / MS, 6),
            "share": round(span / total, 4),
            "worker_ms": round(
                work / MS, 6
            ),  # the rest of ms_a_step is waiting: for the slowest worker, for the barrier
            "num_ops": int(mine.sum()),
        }
    return {"num_samples": len(spans), "ms_a_step": round(total / MS, 6), "by_kind": found}


# ---- Requests ----------------------------------------------------------------------------------------------------------
def gap_quantiles_ms(histogram: NDArray[np.int64]) -> dict[str, float]:
    """Between tokens, from the histogram: within 6 %."""
    total = int(histogram.sum())
    if not total:
        return {}
    cumulated = histogram.cumsum()
    return {
        f"p{100 * quantile:g}": round(bucket_value_ns(int(np.searchsorted(cumulated, quantile * total))) / MS, 6)
        for quantile in (0.5, 0.9, 0.99, 0.999)
    } | {"n": total}


def request_figures(lives: Lives, histogram: NDArray[np.int64]) -> dict[str, Any]:
    table = lives.table
    if not len(table):
        return {}
    reasons = table["reason"][table["finished"] != 0]
    decoded = np.isfinite(lives.at["finished"]) & (table["num_tokens"] > 1)
    per_token = (lives.at["last_token"] - lives.at["first_token"])[decoded] / (table["num_tokens"][decoded] - 1)
    num_prompt = int(table["prompt_tokens"].sum())
    return {
        "num": len(table),
        "num_finished": int((table["finished"] != 0).sum()),
        "by_reason": {
            FinishReason(int(reason)).name.lower(): int((reasons == reason).sum()) for reason in np.unique(reasons)
        },
        "phases_ms": {name: spread(lives.between(MOMENTS[idx], MOMENTS[idx + 1])) for idx, name in enumerate(PHASES)},
        "whole_ms": spread(lives.between("received", "ended")),
        "ttft_ms": spread(lives.between("received", "streamed")),
        "ttft_device_ms": spread(lives.between("queued", "first_token")),
        "first_token_drain_ms": spread(lives.between("first_token", "first_drained")),
        "tpot_ms": spread(per_token),
        "itl_ms": gap_quantiles_ms(histogram),
        "chunks": spread(table["num_chunks"][table["num_chunks"] > 0].astype(np.float64), 1.0),
        "cached_fraction": round(float(table["cached_tokens"].sum()) / num_prompt, 4) if num_prompt else 0.0,
        "num_stalls": int(table["num_stalls"].sum()),
        "num_stalled_requests": int((table["num_stalls"] > 0).sum()),
        "num_preemptions": int(table["num_preemptions"].sum()),
        "recomputed_tokens": int(table["lost_tokens"].sum()),
        "num_cancels": int((table["cancel_asked"] != 0).sum()),
    }


# ---- Occupancy ---------------------------------------------------------------------------------------------------------
OCCUPANCY: Final = (
    (TraceKind.BATCH, "running", "waiting"),
    (TraceKind.PAGES, "pages_used", "pages_cached"),
    (TraceKind.RINGS, "submissions", "completions"),
)


def samples_of(samples: NDArray[np.void]) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """By name (`qp0 completions`): host time and value of each change. samples: of ScanTable."""
    found = {}
    for kind, low_name, high_name in OCCUPANCY:
        own = samples[samples["kind"] == int(kind)]
        for queue_pair_idx in np.unique(own["queue_pair_idx"]).tolist():
            some = own[own["queue_pair_idx"] == queue_pair_idx]
            prefix = f"qp{queue_pair_idx} " if kind == TraceKind.RINGS else ""
            times, values = some["time_ns"].astype(np.int64), some["argument"]
            found[prefix + low_name] = times, (values & np.uint64(0xFFFFFFFF)).astype(np.int64)
            found[prefix + high_name] = times, (values >> np.uint64(32)).astype(np.int64)
    return found


def occupancy_figures(trace: TraceFile, table: ScanTable) -> dict[str, Any]:
    """Mean over time, maximum, and the largest value of each of NUM_BINS stretches of the recording."""
    found = {}
    for name, (times, values) in samples_of(table.samples).items():
        end_ns = max(trace.end_ns, int(times[-1]) + 1)
        lasted = np.diff(np.append(times, end_ns)).astype(np.float64)
        edges = np.linspace(times[0], end_ns, NUM_BINS + 1)
        # What held at the beginning of a bin counts in it too.
        at_edges = values[np.searchsorted(times, edges[:-1], "right") - 1]
        series = at_edges.copy()
        np.maximum.at(series, np.clip(np.searchsorted(edges, times, "right") - 1, 0, NUM_BINS - 1), values)
        mean = float((values * lasted).sum() / lasted.sum())
        found[name] = {"mean": round(mean, 3), "max": int(values.max()), "series": series.tolist()}
    return found


def figures_of(trace: TraceFile, table: ScanTable | None = None) -> dict[str, Any]:
    """All of it."""
    table = table or scan(trace.events)
    lost = trace.metadata.lost
    return {
        "trace": {
            "file": str(trace.path),
            "recorded_at": trace.metadata.recorded_at,
            "device": trace.metadata.engine.device,
            "seconds": round(trace.seconds, 3),
            "events": len(trace.events),
            "lost": {"device": lost.device, "ingress": lost.ingress, "op_samples": lost.op_samples},
            "clock_error_us": round(trace.clock.error_ns / 1e3, 3) if trace.clock.is_known else None,
            "ended_by": trace.metadata.ended_by,
        },
        "steps": step_figures(steps_of(table)),
        "ops": op_figures(trace),
        "requests": request_figures(lives_of(table, trace.clock), table.gap_histogram),
        "occupancy": occupancy_figures(trace, table),
    }
