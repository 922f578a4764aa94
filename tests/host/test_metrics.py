"""/metrics of a live server: exact counts for known requests, consistent histograms, every name that a dashboard asks for.

Run: pytest tests/host/test_metrics.py
"""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.metrics_names import STATUS_GAUGES, STATUS_HELP
from tests.http_support import HttpServer, embedded, scripted
from tests.ingress_support import wait_until
from tests.metrics_support import HTTP_SERIES, OLDER_VLLM, VLLM_HISTOGRAMS, VLLM_SERIES, Scraped, families, queried
from tests.support import PATIENCE_S, load_tool

GREEDY = {"temperature": 0, "ignore_eos": True}
PROMPT = [17, 33, 260, 9]


def scrape(server: HttpServer) -> Scraped:
    reply = server.get("/metrics")
    assert reply.status == 200 and reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scraped(reply.body.decode())


def settled(server: HttpServer) -> Scraped:
    """When the engine's page has caught up with what clients were told."""
    server.wait_until_idle()
    return scrape(server)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with embedded("--metrics-prefix", "vllm:", max_batch=8) as (http, _):
        yield http


def test_before_the_first_request_everything_is_there_and_zero(server: HttpServer) -> None:
    found = scrape(server)
    assert found.value("blinkimp:engine_up") == 1
    assert found.value("vllm:num_requests_running") == 0
    for name in found.histograms():
        counts = found.buckets(name)
        assert set(counts.values()) == {0.0} and found.value(f"{name}_count") == 0 == found.value(f"{name}_sum"), name
    for reason in ("stop", "length", "abort", "timeout", "error"):
        assert found.value("vllm:request_success_total", finished_reason=reason) == 0
    assert found.value("vllm:kv_cache_usage_perc") == 0.0


def test_counts_are_exact(server: HttpServer) -> None:
    whole = server.complete(PROMPT, max_tokens=9, return_token_ids=True, **GREEDY)
    third = whole["choices"][0]["token_ids"][2]
    assert server.complete(PROMPT, max_tokens=9, stop_token_ids=[third], **GREEDY)["usage"]["completion_tokens"] <= 3
    num_stopped = whole["choices"][0]["token_ids"].index(third) + 1
    server.complete(PROMPT, max_tokens=4, n=3, **GREEDY)
    server.complete([PROMPT, [5, 6]], max_tokens=2, **GREEDY)
    long_prompt = [1 + idx % 90 for idx in range(130)]
    for num_cached in (0, 128):
        usage = server.complete(long_prompt, max_tokens=1, **GREEDY)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == num_cached
    found = settled(server)
    outputs = [9, num_stopped, 4, 4, 4, 2, 2, 1, 1]
    prompts = [4, 4, 4, 4, 4, 4, 2, 130, 130]
    assert found.value("vllm:prompt_tokens_total") == sum(prompts)
    assert found.value("vllm:generation_tokens_total") == sum(outputs)
    reasons = {"stop": 1, "length": 8, "abort": 0, "timeout": 0, "error": 0}
    for reason, num in reasons.items():
        assert found.value("vllm:request_success_total", finished_reason=reason) == num
    assert found.value("vllm:request_prompt_tokens_sum") == sum(prompts)
    assert found.value("vllm:request_generation_tokens_sum") == sum(outputs)
    assert found.value("vllm:request_params_max_tokens_sum") == 9 + 9 + 3 * 4 + 2 * 2 + 1 + 1
    assert found.value("vllm:request_params_n_sum") == 1 + 1 + 3 + 1 + 1 + 1 + 1
    assert (
        found.value("vllm:request_params_n_count") == 7 == found.value("vllm:request_max_num_generation_tokens_count")
    )
    assert found.value("vllm:request_max_num_generation_tokens_sum") == 9 + num_stopped + 4 + 2 + 2 + 1 + 1
    assert found.value("vllm:inter_token_latency_seconds_count") == sum(num - 1 for num in outputs)
    assert found.value("vllm:prefix_cache_hits_total") == 128 == found.value("vllm:prompt_tokens_cached_total")
    assert found.value("vllm:prefix_cache_queries_total") == sum(prompts)
    assert found.value("vllm:prompt_tokens_by_source_total", source="local_compute") == sum(prompts) - 128
    assert found.value("vllm:request_prefill_kv_computed_tokens_sum") == sum(prompts) - 128
    for name in VLLM_HISTOGRAMS:
        if name.startswith(("request_params_n", "request_max", "inter_token", "iteration")):
            continue
        assert found.value(f"vllm:{name}_count") == len(outputs), name
    assert found.value("http_requests_total", handler="/v1/completions", status="2xx") == 6


def test_histograms_agree_with_themselves_and_with_each_other(server: HttpServer) -> None:
    server.complete(PROMPT, max_tokens=7, **GREEDY)
    found = settled(server)
    for name in found.histograms():
        counts = found.buckets(name)
        bounds = [float(bound) for bound in counts]
        assert bounds == sorted(bounds) and bounds[-1] == math.inf, name
        assert all(low <= high for low, high in pairwise(counts.values())), name
        assert counts["+Inf"] == found.value(f"{name}_count"), name

    def total(name: str) -> float:
        return found.value(f"vllm:{name}_sum")

    assert total("request_inference_time_seconds") == pytest.approx(
        total("request_prefill_time_seconds") + total("request_decode_time_seconds")
    )
    assert total("inter_token_latency_seconds") == pytest.approx(total("request_decode_time_seconds"))
    assert total("time_to_first_token_seconds") <= total("e2e_request_latency_seconds")
    assert found.value("vllm:iteration_tokens_total_count") == found.value("blinkimp:engine_step_total")
    num_rows = total("iteration_tokens_total")
    assert num_rows >= found.value("blinkimp:engine_prompt_tokens_total")
    assert num_rows <= found.value("blinkimp:engine_prompt_tokens_total") + found.value(
        "blinkimp:engine_output_tokens_total"
    )


def test_bounds_are_those_of_vllm(server: HttpServer) -> None:
    found = scrape(server)
    latency = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
    gaps = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
    first = [
        0.001,
        0.005,
        0.01,
        0.02,
        0.04,
        0.06,
        0.08,
        0.1,
        0.25,
        0.5,
        0.75,
        1,
        2.5,
        5,
        7.5,
        10,
        20,
        40,
        80,
        160,
        640,
        2560,
    ]
    lengths = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]  # up to the embedded model's 2,048
    expected = {
        "e2e_request_latency_seconds": latency,
        "request_queue_time_seconds": latency,
        "inter_token_latency_seconds": gaps,
        "request_time_per_output_token_seconds": gaps,
        "time_to_first_token_seconds": first,
        "request_prompt_tokens": lengths,
        "request_params_max_tokens": lengths,
        "request_params_n": [1, 2, 5, 10, 20],
        "iteration_tokens_total": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    }
    for name, bounds in expected.items():
        assert [float(bound) for bound in found.buckets(f"vllm:{name}")] == [*bounds, math.inf], name


def test_a_dashboard_of_vllm_finds_every_series(server: HttpServer) -> None:
    found = scrape(server)
    missing = {f"vllm:{name}" for name in (*VLLM_SERIES, *OLDER_VLLM)} - found.names
    assert not missing and set(HTTP_SERIES) <= found.names
    for sample in found.samples:
        if sample.name.startswith("vllm:"):
            assert sample.labels["model_name"] == "test-model" and sample.labels["engine"] == "0", sample


def test_our_dashboard_finds_every_series(server: HttpServer) -> None:
    found = scrape(server)
    dashboard: dict[str, Any] = json.loads(load_tool("gen_grafana").OUTPUT.read_text())
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            names = queried(target["expr"], "vllm:")
            assert names, target["expr"]
            asked |= names
    assert len(asked) > 40 and not asked - found.names


def test_every_word_of_the_status_page_is_there_with_a_text(server: HttpServer) -> None:
    words = {name for name in abi.STATUS_LINES.names or () if name != "reserved"}
    assert words == set(STATUS_HELP) and words > STATUS_GAUGES
    found = scrape(server)
    for name in words:
        suffix = "" if name in STATUS_GAUGES else "_total"
        found.value(f"blinkimp:engine_{name}{suffix}")
    for family in found.families:
        assert family.documentation and family.type != "untyped", family.name


def test_openmetrics_says_the_same(server: HttpServer) -> None:
    server.wait_until_idle()
    reply = server.get(
        "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1"}
    )
    assert reply.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    text = reply.body.decode()
    assert text.endswith("# EOF\n")
    plain = scrape(server)
    names = {sample.name for family in parse_openmetrics(text) for sample in family.samples}
    assert names == plain.names
    assert "vllm:request_success_total" in names, "the colon is part of the name"


def test_a_scrape_grows_with_nothing_that_clients_do(server: HttpServer) -> None:
    before = scrape(server)
    for idx in range(12):
        server.complete([3 + idx, 4], max_tokens=2, user=f"user-{idx}", **GREEDY)
        server.get(f"/nothing/{idx}")
        server.post("/v1/completions", {"prompt": "x", f"field_{idx}": 1})
    after = scrape(server)
    assert [(one.name, one.labels) for one in after.samples] == [(one.name, one.labels) for one in before.samples]


def test_an_overdue_request_has_a_reason_of_its_own(server: HttpServer) -> None:
    before = settled(server)
    server.complete(PROMPT, max_tokens=1900, timeout=0.01, **GREEDY)
    after = settled(server)
    name = "vllm:request_success_total"
    for reason, num in {"timeout": 1, "length": 0, "abort": 0}.items():
        assert after.value(name, finished_reason=reason) - before.value(name, finished_reason=reason) == num


def test_a_client_that_leaves_is_an_abort_and_nothing_is_outstanding(tmp_path: Path) -> None:
    with scripted(tmp_path) as server:
        server.director.paused = True
        connection = http.client.HTTPConnection("127.0.0.1", server.http.port, timeout=PATIENCE_S)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 50, "n": 2}))
        wait_until(lambda: scrape(server.http).value("blinkimp:num_requests_running") == 2, "both choices run")
        assert scrape(server.http).value("blinkimp:ingress_num_outstanding", protocol="http") == 2
        connection.close()
        wait_until(lambda: server.director.queue_pairs[0].num_cancels >= 2, "both are cancelled")
        server.director.paused = False
        aborted = "blinkimp:request_success_total"
        wait_until(lambda: scrape(server.http).value(aborted, finished_reason="abort") == 2, "both are counted")
        wait_until(
            lambda: scrape(server.http).value("blinkimp:ingress_num_outstanding", protocol="http") == 0,
            "nothing is outstanding",
        )
        answered = {"handler": "/v1/completions", "status": "4xx"}
        wait_until(
            lambda: (
                [
                    one.value
                    for one in scrape(server.http).samples
                    if one.name == "http_requests_total" and answered.items() <= one.labels.items()
                ]
                == [1]
            ),
            "the answer that nobody reads is counted",
        )


def test_text_is_what_other_parsers_take(server: HttpServer) -> None:
    """HELP and TYPE once for each family, before its samples."""
    lines = server.get("/metrics").body.decode().splitlines()
    heads = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)) == len(families("\n".join(lines) + "\n"))
