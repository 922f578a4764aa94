"""What the host went through during a measurement: pressure (PSI), context switches, CPU time of processes, clocks.

    before = snapshot(pids); ...; host = difference(before, snapshot(pids))

All from /proc and /sys; what a kernel does not tell is None. Called by blinkimp/lab/interference.py. Test: pytest tests/null/test_lab.py
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PROC: Final = Path("/proc")
CPUS: Final = Path("/sys/devices/system/cpu")
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ProcessCounters:
    name: str
    cpu_s: float
    switches: int  # voluntary and not, of all threads
    involuntary: int


@dataclass(frozen=True)
class Snapshot:
    at_s: float
    pressure_us: Mapping[str, int]  # `cpu some` and so on: microseconds stalled since boot
    switches: int | None  # of the whole machine since boot
    busy_s: float | None  # of all CPUs
    clocks_mhz: tuple[float, ...]
    processes: Mapping[int, ProcessCounters]


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def parse_pressure(resource: str, text: str) -> dict[str, int]:
    """Of `some avg10=0.00 ... total=123`."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        totals = [word for word in words if word.startswith("total=")]
        if totals:
            found[f"{resource} {words[0]}"] = int(totals[0].removeprefix("total="))
    return found


def parse_stat(text: str) -> tuple[int | None, float | None]:
    """(context switches, busy seconds of all CPUs) of /proc/stat."""
    switches, busy_s = None, None
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["ctxt"]:
            switches = int(words[1])
        elif words[:1] == ["cpu"]:
            ticks = list(map(int, words[1:]))
            busy_s = (sum(ticks[:3]) + sum(ticks[5:8])) / TICKS_PER_S  # all but idle and iowait
    return switches, busy_s


def threads_of(pid: int) -> list[int]:
    """None of a process that is gone, or goes while one looks."""
    try:
        return [int(name) for name in os.listdir(PROC / str(pid) / "task")]
    except OSError:
        return []


def process_counters(pid: int) -> ProcessCounters | None:
    """None for a process that is gone."""
    stat = read_text(PROC / str(pid) / "stat")
    if not stat:
        return None
    name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat.rpartition(")")[2].split()
    voluntary = involuntary = 0
    for thread in threads_of(pid):
        for line in read_text(PROC / str(pid) / "task" / str(thread) / "status").splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                voluntary += int(line.split()[1])
            elif line.startswith("nonvoluntary_ctxt_switches:"):
                involuntary += int(line.split()[1])
    return ProcessCounters(
        name, (int(fields[11]) + int(fields[12])) / TICKS_PER_S, voluntary + involuntary, involuntary
    )


def clocks_mhz() -> tuple[float, ...]:
    """Of each CPU; empty where neither cpufreq nor /proc/cpuinfo tells."""
    paths = sorted(CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if paths:
        return tuple(int(text) / 1e3 for path in paths if (text := read_text(path).strip()))
    lines = read_text(PROC / "cpuinfo").splitlines()
    return tuple(float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz"))


def snapshot(pids: Iterable[int]) -> Snapshot:
    pressure: dict[str, int] = {}
    for resource in ("cpu", "memory", "io"):
        pressure |= parse_pressure(resource, read_text(PROC / "pressure" / resource))
    switches, busy_s = parse_stat(read_text(PROC / "stat"))
    processes = {pid: found for pid in pids if (found := process_counters(pid)) is not None}
    return Snapshot(time.monotonic(), pressure, switches, busy_s, clocks_mhz(), processes)


def difference(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """Shares and rates between two snapshots; mean_clock_mhz is over CPUs, at the second of them."""
    seconds = max(after.at_s - before.at_s, 1e-9)

    def rate(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else (end - begin) / seconds

    processes = []
    for pid, end in after.processes.items():
        begin = before.processes.get(pid)
        if begin is not None:
            processes.append(
                {
                    "pid": pid,
                    "name": end.name,
                    "cpu_share": (end.cpu_s - begin.cpu_s) / seconds,
                    "switches_per_s": (end.switches - begin.switches) / seconds,
                    "involuntary_per_s": (end.involuntary - begin.involuntary) / seconds,
                }
            )
    return {
        "seconds": seconds,
        "pressure": {
            name: (total - before.pressure_us[name]) / 1e6 / seconds
            for name, total in after.pressure_us.items()
            if name in before.pressure_us
        },
        "context_switches_per_s": rate(before.switches, after.switches),
        "busy_cpus": rate(before.busy_s, after.busy_s),
        "mean_clock_mhz": sum(after.clocks_mhz) / len(after.clocks_mhz) if after.clocks_mhz else None,
        "processes": processes,
    }


def first_sibling(cpu: int, folder: Path = CPUS) -> int:
    """The lowest of the CPUs that are one core with this one; itself where the kernel does not tell."""
    found = re.match(r"\d+", read_text(folder / f"cpu{cpu}/topology/thread_siblings_list"))
    return int(found[0]) if found else cpu


def tree_of(pid: int) -> dict[int, str]:
    """pid -> command line of a process and all it has started."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        text = read_text(path)
        if text:
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        command = read_text(PROC / str(one) / "cmdline").replace("\0", " ").strip()
        if command:
            found[one] = command
        waiting += children.get(one, [])
    return found


def set_affinity(pid: int, cpus: set[int]) -> None:
    """Of every thread of a process; threads that it starts later inherit it."""
    for thread in threads_of(pid):
        try:
            os.sched_setaffinity(thread, cpus)
        except (ProcessLookupError, PermissionError):
            continue  # it has just ended, or belongs to someone else
