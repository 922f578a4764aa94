"""blinkimp/bench against servers with scripted delays: what it reports is what they did, over HTTP and over ZeroMQ.

Run: pytest tests/host/test_bench_load.py
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.bench.load_plan import LoadOptions, TraceLine
from blinkimp.bench.openai_backend import OpenAiBackend
from blinkimp.bench.record import Record
from blinkimp.bench.report import table_of
from blinkimp.bench.runner import Target, run_load
from blinkimp.host.power import Reading
from blinkimp.protocol import Sampling
from blinkimp.trace.arrivals import Arrival, write_arrivals
from tests.scripted_server import Script, scripted_server
from tests.support import PATIENCE_S, undisturbed

KINDS = ["http", "zmq"]
# Beyond what was scripted, of the least disturbed of many requests, in the best of five runs (@undisturbed). What is scripted is the least, on any
# machine; a gap alone may be shorter, where the piece before came late.
SLACK_MS = 150.0


def target_of(address: str, **more: Any) -> Target:
    return Target(connect=address, **more) if address.startswith("tcp") else Target(url=address, **more)


def load(kind: str, script: Script, options: LoadOptions, **how: Any) -> dict[str, Any]:
    with scripted_server(kind, script) as address:
        return asyncio.run(run_load(options, target_of(address, **how.pop("target", {})), **how))


@pytest.mark.parametrize("kind", KINDS)
@undisturbed
def test_an_open_loop_reports_the_delays_that_were_scripted(kind: str) -> None:
    """First token after 30 ms, then every 10 ms: TTFT 30, TPOT 10, E2EL 30 + 7 * 10."""
    script = Script()
    options = LoadOptions(rate=40, num_requests=40, input_len=12, output_len=8)
    got = load(kind, script, options, slos={"ttft": 5000}, details=True)
    assert (got["completed"], got["failed"]) == (40, 0)
    ttfts, itls = np.array(got["ttfts"]) * 1e3, np.array(got["itls"]) * 1e3
    assert 30 <= ttfts.min() < 30 + SLACK_MS and got["median_ttft_ms"] == pytest.approx(np.median(ttfts), abs=0.01)
    tpots, e2els = itls.mean(axis=1), ttfts + itls.sum(axis=1)
    # 70 ms over 7 gaps; over the 8 tokens it would be 8.75.
    assert 9.5 <= got["median_tpot_ms"] == pytest.approx(np.median(tpots), abs=0.01)
    assert tpots.min() < 10 + SLACK_MS / 7
    assert got["mean_itl_ms"] >= 9 and got["median_itl_ms"] == pytest.approx(np.median(itls), abs=0.01)
    assert 100 <= e2els.min() < 100 + SLACK_MS
    assert got["median_e2el_ms"] == pytest.approx(np.median(e2els), abs=0.01)
    assert got["total_output_tokens"] == 40 * 8 and got["total_input_tokens"] == 40 * 12
    assert got["request_rate"] == 40 and got["good_requests"] == 40
    assert all(len(prompt) == 12 for prompt in script.prompts) and len(script.prompts) == 40
    assert len(got["ttfts"]) == 40 and [len(gaps) for gaps in got["itls"]] == [7] * 40


@pytest.mark.parametrize(
    ("kind", "reasons", "is_chat"),
    [
        ("http", ("length", "timeout", "stop", "abort"), False),
        ("http", ("tool_calls", "timeout", "function_call", "content_filter"), True),
        ("zmq", ("eos", "timeout", "stop", "cancelled"), False),
        ("zmq", ("stop_id", "draining", "length", "constraint"), False),
    ],
)
def test_what_a_server_cut_has_failed_by_its_reason(kind: str, reasons: tuple[str, ...], is_chat: bool) -> None:
    script = Script(first_ms=0, gap_ms=0, reasons=reasons)
    options = LoadOptions(concurrency=1, num_requests=8, input_len=4, output_len=2)
    got = load(kind, script, options, target={"chat": is_chat} if kind == "http" else {})
    assert (got["completed"], got["failed"]) == (4, 4)
    assert got["error_counts"] == {reasons[1]: 2, reasons[3]: 2}


@pytest.mark.parametrize("kind", KINDS)
@undisturbed
def test_a_closed_loop_keeps_as_many_running_as_asked(kind: str) -> None:
    """4 at a time, each 20 + 4 * 5 = 40 ms: 100 requests/s."""
    script = Script(first_ms=20, gap_ms=5)
    got = load(kind, script, LoadOptions(concurrency=4, duration_s=1.0, input_len=4, output_len=5))
    assert script.most_at_once == 4 and got["max_concurrency"] == 4
    assert 20 < got["request_throughput"] <= 100 and 40 <= got["median_e2el_ms"] < 40 + SLACK_MS
    assert got["steady_output_throughput"] == pytest.approx(got["output_throughput"], rel=0.4)
    if kind == "http":
        assert script.num_connections <= 4 + 1  # connections are used again


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_are_failures_with_their_words(kind: str) -> None:
    got = load(kind, Script(fail_each=4, gap_ms=1), LoadOptions(concurrency=2, num_requests=16, output_len=2))
    assert (got["completed"], got["failed"]) == (12, 4)
    ((words, number),) = got["error_counts"].items()
    assert number == 4 and "busy" in words


@undisturbed
def test_a_stall_of_the_server_is_not_omitted() -> None:
    """The server stops for 600 ms. A cap of 2 holds requests back meanwhile: from sending they look fast, from intention they do not."""
    script = Script(first_ms=10, gap_ms=1, stall_after=10, stall_ms=600)
    options = LoadOptions(rate=50, num_requests=50, concurrency=2, input_len=4, output_len=2)
    got = load("http", script, options, slos={"ttft": 200})
    assert got["median_ttft_ms"] < 300  # only those two that ran into it show it
    assert got["p90_ttft_intended_ms"] > 300 and got["max_send_delay_ms"] > 300
    assert got["good_requests"] < 40
    assert got["request_goodput"] > got["request_goodput_intended"]
    assert got["p99_e2el_including_client_queue_ms"] == got["p99_e2el_intended_ms"] > got["p99_e2el_ms"]
    assert got["p90_client_queue_time_ms"] > 300


@undisturbed
def test_an_open_loop_sends_on_while_the_server_stalls() -> None:
    script = Script(first_ms=10, gap_ms=1, stall_after=10, stall_ms=500)
    got = load("zmq", script, LoadOptions(rate=50, num_requests=50, input_len=4, output_len=2), details=True)
    stall_began_s = script.stalled_until - script.stall_ms / 1e3
    num_sent_meanwhile = sum(stall_began_s < at_s < script.stalled_until for at_s in got["start_times"])
    assert num_sent_meanwhile > 5 and got["max_concurrent_requests"] > 5  # 25, but for a client that sleeps
    assert got["p99_ttft_ms"] > 400 and got["p99_ttft_intended_ms"] >= got["p99_ttft_ms"]


class SteadyGpu:
    """A power source that draws 300 W always."""

    name, driver = "steady", "1"

    def read(self) -> Reading:
        return Reading(300.0, None, 1500, 2600)


def test_energy_stands_beside_throughput_with_idling_subtracted_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the 300 W are idling's, so that nothing is left above it; half of them, if the user says 150."""
    monkeypatch.setattr("blinkimp.bench.runner.IDLE_S", 0.3)
    options = LoadOptions(concurrency=2, duration_s=0.5, input_len=4, output_len=3)
    got = load("zmq", Script(first_ms=5, gap_ms=1), options, source=SteadyGpu())
    energy, keys = got["gpu_energy"], got["inferencex"]
    assert energy["power_w"] == pytest.approx(300) and energy["idle_w"] == pytest.approx(300)  # integrals over a clock
    assert energy["sm_clock_mhz"] == 1500
    assert energy["j_per_token"] > 0 and energy["j_per_token_above_idle"] == pytest.approx(0, abs=1e-6)
    assert keys["power_valid"] == 1 and keys["joules_per_output_token"] == pytest.approx(
        energy["j_per_token"], rel=0.01
    )
    assert "without the 300 W of idling (measured right before the load)" in table_of(got)
    got = load("zmq", Script(first_ms=5, gap_ms=1), options, source=SteadyGpu(), idle_w=150.0)
    energy = got["gpu_energy"]
    assert energy["j_per_token_above_idle"] == pytest.approx(energy["j_per_token"] / 2, rel=0.01)
    assert energy["idle_source"] == "given"
    got = load("zmq", Script(first_ms=5, gap_ms=1), options, source=SteadyGpu(), idle_w=690.0)
    assert got["gpu_energy"]["j_per_token_above_idle"] is None
    assert "idling took 690 W (given), more than the load, and is not subtracted" in table_of(got)


def test_of_several_gpus_there_is_no_energy_of_one() -> None:
    options = LoadOptions(concurrency=1, num_requests=2, input_len=4, output_len=3)
    got = load("zmq", Script(first_ms=1, gap_ms=1), options, source=SteadyGpu(), target={"num_gpus": 2})
    energy, keys = got["gpu_energy"], got["inferencex"]
    assert keys["tp"] == 2 and keys["hw"] == "steady" and keys["power_valid"] == 0
    assert not [key for key in keys if "joules" in key or "energy" in key or "power_w" in key]
    assert energy["power_w"] is energy["j_per_token"] is energy["sm_clock_mhz"] is None
    assert "GPU energy left out: one GPU is measured, and the load is that of 2" in table_of(got)


def lines_of(path: Path, requests: list[tuple[float | None, int, int]]) -> Path:
    """A trace of (at_s, input tokens, output tokens)."""
    lines = [TraceLine(inputs, outputs, at_s) for at_s, inputs, outputs in requests]
    path.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    return path


def test_lengths_that_nobody_asked_for_are_told_as_sent(tmp_path: Path) -> None:
    """Of the 4,096 requests that a closed loop by duration may draw on, those that were sent."""
    fast = Script(first_ms=0, gap_ms=0)
    options = LoadOptions(concurrency=2, duration_s=0.3, lengths="sharegpt", max_total_len=64)
    got = load("zmq", fast, options, details=True)
    keys = got["inferencex"]
    assert keys["isl"] == round(np.mean(got["input_lens"])) < 64 > keys["osl"] == round(np.mean(got["output_lens"]))
    trace = lines_of(tmp_path / "t.jsonl", [(None, 10, 3), (None, 20, 5), (None, 1000, 900)])
    got = load("zmq", fast, LoadOptions(trace=trace, concurrency=1, num_requests=2))
    assert (got["inferencex"]["isl"], got["inferencex"]["osl"], got["request_rate"]) == (15, 4, "inf")
    assert got["burstiness"] is None
    options = LoadOptions(concurrency=1, num_requests=2, lengths="range", range_ratio=0.1, input_len=40, output_len=9)
    got = load("zmq", fast, options)
    assert (got["inferencex"]["isl"], got["inferencex"]["osl"]) == (40, 9)


def test_a_load_with_times_tells_their_mean_rate(tmp_path: Path) -> None:
    fast = Script(first_ms=0, gap_ms=0)
    trace = lines_of(tmp_path / "t.jsonl", [(0.0, 4, 2), (0.1, 4, 2), (0.3, 4, 2), (0.4, 4, 2)])
    assert load("http", fast, LoadOptions(trace=trace))["request_rate"] == pytest.approx(10)
    assert load("http", fast, LoadOptions(trace=trace, time_scale=0.5))["request_rate"] == pytest.approx(20)
    got = load("http", fast, LoadOptions(trace=trace, num_requests=1))
    assert got["request_rate"] is got["burstiness"] is None
    got = load("http", fast, LoadOptions(trace=trace, rate=50))
    assert (got["request_rate"], got["burstiness"]) == (50, 1)


def test_a_replay_tells_its_own_rate_and_lengths(tmp_path: Path) -> None:
    path, sampling = tmp_path / "arrivals.jsonl", Sampling(max_tokens=3)
    write_arrivals(path, [Arrival(idx * 10**8, 5, sampling, prompt_ids=[1, 2, 3, 4, 5]) for idx in range(3)])
    got = load("zmq", Script(first_ms=0, gap_ms=0), LoadOptions(replay=path))
    assert got["completed"] == 3 and got["request_rate"] == pytest.approx(3 / 0.2) and got["burstiness"] is None
    assert (got["inferencex"]["isl"], got["inferencex"]["osl"]) == (5, 3)


def test_a_trace_that_is_too_short_for_the_duration_ends_the_load_there(tmp_path: Path) -> None:
    trace = lines_of(tmp_path / "t.jsonl", [(None, 4, 2)] * 6)
    got = load("zmq", Script(first_ms=5, gap_ms=1), LoadOptions(trace=trace, concurrency=2, duration_s=PATIENCE_S * 2))
    assert got["completed"] == 6 and got["ended_early"] and not got["stopped_early"]
    assert got["sending_duration"] < PATIENCE_S and "ended early: the trace was used up" in table_of(got)


def test_a_trace_whose_last_requests_fill_the_duration_is_long_enough(tmp_path: Path) -> None:
    trace = lines_of(tmp_path / "t.jsonl", [(None, 4, 2)] * 2)
    got = load("zmq", Script(first_ms=1500), LoadOptions(trace=trace, concurrency=2, duration_s=0.2))
    assert got["completed"] == 2 and not got["ended_early"] and "ended early" not in table_of(got)


def test_a_load_is_many_clients_to_a_server() -> None:
    """More at a time than an ingress grants one client: they come over several sockets."""
    script = Script(first_ms=0, gap_ms=1, hold_for=257)
    got = load("zmq", script, LoadOptions(concurrency=300, num_requests=600, input_len=4, output_len=2))
    assert (got["completed"], got["failed"]) == (600, 0) and script.most_at_once > 256
    assert len(script.clients) == 3


@undisturbed
def test_warm_up_requests_are_sent_and_not_counted() -> None:
    got = load("zmq", Script(gap_ms=1), LoadOptions(rate=50, duration_s=1.0, warmup_s=0.5, output_len=2, input_len=4))
    assert got["num_not_counted"] > 5 and got["completed"] > 5
    assert 0.5 <= got["sending_duration"] < 0.5 + SLACK_MS / 1e3


def test_what_does_not_end_has_failed() -> None:
    options = LoadOptions(concurrency=2, num_requests=2, output_len=1)
    got = load("http", Script(first_ms=PATIENCE_S * 1e3), options, drain_s=0.3)
    assert got["failed"] == got["num_cut"] == 2 and "unfinished" in next(iter(got["error_counts"]))
    assert got["median_ttft_floor_ms"] >= 300 and "2 cut off at the end" in table_of(got)


def test_a_used_connection_that_waits_for_an_answer_is_closed_for_good() -> None:
    """Closed by this side: nobody connects again in its place, as for one that the server had closed."""
    script = Script(first_ms=0, gap_ms=0)

    async def run(address: str) -> None:
        ended = asyncio.Event()
        backend = OpenAiBackend(address, lambda record: ended.set())
        await backend.open(PATIENCE_S)
        backend.submit(Record(0, 4, 2, time.monotonic_ns()), backend.prepare(2, [1, 2, 3, 4]))
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        script.first_ms = PATIENCE_S * 1e4
        backend.submit(Record(1, 4, 2, time.monotonic_ns()), backend.prepare(2, [1, 2, 3, 4]))
        while len(script.prompts) < 2:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(backend.close(), PATIENCE_S)
        assert len(script.prompts) == 2

    with scripted_server("http", script) as address:
        asyncio.run(run(address))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_server_that_is_not_there_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blinkimp.bench.runner.OPEN_TIMEOUT_S", 0.3)
    with pytest.raises(LoadError, match="check that it runs"):
        asyncio.run(run_load(LoadOptions(concurrency=1, num_requests=1), target_of(address)))


def test_requests_longer_than_the_server_takes_are_refused_before_the_load() -> None:
    with pytest.raises(LoadError, match="at most the server's 4096"):
        load("http", Script(), LoadOptions(concurrency=1, num_requests=1, input_len=4090, output_len=10))


def test_chat_prompts_are_text_and_the_role_is_no_token() -> None:
    script = Script(gap_ms=1)
    options = LoadOptions(concurrency=1, num_requests=2, input_len=3, output_len=4)
    got = load("http", script, options, target={"chat": True}, details=True)
    assert got["median_ttft_ms"] >= 30 and [len(gaps) for gaps in got["itls"]] == [3, 3]
    assert script.prompts[0][0]["role"] == "user" and len(script.prompts[0][0]["content"].split()) == 3


def test_a_bad_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="expected http://"):
        asyncio.run(run_load(LoadOptions(concurrency=1, num_requests=1), Target(url="localhost:8000")))
    with pytest.raises(LoadError, match="expected one of them"):
        Target()


def test_what_only_http_has_is_refused_over_zeromq() -> None:
    with pytest.raises(LoadError, match="--model-name and --chat beside --connect; expected them with --url"):
        Target(connect="tcp://127.0.0.1:1", model_name="a", chat=True)
    with pytest.raises(LoadError, match="--api-key beside"):
        Target(connect="tcp://127.0.0.1:1", api_key="a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_that_is_stopped_keeps_what_it_has_measured(kind: str) -> None:
    async def stop_after_some(address: str) -> dict[str, Any]:
        options = LoadOptions(concurrency=4, duration_s=600, input_len=12, output_len=4)
        ended = asyncio.Event()

        def progress(what: str, done: int, total: int) -> None:
            if len(script.prompts) > 40:
                ended.set()

        task = asyncio.create_task(run_load(options, target_of(address), progress=progress, keeps_when_cancelled=True))
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        task.cancel()
        return await task

    script = Script()
    with scripted_server(kind, script) as address:
        got = asyncio.run(stop_after_some(address))
    assert got["stopped_early"] and got["completed"] >= 36 and got["failed"] <= 4
    assert set(got["error_counts"]) <= {"on its way when the load was stopped"}
    assert "stopped early" in table_of(got)
