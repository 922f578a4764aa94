"""blinkimp/lab/evidence_plan.py: what is wanted and in which order, what is done with the time that is left, and the made-up model.

Run: pytest tests/null/test_evidence_plan.py
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from blinkimp.bench.errors import LoadError
from blinkimp.cli import evidence as cli
from blinkimp.cli import lab, main
from blinkimp.host.checkpoint import read_model_config
from blinkimp.lab.evidence_plan import (
    STOP_S,
    EngineFacts,
    EvidenceCell,
    EvidenceGrid,
    cells_of,
    estimate_s,
    next_action,
    simulate,
)
from blinkimp.lab.evidence_state import merged
from blinkimp.lab.shape_model import SERVED, write_model
from blinkimp.lab.sweep import Point, parse_scenario

ENGINES = (
    EngineFacts("persistent", ("http", "zmq"), 75.0, False),
    EngineFacts("cpu", ("http", "zmq"), 75.0, True),
    EngineFacts("vllm", ("http",), 110.0, True),
)


def grid_of(**changes: Any) -> EvidenceGrid:
    wanted: dict[str, Any] = {
        "engines": ENGINES,
        "rates": (2.0, 4.0, 8.0, 16.0, 32.0),
        "open_scenario": parse_scenario("512x128"),
        "users": (4, 16, 64, 128),
        "closed_scenario": parse_scenario("1k1k"),
        "threads": (0, 16, 32, 64),
        "placements": ("reserved", "sharing"),
        "interference": "stream+bz2",
        "seconds": 20.0,
        "warmup_s": 2.0,
        "num_cpus": 16,
        "num_reserved": 2,
    }
    return EvidenceGrid(**{**wanted, **changes})


def cell_at(engine: str = "persistent", tier: int = 1, threads: int = 0) -> EvidenceCell:
    return EvidenceCell(engine, "http", "reserved", threads, Point(parse_scenario("512x128"), rate=float(tier)), tier)


# ---- What is wanted --------------------------------------------------------------------------------------------------
def test_every_load_is_wanted_at_every_level_over_http_with_reserved_cpus() -> None:
    grid = grid_of()
    cells = cells_of(grid)
    assert len({cell.key for cell in cells}) == len(cells)
    for engine in ENGINES:
        core = [c for c in cells if (c.engine, c.transport, c.placement) == (engine.name, "http", "reserved")]
        assert {(c.point, c.threads) for c in core} == {(p, n) for p in grid.points for n in grid.threads}
        sharing = {c.point for c in cells if (c.engine, c.transport, c.placement) == (engine.name, "http", "sharing")}
        assert sharing == set(grid.points)
    over_zmq = [cell for cell in cells if cell.transport == "zmq"]
    assert {cell.point for cell in over_zmq} == set(grid.points) and {c.engine for c in over_zmq} == {
        "persistent",
        "cpu",
    }


def core_labels(load: str) -> list[str]:
    return [f"persistent over http, reserved, {load}, {threads} threads" for threads in (0, 64)]


def test_the_most_important_cells_come_first_and_rounds_stay_together() -> None:
    """Isolated beside the most interference at the middle and the ends of rates and users, then at what is between; then levels between, the other
    placement, the second run, the other transport."""
    cells = cells_of(grid_of())
    mine = [cell for cell in cells if cell.engine == "persistent"]
    rates, users = "512x128, rate ", "1k1k, concurrency "
    loads = [f"{rates}8", f"{users}64", f"{rates}2", f"{rates}32", f"{users}4", f"{users}128"]
    loads += [f"{rates}4", f"{rates}16", f"{users}16"]
    told = [cell.label for cell in mine]
    assert told[:18] == [label for load in loads for label in core_labels(load)]
    between = [f"persistent over http, reserved, {load}, {n} threads" for load in loads[:2] for n in (16, 32)]
    sharing = [label.replace("reserved", "sharing") for label in core_labels(loads[0])]
    over_zmq = [label.replace("over http", "over zmq") for label in core_labels(loads[0])]
    again = [f"{label} again" for label in (told[0], told[2])]
    assert told[18:28] == [*between, *sharing, *again, *over_zmq]
    assert {cell.round for cell in mine[:4]} == {1} and {cell.round for cell in mine[4:12]} == {2}
    assert {cell.round for cell in mine[12:28]} == {3} and {cell.round for cell in mine[28:]} == {4}
    assert sum(cell.is_again for cell in cells) == 2 * len(ENGINES)
    rounds = [cell.round for cell in cells]
    assert rounds == sorted(rounds)
    for number in set(rounds):  # an engine's cells of a round are one stretch: one start
        engines = [cell.engine for cell in cells if cell.round == number]
        assert engines == sorted(engines, key=[engine.name for engine in ENGINES].index)


def test_processes_that_measure_an_engine_each_meet_the_same_levels_in_the_same_order() -> None:
    """Without the second transport, that one engine lacks: then whoever waits for a level is joined by the others (blinkimp/lab/room.py)."""
    engines = tuple(EngineFacts(engine.name, ("http",), engine.start_s, True) for engine in ENGINES)
    levels = [[cell.threads for cell in cells_of(grid_of(engines=(engine,)))] for engine in engines]
    assert levels[0] == levels[1] == levels[2] and levels[0][:18] == [0, 64] * 9


def test_a_short_call_measures_what_tells_most() -> None:
    """vLLM's share of a call of 450 s, with estimates that are on the safe side."""
    grid = grid_of(engines=ENGINES[2:], seconds=14.0)
    (first, *_) = simulate(grid, cells_of(grid), 450.0)
    assert "start vllm" in first[0] and sum("start" in line for line in first) == 1
    loads = {line.rpartition("reserved, ")[2] for line in first[1:]}
    assert len(loads) == len(first) - 1 == 12
    assert {load.rpartition(", ")[0] for load in loads} == {
        *(f"512x128, rate {rate}" for rate in (2, 8, 32)),
        *(f"1k1k, concurrency {users}" for users in (4, 64, 128)),
    }


def test_a_grid_survives_its_file() -> None:
    grid = grid_of()
    assert EvidenceGrid.from_json(json.loads(json.dumps(grid.to_json()))) == grid


def test_a_call_for_less_does_not_forget_what_was_wanted() -> None:
    before = json.loads(json.dumps(grid_of().to_json()))
    less = grid_of(engines=ENGINES[:1], rates=(64.0,), users=(), threads=(0, 8), placements=("sharing",))
    both = EvidenceGrid.from_json(merged(before, json.loads(json.dumps(less.to_json()))))
    assert [engine.name for engine in both.engines] == ["persistent", "cpu", "vllm"]
    more = json.loads(json.dumps(grid_of(engines=ENGINES[2:]).to_json()))
    assert [engine["name"] for engine in merged(more, before)["engines"]] == ["vllm", "persistent", "cpu"]  # the first
    assert both.rates == (2.0, 4.0, 8.0, 16.0, 32.0, 64.0) and both.users == (4, 16, 64, 128)
    assert both.threads == (0, 8, 16, 32, 64) and both.placements == ("reserved", "sharing")


@pytest.mark.parametrize(
    "changes", [{"threads": (16, 0)}, {"threads": (1,)}, {"rates": (), "users": ()}, {"engines": ()}]
)
def test_a_grid_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="expected"):
        grid_of(**changes)


# ---- What is done with the time --------------------------------------------------------------------------------------
def act(missing: list[EvidenceCell], running: str | None, left_s: float) -> tuple[str | None, EvidenceCell | None]:
    """A cell takes 30 s, a start 100 s."""
    action = next_action(missing, running, left_s, lambda cell: 30.0, lambda engine: 100.0)
    return action.engine, action.cell


def test_an_engine_starts_only_where_a_cell_of_it_fits_too() -> None:
    one = cell_at()
    assert act([one], None, 130 + STOP_S) == ("persistent", None)
    assert act([one], None, 129 + STOP_S) == (None, None)
    assert act([], None, 1e6) == (None, None)


def test_an_engine_finishes_its_round_before_another_starts() -> None:
    mine, other, later = cell_at(tier=2), cell_at("vllm", tier=1), cell_at(tier=3)
    assert act([other, mine, later], "persistent", 1e6) == (None, mine)
    assert act([other, later], "persistent", 1e6) == ("vllm", None)


def test_an_engine_is_not_left_for_a_single_cell() -> None:
    """Of another, which would have nothing to be compared with; for the last one that is missing it is."""
    early, pair, mine = cell_at("vllm", tier=1), cell_at("vllm", tier=1, threads=64), cell_at(tier=3)
    assert act([early, pair, mine], "persistent", 160 + 2 * STOP_S) == ("vllm", None)
    assert act([early, pair, mine], "persistent", 159 + 2 * STOP_S) == (None, mine)
    assert act([early, mine], "persistent", 159 + 2 * STOP_S) == ("vllm", None)


def test_an_engine_is_not_left_for_cells_that_are_no_more_important() -> None:
    """The earlier round's engine does not fit any more, and two others have cells of a later round: they must not start in turns."""
    early, mine, other = cell_at("vllm", tier=1), cell_at(tier=3), cell_at("cpu", tier=3)

    def start_s(engine: str) -> float:
        return 500.0 if engine == "vllm" else 10.0

    for running, expected in (("persistent", mine), ("cpu", other)):
        action = next_action([early, mine, other], running, 200.0, lambda cell: 30.0, start_s)
        assert (action.engine, action.cell) == (None, expected)


def test_where_no_other_engine_fits_the_running_one_goes_on() -> None:
    other, later = cell_at("vllm", tier=1), cell_at(tier=3)
    assert act([other, later], "persistent", 100.0) == (None, later)
    assert act([other, later], "persistent", 30.0) == (None, None)


@settings(max_examples=30, deadline=None)
@given(st.integers(200, 2000), st.integers(0, 225))
def test_a_plan_measures_everything_once_and_keeps_to_its_budget(budget_s: int, num_there: int) -> None:
    grid = grid_of()
    missing = cells_of(grid)[num_there:]
    calls = simulate(grid, missing, float(budget_s))
    measured = [line.rpartition("  ")[2] for lines in calls for line in lines if "tier" in line]
    assert sorted(measured) == sorted(cell.label for cell in missing)
    labels = {cell.label: cell for cell in missing}
    for lines in calls:
        started = [line.split()[3] for line in lines if " start " in line]
        assert "start" in lines[0] and all(a != b for a, b in pairwise(started))  # no engine makes room for itself
        assert len(started) <= len(ENGINES) * cells_of(grid)[-1].round
        if "tier" in lines[-1]:
            begun_s = float(lines[-1].split()[0])
            assert begun_s + estimate_s(grid, labels[lines[-1].rpartition("  ")[2]]) <= budget_s + 1  # rounded


def test_a_budget_without_room_for_a_cell_is_refused() -> None:
    with pytest.raises(LoadError, match="raise --budget-s"):
        simulate(grid_of(), cells_of(grid_of()), 60.0)


def test_interference_makes_cells_longer_where_a_cpu_is_on_the_path() -> None:
    grid, point = grid_of(), Point(parse_scenario("1k1k"), concurrency=64)

    def seconds(engine: str, threads: int) -> float:
        return estimate_s(grid, EvidenceCell(engine, "http", "reserved", threads, point, 1))

    assert seconds("vllm", 64) > seconds("vllm", 0) + 10 and seconds("persistent", 64) < seconds("persistent", 0) + 10


# ---- The command's own part ------------------------------------------------------------------------------------------
def options_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_evidence_parser(parser.add_subparsers(), lab.words)
    return parser.parse_args(["evidence", "--resume", "x", *words])


def test_our_engines_differ_in_the_orchestrator_alone() -> None:
    options = options_of()
    persistent, cpu = (cli.serve_command(options, name, "dummy") for name in ("persistent", "cpu"))
    assert persistent.endswith("--orchestrator gpu")
    assert cpu.replace("evidence-cpu", "evidence-persistent") == persistent.replace(
        "orchestrator gpu", "orchestrator cpu"
    )
    assert "--orchestrator cpu-ahead" in cli.serve_command(options, "cpu-ahead", "dummy")
    for word in ("{model}", "{port}", "{zmq_port}", "--prefix-cache false"):
        assert word in persistent
    assert "--http" not in cli.serve_command(options_of("--transports", "zmq"), "cpu", "dummy")


def test_the_plan_is_printed_without_anything_being_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "evidence"
    assert main(["lab", "evidence", "--resume", str(folder), "--plan", "--cpus", "16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("call 1\n      0 s  start persistent (30 s)\n") and "tier 1 (round 1): 6 of 6" in said
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engines", "sglang"], "some of persistent, cpu, cpu-ahead, vllm"),
        (["--placements", "nowhere"], "some of reserved, sharing"),
        (["--transports", "udp"], "some of http, zmq"),
        (["--interference", "noise"], "for kinds"),
        (["--engines", "vllm"], "--vllm-command"),
        (["--cpus", "16"], "it is for --plan"),
    ],
)
def test_what_cannot_be_run_is_explained(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "evidence", "--resume", str(tmp_path / "x"), "--reserved-cpus", "1", *flags]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--seconds", "nan"],
        ["--seconds", "-1"],
        ["--warmup", "inf"],
        ["--budget-s", "nan"],
        ["--rates", "nan"],
        ["--rates", "2,0"],
        ["--users", "0"],
        ["--threads", "-1"],
    ],
)
def test_a_plan_of_no_times_is_wrong_usage(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lab", "evidence", "--resume", str(tmp_path), "--plan", "--cpus", "8", *flags])
    assert f"argument {flags[0]}: got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threads", ""], "--threads: got none, expected at least one"),
        (["--rates", "", "--users", ""], "--rates and --users: got none"),
        (["--vllm-command", 'serve "{model}'], "--vllm-command: got the command .*No closing quotation"),
        (["--serve-flags", "'"], "--serve-flags: got the command"),
    ],
)
def test_a_plan_of_nothing_is_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "evidence", "--resume", str(tmp_path), "--plan", "--cpus", "8", *flags]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_a_plan_for_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["lab", "evidence", "--resume", str(tmp_path / "file"), "--plan", "--cpus", "8"]) == 1
    assert "file, which is a file; expected a folder" in capsys.readouterr().err


def test_the_made_up_model_streams_a_word_for_every_id(tmp_path: Path) -> None:
    config = {**SERVED, "vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599}
    write_model(tmp_path, config)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size(with_added_tokens=True) == 600
    assert tokenizer.decode([300, 597]) == " t300 t597" and tokenizer.token_to_id("<|end|>") == 599
    assert tokenizer.decode(tokenizer.encode("any text, ü too").ids) == "any text, ü too"
    assert json.loads((tmp_path / "config.json").read_text()) == config
    model = read_model_config(tmp_path)
    assert (model.num_layers, model.hidden, model.vocab, model.rope.theta) == (32, 4096, 600, 500000.0)
