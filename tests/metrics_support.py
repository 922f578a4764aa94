"""What the tests of the metrics share: /metrics as numbers, and the names that vLLM's dashboards ask for.

Used by tests/host/test_metrics*.py, tests/host/test_top.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

# Every series that the Grafana dashboards in vLLM's repository query (examples/observability: prometheus_grafana, performance and query
# statistics, overview, KV cache), but for what exists there only with a feature that is not here: KV connectors (external_prefix_cache_*),
# multimodal input (mm_cache_*), sampled KV block residency (kv_block_*), speculative decoding, LoRA.
VLLM_HISTOGRAMS = (
    *("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *(
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ),
    *("request_max_num_generation_tokens", "request_params_n", "request_params_max_tokens", "iteration_tokens_total"),
    *("request_prefill_kv_computed_tokens",),
)
VLLM_OTHERS = (
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total", "num_preemptions_total"),
    *(
        "prefix_cache_hits_total",
        "prefix_cache_queries_total",
        "prompt_tokens_by_source_total",
        "prompt_tokens_cached_total",
    ),
    *("cache_config_info",),
)
HTTP_SERIES = ("http_requests_total", "http_request_duration_seconds_sum", "http_request_duration_seconds_count")
# Of vLLM before 0.9 or 0.12; dashboards of others still ask for them.
OLDER_VLLM = (
    *("gpu_cache_usage_perc", "gpu_prefix_cache_hits_total", "gpu_prefix_cache_queries_total"),
    *(f"time_per_output_token_seconds_{suffix}" for suffix in ("bucket", "sum", "count")),
)
VLLM_SERIES = (
    *VLLM_OTHERS,
    *(f"{name}_{suffix}" for name in VLLM_HISTOGRAMS for suffix in ("bucket", "sum", "count")),
)


def families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


class Scraped:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.families = families(text)
        self.samples = [sample for family in self.families for sample in family.samples]

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def value(self, name: str, **labels: str) -> float:
        """The one sample of this name with these labels."""
        found = [one for one in self.samples if one.name == name and labels.items() <= one.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return float(found[0].value)

    def buckets(self, name: str) -> dict[str, float]:
        return {sample.labels["le"]: sample.value for sample in self.samples if sample.name == f"{name}_bucket"}

    def histograms(self) -> Iterable[str]:
        return [family.name for family in self.families if family.type == "histogram"]


def queried(expr: str, prefix: str) -> set[str]:
    """The series that a PromQL expression of the dashboard asks for."""
    text = expr.replace("${prefix}", prefix)
    return set(re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{", text))
