"""blinkimp/lab/report.py: what stands in the file, isolated beside interfered, and that it needs nothing from elsewhere.

Run: pytest tests/null/test_lab_report.py
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.bench.metrics import Window, figures_of, inferencex_keys
from blinkimp.bench.record import Record
from blinkimp.cli import main
from blinkimp.lab.interference_report import compared, interference_sections
from blinkimp.lab.pages import html_of
from blinkimp.lab.plots import Line, Plot, bar_plot, line_plot
from blinkimp.lab.report import sections_of, write_report
from blinkimp.lab.store import Store
from blinkimp.outputs import OutputError
from tests.support import files_of_at_most

MS = 1_000_000


@pytest.fixture
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles alone: matplotlib takes most of a second for each plot on a busy machine."""

    def plot(title: str, *what: object, **how: bool) -> Plot:
        return Plot(title, "<svg></svg>")

    for name in ("report.line_plot", "interference_report.line_plot", "interference_report.bar_plot"):
        monkeypatch.setattr(f"blinkimp.lab.{name}", plot)


def report_of(ttft_ms: int, tpot_ms: int, num_requests: int = 10) -> dict[str, Any]:
    """Ten requests in a second, all alike, four tokens each."""
    records = []
    for idx in range(num_requests):
        record = Record(idx, 8, 4, idx * 100 * MS + 1, idx * 100 * MS + 1)
        for token in range(4):
            record.add_chunk(record.sent_ns + (ttft_ms + token * tpot_ms) * MS, 1)
        record.end(record.chunk_ns[-1])
        records.append(record)
    figures = figures_of(records, Window.of(records, 0, 1000 * MS), {})
    keys = inferencex_keys(figures, num_gpus=1, model="m")
    return {
        **figures,
        "inferencex": keys,
        "gpu_energy": {"power_w": 300.0, "j_per_token": 0.5, "j_per_token_above_idle": 0.4, "sm_clock_mhz": 1980.0},
        "error_counts": {},
    }


def interfered(engine: str, kind: str, threads: int, ttft_ms: int, tpot_ms: int) -> dict[str, Any]:
    return {
        "kind": "interference",
        "engine": engine,
        "placement": "reserved",
        "interference": kind,
        "threads": threads,
        "contested_cpus": 14,
        "reserved_cpus": 2,
        "load": "512x128, rate 8",
        "report": report_of(ttft_ms, tpot_ms),
        "host": {
            "pressure": {"cpu some": 0.25},
            "context_switches_per_s": 100.0,
            "processes": [{"cpu_share": 0.5}, {"cpu_share": 0.25}],
            "mean_clock_mhz": None,
        },
    }


def swept(engine: str, concurrency: int, tpot_ms: int) -> dict[str, Any]:
    return {
        "kind": "sweep",
        "engine": engine,
        "scenario": "1k1k",
        "concurrency": concurrency,
        "rate": None,
        "report": report_of(20, tpot_ms),
    }


INTERFERED = [
    interfered("persistent", "none", 0, 20, 5),
    interfered("persistent", "stream", 64, 21, 5),
    interfered("vllm", "none", 0, 30, 5),
    interfered("vllm", "stream", 64, 360, 50),
    interfered("vllm", "bz2", 64, 300, 20),
]


NUM_INTERFERENCE_PLOTS = 3 + 2 * 2 + 1  # multiples and what is retained, latencies of two engines, energy


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


@pytest.mark.usefixtures("quick_plots")
def test_interference_is_shown_as_multiples_of_the_isolated_run() -> None:
    # Of the second of sending, 360 ms pass until the first token: 24 of 40 tokens come within it.
    assert compared(INTERFERED[3], INTERFERED[2]) == pytest.approx({"ttft": 12, "tpot": 10, "retained": 0.6}, rel=0.01)
    (section,) = interference_sections(INTERFERED)
    headings, *rows = parsed(html_of("t", [section])).rows
    column = headings.index("x TTFT p99")
    found = {(row[0], row[1]): row[column] for row in rows}
    assert found["vllm", "stream"] == "12.00" and found["vllm", "bz2"] == "10.00"
    assert found["persistent", "stream"] == "1.05" and found["vllm", "none"] == "1.00"
    assert rows[0][headings.index("tokens/J")] == "2.00" and rows[0][headings.index("the same above idle")] == "2.50"
    assert rows[0][headings.index("engine CPUs")] == "0.75"
    assert rows[0][headings.index("CPU pressure")] == "25.0%" and rows[0][headings.index("CPU MHz")] == "-"
    assert rows[0][headings.index("GPU W")] == "300.00"
    titles = [plot.title for plot in section.plots]
    assert titles[2:] == [
        "throughput retained at 64 threads",
        *(f"{engine}: {name} at 64 threads" for engine in ("persistent", "vllm") for name in ("TTFT", "TPOT")),
        "energy at 64 threads",
    ]


@pytest.mark.usefixtures("quick_plots")
def test_without_an_isolated_run_there_are_no_multiples() -> None:
    (section,) = interference_sections(INTERFERED[3:4])
    (row,) = section.rows
    assert row[list(section.headings).index("x TTFT p99")] is None and not section.plots


def test_the_file_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    store, out = Store(tmp_path / "cells"), tmp_path / "report.html"
    cells = [
        swept("a<b>", 4, 5),
        swept("a<b>", 8, 8),
        *INTERFERED[:2],
        {"kind": "sweep", "engine": "x", "error": "no <answer>"},
    ]
    for number, cell in enumerate(cells):
        store.put(f"c{number}", cell)
    assert write_report([store], out) == len(cells)
    text = out.read_text()
    checker = parsed(text)
    assert checker.rows and "no &lt;answer&gt;" in text and "a&lt;b&gt;" in text
    assert text.count("<svg") == 3 + NUM_INTERFERENCE_PLOTS - 2  # of one engine
    outside = re.findall(r'(?:src|href|xlink:href)="(?!#)([^"]*)"', text)
    assert outside == [] and "<script" not in text and "@import" not in text


def test_the_same_figures_give_the_same_file() -> None:
    lines = [Line("a", [(1, 1), (2, 30)], [(1, 1)]), Line("b", [])]
    one, two = (line_plot("t", "x", "y", lines, log_x=True, log_y=True).svg for _ in range(2))
    assert one == two and "10" in one
    one, two = (bar_plot("t", "y", ["a long name", "b"], {"c": [1, 0]}, log_y=True).svg for _ in range(2))
    assert one == two


@pytest.mark.usefixtures("quick_plots")
def test_markdown_has_the_same_tables_and_its_plots_beside_it(tmp_path: Path) -> None:
    store, out = Store(tmp_path / "cells"), tmp_path / "page.md"
    for number, cell in enumerate([swept("a|b", 4, 5), *INTERFERED]):
        store.put(f"c{number}", cell)
    write_report([store], out, "the title")
    text = out.read_text()
    assert text.startswith("# the title\n") and "a\\|b" in text
    links = re.findall(r"!\[[^]]*\]\((page/[^)]*)\)", text)
    assert len(links) == len(set(links)) == 3 + NUM_INTERFERENCE_PLOTS
    assert all((tmp_path / link).read_text().startswith("<svg") for link in links)
    (tmp_path / "page" / "99-of-an-older-page.svg").write_text("<svg/>")
    write_report([store], out, "the title")
    assert {f"page/{path.name}" for path in (tmp_path / "page").iterdir()} == set(links)
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == len(sections_of(list(store)))  # one a table


@pytest.mark.usefixtures("quick_plots")
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")
    store.put("c", swept("a", 4, 5))
    for name in ("page.md", "page.html"):
        out = tmp_path / name
        write_report([store], out, "the old one")
        before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        with files_of_at_most(100), pytest.raises(OutputError, match=r"cannot be written.*make room"):
            write_report([store], out, "the new one")
        assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoadError, match=r"pip install 'blinkimp\[lab\]'"):
        line_plot("t", "x", "y", [Line("a", [(0, 1)])])
    # A command says so first: there is no cell to be read, nor a server to be measured.
    folder, out = ["--folder", str(tmp_path / "none")], str(tmp_path / "x.html")
    for command in (["report", "--out", out], ["sweep", "--connect", "tcp://127.0.0.1:1", "--report", out]):
        assert main(["lab", *command, *folder]) == 1
        assert "plots need matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
