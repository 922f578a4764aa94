"""Names and texts of metrics that need more than their name: the engine's status words, HTTP's methods, names that vLLM used to have.

Used by nic_shim/http_metrics.py. Test: pytest tests/null/test_metrics_text.py
"""

from __future__ import annotations

from typing import Final

# Of device/ring_abi.h, StatusLines.
STATUS_HELP: Final = {
    "heartbeat": "Loops of the director.",
    "device_ns": "The device's clock.",
    "step": "Model steps done.",
    "state": "0 starting, 1 running, 2 draining, 3 stopped, 4 faulted, 5 parked.",
    "num_queue_pairs_attached": "Queue pairs with an ingress.",
    "num_running": "Requests in the batch.",
    "num_waiting": "Requests that wait for the batch.",
    "num_finishing": "Finished requests that wait for completion credit.",
    "num_free_requests": "Free entries of the request table.",
    "num_pages": "KV pages.",
    "num_pages_free": "KV pages that hold nothing.",
    "num_pages_used": "KV pages of requests.",
    "num_pages_cached": "KV pages of the prefix cache that no request uses.",
    "requests_accepted": "Requests accepted.",
    "requests_rejected": "Requests rejected.",
    "finished_eos": "Requests that ended with an EOS token.",
    "finished_stop_id": "Requests that ended with one of their stop ids.",
    "finished_length": "Requests that reached max_tokens.",
    "finished_cancelled": "Requests cancelled, those that found a stop string included.",
    "finished_draining": "Requests ended by the engine's stop.",
    "preemptions": "Requests that lost their place in the batch to be recomputed.",
    "credit_stalls": "Times that a request was left out of a step because its ingress does not read.",
    "prompt_tokens": "Prompt tokens computed, recomputation included.",
    "output_tokens": "Output tokens.",
    "ingress_drops": "Ingresses dropped for a stale heartbeat.",
    "integrity_checks": "Checks of pages and requests passed.",
    "step_ns_last": "Device time of the last step.",
    "gap_ns_last": "Device time between the last two steps.",
    "finished_timeout": "Requests whose deadline passed.",
    "finished_constraint": "Requests whose constraint allowed no token any more.",
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache.",
    "prefix_hit_tokens": "Of them, tokens found.",
    "tuning_generation": "Last change of limits obeyed (blinkimp tune).",
}
STATUS_GAUGES: Final = frozenset(
    {"device_ns", "state", "step_ns_last", "gap_ns_last", "tuning_generation"}
    | {name for name in STATUS_HELP if name.startswith("num_")}
)

# Of the handlers in host/metrics_memory.py that are not asked for by GET.
HTTP_METHODS: Final = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
}

# Names that vLLM has given up, for dashboards that still ask for them -> today's.
OLDER_NAMES: Final = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_queries": "prefix_cache_queries",
    "gpu_prefix_cache_hits": "prefix_cache_hits",
    "time_per_output_token_seconds": "inter_token_latency_seconds",
}
