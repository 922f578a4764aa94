"""Sections of a lab report, and the two pages that are made of them: an HTML file that opens offline, and Markdown with its plots beside it.

Called by blinkimp/lab/report.py, interference_report.py and evidence_report.py. Test: pytest tests/null/test_lab_report.py
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from blinkimp.lab.plots import Plot
from blinkimp.outputs import make_folder, replacing

STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots svg { max-width: 36rem; height: auto }
"""


TABLE_MARK: Final = "|"  # a paragraph that begins with it is a table of Markdown


@dataclass(frozen=True)
class Section:
    """A heading, words, plots, and a table under them (none without headings)."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    plots: Sequence[Plot] = field(default_factory=list)
    words: Sequence[str] = ()  # paragraphs, or tables (TABLE_MARK)


def text_of(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def by(cells: Sequence[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    """Cells grouped by one of their words, in the order of its first appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell[name], []).append(cell)
    return groups


# ---- HTML ------------------------------------------------------------------------------------------------------------
def html_of(title: str, sections: Sequence[Section]) -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "".join(map(_html_section, sections))
    return f"<!doctype html><html lang=en><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"


def _html_section(section: Section) -> str:
    def cells(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text_of(value))}</{tag}>" for value in values) + "</tr>"

    plots = f'<div class="plots">{"".join(plot.svg for plot in section.plots)}</div>' if section.plots else ""
    rows = "".join(cells("td", row) for row in section.rows)
    table = f"<table>{cells('th', section.headings)}{rows}</table>" if section.headings else ""
    words = "".join(
        f"<pre>{html.escape(paragraph)}</pre>"
        if paragraph.startswith(TABLE_MARK)
        else f"<p>{html.escape(paragraph)}</p>"
        for paragraph in section.words
    )
    return f"<h2>{html.escape(section.title)}</h2>{words}{plots}{table}"


# ---- The file --------------------------------------------------------------------------------------------------------
def write_page(title: str, sections: Sequence[Section], path: Path) -> None:
    """Markdown by the name's end, else HTML. Raises OutputError."""
    if path.suffix == ".md":
        write_markdown(title, sections, path)
    else:
        with replacing(path) as temporary:
            temporary.write_text(html_of(title, sections))


def write_markdown(title: str, sections: Sequence[Section], path: Path) -> None:
    """The page, and its plots as SVG files in a folder of its name; those that an earlier page had there are removed."""
    folder = path.with_suffix("")
    written: set[str] = set()
    lines = [f"# {title}"]
    for number, section in enumerate(sections, 1):
        lines += ["", f"## {section.title}", ""]
        for paragraph in section.words:
            lines += [paragraph, ""]
        for plot in section.plots:
            if not written:
                make_folder(folder)
            name = f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', plot.title.lower()).strip('-')}.svg"
            with replacing(folder / name) as temporary:
                temporary.write_text(plot.svg + "\n")
            written.add(name)
            lines.append(f"![{plot.title}]({folder.name}/{name})")
        if not section.headings:
            continue
        rows = [section.headings, ["---"] * len(section.headings), *section.rows]
        lines += ["", *("| " + " | ".join(text_of(value).replace("|", "\\|") for value in row) + " |" for row in rows)]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    for old in folder.glob("[0-9][0-9]-*.svg"):
        if old.name not in written:
            old.unlink()
