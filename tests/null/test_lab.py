"""blinkimp/lab: cells that are kept, scenarios and loads as they are written, the frontier, the host's figures, placements.

Run: pytest tests/null/test_lab.py
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blinkimp.bench.errors import LoadError
from blinkimp.lab import burner
from blinkimp.lab.engines import EngineSpec, placement_of
from blinkimp.lab.host_monitor import (
    difference,
    first_sibling,
    parse_pressure,
    parse_stat,
    set_affinity,
    snapshot,
    tree_of,
)
from blinkimp.lab.interference import CellPlan, Grid, parse_load, usable_kinds
from blinkimp.lab.store import Store, key_of
from blinkimp.lab.sweep import Scenario, pareto_frontier, parse_scenario, points_of


# ---- Cells -----------------------------------------------------------------------------------------------------------
def test_a_cell_is_kept_and_a_failed_one_is_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    assert store.get("a") is None and list(store) == []
    store.put("a", {"kind": "sweep", "report": 1})
    store.put("b", {"kind": "sweep", "error": "no"})
    assert store.get("a") == {"kind": "sweep", "report": 1} and store.get("b") is None
    assert len(list(store)) == 2 and not list(store.folder.glob("*.tmp"))


def test_a_damaged_cell_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.cell.json").write_text("{")
    with pytest.raises(LoadError, match="remove the file"):
        list(Store(tmp_path))
    for content in ("[]", "{}", '{"kind": "sweep"}', '{"report": {}}'):
        (tmp_path / "x.cell.json").write_text(content)
        for look in (lambda: list(Store(tmp_path)), lambda: Store(tmp_path).get("x")):
            with pytest.raises(LoadError, match=r"x\.cell\.json: got .*expected a .*remove the file"):
                look()


def test_keys_are_file_names_and_tell_loads_apart() -> None:
    key = key_of("sweep", "a/b engine", "1k1k", "rate 0.5")
    assert "/" not in key and " " not in key
    assert key != key_of("sweep", "a/b engine", "1k1k", "rate 5")


# ---- Sweeps ----------------------------------------------------------------------------------------------------------
def test_scenarios_and_points() -> None:
    assert parse_scenario("8k1k") == Scenario("8k1k", 8192, 1024)
    assert parse_scenario("512x128") == Scenario("512x128", 512, 128)
    points = points_of([parse_scenario("1k1k"), parse_scenario("8x2")], [4, 8], [0.5])
    assert [(point.scenario.name, point.name) for point in points] == [
        ("1k1k", "concurrency 4"),
        ("1k1k", "concurrency 8"),
        ("8x2", "concurrency 4"),
        ("8x2", "concurrency 8"),
        ("1k1k", "rate 0.5"),
        ("8x2", "rate 0.5"),
    ]
    load = points[0].load(range_ratio=0.8, duration_s=60, warmup_s=5, seed=1, requests_per_user=10)
    assert (load.num_requests, load.duration_s, load.concurrency) == (40, None, 4)
    with pytest.raises(LoadError, match="at least one"):
        points_of([], [4], [])


@pytest.mark.parametrize("text", ["1k", "k1k", "0x5", "fast"])
def test_what_is_no_scenario_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="expected such as 1k1k"):
        parse_scenario(text)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40))
def test_the_frontier_is_what_nothing_exceeds(points: list[tuple[float, float]]) -> None:
    frontier = pareto_frontier(points)
    assert frontier == sorted(frontier)
    for x, y in points:
        assert any(fx >= x and fy >= y for fx, fy in frontier)
    for x, y in frontier:
        assert (x, y) in points
        assert not any((px > x and py >= y) or (px >= x and py > y) for px, py in points)


# ---- Interference ----------------------------------------------------------------------------------------------------
def test_loads_are_read_as_they_are_written() -> None:
    assert parse_load("r8:512x128").rate == 8 and parse_load("r0.5:1k1k").name == "rate 0.5"
    assert parse_load("c16:1k1k").concurrency == 16
    for text in ("8:512x128", "r0:512x128", "x8:1k1k", "r8"):
        with pytest.raises(LoadError, match="expected"):
            parse_load(text)


def test_reserved_cpus_are_whole_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cores of two CPUs, numbered as machines number them: 0 and 4, 1 and 5, and so on."""
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert [first_sibling(cpu, tmp_path) for cpu in (0, 4, 7, 8)] == [0, 0, 3, 8]
    monkeypatch.setattr("blinkimp.lab.engines.first_sibling", lambda cpu: first_sibling(cpu, tmp_path))
    placement = placement_of("reserved", 2, set(range(8)))
    assert placement.reserved == {0, 4} and placement.contested == {1, 2, 3, 5, 6, 7}


def test_placements_keep_reserved_cpus_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blinkimp.lab.engines.first_sibling", lambda cpu: cpu)
    reserved = placement_of("reserved", 2, {3, 4, 5, 6, 7})
    assert (set(reserved.reserved), set(reserved.contested)) == ({3, 4}, {5, 6, 7})
    sharing = placement_of("sharing", 2, {3, 4})
    assert set(sharing.reserved) == set(sharing.contested) == {3, 4}
    for number in (0, 5, 9):
        with pytest.raises(LoadError, match="left for the interference"):
            placement_of("reserved", number, {1, 2, 3, 4, 5})


def test_a_grid_measures_isolation_once_and_each_intensity_of_each_kind() -> None:
    placement = placement_of("reserved", 2, set(range(16)))
    grid = Grid([placement], ["stream", "tlb"], [0, 0.5, 1.0], [32], [parse_load("r1:8x2")], 1.0, 0.0)
    assert list(grid.disturbances(placement)) == [
        ("none", 0),
        *(("stream", threads) for threads in (7, 14, 32)),
        *(("tlb", threads) for threads in (7, 14, 32)),
    ]
    engine = EngineSpec.of(["x", "tcp://127.0.0.1:1"])
    keys = {CellPlan(engine, placement, kind, n, grid.loads[0]).key for kind, n in grid.disturbances(placement)}
    assert len(keys) == 7


def test_kinds_without_their_program_are_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burner.shutil, "which", lambda program: None)
    said: list[str] = []
    assert usable_kinds(["stream", "stress-ng", "compile"], said.append) == ["stream"]
    assert len(said) == 2 and "stress-ng is not installed" in said[0]
    with pytest.raises(LoadError, match="expected some of"):
        usable_kinds(["noise"], said.append)


@pytest.mark.parametrize("words", [["x"], ["x", "127.0.0.1"], ["x", "tcp://a", "run", "more"]])
def test_an_engine_that_is_none_is_refused(words: list[str]) -> None:
    with pytest.raises(LoadError, match="NAME ADDRESS"):
        EngineSpec.of(words)


def test_a_command_that_no_shell_could_read_is_refused() -> None:
    with pytest.raises(
        LoadError, match=r"engine a: got the command 'blinkimp serve \"unbalanced' \(No closing quotation\)"
    ):
        EngineSpec.of(["a", "tcp://127.0.0.1:1", 'blinkimp serve "unbalanced'])


# ---- The host's figures ----------------------------------------------------------------------------------------------
def test_pressure_and_counters_are_read() -> None:
    text = "some avg10=1.00 avg60=0.50 avg300=0.10 total=1234567\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=89\n"
    assert parse_pressure("cpu", text) == {"cpu some": 1234567, "cpu full": 89} and parse_pressure("io", "") == {}
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"cpu  {ticks} 0 {ticks} {50 * ticks} 7 {ticks} 0 {ticks} 0 0\ncpu0 1 1\nctxt 4242\n"
    assert parse_stat(stat) == (4242, 4.0) and parse_stat("") == (None, None)


def test_what_a_busy_process_did_is_found() -> None:
    """By the process's own clock, read around both snapshots: how long the machine takes to grant 0.3 s does not matter."""
    pid = os.getpid()
    outer_begin_s = time.process_time()
    before = snapshot([pid, 2**22 + 1])  # above every limit of process ids
    inner_begin_s = time.process_time()
    while time.process_time() < inner_begin_s + 0.3:
        pass
    inner_s = time.process_time() - inner_begin_s
    host = difference(before, snapshot([pid]))
    outer_s = time.process_time() - outer_begin_s
    (process,) = host["processes"]
    used_s = process["cpu_share"] * host["seconds"]
    tick_s = 4 / os.sysconf("SC_CLK_TCK")  # user and system time are each cut to a tick, twice
    assert process["pid"] == pid and inner_s - tick_s <= used_s <= outer_s + tick_s
    assert host["context_switches_per_s"] > 0 and host["busy_cpus"] * host["seconds"] >= inner_s / 2
    assert all(share >= 0 for share in host["pressure"].values())
    assert pid in tree_of(os.getppid())


def test_affinity_reaches_every_thread() -> None:
    stop, cpus = threading.Event(), os.sched_getaffinity(0)
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        one = {min(cpus)}
        set_affinity(os.getpid(), one)
        assert thread.native_id is not None and os.sched_getaffinity(thread.native_id) == one
    finally:
        set_affinity(os.getpid(), cpus)
        stop.set()
        thread.join()
