"""Both ends of the ring under ThreadSanitizer, AddressSanitizer and UBSan; and proof that a missing release is found.

Each case builds tests/host/stress/ring_stress.cpp with its flags (seconds) and runs it.
Run: pytest tests/host/test_sanitizers.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCE = ROOT / "tests" / "host" / "stress" / "ring_stress.cpp"
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer", "-pthread"]
LANES = [
    "-DBK_TEST_LANES",
    f"-I{ROOT / 'tests' / 'host' / 'lanes'}",
]  # before device/: its lanes.cuh is the one to be found
RACE_STATUS = 66
NEITHER_PREEMPTED_NOR_STALLED = 3  # the program's status when a run was clean but missed preemptions or credit stalls


def build(directory: Path, name: str, flags: list[str]) -> Path:
    output = directory / name
    result = subprocess.run(
        ["g++", *FLAGS, *flags, f"-I{ROOT / 'device'}", str(SOURCE), "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return output


def run(program: Path, num_requests: int) -> subprocess.CompletedProcess[str]:
    options = f"halt_on_error=1 exitcode={RACE_STATUS}"
    environment = {
        **os.environ,
        "TSAN_OPTIONS": options,
        "ASAN_OPTIONS": "detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # TSan's shadow memory and address randomisation do not go together on recent kernels.
    command = ["setarch", os.uname().machine, "-R", str(program), str(num_requests)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)


@pytest.mark.parametrize(
    ("sanitizer", "extra", "num_requests"),
    [
        ("thread", [], 2000),
        ("address", [], 2000),
        ("undefined", ["-fno-sanitize-recover=all"], 2000),
        ("thread", LANES, 100),
        ("address", LANES, 100),
    ],
    ids=["thread", "address", "undefined", "thread-lanes", "address-lanes"],
)
def test_director_and_ingresses_are_clean(tmp_path: Path, sanitizer: str, extra: list[str], num_requests: int) -> None:
    """Two ingresses and the director, small rings and few pages. The program itself checks every completion."""
    program = build(tmp_path, "stress", [f"-fsanitize={sanitizer}", *extra])
    result = run(program, num_requests)
    # The 2,000 requests of the long runs must meet preemptions and stalls; 100, on slow lanes, may happen to miss one of them.
    allowed = (0,) if num_requests >= 2000 else (0, NEITHER_PREEMPTED_NOR_STALLED)
    assert result.returncode in allowed, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("plant", "reader"),
    [
        ("SUBMISSION_COMMIT", "fetch_entry"),
        ("COMPLETION_COMMIT", "IngressPort::poll"),
        ("CONSUMER_POS", "publish_completions"),
    ],
)
def test_a_planted_missing_release_is_caught(tmp_path: Path, plant: str, reader: str) -> None:
    """One release store weakened to relaxed: the accesses that it ordered are reported as a race."""
    program = build(tmp_path, "planted", ["-fsanitize=thread", f"-DBK_PLANT_{plant}"])
    result = run(program, 2000)
    assert result.returncode == RACE_STATUS, f"no race was reported: {result.stdout}{result.stderr}"
    assert "data race" in result.stderr and reader in result.stderr


def test_planted_missing_lane_syncs_are_caught(tmp_path: Path) -> None:
    """The threads that stand for a warp's lanes see what a missing __syncwarp would do."""
    program = build(tmp_path, "planted", ["-fsanitize=thread", "-DBK_PLANT_NO_SYNC", *LANES])
    result = run(program, 100)
    assert result.returncode == RACE_STATUS and "data race" in result.stderr, result.stdout + result.stderr
