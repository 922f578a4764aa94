#!/usr/bin/env python3
"""Writes nic_shim/grafana_dashboard.json: the Grafana dashboard of a blinkimp server, with the panels that vLLM's dashboards have.

Data source, metric prefix (`blinkimp:` or `vllm:`), model and instance are variables of the dashboard.
Called by: a person after a change of the panels below (`python tools/gen_grafana.py`).
Test: pytest tests/null/test_grafana.py tests/host/test_metrics.py (every metric asked for is there)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
OUTPUT: Final = ROOT / "nic_shim" / "grafana_dashboard.json"

SELECTOR: Final = 'model_name=~"$model_name",instance=~"$instance"'
OURS: Final = 'instance=~"$instance"'  # of metrics without a model
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
WIDTH: Final = 24

Panel = dict[str, Any]


# ---- PromQL ------------------------------------------------------------------------------------------------------------
def metric(name: str, selector: str = SELECTOR) -> str:
    return f"${{prefix}}{name}{{{selector}}}"


def rate(name: str, by: str = "", selector: str = SELECTOR) -> str:
    return f"sum {f'by ({by}) ' if by else ''}(rate({metric(name, selector)}[$__rate_interval]))"


def quantile(share: float, name: str) -> str:
    return f"histogram_quantile({share}, {rate(name + '_bucket', 'le')})"


def mean(name: str) -> str:
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def own(name: str, by: str, *, per_second: bool = False) -> str:
    """Of a metric that only blinkimp has."""
    series = f"blinkimp:{name}{{{OURS}}}"
    return f"sum by ({by}) ({f'rate({series}[$__rate_interval])' if per_second else series})"


# ---- Panels ------------------------------------------------------------------------------------------------------------
def targets(queries: dict[str, str], **options: Any) -> list[dict[str, Any]]:
    return [
        {"datasource": DATASOURCE, "expr": expr, "legendFormat": legend, "refId": chr(ord("A") + idx), **options}
        for idx, (legend, expr) in enumerate(queries.items())
    ]


def panel(kind: str, title: str, text: str, queries: dict[str, str], unit: str, width: int, height: int) -> Panel:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": DATASOURCE,
        "targets": targets(queries),
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "gridPos": {"w": width, "h": height},
    }


def stat(title: str, text: str, query: str, unit: str = "short") -> Panel:
    made = panel("stat", title, text, {"": query}, unit, 4, 4)
    made["options"] = {"graphMode": "area", "colorMode": "value", "reduceOptions": {"calcs": ["lastNotNull"]}}
    return made


def lines(
    title: str, text: str, queries: dict[str, str], unit: str = "short", width: int = 8, *, stacked: bool = False
) -> Panel:
    made = panel("timeseries", title, text, queries, unit, width, 8)
    custom: dict[str, Any] = {"fillOpacity": 25 if stacked else 8, "lineWidth": 1, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    made["fieldConfig"]["defaults"]["custom"] = custom
    made["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return made


def latency(title: str, text: str, name: str) -> Panel:
    shares = {f"p{share * 100:g}": quantile(share, name) for share in (0.5, 0.9, 0.95, 0.99)}
    return lines(title, text, shares | {"mean": mean(name)}, "s")


def heatmap(title: str, text: str, name: str, unit: str) -> Panel:
    made = panel("heatmap", title, text, {}, unit, 8, 8)
    made["targets"] = targets({"{{le}}": rate(name + "_bucket", "le")}, format="heatmap")
    made["options"] = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "scale": "exponential"},
        "yAxis": {"unit": unit},
        "filterValues": {"le": 1e-9},
    }
    return made


def rows() -> dict[str, list[Panel]]:
    hits = f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}"
    errors = f'http_requests_total{{{OURS},status="5xx"}}'
    return {
        "Overview": [
            stat("Requests / s", "That ended, for whatever reason.", rate("request_success_total"), "reqps"),
            stat("Output tokens / s", "Tokens sampled.", rate("generation_tokens_total")),
            stat("Prompt tokens / s", "Those from the prefix cache included.", rate("prompt_tokens_total")),
            stat("Running", "Requests in the batch.", f"sum({metric('num_requests_running')})"),
            stat("Waiting", "Requests that wait for the batch.", f"sum({metric('num_requests_waiting')})"),
            stat("KV pages in use", "Of the fullest engine.", f"max({metric('kv_cache_usage_perc')})", "percentunit"),
            stat("TTFT p95", "Time to first token.", quantile(0.95, "time_to_first_token_seconds"), "s"),
            stat("ITL p95", "Time between tokens.", quantile(0.95, "inter_token_latency_seconds"), "s"),
            stat("E2E p95", "From arrival to the last token.", quantile(0.95, "e2e_request_latency_seconds"), "s"),
            stat("Prefix cache hits", "Share of the prompt tokens looked up.", hits, "percentunit"),
            stat("Preemptions / s", "Requests that lost their place to be recomputed.", rate("num_preemptions_total")),
            stat(
                "HTTP 5xx", "Share of the HTTP requests.",
                f"(sum(rate({errors}[$__rate_interval])) or vector(0)) / sum(rate(http_requests_total{{{OURS}}}[$__rate_interval]))",
                "percentunit",
            ),
        ],
        "Latency": [
            latency("Time to first token", "From arrival, tokenising and waiting included.", "time_to_first_token_seconds"),
            latency("Time between tokens", "On the device's clock, every token.", "inter_token_latency_seconds"),
            latency("Time per output token", "Mean of each request.", "request_time_per_output_token_seconds"),
            latency("End to end", "From arrival to the last token.", "e2e_request_latency_seconds"),
            latency("Waiting for the batch", "From the engine's acceptance on.", "request_queue_time_seconds"),
            lines(
                "Mean time of a request's phases", "Where the time goes.",
                {
                    "waiting": mean("request_queue_time_seconds"),
                    "prefill": mean("request_prefill_time_seconds"),
                    "decode": mean("request_decode_time_seconds"),
                },
                "s", stacked=True,
            ),
            heatmap("TTFT, all of them", "Requests by time.", "time_to_first_token_seconds", "s"),
            heatmap("Times between tokens, all of them", "Tokens by time.", "inter_token_latency_seconds", "s"),
            latency("In the batch", "Prefill and decode.", "request_inference_time_seconds"),
        ],
        "Throughput": [
            lines(
                "Tokens / s", "Prompt tokens of requests that got a first token, and output tokens.",
                {"prompt": rate("prompt_tokens_total"), "output": rate("generation_tokens_total")},
            ),
            lines(
                "Ended, by reason", "abort: cancelled, or the engine stopped. timeout: the request's own deadline.",
                {"{{finished_reason}}": rate("request_success_total", "finished_reason")}, "reqps", stacked=True,
            ),
            lines(
                "Tokens of a step", "Rows that the model computed at once.",
                {
                    "p50": quantile(0.5, "iteration_tokens_total"),
                    "p99": quantile(0.99, "iteration_tokens_total"),
                    "mean": mean("iteration_tokens_total"),
                },
            ),
        ],
        "Saturation": [
            lines(
                "Requests", "In the batch, and waiting for it.",
                {
                    "running": f"sum({metric('num_requests_running')})",
                    "waiting: {{reason}}": f"sum by (reason) ({metric('num_requests_waiting_by_reason')})",
                },
            ),
            lines(
                "KV pages in use", "1 is all of them.",
                {"max": f"max({metric('kv_cache_usage_perc')})", "mean": f"avg({metric('kv_cache_usage_perc')})"}, "percentunit",
            ),
            lines("Preemptions / s", "The KV memory is too small for the load.", {"preemptions": rate("num_preemptions_total")}),
        ],
        "Prefix cache": [
            lines("Hits", "Share of the prompt tokens looked up.", {"hits": hits}, "percentunit", 12),
            lines(
                "Prompt tokens / s by source", "Computed (recomputation included), or found in the cache.",
                {"{{source}}": rate("prompt_tokens_by_source_total", "source")}, width=12, stacked=True,
            ),
        ],
        "Workload": [
            heatmap("Prompt lengths", "Requests by prompt tokens.", "request_prompt_tokens", "short"),
            heatmap("Output lengths", "Requests by output tokens.", "request_generation_tokens", "short"),
            lines(
                "Mean of what requests ask for", "max_tokens, and the longest choice that came of it.",
                {
                    "max_tokens": mean("request_params_max_tokens"),
                    "longest choice": mean("request_max_num_generation_tokens"),
                    "choices (n)": mean("request_params_n"),
                    "prompt tokens computed": mean("request_prefill_kv_computed_tokens"),
                },
            ),
        ],
        "HTTP": [
            lines("Requests by status", "", {"{{status}}": f"sum by (status) (rate(http_requests_total{{{OURS}}}[$__rate_interval]))"}, "reqps"),
            lines("Requests by path", "", {"{{handler}}": f"sum by (handler) (rate(http_requests_total{{{OURS}}}[$__rate_interval]))"}, "reqps"),
            lines(
                "Mean duration", "Streams to their end.",
                {
                    "{{handler}}": f"sum by (handler) (rate(http_request_duration_seconds_sum{{{OURS}}}[$__rate_interval])) / "
                    f"sum by (handler) (rate(http_request_duration_seconds_count{{{OURS}}}[$__rate_interval]))"
                },
                "s",
            ),
        ],
        "The engine": [
            lines(
                "Step", "Device time of the last step, and the gap before it.",
                {"step {{instance}}": own("engine_step_ns_last", "instance"), "gap {{instance}}": own("engine_gap_ns_last", "instance")},
                "ns",
            ),
            lines(
                "Pages", "KV memory by what holds it.",
                {name: own(f"engine_num_pages_{name}", "instance") for name in ("used", "cached", "free")}, stacked=True,
            ),
            lines(
                "Director loops / s", "Its heartbeat: flat zero is a dead or parked engine.",
                {"{{instance}}": own("engine_heartbeat_total", "instance", per_second=True)},
            ),
            lines(
                "Tokens / s by queue pair", "As the ingresses read them.",
                {"{{queue_pair}} {{protocol}}": own("ingress_tokens_total", "queue_pair, protocol", per_second=True)},
            ),
            lines(
                "Unfinished requests by queue pair", "",
                {"{{queue_pair}} {{protocol}}": own("ingress_num_outstanding", "queue_pair, protocol")},
            ),
            lines(
                "Entries in the rings", "Submissions not taken, completions not read.",
                {
                    "submissions {{queue_pair}}": own("ring_submissions_used", "queue_pair"),
                    "completions {{queue_pair}}": own("ring_completions_used", "queue_pair"),
                },
            ),
            lines(
                "Back-pressure / s", "Requests left out of a step, full rings and arenas, refusals.",
                {
                    "credit stalls": own("engine_credit_stalls_total", "instance", per_second=True),
                    "ring full": own("ingress_ring_full_total", "instance", per_second=True),
                    "arena full": own("ingress_arena_full_total", "instance", per_second=True),
                    "refused": own("ingress_refused_total", "instance", per_second=True),
                },
                width=12,
            ),
            lines(
                "Losses", "Ingresses dropped, requests submitted again, requests rejected.",
                {
                    "ingress drops": own("engine_ingress_drops_total", "instance", per_second=True),
                    "resubmissions": own("ingress_resubmissions_total", "instance", per_second=True),
                    "rejected": own("engine_requests_rejected_total", "instance", per_second=True),
                    "engine losses": own("ingress_engine_losses_total", "instance", per_second=True),
                },
                width=12,
            ),
        ],
    }  # fmt: skip


# ---- The dashboard -----------------------------------------------------------------------------------------------------
def placed() -> list[Panel]:
    """Panels in reading order, each row of the dashboard from the left."""
    result: list[Panel] = []
    y = 0
    for title, panels in rows().items():
        result.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            }
        )
        x, y, height = 0, y + 1, 0
        for one in panels:
            place = one["gridPos"]
            if x + place["w"] > WIDTH:
                x, y = 0, y + height
            place |= {"x": x, "y": y}
            x, height = x + place["w"], place["h"]
            result.append(one)
        y += height
    return [made | {"id": idx + 1} for idx, made in enumerate(result)]


def variable(name: str, label: str, query: str, **options: Any) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": query,
        "refresh": 2,
        "sort": 1,
        **options,
    }


def dashboard() -> dict[str, Any]:
    prefixes = [
        {"text": prefix, "value": prefix, "selected": prefix == "blinkimp:"} for prefix in ("blinkimp:", "vllm:")
    ]
    several = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
    return {
        "title": "blinkimp",
        "uid": "blinkimp",
        "description": "An LLM server whose steady state needs no host CPU. nic_shim/METRICS.md says what each metric means.",
        "tags": ["blinkimp", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
                {
                    "name": "prefix", "label": "Metric prefix", "type": "custom", "query": "blinkimp:,vllm:",
                    "options": prefixes, "current": prefixes[0],
                },
                variable("model_name", "Model", "label_values(blinkimp:engine_num_pages, model_name)", **several),
                variable("instance", "Instance", "label_values(blinkimp:engine_num_pages, instance)", **several),
            ]
        },
        "panels": placed(),
    }  # fmt: skip


def render() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    OUTPUT.write_text(render())
    print(f"wrote {OUTPUT.relative_to(ROOT)}")
