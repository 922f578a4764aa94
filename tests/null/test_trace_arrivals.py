"""Arrivals: what a capture's lines come to, what a replay makes of them, and what is refused. Run: pytest tests/null/test_trace_arrivals.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.bench.load_plan import LoadOptions, make_plan
from blinkimp.bench.record import Record
from blinkimp.bench.replay import ReplayPlan, compare_outputs, openai_fields, submit_of
from blinkimp.cli import main
from blinkimp.cli.bench import replay_line
from blinkimp.protocol import Constraint, Sampling
from blinkimp.trace.arrivals import (
    Arrival,
    Captured,
    Outcome,
    collect_arrivals,
    output_digest,
    read_arrivals,
    write_arrivals,
)
from blinkimp.trace.errors import TraceError
from blinkimp.trace.synthetic import Shape
from tests.null.test_trace_figures import make_file


def arrival(at_ns: int, prompt: list[int], **more: Any) -> Arrival:
    sampling = more.pop("sampling", Sampling(temperature=0.7, seed=at_ns, max_tokens=8))
    return Arrival(at_ns, len(prompt), sampling, prompt_ids=prompt, **more)


def write_capture(path: Path, lines: list[Captured], tail: bytes = b"") -> None:
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines) + tail)


def plan_of(path: Path, arrivals: list[Arrival], **options: Any) -> ReplayPlan:
    write_arrivals(path, arrivals)
    plan = make_plan(LoadOptions(replay=path, **options), vocab_size=100)
    assert isinstance(plan, ReplayPlan)
    return plan


def test_captures_of_several_ingresses_become_one_list_by_time(tmp_path: Path) -> None:
    outcome = Outcome("length", 2, output_digest([5, 6]))
    write_capture(
        tmp_path / "arrivals.main.qp0.1.2.jsonl",
        [Captured(0, arrival(5_000, [1])), Captured(1, arrival(9_000, [2, 3])), Captured(0, outcome=outcome)],
        tail=b'{"number":1,"outc',  # killed while it wrote
    )
    write_capture(tmp_path / "arrivals.main.qp1.1.2.jsonl", [Captured(0, arrival(7_000, [4]))])
    found = collect_arrivals([tmp_path])
    assert [one.prompt_ids for one in found] == [[1], [4], [2, 3]]
    assert [one.outcome for one in found] == [outcome, None, None]
    path = tmp_path / "replay.jsonl"
    write_arrivals(path, found)
    assert path.stat().st_mode & 0o077 == 0, "prompts are private"
    read = read_arrivals(path)
    assert [one.at_ns for one in read] == [0, 2_000, 4_000] and read[0].sampling.seed == 5_000


def test_a_capture_is_never_written_over_nor_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "captured"
    folder.mkdir()
    part = folder / "arrivals.main.qp0.1.2.jsonl"
    write_capture(part, [Captured(0, arrival(5_000, [1]))])
    before = part.read_bytes()
    for source in (folder, part):
        assert main(["trace", "arrivals", str(source), "-o", str(part)]) == 1
        assert "the same file as" in capsys.readouterr().err
        assert main(["trace", "arrivals", str(source), "-o", str(folder / "arrivals.all.jsonl")]) == 1
        assert "expected another: it would be read as a part of the capture" in capsys.readouterr().err
    assert part.read_bytes() == before and list(folder.iterdir()) == [part]
    for out in (folder / "arrivals.jsonl", tmp_path / "arrivals.all.jsonl"):
        assert main(["trace", "arrivals", str(folder), "-o", str(out)]) == 0
    assert len(collect_arrivals([folder])) == 1, "what was written is no part of the capture"


def test_a_replay_is_the_same_requests_at_the_same_times(tmp_path: Path) -> None:
    given = [
        arrival(0, [1, 2], priority=3, timeout_s=2.5, cache_salt="aa"),
        arrival(1_250_000_000, [9], prefix_cache=False, stream=False, delivered_ids=[4]),
    ]
    plan = plan_of(tmp_path / "a.jsonl", given, time_scale=2.0)
    assert plan.intended_s is not None and plan.intended_s.tolist() == [0.0, 2.5] and not plan.options.is_closed
    assert [plan.prompt(idx) for idx in range(2)] == [[1, 2], [9]] and plan.output_lens.tolist() == [8, 8]
    first, second = (submit_of(7, plan.prompt(idx), plan.arrival(idx)) for idx in range(2))
    assert (first.priority, first.timeout_s, first.cache_salt, first.sampling.seed) == (3, 2.5, "aa", 0)
    assert (second.prefix_cache, second.stream, second.delivered_ids) == (False, False, [4])


def test_a_request_that_was_cut_off_asks_for_what_it_got(tmp_path: Path) -> None:
    outcome = Outcome("cancelled", 3, output_digest([1, 2, 3]))
    sampling = Sampling(max_tokens=500, min_tokens=100, seed=1)
    plan = plan_of(tmp_path / "a.jsonl", [arrival(0, [1], sampling=sampling, outcome=outcome)])
    assert plan.arrival(0).sampling.max_tokens == 3 and plan.arrival(0).sampling.min_tokens == 3


def test_outputs_are_held_against_the_live_runs(tmp_path: Path) -> None:
    outcomes = [
        Outcome("length", 2, output_digest([5, 6])), Outcome("eos", 2, output_digest([5, 7])),
        Outcome("timeout", 1, output_digest([5])), None, Outcome("cancelled", 0, output_digest([])),
    ]  # fmt: skip
    plan = plan_of(tmp_path / "a.jsonl", [arrival(idx, [1], outcome=outcome) for idx, outcome in enumerate(outcomes)])
    records = [Record(idx, 1, 2, 0, token_ids=[5, 6]) for idx in range(5)]
    for record in records:
        record.add_chunk(1, 2)
        record.end(2)
    found = compare_outputs(plan, records)
    assert found == {"num_arrivals": 5, "num_compared": 2, "num_identical": 1, "differing": [1]}
    assert replay_line(found) == "replay: 1 of 2 outputs identical, token by token; not those of requests 1"
    assert "no output to compare" in replay_line({"num_compared": 0})
    records[1].token_ids = None  # a protocol that does not tell
    assert compare_outputs(plan, records)["num_compared"] == 1


def test_a_trace_gives_times_and_lengths(tmp_path: Path) -> None:
    trace = make_file(tmp_path / "a.trace", Shape(batch=4, output_tokens=10))
    found = collect_arrivals([tmp_path / "a.trace"])
    assert len(found) == len(set(trace.events["request_id"].tolist()) - {0})
    assert {(one.num_prompt_tokens, one.sampling.max_tokens) for one in found} == {(300, 10)}
    plan = plan_of(tmp_path / "a.jsonl", found)
    assert len(plan.prompt(0)) == 300 and plan.prompt(0) == plan.prompt(0) != plan.prompt(1)
    assert max(plan.prompt(0)) < 100


def test_fields_for_other_servers() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, seed=4, max_tokens=7, stop=["x"], logit_bias={3: 1.0})
    assert openai_fields(arrival(0, [1], sampling=sampling, priority=2)) == {
        "temperature": 0.5, "max_tokens": 7, "seed": 4, "top_p": 0.9, "stop": ["x"], "logit_bias": {3: 1.0}, "priority": 2,
    }  # fmt: skip
    constrained = Sampling(constraint=Constraint("json_object"))
    with pytest.raises(LoadError, match="--connect"):
        openai_fields(arrival(0, [1], sampling=constrained))


def test_what_is_no_list_of_arrivals_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="--capture-arrivals"):
        collect_arrivals([tmp_path])
    path = tmp_path / "a.jsonl"
    for content, words in ((b"", "no lines"), (b"{}\n", "line 1"), (b'{"at_ns": 1, "x": 2}\n', "line 1")):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=words):
            read_arrivals(path)
        with pytest.raises(LoadError, match=words):
            make_plan(LoadOptions(replay=path), vocab_size=9)
    path.write_bytes(b"".join(msgspec.json.encode(arrival(at, [1])) + b"\n" for at in (5, 3)))
    with pytest.raises(TraceError, match="backwards"):
        read_arrivals(path)
    with pytest.raises(LoadError, match=r"line 1: got .* prompt tokens, expected at most"):
        plan_of(path, [Arrival(0, 1 << 40, Sampling(max_tokens=1))])
    with pytest.raises(LoadError, match="would be sent after"):
        plan_of(path, [arrival(0, [1]), arrival(1 << 60, [1])])
    with pytest.raises(LoadError, match="expected it alone"):
        LoadOptions(replay=path, rate=3)
