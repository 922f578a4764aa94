"""blinkimp/bench/metrics.py on records written by hand: every figure has one right value.

Run: pytest tests/null/test_bench_metrics.py
"""

from __future__ import annotations

import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.bench.metrics import (
    Window,
    details_of,
    figures_of,
    floors_of,
    inferencex_keys,
    inferencex_power_keys,
    parse_slos,
    percentile_word,
)
from blinkimp.bench.record import Record

MS = 1_000_000


def record(
    intended_ms: int, sent_ms: int, chunks: list[tuple[int, int]], *, error: str = "", input_len: int = 10
) -> Record:
    """chunks: (time in ms, tokens)."""
    made = Record(0, input_len, sum(tokens for _, tokens in chunks), intended_ms * MS, sent_ms * MS)
    for at_ms, num_tokens in chunks:
        made.add_chunk(at_ms * MS, num_tokens)
    made.end((chunks[-1][0] if chunks else sent_ms) * MS, error=error)
    return made


def test_latencies_of_one_request() -> None:
    """Sent 5 ms late; first token 100 ms after sending, then 10, 10 and 40 ms: 4 tokens, the last gap brings 2 of 5."""
    one = record(1000, 1005, [(1105, 1), (1115, 1), (1125, 1), (1165, 2)])
    window = Window.of([one], 1000 * MS, 2000 * MS)
    got = figures_of([one], window, {})
    assert got["mean_ttft_ms"] == 100 and got["mean_ttft_intended_ms"] == 105
    assert got["mean_tpot_ms"] == 60 / 4  # 5 tokens: 4 after the first
    assert got["mean_itl_ms"] == 20 and got["median_itl_ms"] == 10
    assert got["mean_e2el_ms"] == 160 and got["mean_e2el_intended_ms"] == 165
    assert got["max_send_delay_ms"] == 5
    assert got["duration"] == pytest.approx(0.165) and got["output_throughput"] == pytest.approx(5 / 0.165)
    assert got["total_token_throughput"] == pytest.approx(15 / 0.165)
    assert got["request_goodput"] is None


def test_the_server_count_of_tokens_wins_over_the_number_of_chunks() -> None:
    """A text protocol packs 8 tokens into 4 chunks."""
    one = Record(0, 10, 8, 1, 1)
    for at_ms in (100, 110, 120, 130):
        one.add_chunk(at_ms * MS, 1)
    one.end(130 * MS, num_output_tokens=8)
    got = figures_of([one], Window.of([one], 0, 200 * MS), {})
    assert got["total_output_tokens"] == 8 and got["mean_tpot_ms"] == pytest.approx(30 / 7)
    assert got["mean_chunk_tokens"] == 2


def test_tokens_packed_into_one_piece_count_as_tokens_while_sending() -> None:
    """8 tokens in 4 pieces, three of them within the second: the first is a token, 7 come in 1,000 ms, so 2.8 in the next 400. A request that
    is cut off, with two pieces, is taken to pack as many."""
    done, cut = Record(0, 10, 8, 1, 1), Record(1, 10, 8, 1, 1)
    for at_ms in (100, 300, 500, 1100):
        done.add_chunk(at_ms * MS, 1)
    done.end(1100 * MS, num_output_tokens=8)
    for at_ms in (200, 300):
        cut.add_chunk(at_ms * MS, 1)
    cut.end(1800 * MS, error="unfinished")
    cut.is_cut = True
    got = figures_of([done, cut], Window.of([done, cut], 0, 1000 * MS), {})
    assert got["steady_output_throughput"] == pytest.approx(1 + 2.8 + 2 * 2)
    assert got["mean_tpot_floor_ms"] == pytest.approx((1000 / 7 + 1600 / 4) / 2)


def test_an_output_in_a_single_piece_is_all_of_its_tokens() -> None:
    one = Record(0, 10, 8, 1, 1)
    one.add_chunk(100 * MS, 1)
    one.end(100 * MS, num_output_tokens=8)
    assert figures_of([one], Window.of([one], 0, 1000 * MS), {})["steady_output_throughput"] == 8


def test_percentiles_are_vllms_keys() -> None:
    records = [record(0, 0, [(i + 1, 1)]) for i in range(1000)]
    got = figures_of(records, Window.of(records, 0, 1000 * MS), {})
    assert got["median_ttft_ms"] == 500.5 and got["mean_ttft_ms"] == 500.5
    assert (got["p90_ttft_ms"], got["p99_ttft_ms"]) == (pytest.approx(900.1), pytest.approx(990.01))
    assert got["p99.9_ttft_ms"] == pytest.approx(999.001)
    assert got["mean_tpot_ms"] == 0  # one token each: there is none
    assert percentile_word(99.0) == "99" and percentile_word(99.9) == "99.9"


@pytest.mark.parametrize("metric", ["ttft", "tpot", "itl", "e2el"])
def test_every_metric_has_all_of_its_summary(metric: str) -> None:
    """Twenty requests of two tokens: the first after 1 to 20 ms, the second as long after it."""
    records = [record(0, 0, [(i, 1), (2 * i, 1)]) for i in range(1, 21)]
    got = figures_of(records, Window.of(records, 0, 1000 * MS), {})
    times = 2 if metric == "e2el" else 1
    wanted = {
        "mean": 10.5,
        "median": 10.5,
        "std": (399 / 12) ** 0.5,
        "p90": 18.1,
        "p95": 19.05,
        "p99": 19.81,
        "p99.9": 19.981,
    }
    for word, value in wanted.items():
        assert got[f"{word}_{metric}_ms"] == pytest.approx(times * value), word


def test_warm_up_failures_and_the_window() -> None:
    """Counted are requests meant to be sent at 1 s or later; of three, one failed. The warm-up's tokens count as arrivals only."""
    records = [
        record(500, 500, [(900, 1), (1100, 3)]),
        record(1000, 1000, [(1200, 1), (1300, 1)]),
        record(1500, 1500, [(1600, 1), (1700, 1)]),
        record(1600, 1600, [], error="status 503"),
    ]
    got = figures_of(records, Window.of(records, 1000 * MS, 2000 * MS), {})
    assert (got["completed"], got["failed"], got["num_not_counted"]) == (2, 1, 1)
    assert got["duration"] == pytest.approx(0.7) and got["request_throughput"] == pytest.approx(2 / 0.7)
    assert got["steady_output_throughput"] == 7  # 3 + 2 + 2 within the second of sending
    assert got["max_concurrent_requests"] == 1


def test_an_output_without_tokens_is_a_failure() -> None:
    empty = record(0, 0, [])
    assert not empty.is_complete and empty.error == "ended without output"


def test_requests_that_were_cut_off_count_by_how_long_they_had_waited() -> None:
    """Cut at 1 s: one without a token, one with four of them since 200 ms; a refused one tells nothing about latency."""
    done = record(0, 0, [(100, 1), (110, 1)])
    silent, slow = record(0, 0, []), record(0, 100, [(200, 4)])
    for one in (silent, slow):
        one.ended_ns, one.error, one.is_cut = 1000 * MS, "unfinished", True
    records = [done, silent, slow, record(0, 0, [], error="status 503")]
    got = figures_of(records, Window.of(records, 0, 1000 * MS), {})
    assert (got["completed"], got["failed"], got["num_cut"]) == (1, 3, 2)
    assert got["mean_ttft_intended_ms"] == 100 and got["mean_ttft_floor_ms"] == pytest.approx((100 + 1000 + 200) / 3)
    assert got["mean_tpot_ms"] == 10 and got["mean_tpot_floor_ms"] == pytest.approx((10 + 800 / 4) / 2)


def test_requests_at_a_time_are_counted_at_moments_not_in_seconds() -> None:
    """One ends where the next begins: never two at a time, though four ran within the second."""
    records = [record(at, at, [(at + 100, 1)]) for at in (0, 100, 200, 300)]
    assert figures_of(records, Window.of(records, 0, 1000 * MS), {})["max_concurrent_requests"] == 1


def test_goodput_is_reported_from_sending_and_from_the_intended_time() -> None:
    """All three take 100 ms from sending; the second was sent 80 ms late and misses 150 ms."""
    records = [
        record(0, 0, [(100, 1), (110, 1)]),
        record(0, 80, [(180, 1), (190, 1)]),
        record(0, 0, [(100, 1), (160, 1)]),
    ]
    window = Window.of(records, 0, 1000 * MS)
    assert figures_of(records, window, {"ttft": 150})["good_requests"] == 2
    assert figures_of(records, window, {"ttft": 150, "tpot": 20})["good_requests"] == 1
    got = figures_of(records, window, {"ttft": 150})
    assert got["request_goodput"] == pytest.approx(3 / 0.19)  # vLLM's definition: from sending
    assert got["request_goodput_intended"] == pytest.approx(2 / 0.19)


@pytest.mark.parametrize("text", ["ttft", "ttft:fast", "ttft:-1", "itl:5", "x:1"])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="expected NAME:MILLISECONDS"):
        parse_slos([text])


def test_inferencex_keys_are_seconds_per_gpu_and_interactivity() -> None:
    records = [record(0, 0, [(100, 1), (120, 1)])]
    figures = figures_of(records, Window.of(records, 0, 1000 * MS), {})
    keys = inferencex_keys(figures, num_gpus=2, model="m", conc=4)
    assert keys["tp"] == 2 and keys["conc"] == 4 and keys["model"] == "m"
    assert keys["mean_ttft"] == pytest.approx(0.1) and keys["p99_tpot"] == pytest.approx(0.02)
    assert keys["median_intvty"] == pytest.approx(50) and keys["p99_intvty"] == pytest.approx(50)
    assert keys["tput_per_gpu"] == pytest.approx(12 / 0.12 / 2)
    assert keys["input_tput_per_gpu"] + keys["output_tput_per_gpu"] == pytest.approx(keys["tput_per_gpu"])


def test_inferencex_power_is_told_or_said_to_be_missing() -> None:
    records = [record(0, 0, [(100, 1), (120, 1)])]
    assert inferencex_power_keys(records, None, None) == {"power_metric_schema_version": 2, "power_valid": 0}
    keys = inferencex_power_keys(records, 60.0, 500.0)
    assert keys["power_valid"] == 1 and keys["avg_power_w"] == 500 and keys["total_gpu_energy_j"] == 60
    assert (keys["joules_per_output_token"], keys["joules_per_total_token"]) == (30, 5)
    assert (keys["joules_per_input_token"], keys["joules_per_successful_query"]) == (6, 60)


def test_floors_of_each_request_are_what_the_figures_are_of() -> None:
    cut = record(0, 0, [(300, 2)])
    cut.ended_ns, cut.error, cut.is_cut = 700 * MS, "unfinished", True
    records = [
        record(0, 10, [(100, 1), (120, 1)]),
        record(0, 0, [(50, 1), (80, 3)]),
        cut,
        record(5, 5, [], error="refused"),
    ]
    window = Window.of(records, 0, 1000 * MS)
    got, figures = floors_of(window), figures_of(records, window, {})
    assert got == {"ttft_floor": [100, 50, 300], "tpot_floor": [20, 10, 200]}
    for name, values in got.items():
        assert figures[f"median_{name}_ms"] == sorted(values)[1] and figures[f"mean_{name}_ms"] == pytest.approx(
            sum(values) / 3
        )


def test_details_are_vllms_lists() -> None:
    got = details_of(Window.of([record(0, 10, [(100, 1), (120, 1)]), record(5, 5, [], error="x")], 0, 1000 * MS))
    assert got["ttfts"] == [0.09, 0.0] and got["itls"] == [[0.02], []] and got["errors"] == ["", "x"]
    assert got["input_lens"] == [10, 10] and got["output_lens"] == [2, 0]
    assert got["latencies"] == [0.11, 0.0] and got["queue_times"] == [0.01, 0.0]
