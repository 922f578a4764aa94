"""The least of what the machine and the control groups leave. Test: pytest tests/null/test_available_memory.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from blinkimp.host.available_memory import host_memory_available_bytes

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """1000 MiB available, process in group a/b."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 1024000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    (tmp_path / "cgroup" / "a" / "b").mkdir(parents=True)
    return tmp_path


def limit(folder: Path, maximum: int | str, current: int, cached: int = 0) -> None:
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached}\ninactive_file 0\n")


def available_mib(machine: Path) -> int:
    return host_memory_available_bytes(machine / "proc", machine / "cgroup") // MIB


def test_without_groups_it_is_what_the_kernel_says(machine: Path) -> None:
    assert available_mib(machine) == 1000
    (machine / "proc" / "self" / "cgroup").unlink()
    assert available_mib(machine) == 1000


@pytest.mark.parametrize("folder", [".", "a", "a/b"])
def test_any_group_above_the_process_limits_it(machine: Path, folder: str) -> None:
    limit(machine / "cgroup", "max", 900 * MIB)
    limit(machine / "cgroup" / folder, 300 * MIB, 100 * MIB, cached=50 * MIB)
    assert available_mib(machine) == 250
    limit(machine / "cgroup" / folder, 300 * MIB, 400 * MIB)
    assert available_mib(machine) == 0
    limit(machine / "cgroup" / folder, 5000 * MIB, 100 * MIB)
    assert available_mib(machine) == 1000


def test_a_kernel_that_does_not_say_is_an_error(machine: Path) -> None:
    (machine / "proc" / "meminfo").write_text("MemTotal: 9999999 kB\n")
    with pytest.raises(RuntimeError, match="MemAvailable"):
        available_mib(machine)
