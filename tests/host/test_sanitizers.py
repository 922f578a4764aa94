"""Both ends of the ring under ThreadSanitizer, AddressSanitizer and UBSan; and proof that a missing release is found.

Each case runs a build of tests/host/stress/ring_stress.cpp with flags of its own; all are built first, on every CPU.
Run: pytest tests/host/test_sanitizers.py
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCE = ROOT / "tests" / "host" / "stress" / "ring_stress.cpp"
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer", "-pthread"]
# The folder before device/: its lanes.cuh is the one to be found.
LANES = ["-DBK_TEST_LANES", f"-I{ROOT / 'tests' / 'host' / 'lanes'}"]
BUILDS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "thread-lanes": ["-fsanitize=thread", *LANES],
    "address-lanes": ["-fsanitize=address", *LANES],
    # One release store weakened to relaxed; or no __syncwarp.
    "planted-submission": ["-fsanitize=thread", "-DBK_PLANT_SUBMISSION_COMMIT"],
    "planted-completion": ["-fsanitize=thread", "-DBK_PLANT_COMPLETION_COMMIT"],
    "planted-consumer": ["-fsanitize=thread", "-DBK_PLANT_CONSUMER_POS"],
    "planted-lanes": ["-fsanitize=thread", "-DBK_PLANT_NO_SYNC", *LANES],
}
RACE_STATUS = 66
NEITHER_PREEMPTED_NOR_STALLED = 3  # the program's status when a run was clean but missed preemptions or credit stalls
# Not a bound on speed: a run takes seconds, and minutes mean that it hangs.
HANG_TIMEOUT_S = 600


def build(directory: Path, name: str) -> Path:
    output = directory / name
    command = ["g++", *FLAGS, *BUILDS[name], f"-I{ROOT / 'device'}", str(SOURCE), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """The builds that the chosen tests of this file want."""
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    directory = tmp_path_factory.mktemp("stress")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(build, directory, name) for item in items for name in [item.callspec.params["name"]]}


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
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_TIMEOUT_S, env=environment)


@pytest.mark.parametrize(
    ("name", "num_requests"),
    [("thread", 2000), ("address", 2000), ("undefined", 2000), ("thread-lanes", 100), ("address-lanes", 100)],
)
def test_director_and_ingresses_are_clean(programs: dict[str, Future[Path]], name: str, num_requests: int) -> None:
    """Two ingresses and the director, small rings and few pages. The program itself checks every completion."""
    result = run(programs[name].result(), num_requests)
    # The 2,000 requests of the long runs must meet preemptions and stalls; 100, on slow lanes, may happen to miss one of them.
    allowed = (0,) if num_requests >= 2000 else (0, NEITHER_PREEMPTED_NOR_STALLED)
    assert result.returncode in allowed, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("planted-submission", "fetch_entry"),
        ("planted-completion", "IngressPort::poll"),
        ("planted-consumer", "publish_completions"),
    ],
)
def test_a_planted_missing_release_is_caught(programs: dict[str, Future[Path]], name: str, reader: str) -> None:
    """The accesses that the release ordered are reported as a race."""
    result = run(programs[name].result(), 2000)
    assert result.returncode == RACE_STATUS, f"no race was reported: {result.stdout}{result.stderr}"
    assert "data race" in result.stderr and reader in result.stderr


@pytest.mark.parametrize("name", ["planted-lanes"])
def test_planted_missing_lane_syncs_are_caught(programs: dict[str, Future[Path]], name: str) -> None:
    """The threads that stand for a warp's lanes see what a missing __syncwarp would do."""
    result = run(programs[name].result(), 100)
    assert result.returncode == RACE_STATUS and "data race" in result.stderr, result.stdout + result.stderr
