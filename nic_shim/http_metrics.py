"""/metrics: the engine and all its ingresses in Prometheus' text format or OpenMetrics, under vLLM's names and under our own.

    body, content_type = Metrics("blinkimp", prefix="vllm:", model_name="m").render(accept_header)

Every scrape takes one look at shared memory (host/engine_view.py): the status page, and the slots of all ingresses summed up. So every
endpoint says the same, whichever process serves it, and two scrapes of one engine must not be added. METRICS.md lists the names.
Called by nic_shim/http_ingress.py and nic_shim/metrics_server.py. Test: pytest tests/host/test_metrics.py tests/null/test_metrics_text.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector, CollectorRegistry

from blinkimp import ring_abi as abi
from blinkimp.host import metrics_memory as memory
from blinkimp.host.engine_view import EngineView, look
from blinkimp.host.shared_memory import SharedMemoryError
from blinkimp.nic_shim.metrics_names import HTTP_METHODS, OLDER_NAMES, STATUS_GAUGES, STATUS_HELP

DEFAULT_PREFIX: Final = "blinkimp:"
LABELS: Final = ("model_name", "engine")
TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
ENGINE_LABEL: Final = "0"  # as vLLM counts the engines behind one endpoint


class EngineCollector(Collector):
    """All metrics of one engine, read anew at each scrape."""

    def __init__(self, engine_name: str, *, prefix: str = DEFAULT_PREFIX, model_name: str = "") -> None:
        self._engine_name = engine_name
        self._prefix = prefix
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is collected at registration

    def collect(self) -> Iterator[Metric]:
        try:
            view = look(self._engine_name)
        except SharedMemoryError:  # it ends, or is being started anew
            view = None
        yield GaugeMetricFamily(
            "blinkimp:engine_up", "1: the engine's shared memory is there.", 0 if view is None else 1
        )
        if view is not None:
            labels = (self._model_name or view.about.model_name, ENGINE_LABEL)
            yield from self._of_engine(view, labels)
            yield from self._of_requests(view, labels)
            yield from _of_http(view)
            yield from _of_status(view, labels)
            yield from _of_ingresses(view)

    # ---- Under vLLM's names ----------------------------------------------------------------------------------------
    def _gauge(self, name: str, text: str, labels: Sequence[str], value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=LABELS)
        family.add_metric(labels, value)
        return family

    def _counter(self, name: str, text: str, labels: Sequence[str], value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=LABELS)
        family.add_metric(labels, value)
        return family

    def _of_engine(self, view: EngineView, labels: Sequence[str]) -> Iterator[Metric]:
        status = view.status
        yield self._gauge("num_requests_running", "Requests in the batch.", labels, status["num_running"])
        yield self._gauge("num_requests_waiting", "Requests that wait for the batch.", labels, status["num_waiting"])
        reasons = GaugeMetricFamily(
            self._prefix + "num_requests_waiting_by_reason",
            "Requests that wait, by reason.",
            labels=(*LABELS, "reason"),
        )
        reasons.add_metric((*labels, "capacity"), status["num_waiting"])
        reasons.add_metric((*labels, "deferred"), 0)  # nothing else holds a request back here
        yield reasons
        usage = status["num_pages_used"] / max(1, status["num_pages"])
        older = {
            "kv_cache_usage_perc": self._gauge("kv_cache_usage_perc", "KV pages in use, 0 to 1.", labels, usage),
            "prefix_cache_queries": self._counter(
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                labels,
                status["prefix_query_tokens"],
            ),
            "prefix_cache_hits": self._counter(
                "prefix_cache_hits", "Of them, tokens found.", labels, status["prefix_hit_tokens"]
            ),
        }
        yield from older.values()
        yield from (_renamed(older[name], self._prefix + alias) for alias, name in OLDER_NAMES.items() if name in older)
        yield self._counter(
            "num_preemptions", "Requests that lost their place in the batch.", labels, status["preemptions"]
        )
        yield self._counter("generation_tokens", "Output tokens.", labels, status["output_tokens"])
        sources = CounterMetricFamily(
            self._prefix + "prompt_tokens_by_source", "Prompt tokens by what they cost.", labels=(*LABELS, "source")
        )
        sources.add_metric((*labels, "local_compute"), status["prompt_tokens"])
        sources.add_metric((*labels, "local_cache_hit"), status["prefix_hit_tokens"])
        sources.add_metric((*labels, "external_kv_transfer"), 0)
        yield sources
        yield self._counter(
            "prompt_tokens_cached", "Prompt tokens from the prefix cache.", labels, status["prefix_hit_tokens"]
        )
        yield self._step_tokens(view, labels)
        info = GaugeMetricFamily(
            self._prefix + "cache_config_info", "The KV cache.",
            labels=("block_size", "num_gpu_blocks", "enable_prefix_caching", *LABELS),
        )  # fmt: skip
        has_cache = "True" if view.about.has_prefix_cache else "False"
        info.add_metric((str(abi.PAGE_TOKENS), str(status["num_pages"]), has_cache, *labels), 1)
        yield info

    def _step_tokens(self, view: EngineView, labels: Sequence[str]) -> Metric:
        """Tokens of a step: the device counts by powers of two, vLLM's bounds are some of those."""
        counts, bounds = view.step_counts, [1, *(1 << bits for bits in range(3, len(view.step_counts)))]
        totals = list(accumulate(counts))
        buckets = [
            (float(bound), totals[bound.bit_length() - 1]) for bound in bounds if bound.bit_length() <= len(totals)
        ]
        buckets.append((float("inf"), totals[-1]))
        return _histogram(
            self._prefix + "iteration_tokens_total", "Tokens (rows) of a step.", labels, buckets, view.num_step_rows
        )

    def _of_requests(self, view: EngineView, labels: Sequence[str]) -> Iterator[Metric]:
        yield self._counter(
            "prompt_tokens", "Prompt tokens of requests that got a first token.", labels, view.total("prompt_tokens")
        )
        success = CounterMetricFamily(
            self._prefix + "request_success", "Requests (choices) that ended.", labels=(*LABELS, "finished_reason")
        )
        for reason in memory.FINISHED_REASONS:
            success.add_metric((*labels, reason), view.total(f"finished_{reason}"))
        yield success
        for name, (text, _) in memory.HISTOGRAMS.items():
            bounds = (*memory.bounds_of(name, view.about.max_context), float("inf"))
            first = memory.word(f"{name}_bucket_0")
            counts = [sum(slot[first + idx] for slot in view.slots) for idx in range(len(bounds))]
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family = _histogram(self._prefix + name, text, labels, buckets, view.total(f"{name}_sum"))
            yield family
            yield from (_renamed(family, self._prefix + alias) for alias, of in OLDER_NAMES.items() if of == name)


# ---- Under the names of what serves HTTP in front of vLLM --------------------------------------------------------------
def _of_http(view: EngineView) -> Iterator[Metric]:
    requests = CounterMetricFamily("http_requests", "HTTP requests.", labels=("handler", "method", "status"))
    seconds = SummaryMetricFamily(
        "http_request_duration_seconds", "From the first byte to the last.", labels=("handler", "method")
    )
    for handler in memory.HTTP_HANDLERS:
        method, count = HTTP_METHODS.get(handler, "GET"), 0.0
        for status in memory.HTTP_STATUSES:
            value = view.total(f"http_{status} {handler}")
            count += value
            requests.add_metric((handler, method, status), value)
        seconds.add_metric((handler, method), int(count), view.total(f"http_seconds {handler}"))
    yield requests
    yield seconds


# ---- Under our own names -----------------------------------------------------------------------------------------------
def _of_status(view: EngineView, labels: Sequence[str]) -> Iterator[Metric]:
    for name, value in view.status.items():
        kind = GaugeMetricFamily if name in STATUS_GAUGES else CounterMetricFamily
        family = kind(f"blinkimp:engine_{name}", STATUS_HELP[name], labels=LABELS)
        family.add_metric(labels, value)
        yield family
    restarts = CounterMetricFamily("blinkimp:engine_restarts", "Engines that faulted before this one.", labels=LABELS)
    restarts.add_metric(labels, view.num_restarts)
    yield restarts
    about = view.about
    info = GaugeMetricFamily(
        "blinkimp:engine_info", "What the engine is.",
        labels=("device", "max_batch", "max_step_tokens", "max_context", "engine_name", *LABELS),
    )  # fmt: skip
    sizes = (str(about.max_batch), str(about.max_step_tokens), str(about.max_context))
    info.add_metric((about.device, *sizes, view.engine_name, *labels), 1)
    yield info


def _of_ingresses(view: EngineView) -> Iterator[Metric]:
    labels = ("queue_pair", "protocol")
    used = [
        (pair, (str(pair.queue_pair_idx), "http" if view.ingress(pair.queue_pair_idx, "is_http") else "zmq"))
        for pair in view.queue_pairs
        if pair.owner_pid or view.ingress(pair.queue_pair_idx, "pid")
    ]
    for name, text in (memory.INGRESS_COUNTERS | memory.INGRESS_GAUGES).items():
        if name in ("pid", "is_http"):
            continue
        kind = CounterMetricFamily if name in memory.INGRESS_COUNTERS else GaugeMetricFamily
        family = kind(f"blinkimp:ingress_{name}", text, labels=labels)
        for pair, values in used:
            family.add_metric(values, view.ingress(pair.queue_pair_idx, name))
        yield family
    for ring in ("submissions", "completions"):
        family = GaugeMetricFamily(f"blinkimp:ring_{ring}_used", f"Entries in the {ring} ring.", labels=labels)
        for pair, values in used:
            family.add_metric(values, getattr(pair, f"num_{ring}_used"))
        yield family


def _histogram(
    name: str, text: str, labels: Sequence[str], buckets: Sequence[tuple[float, float]], total: float
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=LABELS)
    family.add_metric(
        labels, [("+Inf" if bound == float("inf") else str(bound), value) for bound, value in buckets], total
    )
    return family


def _renamed(family: Metric, name: str) -> Metric:
    """The same under an older name of vLLM's."""
    copy = Metric(name, f"Older name of {family.name}.", family.type)
    for sample in family.samples:
        suffix = sample.name.removeprefix(family.name)
        copy.samples.append(sample._replace(name=name + suffix))
    return copy


class Metrics:
    """What one process serves at /metrics: its engine, and itself as a process."""

    def __init__(self, engine_name: str, *, prefix: str = DEFAULT_PREFIX, model_name: str = "") -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine_name, prefix=prefix, model_name=model_name))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """Body and content type; OpenMetrics for those who ask for it."""
        if "application/openmetrics-text" not in (accept or ""):
            return generate_latest(self.registry), TEXT_TYPE
        # Its other ways to escape turn the colon of `vllm:` into an underscore, which no dashboard would find.
        body: bytes = openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
        return body, openmetrics.CONTENT_TYPE_LATEST
