"""blinkimp/lab/evidence_report.py on cells written by hand: multiples, lower bounds, what was not run, the causes, the plots.

Run: pytest tests/null/test_evidence_report.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.lab.evidence_plan import EngineFacts, EvidenceCell, EvidenceGrid, cells_of
from blinkimp.lab.evidence_report import write_evidence_report
from blinkimp.lab.plots import Line, Plot
from blinkimp.lab.store import Store, write_json
from blinkimp.lab.sweep import parse_scenario

GRID = EvidenceGrid(
    engines=(EngineFacts("persistent", ("http", "zmq"), 75.0, False), EngineFacts("vllm", ("http",), 110.0, True)),
    rates=(4.0, 8.0),
    open_scenario=parse_scenario("512x128"),
    users=(4, 64),
    closed_scenario=parse_scenario("1k1k"),
    threads=(0, 16, 64),
    placements=("reserved", "sharing"),
    interference="stream+bz2",
    seconds=20.0,
    warmup_s=2.0,
    num_cpus=16,
    num_reserved=2,
)


@pytest.fixture
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables alone: matplotlib takes most of a second for each plot."""

    def plot(title: str, x_label: str, y_label: str, lines: list[Line], **how: bool) -> Plot:
        assert lines and all(line.points for line in lines)
        return Plot(title, "<svg></svg>")

    def bars(title: str, y_label: str, groups: list[str], heights: dict[str, list[float]], **how: bool) -> Plot:
        assert groups and all(len(values) == len(groups) and any(values) for values in heights.values())
        return Plot(title, "<svg></svg>")

    monkeypatch.setattr("blinkimp.lab.evidence_report.line_plot", plot)
    monkeypatch.setattr("blinkimp.lab.evidence_report.bar_plot", bars)


def report_of(ttft: float, tpot: float, throughput: float, num_cut: int, users: int | None) -> dict[str, Any]:
    """An answer of a closed loop has 500 tokens and takes as long as they need at this throughput."""
    latencies = {
        f"{key}_{metric}_floor_ms": value
        for metric, value in (("ttft", ttft), ("tpot", tpot))
        for key in ("median", "p99", "p99.9")
    }
    return {
        **latencies,
        "steady_output_throughput": throughput,
        "mean_chunk_tokens": 1.0,
        "backend": "openai",
        "load": {"concurrency": users},
        "completed": 160,
        "total_output_tokens": 160 * 500,
        "median_e2el_ms": 500 * (users or 1) / throughput * 1e3,
        "failed": num_cut,
        "num_cut": num_cut,
        "p99_send_delay_ms": 0.5,
        "gpu_energy": {
            "power_w": 400.0,
            "j_per_token": 0.25,
            "j_per_token_above_idle": 0.125,
            "sm_clock_mhz": 1980.0,
        },
    }


def measured(cell: EvidenceCell, num_cut: int = 0) -> dict[str, Any]:
    """At 64 threads vLLM's latencies are ten times those at 0, and a fifth of its throughput is left; the persistent kernel's are 4 % longer."""
    slower = 1.0 if cell.threads == 0 else 10.0 if cell.engine == "vllm" else 1.04
    left = 0.2 if slower == 10 else 1.0
    return {
        "kind": "evidence",
        "engine": cell.engine,
        "transport": cell.transport,
        "placement": cell.placement,
        "threads": cell.threads,
        "load": cell.load,
        "report": report_of(30 * slower, 5 * slower, 1000 * left, num_cut, cell.point.concurrency),
        "host": {
            "pressure": {"cpu some": 0.5, "memory some": 0.01},
            "context_switches_per_s": 1234.0,
            "mean_clock_mhz": 2600.0,
            "processes": [
                {"cpu_share": 0.5, "involuntary_per_s": 10.0},
                {"cpu_share": 1.0, "involuntary_per_s": 5.0},
            ],
        },
        "interference_units_per_s": {"stream": 1e9, "bz2": 2e6} if cell.threads else None,
        "wall_s": 24.0,
    }


def folder_of(tmp_path: Path, cells: list[EvidenceCell], cut: tuple[str, ...] = (), grid: EvidenceGrid = GRID) -> Path:
    folder = tmp_path / "evidence"
    folder.mkdir()
    write_json(folder / "grid.json", grid.to_json())
    call = {"date": "2026-01-01", "gpu": "H200", "cpus": 16, "starts": [{"engine": "vllm", "seconds": 99.0}]}
    write_json(folder / "calls.json", [call])
    for cell in cells:
        Store(folder / "cells").put(cell.key, measured(cell, num_cut=5 if cell.key in cut else 0))
    return folder


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows by heading, of Markdown."""
    found: dict[str, list[list[str]]] = {}
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        found[part.splitlines()[0]] = [[word.strip() for word in line.strip("|").split("|")] for line in lines]
    return found


def row_of(table: list[list[str]], *begins: str) -> dict[str, str]:
    (row,) = [row for row in table if tuple(row[: len(begins)]) == begins]
    return dict(zip(table[0], row, strict=True))


TTFT, TPOT, RETAINED = (
    f"Under interference: {name}"
    for name in (
        "p99 TTFT, multiples of the isolated run",
        "p99 TPOT, multiples of the isolated run",
        "output tokens/s retained",
    )
)


@pytest.mark.usefixtures("quick_plots")
def test_multiples_and_the_goal_stand_beside_the_isolated_run(tmp_path: Path) -> None:
    out = tmp_path / "RESULTS.md"
    assert write_evidence_report(folder_of(tmp_path, cells_of(GRID)), out) == len(cells_of(GRID))
    found = tables(out.read_text())
    of_load = ("http", "reserved", "512x128, rate 8")
    flat, bad = (row_of(found[TTFT], name, *of_load) for name in ("persistent", "vllm"))
    assert (flat["TTFT p99 ms, 0 threads"], flat["x at 0 again"], flat["within 5 %"]) == ("30.00", "1.00", "yes")
    assert (bad["x at 64"], bad["within 5 %"], bad["requests"]) == ("10.00", "no", "160")
    assert row_of(found[TPOT], "vllm", *of_load)["x at 64"] == "10.00"
    assert row_of(found[RETAINED], "vllm", *of_load)["x at 64"] == "20.0%"
    for title in (TTFT, TPOT, RETAINED):
        assert len({len(row) for row in found[title]}) == 1


@pytest.mark.usefixtures("quick_plots")
def test_the_page_begins_with_what_came_out(tmp_path: Path) -> None:
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder_of(tmp_path, cells_of(GRID)), out)
    text = out.read_text()
    short = row_of(tables(text)["In short"], "1k1k, concurrency 64", "vllm")
    assert (short["TTFT p99 ms"], short["TPOT p99 ms"]) == ("30.0 -> 300.0", "5.00 -> 50.0")
    assert (short["output tokens/s"], short["retained"], short["requests"]) == ("1,000 -> 200", "20.0%", "160, 160")
    assert short["J/token"] == "0.25 -> 0.25"
    assert "persistent, TTFT: in 4 of 4 loads (4 of them measured at every level); worst 1.04 x" in text
    assert "vllm, TPOT: in 0 of 4 loads (4 of them measured at every level); worst 10.00 x" in text
    again = row_of(tables(text)["How far two runs of the same differ"], "512x128, rate 8", "vllm")
    assert again["TTFT p99 ms"] == "30.0 and 30.0"


@pytest.mark.parametrize(("num_requests", "width"), [(200, (0.5, 3.0)), (20_000, (0.0, 0.1))])
@pytest.mark.usefixtures("quick_plots")
def test_a_p99_of_few_requests_has_a_wide_interval(
    tmp_path: Path, num_requests: int, width: tuple[float, float]
) -> None:
    """2 % of the requests are slow, with interference and without: of 200 they may as well be one or seven."""
    folder = folder_of(tmp_path, [c for c in cells_of(GRID) if c.tier == 1])
    ttft = [60.0 if idx % 50 == 0 else 20.0 for idx in range(num_requests)]
    for cell in cells_of(GRID):
        if cell.tier == 1 and cell.engine == "persistent":
            made = measured(cell)
            made["report"]["floors_ms"] = {"ttft_floor": ttft, "tpot_floor": [5.0] * num_requests}
            Store(folder / "cells").put(cell.key, made)
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder, out)
    found = tables(out.read_text())
    of_load = ("http", "reserved", "512x128, rate 8")
    low, high = (float(word) for word in row_of(found[TTFT], "persistent", *of_load)["90 % at 64"].split(" to "))
    assert low <= 1 <= high and width[0] <= high - low <= width[1]
    assert row_of(found[TPOT], "persistent", *of_load)["90 % at 64"] == "1.00 to 1.00"
    assert row_of(found[TTFT], "vllm", *of_load)["90 % at 64"] == "-", "its cells tell no request's latency"


@pytest.mark.usefixtures("quick_plots")
def test_isolated_runs_alone_are_a_page_too(tmp_path: Path) -> None:
    out, grid = tmp_path / "RESULTS.md", replace(GRID, threads=(0,))
    write_evidence_report(folder_of(tmp_path, cells_of(grid), grid=grid), out)
    text = out.read_text()
    short = row_of(tables(text)["In short"], "1k1k, concurrency 64", "vllm")
    assert "\nWithout interference, each engine" in text and TTFT not in text
    assert (short["TTFT p99 ms"], short["output tokens/s"], short["retained"], short["requests"]) == (
        "30.0",
        "1,000",
        "-",
        "160",
    )


@pytest.mark.usefixtures("quick_plots")
def test_an_engine_that_is_behind_another_on_a_quiet_machine_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, cells_of(GRID))
    (cell,) = [c for c in cells_of(GRID) if c.label == "vllm over http, reserved, 512x128, rate 8, 0 threads"]
    faster = measured(cell)
    faster["report"] |= {"p99_ttft_floor_ms": 25.0, "steady_output_throughput": 1100.0}
    Store(folder / "cells").put(cell.key, faster)
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder, out)
    text = out.read_text()
    row = row_of(tables(text)["A quiet machine: persistent beside the others"], "512x128, rate 8", "vllm")
    assert (row["TTFT p99 ms"], row["TPOT p99 ms"], row["tokens/s"]) == ("1.20", "1.00", "0.91")
    assert (
        "persistent is behind vllm by more than 1% in TTFT p99 ms (1 of 4 loads, most 20% at 512x128, rate 8), "
        "tokens/s (1 of 4 loads, most 10% at 512x128, rate 8)." in text
    )


@pytest.mark.usefixtures("quick_plots")
def test_pieces_of_an_older_client_are_counted_as_tokens(tmp_path: Path) -> None:
    """128 tokens in 64 pieces, 63 gaps of 10 ms: what arrived while sending was twice as much as it counted. With ZeroMQ tokens were counted."""
    cells = [c for c in cells_of(GRID) if c.engine == "persistent" and c.threads == 0 and c.load == "512x128, rate 8"]
    folder = folder_of(tmp_path, cells)
    for cell in cells:
        old = measured(cell)
        del old["report"]["mean_chunk_tokens"]
        old["report"] |= {"completed": 10, "total_output_tokens": 1280, "mean_itl_ms": 10.0, "mean_ttft_ms": 20.0}
        old["report"] |= {"mean_e2el_ms": 650.0, "backend": "openai" if cell.transport == "http" else "zmq"}
        Store(folder / "cells").put(cell.key, old)
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder, out)
    found = tables(out.read_text())
    for transport, tokens_per_s in (("http", "2,000.00"), ("zmq", "1,000.00")):
        assert (
            row_of(found["512x128, rate 8"], "persistent", transport, "reserved", "0")["output tokens/s"]
            == tokens_per_s
        )
    cause = row_of(
        found["Causes: what the host went through"], "persistent", "http", "reserved", "512x128, rate 8", "0"
    )
    assert cause["tokens a piece"] == "2.00"


@pytest.mark.usefixtures("quick_plots")
def test_notes_of_the_folder_stand_in_the_page(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [c for c in cells_of(GRID) if c.tier == 1])
    (folder / "NOTES.md").write_text("Made with\nvLLM 9.9.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nSecond.\n")
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder, out)
    assert "\nMade with vLLM 9.9.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nSecond.\n" in out.read_text()
    write_evidence_report(folder, tmp_path / "page.html")
    assert "<p>Second.</p>" in (page := (tmp_path / "page.html").read_text()) and "<pre>| a | b |\n" in page


@pytest.mark.usefixtures("quick_plots")
def test_what_was_not_run_stands_there_as_such(tmp_path: Path) -> None:
    cells = [
        c for c in cells_of(GRID) if c.engine == "vllm" and c.tier == 1 and c.threads in (0, 64) and not c.is_again
    ]
    out = tmp_path / "RESULTS.md"
    assert write_evidence_report(folder_of(tmp_path, cells), out) == 2
    text = out.read_text()
    found = tables(text)
    assert "2 of " in text
    assert len(found[TTFT]) == 2 + 1  # heading, rule, and the only group of which there is something
    row = row_of(found[TTFT], "vllm", "http", "reserved", "512x128, rate 8")
    assert (row["x at 0 again"], row["x at 16"], row["x at 64"], row["within 5 %"]) == ("-", "not run", "10.00", "no")
    assert [line[3] for line in found["512x128, rate 8"][2:]] == ["0", "64"]  # what was measured alone
    lacking = found["Planned, and not run"]
    assert "512x128, rate 8: 16;" in row_of(lacking, "vllm", "http", "reserved")["loads, and their numbers of threads"]
    assert "512x128, rate 8: 0, 16, 64" in row_of(lacking, "persistent", "zmq", "reserved")[lacking[0][3]]
    assert len(found["Causes: what the host went through"]) == 2 + 2


@pytest.mark.usefixtures("quick_plots")
def test_a_goal_that_was_tried_at_some_levels_says_at_which(tmp_path: Path) -> None:
    cells = [c for c in cells_of(GRID) if c.engine == "persistent" and c.tier == 1 and c.threads in (0, 64)]
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder_of(tmp_path, cells), out)
    row = row_of(tables(out.read_text())[TPOT], "persistent", "http", "reserved", "512x128, rate 8")
    assert row["within 5 %"] == "yes, at 64"


@pytest.mark.usefixtures("quick_plots")
def test_requests_that_were_cut_off_make_figures_lower_bounds(tmp_path: Path) -> None:
    (cell,) = [c for c in cells_of(GRID) if c.tier == 1 and c.engine == "vllm" and c.threads == 64]
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder_of(tmp_path, cells_of(GRID), cut=(cell.key,)), out)
    row = row_of(tables(out.read_text())["512x128, rate 8"], "vllm", "http", "reserved", "64")
    assert row["TTFT p99"] == ">= 300.00" and row["not completed"] == "5"


@pytest.mark.usefixtures("quick_plots")
def test_energy_and_causes_stand_beside_the_figures(tmp_path: Path) -> None:
    out = tmp_path / "RESULTS.md"
    write_evidence_report(folder_of(tmp_path, cells_of(GRID)), out)
    found = tables(out.read_text())
    quiet = row_of(found["A quiet machine"], "512x128, rate 8", "persistent")
    assert (quiet["output tokens/s"], quiet["J/token"], quiet["J/token above idle"]) == ("1,000.00", "0.2500", "0.1250")
    cause = row_of(found["Causes: what the host went through"], "vllm", "http", "reserved", "512x128, rate 8", "64")
    assert (cause["CPU pressure"], cause["engine CPUs"], cause["GPU W"]) == ("50.0%", "1.50", "400.00")
    assert cause["engine's involuntary switches/s"] == "15.00" and cause["interference/s"] == "stream 1e+09, bz2 2e+06"


@pytest.mark.usefixtures("quick_plots")
def test_every_plot_stands_in_the_page(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    write_evidence_report(folder_of(tmp_path, cells_of(GRID)), page)
    links = re.findall(r"!\[[^]]*\]\((RESULTS/[^)]*)\)", page.read_text())
    assert len(set(links)) == 3 + 4 * 2 + 2 + 1  # at the most threads; of four loads; over the rate; the frontier
    assert all((tmp_path / link).exists() for link in links)


def test_one_file_opens_offline(tmp_path: Path) -> None:
    out = tmp_path / "results.html"
    folder = folder_of(tmp_path, [c for c in cells_of(GRID) if c.tier in (1, 5) and c.point.rate is not None])
    Store(folder / "cells").put("broken", {"kind": "evidence", "engine": "cpu", "error": "no <answer>"})
    write_evidence_report(folder, out)
    text = out.read_text()
    assert text.count("<svg") == 3 + 2 and "no &lt;answer&gt;" in text
    assert re.findall(r'(?:src|href|xlink:href)="(?!#)([^"]*)"', text) == [] and "<script" not in text


def test_a_folder_without_a_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="check --resume"):
        write_evidence_report(tmp_path, tmp_path / "x.md")
    (tmp_path / "grid.json").write_text(json.dumps(GRID.to_json()))
    with pytest.raises(LoadError, match="run without --report first"):
        write_evidence_report(tmp_path, tmp_path / "x.md")


def spread_of(p50: float, p99: float) -> dict[str, float]:
    return {"mean": p50, "p50": p50, "p90": p99, "p99": p99, "max": p99, "n": 100}


def trace_of_cell() -> dict[str, Any]:
    """As blinkimp/lab/cell_trace.py leaves it in a cell."""
    phases = ("ingress", "commit", "ring", "queue", "prefill", "decode", "drain", "hand-over")
    classes = {"decode 1": (4.1, 10), "decode 5-8": (4.5, 200), "with prompts 1": (12.5, 30)}
    return {
        "trace": {"clock_error_us": 120.5, "lost": {"device": 3, "ingress": 4, "op_samples": 9}},
        "steps": {
            "gap_us": spread_of(0.5, 3.0),
            "busy_fraction": 0.573,
            "by_class": {name: {"step_ms": {**spread_of(p50, 2 * p50), "n": n}} for name, (p50, n) in classes.items()},
        },
        "ops": {},
        "requests": {
            "ttft_ms": spread_of(19.0, 36.0),
            "first_token_drain_ms": spread_of(0.2, 0.4),
            "phases_ms": {name: spread_of(1.0 + idx, 10.0 + idx) for idx, name in enumerate(phases)},
        },
    }


@pytest.mark.usefixtures("quick_plots")
def test_traced_cells_say_where_their_time_went(tmp_path: Path) -> None:
    """The others have no row; a cell in which no request came to an end says so, and has its steps all the same."""
    cells = [cell for cell in cells_of(GRID) if cell.tier == 1 and cell.engine == "persistent"]
    folder = folder_of(tmp_path, cells_of(GRID))
    store, empty = Store(folder / "cells"), {**trace_of_cell(), "requests": {}}
    for cell, trace in zip(cells, (trace_of_cell(), empty), strict=True):
        store.put(cell.key, measured(cell) | {"trace": trace})
    write_evidence_report(folder, tmp_path / "RESULTS.md")
    table = tables((tmp_path / "RESULTS.md").read_text())["Causes: where the time went"]
    assert [row[4] for row in table[2:]] == ["0", "64"]
    row = row_of(table, "persistent", "http", "reserved", "512x128, rate 8", "0")
    assert (row["TTFT at the client"], row["in the server"]) == ("30.00 / 30.00", "19.00 / 36.00")
    assert (row["ingress"], row["ring"], row["prefill"]) == ("1.00 / 10.00", "3.00 / 12.00", "5.00 / 14.00")
    assert (row["way back"], row["gap us"], row["busy"], row["lost"]) == ("0.20 / 0.40", "0.5 / 3.0", "57.3%", "7")
    assert (row["decode step ms"], row["step with prompts ms"]) == ("4.500 (5-8)", "12.500 (1)")
    bare = row_of(table, "persistent", "http", "reserved", "512x128, rate 8", "64")
    assert (bare["in the server"], bare["prefill"], bare["gap us"]) == ("-", "-", "0.5 / 3.0")
    assert "where the time went" not in without_traces(tmp_path)


def without_traces(tmp_path: Path) -> str:
    (tmp_path / "other").mkdir()
    folder = folder_of(tmp_path / "other", cells_of(GRID))
    write_evidence_report(folder, tmp_path / "other.md")
    return (tmp_path / "other.md").read_text()
