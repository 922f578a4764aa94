"""What the server's processes hold over a run: their own memory, pages of files, and shared memory, told apart.

    for process in processes_of(host_pid): process.sample(), once a second;  memory_of(process)

Only the first of the three can leak: heaps, stacks and the emulated device's memory. Pages of libraries count as they are first read, and those of
the rings, up to their size (`--num-completions`, `--arena-bytes`, `--trace-events`), as they are first written.
Used by tools/bench_streams.py and tests/host/test_memory_growth.py. Test: pytest tests/host/test_bench_streams.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

PARTS: Final = ("anonymous", "file", "shared")
_MODULES: Final = {
    "host.engine_process": "engine", "host.emulated_process": "device",
    "nic_shim.zmq_ingress": "zmq ingress", "nic_shim.http_ingress": "http ingress",
}  # fmt: skip


@dataclass
class Process:
    """One of the server's processes."""

    name: str
    pid: int
    cpu_begin_s: float = 0.0
    cpu_end_s: float = 0.0
    resident_kb: dict[str, list[int]] = field(
        default_factory=lambda: {part: [] for part in PARTS}
    )  # by part, of each sample

    def sample(self) -> None:
        status = _numbers(Path(f"/proc/{self.pid}/status").read_text(), "Rss")
        # The kernel adds this one up page by page; RssAnon may lag by some pages a processor.
        rollup = _numbers(Path(f"/proc/{self.pid}/smaps_rollup").read_text(), "Anonymous")
        self.resident_kb["anonymous"].append(rollup["Anonymous"])
        self.resident_kb["file"].append(status["RssFile"])
        self.resident_kb["shared"].append(status["RssShmem"])

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _numbers(text: str, prefix: str) -> dict[str, int]:
    """KB by name, of the lines `Name:   123 kB` that begin so."""
    return {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith(prefix)}


def processes_of(host_pid: int) -> list[Process]:
    """The supervisor (`blinkimp serve`) and what it started; not the helpers of those."""
    found, pids = [Process("supervisor", host_pid)], [host_pid]
    while pids:
        pid = pids.pop()
        pids += [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        found += [Process(name, pid) for module, name in _MODULES.items() if module in command]
    return found


def memory_of(process: Process) -> dict[str, Any]:
    """MB of each part: medians of the first and of the last tenth of the run; and the slope of a straight line through the second half."""
    figures: dict[str, Any] = {}
    for part, values in process.resident_kb.items():
        kb = np.array(values, float)
        tenth, rest = max(1, len(kb) // 10), kb[len(kb) // 2 :]
        slope = float(np.polyfit(np.arange(len(rest)), rest, 1)[0]) if len(rest) > 2 else 0.0
        figures[f"{part}_mb_first"] = round(float(np.median(kb[:tenth])) / 1024, 2)
        figures[f"{part}_mb_last"] = round(float(np.median(kb[-tenth:])) / 1024, 2)
        figures[f"{part}_mb_max"] = round(float(kb.max()) / 1024, 2)
        figures[f"{part}_slope_kb_per_minute_second_half"] = round(slope * 60, 2) + 0.0  # no -0.0
    return figures | {"num_samples": len(process.resident_kb["anonymous"])}


def describe(name: str, figures: dict[str, Any]) -> str:
    """A line for people."""
    parts = (
        f"{part} {figures[f'{part}_mb_first']:.2f} -> {figures[f'{part}_mb_last']:.2f} MB "
        f"({figures[f'{part}_slope_kb_per_minute_second_half']:+.1f} KB a minute)"
        for part in PARTS
    )
    return f"      {name:13} {'; '.join(parts)}"
