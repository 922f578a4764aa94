"""From records to figures: TTFT, TPOT, ITL, E2EL, throughput, goodput. BENCH.md defines each one; the tests check them on scripted delays.

Each latency exists twice: from the time a request was sent (vLLM's definition, vLLM's keys), and from the time it was meant to be sent (keys
with `_intended`), which a client that falls behind, or a cap on concurrency, cannot make look better (coordinated omission).
Called by blinkimp/bench/runner.py and sweep.py. Test: pytest tests/null/test_bench_metrics.py
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


def samples_of(completed: Sequence[Record]) -> Samples:
    def ms(values: list[int]) -> NDArray[np.float64]:
        return np.array(values, np.float64) / 1e6

    gaps = [np.diff(np.array(record.chunk_ns, np.int64)) for record in completed]
    tpots = [value for record in completed if (value := tpot_ms(record)) is not None]
    return Samples(
        ttft=ms([record.chunk_ns[0] - record.sent_ns for record in completed]),
        tpot=np.array(tpots, np.float64),
        itl=np.concatenate(gaps).astype(np.float64) / 1e6 if gaps else np.zeros(0),
        e2el=ms([record.chunk_ns[-1] - record.sent_ns for record in completed]),
        ttft_intended=ms([record.chunk_ns[0] - record.intended_ns for record in completed]),
        e2el_intended=ms([record.chunk_ns[-1] - record.intended_ns for record in completed]),
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
        if name not in SLO_METRICS or slos[name] <= 0:
            raise LoadError(
                f"goodput: got {text!r}, expected NAME:MILLISECONDS with a name out of {', '.join(SLO_METRICS)}, such as ttft:500"
            )
    return slos


def num_good(completed: Sequence[Record], slos: Mapping[str, float]) -> int:
    """Completed requests that met every limit, counted from when they were meant to be sent."""

    def is_good(record: Record) -> bool:
        got = {
            "ttft": (record.chunk_ns[0] - record.intended_ns) / 1e6,
            "tpot": tpot_ms(record) or 0.0,
            "e2el": (record.chunk_ns[-1] - record.intended_ns) / 1e6,
        }
        return all(got[name] <= limit_ms for name, limit_ms in slos.items())

    return sum(map(is_good, completed))


def peak_rates(completed: Sequence[Record], begin_ns: int) -> tuple[float, int]:
    """(most tokens in one second, most requests at a time in one second), by whole seconds from the begin."""
    if not completed:
        return 0.0, 0
    at_s = np.concatenate([np.array(record.chunk_ns, np.int64) - begin_ns for record in completed]) // 1_000_000_000
    tokens = np.concatenate([np.array(record.chunk_tokens, np.int64) for record in completed])
    per_second = np.bincount(np.maximum(at_s, 0), weights=tokens)
    running = np.zeros(len(per_second) + 1, np.int64)
    for record in completed:
        first = max(0, (record.sent_ns - begin_ns) // 1_000_000_000)
        running[first : (record.ended_ns - begin_ns) // 1_000_000_000 + 1] += 1
    return float(per_second.max()), int(running.max())


def tokens_between(records: Sequence[Record], begin_ns: int, end_ns: int) -> int:
    """Output tokens, of whatever request, that arrived in a time."""
    total = 0
    for record in records:
        at_ns = np.array(record.chunk_ns, np.int64)
        inside = (at_ns >= begin_ns) & (at_ns < end_ns)
        total += int(np.array(record.chunk_tokens, np.int64)[inside].sum())
    return total


def figures_of(all_records: Sequence[Record], window: Window, slos: Mapping[str, float]) -> dict[str, Any]:
    """vLLM's `bench serve` keys, and this tool's own beside them."""
    completed, duration_s = window.completed, max(window.duration_s, 1e-9)
    samples = samples_of(completed)
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
        "request_goodput": num_good(completed, slos) / duration_s if slos else None,
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_requests,
    }
    for name in METRICS:
        figures |= summary_of(name, getattr(samples, name))
    for name in ("ttft", "e2el"):
        figures |= summary_of(f"{name}_intended", getattr(samples, f"{name}_intended"))
    sending_s = (window.end_ns - window.begin_ns) / 1e9
    arrived = tokens_between(all_records, window.begin_ns, window.end_ns)
    late_ms = [(record.sent_ns - record.intended_ns) / 1e6 for record in window.records if record.sent_ns]
    return figures | {
        "sending_duration": sending_s,
        "steady_output_throughput": arrived / sending_s if sending_s > 0 else 0.0,
        "good_requests": num_good(completed, slos) if slos else None,
        "slos_ms": dict(slos),
        "p99_send_delay_ms": float(np.percentile(late_ms, 99)) if late_ms else 0.0,
        "max_send_delay_ms": max(late_ms, default=0.0),
        "num_not_counted": len(all_records) - len(window.records),
    }


def details_of(window: Window) -> dict[str, Any]:
    """vLLM's per-request lists, in seconds, of the counted requests."""
    records = window.records
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [(record.chunk_ns[0] - record.sent_ns) / 1e9 if record.chunk_ns else 0.0 for record in records],
        "itls": [(np.diff(np.array(record.chunk_ns, np.int64)) / 1e9).tolist() for record in records],
        "start_times": [record.sent_ns / 1e9 for record in records],
        "intended_times": [record.intended_ns / 1e9 for record in records],
        "errors": [record.error for record in records],
    }


def inferencex_keys(figures: Mapping[str, Any], *, num_gpus: int, **facts: Any) -> dict[str, Any]:
    """InferenceX's keys: throughput per GPU, latencies in seconds, interactivity (intvty) in tokens/s for one user."""
    total, output = figures["total_token_throughput"] / num_gpus, figures["output_throughput"] / num_gpus
    keys: dict[str, Any] = {
        **facts,
        "tp": num_gpus,
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
