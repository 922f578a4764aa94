"""What memory this machine, and a container's limit, still have. Nothing is allocated to find out.

Called by host/emulated_device.py (how many KV pages fit), host/shared_room.py (whether the queue pairs fit).
Test: pytest tests/null/test_available_memory.py
"""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def host_memory_available_bytes(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int:
    """What the kernel says can be had without swapping, or what the control groups of this process leave, if that is less."""
    return min([_meminfo_bytes(proc, "MemAvailable"), *_left_of_groups(proc, cgroups)])


def _meminfo_bytes(proc: Path, field: str) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{proc}/meminfo has no {field}; expected Linux 3.14 or newer")


def _left_of_groups(proc: Path, cgroups: Path) -> list[int]:
    """Of this process's group and those above it; of none without limits that we can see (control groups of version 1, or no limit)."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group = cgroups / path
    return [
        left_bytes
        for folder in (group, *group.parents)
        if folder.is_relative_to(cgroups) and (left_bytes := _left_of_group(folder)) is not None
    ]


def _left_of_group(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        current_bytes = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # Cached files, a checkpoint that was read for example, are given up for whatever needs the memory. Shared memory is not among them.
    cached_bytes = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return max(0, int(limit) - current_bytes + cached_bytes)
