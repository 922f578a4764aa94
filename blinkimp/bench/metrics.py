"""From records to figures: TTFT, TPOT, ITL, E2EL, throughput, goodput. BENCH.md defines each one; the tests check them on scripted delays.

Each latency exists twice: from the time a request was sent (vLLM's definition, vLLM's keys), and from the time it was meant to be sent (keys
with `_intended`), which a client that falls behind, or a cap on concurrency, cannot make look better (coordinated omission). Keys with `_floor`
count requests that were cut off at the load's end too, by how long they had waited: a server that does not finish cannot look better by that.
Called by blinkimp/bench/runner.py and blinkimp/cli/bench.py. Test: pytest tests/null/test_bench_metrics.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.bench.errors import LoadError
from blinkimp.bench.record import Record

PERCENTILES: Final = (90.0, 95.0, 99.0, 99.9)
METRICS: Final = ("ttft", "tpot", "itl", "e2el")
SLO_METRICS: Final = ("ttft", "tpot", "e2el")  # of one request each


@dataclass(frozen=True)
class Samples:
    """Latencies in ms of the requests that were counted and completed."""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]  # of requests with at least two tokens
    itl: NDArray[np.float64]  # of all gaps between chunks
    e2el: NDArray[np.float64]
    ttft_intended: NDArray[np.float64]
    e2el_intended: NDArray[np.float64]
    ttft_floor: NDArray[np.float64]  # these two: of the requests that were cut off as well
    tpot_floor: NDArray[np.float64]
    client_queue_time: NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """What counts: requests meant to be sent at or after begin_ns; sending stopped at end_ns."""

    begin_ns: int
    end_ns: int
    records: list[Record] = field(default_factory=list)  # those that count

    @classmethod
    def of(cls, records: Sequence[Record], begin_ns: int, end_ns: int) -> Window:
        return cls(begin_ns, end_ns, [record for record in records if record.intended_ns >= begin_ns])

    @property
    def completed(self) -> list[Record]:
        return [record for record in self.records if record.is_complete]

    @property
    def duration_s(self) -> float:
        """From the window's begin to the last completion, as vLLM counts."""
        return (max((record.ended_ns for record in self.completed), default=self.end_ns) - self.begin_ns) / 1e9


def tpot_ms(record: Record) -> float | None:
    """Mean time per output token after the first."""
    if record.num_output_tokens < 2:
        return None
    return (record.chunk_ns[-1] - record.chunk_ns[0]) / 1e6 / (record.num_output_tokens - 1)


def tokens_a_count(completed: Sequence[Record]) -> float:
    """Tokens for each that was counted as it came. Over a text protocol a piece counts one, and a busy server packs several tokens into a piece:
    how many there were stands at the request's end alone."""
    num_counted = sum(sum(record.chunk_tokens) for record in completed)
    return sum(record.num_output_tokens for record in completed) / num_counted if num_counted else 1.0


def tpot_floor_ms(record: Record, tokens_each: float) -> float | None:
    """The same of a request that was cut off, as if its next token had come at that moment: it took at least so long a token. tokens_each: as
    tokens_a_count(), for how many tokens its pieces held the server did not come to tell."""
    if record.is_complete:
        return tpot_ms(record)
    if not record.chunk_ns:
        return None
    return (record.ended_ns - record.chunk_ns[0]) / 1e6 / (sum(record.chunk_tokens) * tokens_each)


def samples_of(completed: Sequence[Record], cut: Sequence[Record] = ()) -> Samples:
    def ms(values: list[int]) -> NDArray[np.float64]:
        return np.array(values, np.float64) / 1e6

    known, tokens_each = [*completed, *cut], tokens_a_count(completed)
    floors = [value for record in known if (value := tpot_floor_ms(record, tokens_each)) is not None]
    gaps = [np.diff(np.array(record.chunk_ns, np.int64)) for record in completed]
    tpots = [value for record in completed if (value := tpot_ms(record)) is not None]
    return Samples(
        ttft=ms([record.chunk_ns[0] - record.sent_ns for record in completed]),
        tpot=np.array(tpots, np.float64),
        itl=np.concatenate(gaps).astype(np.float64) / 1e6 if gaps else np.zeros(0),
        e2el=ms([record.chunk_ns[-1] - record.sent_ns for record in completed]),
        ttft_intended=ms([record.chunk_ns[0] - record.intended_ns for record in completed]),
        e2el_intended=ms([record.chunk_ns[-1] - record.intended_ns for record in completed]),
        ttft_floor=ms([(record.chunk_ns or [record.ended_ns])[0] - record.intended_ns for record in known]),
        tpot_floor=np.array(floors, np.float64),
        client_queue_time=ms([record.sent_ns - record.intended_ns for record in completed]),
    )


def percentile_word(percentile: float) -> str:
    """99 and 99.9 as vLLM writes them in keys."""
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)


def summary_of(name: str, values_ms: NDArray[np.float64]) -> dict[str, float]:
    """vLLM's keys for one metric: mean_ttft_ms, median_ttft_ms, std_ttft_ms, p99_ttft_ms and so on; 0 without samples, as there."""
    values = values_ms if len(values_ms) else np.zeros(1)
    summary = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    for percentile in PERCENTILES:
        summary[f"p{percentile_word(percentile)}_{name}_ms"] = float(np.percentile(values, percentile))
    return summary


def parse_slos(texts: Sequence[str]) -> dict[str, float]:
    """Limits in ms out of `ttft:500 tpot:20`. Raises LoadError."""
    slos: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            slos[name] = float(value)
        except ValueError:
            slos[name] = -1.0
        if name not in SLO_METRICS or not slos[name] > 0:
            raise LoadError(
                f"goodput: got {text!r}, expected NAME:MILLISECONDS with a name out of {', '.join(SLO_METRICS)}, such as ttft:500"
            )
    return slos


def num_good(completed: Sequence[Record], slos: Mapping[str, float], *, from_intended: bool) -> int:
    """Completed requests that met every limit, counted from when they were meant to be sent, or from when they were sent."""

    def is_good(record: Record) -> bool:
        begin_ns = record.intended_ns if from_intended else record.sent_ns
        got = {
            "ttft": (record.chunk_ns[0] - begin_ns) / 1e6,
            "tpot": tpot_ms(record) or 0.0,
            "e2el": (record.chunk_ns[-1] - begin_ns) / 1e6,
        }
        return all(got[name] <= limit_ms for name, limit_ms in slos.items())

    return sum(map(is_good, completed))


def peak_rates(completed: Sequence[Record], begin_ns: int) -> tuple[float, int]:
    """(most tokens in a whole second from the begin, most requests that ran at one moment)."""
    if not completed:
        return 0.0, 0
    at_s = np.concatenate([np.array(record.chunk_ns, np.int64) - begin_ns for record in completed]) // 1_000_000_000
    tokens = np.concatenate([np.array(record.chunk_tokens, np.int64) for record in completed])
    per_second = np.bincount(np.maximum(at_s, 0), weights=tokens)
    # An end before a begin at the same moment, as vLLM counts: the intervals are half-open.
    edges = sorted([(record.sent_ns, 1) for record in completed] + [(record.ended_ns, -1) for record in completed])
    return float(per_second.max()), int(np.cumsum([change for _, change in edges]).max())


def tokens_of_pieces(record: Record, tokens_each: float) -> NDArray[np.float64]:
    """Tokens in each piece of a request's output. Where several were packed into one, as many as belong to the time since the piece before: the
    server went on making them. Of a request that did not complete, tokens_each."""
    counted = np.array(record.chunk_tokens, np.float64)
    if not record.is_complete:
        return counted * tokens_each
    if counted.sum() == record.num_output_tokens:
        return counted
    gaps = np.diff(np.array(record.chunk_ns, np.int64))
    if not gaps.sum():
        return np.full(len(counted), record.num_output_tokens / len(counted))
    return np.concatenate([[1.0], (record.num_output_tokens - 1) * gaps / gaps.sum()])


def tokens_between(records: Sequence[Record], begin_ns: int, end_ns: int) -> float:
    """Output tokens, of whatever request, that arrived in a time."""
    tokens_each, total = tokens_a_count([record for record in records if record.is_complete]), 0.0
    for record in records:
        at_ns = np.array(record.chunk_ns, np.int64)
        inside = (at_ns >= begin_ns) & (at_ns < end_ns)
        total += float(tokens_of_pieces(record, tokens_each)[inside].sum())
    return total


def figures_of(all_records: Sequence[Record], window: Window, slos: Mapping[str, float]) -> dict[str, Any]:
    """vLLM's `bench serve` keys, and this tool's own beside them."""
    completed, duration_s = window.completed, max(window.duration_s, 1e-9)
    cut = [record for record in window.records if record.is_cut]
    samples = samples_of(completed, cut)
    total_input = sum(record.input_len for record in completed)
    total_output = sum(record.num_output_tokens for record in completed)
    most_tokens, most_requests = peak_rates(completed, window.begin_ns)
    figures: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(window.records) - len(completed),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(completed) / duration_s,
        "request_goodput": num_good(completed, slos, from_intended=False) / duration_s if slos else None,
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_requests,
    }
    for name in METRICS:
        figures |= summary_of(name, getattr(samples, name))
    for name in ("ttft_intended", "e2el_intended", "ttft_floor", "tpot_floor", "client_queue_time"):
        figures |= summary_of(name, getattr(samples, name))
    good = num_good(completed, slos, from_intended=True) if slos else None
    sending_s = (window.end_ns - window.begin_ns) / 1e9
    arrived = tokens_between(all_records, window.begin_ns, window.end_ns)
    num_chunks = sum(len(record.chunk_ns) for record in completed)
    late_ms = [(record.sent_ns - record.intended_ns) / 1e6 for record in window.records if record.sent_ns]
    return figures | {
        "sending_duration": sending_s,
        "steady_output_throughput": arrived / sending_s if sending_s > 0 else 0.0,
        "mean_chunk_tokens": total_output / num_chunks if num_chunks else None,
        "request_goodput_intended": None if good is None else good / duration_s,
        "good_requests": good,
        "slos_ms": dict(slos),
        "p99_send_delay_ms": float(np.percentile(late_ms, 99)) if late_ms else 0.0,
        "max_send_delay_ms": max(late_ms, default=0.0),
        "num_not_counted": len(all_records) - len(window.records),
        "num_cut": len(cut),
    }


def details_of(window: Window) -> dict[str, Any]:
    """vLLM's per-request lists, in seconds, of the counted requests."""
    records = window.records
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [(record.chunk_ns[0] - record.sent_ns) / 1e9 if record.chunk_ns else 0.0 for record in records],
        "itls": [(np.diff(np.array(record.chunk_ns, np.int64)) / 1e9).tolist() for record in records],
        "latencies": [(record.chunk_ns[-1] - record.sent_ns) / 1e9 if record.chunk_ns else 0.0 for record in records],
        "queue_times": [(record.sent_ns - record.intended_ns) / 1e9 if record.sent_ns else 0.0 for record in records],
        "start_times": [record.sent_ns / 1e9 for record in records],
        "intended_times": [record.intended_ns / 1e9 for record in records],
        "errors": [record.error for record in records],
    }


def floors_of(window: Window) -> dict[str, list[float]]:
    """What `*_ttft_floor_ms` and `*_tpot_floor_ms` are figures of: a value for each request, in ms, to a microsecond."""
    samples = samples_of(window.completed, [record for record in window.records if record.is_cut])
    return {name: np.round(getattr(samples, name), 3).tolist() for name in ("ttft_floor", "tpot_floor")}


def inferencex_keys(figures: Mapping[str, Any], *, num_gpus: int, **facts: Any) -> dict[str, Any]:
    """InferenceX's keys: throughput per GPU, latencies in seconds, interactivity (intvty) in tokens/s for one user."""
    total, output = figures["total_token_throughput"] / num_gpus, figures["output_throughput"] / num_gpus
    keys: dict[str, Any] = {
        **facts,
        "is_multinode": False,
        "disagg": False,
        "spec_decoding": "none",
        "tp": num_gpus,
        "pp": 1,
        "dcp_size": 1,
        "pcp_size": 1,
        "ep": 1,
        "dp_attention": "false",
        "tput_per_gpu": total,
        "output_tput_per_gpu": output,
        "input_tput_per_gpu": total - output,
    }
    for name, value in figures.items():
        if name.endswith("_ms") and isinstance(value, float):
            keys[name.removesuffix("_ms")] = value / 1e3
            if name.removesuffix("_ms").endswith("_tpot"):
                keys[name.removesuffix("_ms").replace("tpot", "intvty")] = 1e3 / value if value > 0 else 0.0
    return keys


def inferencex_power_keys(records: Sequence[Record], energy_j: float | None, power_w: float | None) -> dict[str, Any]:
    """InferenceX's keys of power measured over the whole run, nothing subtracted; without a measurement it says so, and gives none."""
    keys: dict[str, Any] = {"power_metric_schema_version": 2, "power_valid": int(energy_j is not None)}
    if energy_j is None:
        return keys
    completed = [record for record in records if record.is_complete]
    inputs, outputs = (sum(getattr(r, name) for r in completed) for name in ("input_len", "num_output_tokens"))
    counts = {
        "successful_query": len(completed),
        "input_token": inputs,
        "output_token": outputs,
        "total_token": inputs + outputs,
    }
    return (
        keys
        | {"avg_power_w": power_w, "avg_total_gpu_power_w": power_w, "total_gpu_energy_j": round(energy_j, 3)}
        | {f"joules_per_{what}": round(energy_j / number, 6) for what, number in counts.items() if number}
    )
