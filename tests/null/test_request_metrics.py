"""What an ingress counts: exact numbers for requests that are made up, one slot an ingress, counters that outlive a process.

Run: pytest tests/null/test_request_metrics.py
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host import metrics_memory as memory
from blinkimp.host import shared_memory as shm
from blinkimp.nic_shim.engine_link import LinkCounters
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.request_metrics import RequestMetrics, Siblings, finished_reason, times_of
from blinkimp.protocol import Sampling, Submit
from tests.support import blocks_kept_by

MS = 1_000_000


@pytest.fixture
def engine() -> Iterator[str]:
    name = f"test-{os.getpid()}-{secrets.token_hex(3)}"
    geometry = shm.QueuePairGeometry(2, 2, 4096)
    regions = shm.create_engine_regions(name, num_queue_pairs=2, geometry=geometry, max_context=300, vocab_size=7)
    yield name
    regions.unlink()


def buckets(slot: list[float], name: str) -> dict[str, float]:
    """Counts that are not 0, by upper bound."""
    bounds = [*(f"{bound:g}" for bound in memory.bounds_of(name, 300)), "inf"]
    first = memory.word(f"{name}_bucket_0")
    return {bound: slot[first + idx] for idx, bound in enumerate(bounds) if slot[first + idx]}


def look(engine_name: str, idx: int = 0) -> list[float]:
    with shm.open_metrics(engine_name) as region:
        values: list[float] = memory.slots(region)[idx].tolist()
        return values


def request_of(num_prompt: int = 5, max_tokens: int = 7) -> LiveRequest:
    request = LiveRequest(Submit(1, "", Sampling(max_tokens=max_tokens)), None)
    request.prompt_ids = np.zeros(num_prompt, np.uint32)
    return request


def run(metrics: RequestMetrics, request: LiveRequest, gaps_ms: list[int], reason: int = abi.FINISH_LENGTH) -> None:
    """Accepted at 1 s, in the batch 400 ms later, its first token 30 ms after that, then one after each gap."""
    request.observer = metrics.ended
    request.accepted_ns, request.started_ns = 1000 * MS, 1400 * MS
    now_ns = 1430 * MS
    for position in range(len(gaps_ms) + 1):
        if position:
            now_ns += gaps_ms[position - 1] * MS
            metrics.gaps_ns.append(now_ns - request.last_token_ns)
        else:
            metrics.first_token(request)
        request.last_token_ns = now_ns
        request.push_token(9, 0.0, now_ns)
    request.finish(reason, now_ns)


def test_a_request_is_counted_once_everywhere(engine: str) -> None:
    metrics = RequestMetrics(engine, 0)
    request = request_of()
    request.num_cached_tokens = 2
    run(metrics, request, [5, 20, 60])
    slot = look(engine)
    assert {reason: slot[memory.word(f"finished_{reason}")] for reason in memory.FINISHED_REASONS} == {
        "stop": 0, "length": 1, "abort": 0, "timeout": 0, "error": 0,
    }  # fmt: skip
    assert slot[memory.word("prompt_tokens")] == 5
    expected = {
        "inter_token_latency_seconds": ({"0.01": 1, "0.025": 1, "0.075": 1}, 0.085),
        "request_queue_time_seconds": ({"0.5": 1}, 0.4),
        "request_prefill_time_seconds": ({"0.3": 1}, 0.03),
        "request_decode_time_seconds": ({"0.3": 1}, 0.085),
        "request_inference_time_seconds": ({"0.3": 1}, 0.115),
        "request_time_per_output_token_seconds": ({"0.05": 1}, 0.085 / 3),
        "request_prompt_tokens": ({"5": 1}, 5),
        "request_generation_tokens": ({"5": 1}, 4),
        "request_max_num_generation_tokens": ({"5": 1}, 4),
        "request_prefill_kv_computed_tokens": ({"5": 1}, 3),
        "request_params_max_tokens": ({"10": 1}, 7),
        "request_params_n": ({"1": 1}, 1),
    }
    for name, (counts, total) in expected.items():
        assert buckets(slot, name) == counts, name
        assert slot[memory.word(f"{name}_sum")] == pytest.approx(total), name
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert sum(buckets(slot, name).values()) == 1, name


def test_a_bound_belongs_to_its_bucket(engine: str) -> None:
    """`le` means at most."""
    metrics = RequestMetrics(engine, 0)
    run(metrics, request_of(num_prompt=2), [10, 11])
    assert buckets(look(engine), "inter_token_latency_seconds") == {"0.01": 1, "0.025": 1}
    assert buckets(look(engine), "request_prompt_tokens") == {"2": 1}


@pytest.mark.parametrize("num_gaps", [1, 24, 25, 1000])
def test_few_gaps_and_many_are_counted_alike(engine: str, num_gaps: int) -> None:
    rng = np.random.default_rng(num_gaps)
    gaps_ns = [int(gap) for gap in rng.integers(-5, 200_000 * 1000, num_gaps)]
    metrics = RequestMetrics(engine, 0)
    metrics.gaps_ns = list(gaps_ns)
    metrics.fold_gaps()
    metrics.fold_gaps()
    bounds = [-1.0, *memory.bounds_of("inter_token_latency_seconds", 300), float("inf")]
    seconds = [max(0, gap) / 1e9 for gap in gaps_ns]
    slot = look(engine)
    for low, high in pairwise(bounds):
        assert buckets(slot, "inter_token_latency_seconds").get(f"{high:g}", 0) == sum(
            low < one <= high for one in seconds
        )
    assert slot[memory.word("inter_token_latency_seconds_sum")] == pytest.approx(sum(seconds))


@pytest.mark.parametrize(
    ("reason", "counted"),
    [
        (abi.FINISH_EOS, "stop"), (abi.FINISH_STOP_ID, "stop"), (abi.FINISH_LENGTH, "length"), (abi.FINISH_CANCELLED, "abort"),
        (abi.FINISH_DRAINING, "abort"), (abi.FINISH_TIMEOUT, "timeout"), (abi.FINISH_CONSTRAINT, "abort"), (99, "abort"),
    ],
)  # fmt: skip
def test_every_reason_has_its_place(engine: str, reason: int, counted: str) -> None:
    request = request_of()
    run(RequestMetrics(engine, 0), request, [], reason)
    assert finished_reason(request) == counted and look(engine)[memory.word(f"finished_{counted}")] == 1


def test_a_request_that_never_ran_has_no_phases(engine: str) -> None:
    metrics, request = RequestMetrics(engine, 0), request_of()
    request.observer = metrics.ended
    request.fail("engine_lost", "w", "g", "e", "r")
    slot = look(engine)
    assert slot[memory.word("finished_error")] == 1 and slot[memory.word("prompt_tokens")] == 0
    assert sum(buckets(slot, "e2e_request_latency_seconds").values()) == 1
    for phase in ("queue", "prefill", "decode", "inference"):
        assert not buckets(slot, f"request_{phase}_time_seconds")
    assert not buckets(slot, "time_to_first_token_seconds")


def test_choices_of_a_prompt_are_one_request_of_n(engine: str) -> None:
    metrics, siblings = RequestMetrics(engine, 0), Siblings(3, 3)
    for num_gaps in (1, 8, 0):
        request = request_of()
        request.siblings = siblings
        run(metrics, request, [1] * num_gaps)
    slot = look(engine)
    assert buckets(slot, "request_params_n") == {"5": 1} and slot[memory.word("request_params_n_sum")] == 3
    assert slot[memory.word("request_max_num_generation_tokens_sum")] == 9
    assert sum(buckets(slot, "request_generation_tokens").values()) == 3 == slot[memory.word("finished_length")]


def test_a_clock_that_went_back_makes_no_negative_time(engine: str) -> None:
    request = request_of()
    request.accepted_ns, request.started_ns, request.first_token_ns = 5000, 3000, 1000
    request.received_ns = time.monotonic_ns()
    request.finish(abi.FINISH_LENGTH, 500)
    times = times_of(request)
    assert (times.queue_s, times.prefill_s, times.decode_s) == (0, 0, 0) and times.e2e_s >= 0


def test_an_ingress_that_is_started_anew_counts_on(engine: str) -> None:
    for num_runs in (1, 2):
        metrics = RequestMetrics(engine, 1)
        run(metrics, request_of(), [3])
        metrics.close()
        run(metrics, request_of(), [3])  # nobody's any more, and no crash
        assert look(engine, 1)[memory.word("finished_length")] == num_runs
    assert not any(look(engine, 0)), "the other slot is another's"


def test_without_an_engine_nothing_is_lost_but_the_counts(engine: str) -> None:
    metrics = RequestMetrics("there-is-none", 0)
    run(metrics, request_of(), [3])
    assert metrics.slot[memory.word("finished_length")] == 1


def test_publishing_ten_times_a_second_keeps_no_memory(engine: str) -> None:
    metrics, counters, times = RequestMetrics(engine, 0), LinkCounters(tokens=3), itertools.count(1)
    assert blocks_kept_by(lambda: metrics.publish(float(next(times)), counters, 2), 1000) < 100
    assert look(engine)[memory.word("ingress_num_waiting")] == 2
    metrics.close()
