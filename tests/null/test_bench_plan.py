"""blinkimp/bench: lengths, arrivals, traces, and plans that a seed repeats.

Run: pytest tests/null/test_bench_plan.py
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.bench import lengths
from blinkimp.bench.arrivals import arrival_times
from blinkimp.bench.errors import LoadError
from blinkimp.bench.limits import MOST_REQUESTS
from blinkimp.bench.load_plan import LoadOptions, make_plan, read_trace, write_trace


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_random_lengths_fill_their_range() -> None:
    inputs, outputs = lengths.random_range(rng(), 4000, 100, 10, 0.8)
    assert (inputs.min(), inputs.max()) == (80, 100) and (outputs.min(), outputs.max()) == (8, 10)
    assert inputs.mean() == pytest.approx(90, rel=0.02)


def test_sharegpt_like_lengths_have_its_means_and_long_tails() -> None:
    inputs, outputs = lengths.sharegpt_like(rng(), 50_000, None)
    assert inputs.mean() == pytest.approx(161, rel=0.1) and outputs.mean() == pytest.approx(338, rel=0.1)
    assert np.median(inputs) < inputs.mean() / 2 and np.percentile(inputs, 99) > 1000
    inputs, outputs = lengths.sharegpt_like(rng(), 5000, 512)
    assert (inputs + outputs).max() <= 512 and inputs.min() >= 1 and outputs.min() >= 1


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    """Of a gamma process the squared coefficient of variation of the intervals is 1 / shape."""
    gaps = np.diff(arrival_times(rng(), rate=8.0, burstiness=burstiness, num_requests=40_000))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.08)


def test_a_ramp_raises_the_rate_linearly() -> None:
    """Up to 100/s over 20 s: 250 arrivals in the first half of the ramp, 750 in the second, 1,000 in each 10 s after it."""
    times = arrival_times(rng(), rate=100.0, ramp_s=20.0, duration_s=40.0)
    counts, _ = np.histogram(times, [0, 10, 20, 30, 40])
    assert counts.tolist() == pytest.approx([250, 750, 1000, 1000], rel=0.15)
    assert times.max() < 40 and (np.diff(times) >= 0).all()


def test_a_plan_is_repeated_by_its_seed_and_prompts_do_not_share_beginnings() -> None:
    options = LoadOptions(rate=5, duration_s=30, input_len=64, output_len=8, lengths="range", range_ratio=0.5)
    one, two = make_plan(options, 1000), make_plan(options, 1000)
    assert one.intended_s is not None and two.intended_s is not None
    assert one.intended_s.tolist() == two.intended_s.tolist() and one.input_lens.tolist() == two.input_lens.tolist()
    prompts = [one.prompt(idx) for idx in range(len(one))]
    assert prompts == [two.prompt(idx) for idx in range(len(two))]
    assert [len(prompt) for prompt in prompts] == one.input_lens.tolist()
    assert len({tuple(prompt[:8]) for prompt in prompts}) == len(prompts)


def test_a_trace_is_replayed_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    plan = make_plan(LoadOptions(rate=5, num_requests=20, lengths="sharegpt"), 1000)
    write_trace(path, plan)
    again = make_plan(LoadOptions(trace=path, time_scale=2.0), 1000)
    assert plan.intended_s is not None and again.intended_s is not None
    assert again.intended_s.tolist() == pytest.approx((plan.intended_s * 2).tolist(), abs=1e-5)
    assert again.output_lens.tolist() == plan.output_lens.tolist()
    closed = make_plan(LoadOptions(trace=path, concurrency=4, num_requests=7), 1000)
    assert closed.intended_s is None and len(closed) == 7


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"input_tokens": 3}', "output_tokens"),
        ("{", "line 1"),
        ('{"input_tokens": 3, "output_tokens": 1}', "has no at_s"),
        (
            '{"input_tokens": 3, "output_tokens": 1, "at_s": 2}\n{"input_tokens": 3, "output_tokens": 1, "at_s": 1}',
            "backwards",
        ),
        ("", "no lines"),
    ],
)
def test_a_bad_trace_is_explained(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(LoadError, match=words):
        make_plan(LoadOptions(trace=path), 100)


def test_a_missing_trace_is_explained(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        {"num_requests": 3},
        {"rate": 1.0},
        {"rate": 1.0, "num_requests": 3, "duration_s": 1.0},
        {"concurrency": 0, "num_requests": 3},
        {"rate": 1.0, "num_requests": 3, "input_len": 0},
        {"rate": 1.0, "num_requests": 3, "lengths": "sharegpt", "max_total_len": 1},
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="expected"):
        LoadOptions(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rate", math.inf), ("rate", math.nan), ("duration_s", math.inf), ("warmup_s", math.inf), ("ramp_s", math.inf)],
)
def test_a_load_that_would_not_end_is_refused(name: str, value: float) -> None:
    given: dict[str, Any] = {"rate": 1.0, "duration_s": 5.0} | {name: value}
    with pytest.raises(LoadError, match=f"{name}: got {value}, expected a finite number"):
        LoadOptions(**given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_requests": 10**10}, "num_requests: got 10000000000, expected at most 1e\\+07"),
        ({"num_requests": 1, "input_len": 10**30}, "input_len: got 1.*, expected at most"),
        ({"num_requests": 1, "output_len": 10**9}, "output_len: got 1000000000, expected at most"),
        ({"num_requests": 1, "rate": None, "concurrency": 10**9}, "concurrency: got 1000000000, expected at most"),
        ({"duration_s": 1e12}, "duration_s: got 10+.0, expected at most"),
        ({"duration_s": -1.0, "rate": None, "concurrency": 1}, "duration_s: got -1.0, expected at least 0"),
        ({"duration_s": 1e6, "rate": 1e6}, "requests/s for 1e.06 s, expected at most 10000000 requests"),
        ({"num_requests": 1, "rate": 1e-300}, "would be sent after .* s, expected at most 1e.08"),
        ({"num_requests": 1, "burstiness": 1e-300}, "expected a positive rate, a burstiness of at least 0.001"),
    ],
)
def test_a_load_beyond_all_bounds_is_refused(options: dict[str, Any], words: str) -> None:
    """In place of a MemoryError, or no end."""
    with pytest.raises(LoadError, match=words):
        make_plan(LoadOptions(**{"rate": 1.0, **options}), vocab_size=9)


def test_a_closed_loop_of_a_day_is_not_refused() -> None:
    """It has as many requests as there may be at most, and draws no prompt before it is sent."""
    assert len(make_plan(LoadOptions(concurrency=256, duration_s=86400), vocab_size=9)) == MOST_REQUESTS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"at_s": 1e308, "input_tokens": 1, "output_tokens": 1}', "would be sent after 1e.308 s"),
        ('{"at_s": 0, "input_tokens": 1, "output_tokens": 99999999999999999999}', "line 1: .*output_tokens"),
        ('{"at_s": 0, "input_tokens": 9000000000000000000, "output_tokens": 1}', "line 1: .*input_tokens"),
        ('{"at_s": 0, "input_tokens": -4, "output_tokens": 1}', "line 1: .*input_tokens"),
    ],
)
def test_a_trace_beyond_all_bounds_is_refused(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "trace.jsonl").write_text(line)
    with pytest.raises(LoadError, match=words):
        make_plan(LoadOptions(trace=tmp_path / "trace.jsonl"), vocab_size=9)


def test_arrivals_without_bursts_are_json() -> None:
    assert LoadOptions(rate=1.0, num_requests=3, burstiness=math.inf).to_json()["burstiness"] == "inf"


@pytest.mark.parametrize("source", ["trace", "replay"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_requests", 0), ("num_requests", -1), ("warmup_s", -1.0), ("time_scale", -1.0), ("time_scale", math.nan)],
)
def test_bounds_hold_for_loads_of_a_file_too(source: str, name: str, value: float) -> None:
    given: dict[str, Any] = {source: Path("x"), name: value}
    with pytest.raises(LoadError, match=f"{name}: got {value}, expected at least"):
        LoadOptions(**given)


@pytest.mark.parametrize("source", ["trace", "replay"])
@pytest.mark.parametrize(
    ("name", "option"), [("duration_s", "--duration"), ("ramp_s", "--ramp"), ("burstiness", "--burstiness")]
)
def test_options_that_times_of_a_file_leave_no_room_for_are_refused(source: str, name: str, option: str) -> None:
    given: dict[str, Any] = {source: Path("x")}
    more: dict[str, Any] = {name: 0.5}
    with pytest.raises(LoadError, match=f"got {option} with --{source}; expected .* --num-requests"):
        LoadOptions(**given, **more)
    LoadOptions(**given, num_requests=3, warmup_s=1.0, time_scale=2.0)


def test_what_another_kind_of_load_has_no_use_for_is_refused() -> None:
    with pytest.raises(LoadError, match="got --burstiness with --concurrency"):
        LoadOptions(concurrency=2, burstiness=0.5, num_requests=3)
    with pytest.raises(LoadError, match="got --burstiness with --concurrency"):
        LoadOptions(trace=Path("x"), concurrency=2, burstiness=0.5)
    with pytest.raises(LoadError, match="got --duration with --trace and --rate"):
        LoadOptions(trace=Path("x"), rate=2.0, duration_s=5.0)
    LoadOptions(rate=1.0, concurrency=2, burstiness=0.5, ramp_s=1.0, duration_s=3.0)
    LoadOptions(concurrency=2, ramp_s=1.0, duration_s=3.0)
    LoadOptions(trace=Path("x"), concurrency=2, ramp_s=1.0, duration_s=3.0)
    LoadOptions(trace=Path("x"), rate=2.0, burstiness=0.5, ramp_s=1.0)
    with pytest.raises(LoadError, match="got --seed with --replay"):
        LoadOptions(replay=Path("x"), seed=3)
    LoadOptions(trace=Path("x"), seed=3)


@pytest.mark.parametrize("more", [{"rate": 2.0}, {"concurrency": 2}, {"rate": 2.0, "concurrency": 2}])
def test_a_time_scale_is_refused_where_no_file_gives_the_times(more: dict[str, Any]) -> None:
    option = "--rate" if "rate" in more else "--concurrency"
    for load in ({"num_requests": 3}, {"trace": Path("x")}):
        with pytest.raises(LoadError, match=f"got --time-scale with {option}; expected .* and here {option} says when"):
            LoadOptions(**more, **load, time_scale=2.0)


LENGTHS: dict[str, dict[str, Any]] = {
    "--lengths": {"lengths": "fixed"},
    "--input-len": {"input_len": 512},
    "--output-len": {"output_len": 128},
    "--range-ratio": {"range_ratio": 0.5},
    "--max-total-len": {"max_total_len": 64},
}


@pytest.mark.parametrize("option", LENGTHS)
@pytest.mark.parametrize("given", [{"trace": Path("x")}, {"trace": Path("x"), "rate": 2.0}, {"replay": Path("x")}])
def test_lengths_are_refused_where_a_file_has_them_even_the_usual_ones(given: dict[str, Any], option: str) -> None:
    source = next(iter(given))
    with pytest.raises(LoadError, match=f"got {option} with --{source}; expected .* the file says how long"):
        LoadOptions(**given, **LENGTHS[option])


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        (None, ["--range-ratio", "--max-total-len"]),
        ("fixed", ["--range-ratio", "--max-total-len"]),
        ("range", ["--max-total-len"]),
        ("sharegpt", ["--input-len", "--output-len", "--range-ratio"]),
    ],
)
def test_options_of_other_lengths_are_refused(kind: Any, unused: list[str]) -> None:
    for option in LENGTHS.keys() - {"--lengths"}:
        expected = pytest.raises(LoadError, match=f"got {option} with") if option in unused else nullcontext()
        with expected:
            LoadOptions(rate=1.0, num_requests=3, **{"lengths": kind, **LENGTHS[option]})


def test_lengths_that_nobody_asked_for_are_the_usual_ones() -> None:
    def of(**given: Any) -> list[Any]:
        load = LoadOptions(**given).to_json()
        return [load[name] for name in ("lengths", "input_len", "output_len", "range_ratio")]

    assert of(rate=1.0, num_requests=3) == ["fixed", 512, 128, 1.0]
    assert of(rate=1.0, num_requests=3, lengths="range", output_len=9) == ["range", 512, 9, 0.8]
    assert of(rate=1.0, num_requests=3, lengths="sharegpt") == ["sharegpt", None, None, None]
    assert of(trace=Path("x")) == of(replay=Path("x")) == [None] * 4


def test_a_rate_beside_a_concurrency_is_an_open_loop_of_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_tokens": 3, "output_tokens": 1}\n' * 5)
    plan = make_plan(LoadOptions(trace=path, rate=5, concurrency=2), 100)
    assert not plan.options.is_closed and plan.intended_s is not None and len(plan.intended_s) == 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"rate": 0.0, "num_requests": 1},
        {"rate": 1.0},
        {"rate": 1.0, "burstiness": 0.0, "num_requests": 1},
        {"rate": 1.0, "burstiness": math.nan, "num_requests": 1},
    ],
)
def test_arrivals_that_cannot_be_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="expected"):
        arrival_times(rng(), **arguments)
