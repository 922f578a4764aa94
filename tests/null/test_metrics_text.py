"""The text of /metrics for engines that are made up: prefixes, labels, sums over ingresses, steps by rows; and METRICS.md names all of it.

Run: pytest tests/null/test_metrics_text.py
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host import metrics_memory as memory
from blinkimp.host import shared_memory as shm
from blinkimp.nic_shim.http_metrics import Metrics
from tests.metrics_support import HTTP_SERIES, OLDER_VLLM, VLLM_HISTOGRAMS, VLLM_OTHERS, Scraped
from tests.support import ROOT

MODEL = 'org/model "quoted" \\ back\nline'


@pytest.fixture
def regions() -> Iterator[shm.EngineRegions]:
    made = shm.create_engine_regions(
        f"test-{os.getpid()}-{secrets.token_hex(3)}",
        num_queue_pairs=3, geometry=shm.QueuePairGeometry(2, 2, 4096), max_context=300, vocab_size=7,
        about=memory.new_about(MODEL, "gpu", max_batch=8, max_context=300, has_prefix_cache=True),
    )  # fmt: skip
    yield made
    made.unlink()


def scrape(regions: shm.EngineRegions, prefix: str = "blinkimp:", model_name: str = "") -> Scraped:
    body, _ = Metrics(regions.engine_name, prefix=prefix, model_name=model_name).render(None)
    return Scraped(body.decode())


def test_slots_are_added_up_and_the_engine_counts_once(regions: shm.EngineRegions) -> None:
    assert regions.metrics is not None
    for idx, slot in enumerate(memory.slots(regions.metrics)):
        slot[memory.word("finished_length")] = 10.0**idx
        slot[memory.word("time_to_first_token_seconds_bucket_2")] = 10.0**idx
        slot[memory.word("time_to_first_token_seconds_sum")] = 0.01 * 10.0**idx
        slot[memory.word("http_2xx /tokenize")] = 2.0
        slot[memory.word("http_5xx /tokenize")] = 1.0
    regions.engine_page.view(abi.ENGINE_PAGE)["status"]["preemptions"][0] = 4
    found = scrape(regions)
    assert found.value("blinkimp:request_success_total", finished_reason="length") == 111
    assert found.buckets("blinkimp:time_to_first_token_seconds")["0.005"] == 0
    assert found.buckets("blinkimp:time_to_first_token_seconds")["0.01"] == 111
    assert found.value("blinkimp:time_to_first_token_seconds_sum") == pytest.approx(1.11)
    assert found.value("blinkimp:num_preemptions_total") == 4
    assert found.value("http_requests_total", handler="/tokenize", status="5xx") == 3
    assert found.value("http_request_duration_seconds_count", handler="/tokenize", method="POST") == 9


def test_steps_by_rows_become_buckets(regions: shm.EngineRegions) -> None:
    counts = regions.engine_page.view(abi.ENGINE_PAGE)["step_counts"][0]
    counts["by_rows"][:] = range(1, 16)  # of 1 row, 2, up to 4, 8, 16, ...
    counts["num_rows"] = 777
    found = scrape(regions)
    buckets = found.buckets("blinkimp:iteration_tokens_total")
    assert [buckets[bound] for bound in ("1.0", "8.0", "16.0", "8192.0", "16384.0", "+Inf")] == [
        1,
        10,
        15,
        105,
        120,
        120,
    ]
    assert found.value("blinkimp:iteration_tokens_total_sum") == 777


def test_pages_in_use_are_a_share(regions: shm.EngineRegions) -> None:
    status = regions.engine_page.view(abi.ENGINE_PAGE)["status"]
    status["num_pages"], status["num_pages_used"], status["num_pages_cached"] = 200, 50, 100
    assert scrape(regions).value("blinkimp:kv_cache_usage_perc") == 0.25


@pytest.mark.parametrize("prefix", ["blinkimp:", "vllm:", "llm_", ""])
def test_the_prefix_is_of_what_vllm_has_and_of_nothing_else(regions: shm.EngineRegions, prefix: str) -> None:
    names = scrape(regions, prefix).names
    assert {prefix + "num_requests_running", prefix + "time_to_first_token_seconds_bucket"} <= names
    assert {"blinkimp:engine_num_running", "blinkimp:engine_up", *HTTP_SERIES} <= names
    assert {"process_cpu_seconds_total", "python_info"} <= names


def test_labels_name_the_model_whatever_it_is_called(regions: shm.EngineRegions) -> None:
    assert scrape(regions).value("blinkimp:num_requests_running", model_name=MODEL, engine="0") == 0
    assert scrape(regions, model_name="m").value("blinkimp:num_requests_running", model_name="m", engine="0") == 0


def test_an_ingress_that_never_was_has_no_series(regions: shm.EngineRegions) -> None:
    assert regions.metrics is not None
    assert not any(sample.name.startswith("blinkimp:ingress_") for sample in scrape(regions).samples)
    slot = memory.slots(regions.metrics)[1]
    slot[memory.word("ingress_pid")], slot[memory.word("ingress_is_http")], slot[memory.word("ingress_tokens")] = (
        5,
        1,
        9,
    )
    found = scrape(regions)
    assert found.value("blinkimp:ingress_tokens_total", queue_pair="1", protocol="http") == 9
    assert sum(sample.name == "blinkimp:ingress_tokens_total" for sample in found.samples) == 1


def test_without_an_engine_it_says_so() -> None:
    body, _ = Metrics("there-is-none").render("text/plain")
    assert Scraped(body.decode()).value("blinkimp:engine_up") == 0


def test_the_document_names_every_metric_and_every_event() -> None:
    text = (ROOT / "nic_shim" / "METRICS.md").read_text()
    for name in (*VLLM_HISTOGRAMS, *VLLM_OTHERS, "http_requests_total", "http_request_duration_seconds"):
        assert re.search(rf"\b{name}\b", text), name
    for name in OLDER_VLLM:
        assert re.sub(r"_(bucket|sum|count)$", "", name) in text, name
    sources = [*(ROOT / "nic_shim").glob("*.py"), *(ROOT / "host").glob("*.py"), ROOT / "blinkimp" / "logs.py"]
    events = {
        event
        for path in sources
        for event in re.findall(r'log_event\(\s*\w+,\s*logging\.\w+,\s*"(\w+)"', path.read_text())
    }
    assert events >= {"request", "serving", "draining", "ended", "child_died", "engine_fault", "engine_running"}
    for event in events:
        assert re.search(rf"^\|.*\b{event}\b", text, re.MULTILINE), event
