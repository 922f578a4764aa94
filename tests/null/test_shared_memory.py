"""Creation, opening and ownership of an engine's shared memory. Test: pytest tests/null/test_shared_memory.py"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host import engine_lock, shared_room
from blinkimp.host import shared_memory as shm

SMALL = shm.QueuePairGeometry(num_submissions=16, num_completions=64, arena_bytes=4096)


@pytest.fixture
def engine_name() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    for path in shm.SHM_DIR.glob(f"blinkimp.{name}.*"):
        path.unlink()
        pytest.fail(f"{path} was left behind")


def create(name: str, num_queue_pairs: int = 2, geometry: shm.QueuePairGeometry = SMALL) -> shm.EngineRegions:
    return shm.create_engine_regions(
        name, num_queue_pairs=num_queue_pairs, geometry=geometry, max_context=256, vocab_size=100, max_requests=7
    )


@pytest.mark.parametrize("scarce", ["memory", "/dev/shm"])
def test_nothing_is_created_unless_all_of_it_fits(
    engine_name: str, scarce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3. What there is is made up, and a byte short of two queue pairs."""
    have = {"memory": 1 << 60, "/dev/shm": 1 << 60} | {scarce: 2 * SMALL.region_bytes - 1}
    created: list[str] = []
    monkeypatch.setattr(shared_room, "host_memory_available_bytes", lambda: have["memory"])
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=have["/dev/shm"], f_frsize=1))
    monkeypatch.setattr(shm, "create_region", lambda name, *_: created.append(name))
    with pytest.raises(shm.SharedMemoryError, match=f"needs .*2 queue pairs .*{scarce}.*lower num_queue_pairs"):
        create(engine_name)
    assert not created


def test_header_says_what_the_geometry_is(engine_name: str) -> None:
    regions = create(engine_name)
    with shm.open_queue_pair(engine_name, 1) as region:
        header = np.frombuffer(region.buffer, dtype=abi.QUEUE_PAIR_HEADER, count=1)[0].copy()
        assert header["magic"] == abi.QUEUE_PAIR_MAGIC
        assert header["queue_pair_idx"] == 1
        assert header["engine_id"] == regions.engine_id
        assert header["max_context"] == 256 and header["vocab_size"] == 100 and header["max_requests"] == 7
        ends = [
            (abi.QUEUE_PAIR.itemsize, SMALL.submissions_offset),
            (SMALL.submissions_offset + 16 * 64, SMALL.completions_offset),
            (SMALL.completions_offset + 64 * 32, SMALL.arena_offset),
            (SMALL.arena_offset + 4096, SMALL.region_bytes),
        ]
        assert all(end <= begin for end, begin in ends)
        assert region.buffer[512:].tobytes() == bytes(region.region_bytes - 512), "everything past the header is zero"
    regions.unlink()


def test_both_maps_see_the_same_bytes_and_addresses_are_of_the_map(engine_name: str) -> None:
    regions = create(engine_name)
    with shm.open_queue_pair(engine_name, 0) as region:
        region.buffer[300] = 77
        assert regions.queue_pairs[0].buffer[300] == 77
        assert ctypes.c_uint8.from_address(region.address + 300).value == 77
    regions.unlink()


def test_regions_are_private_to_the_user(engine_name: str) -> None:
    regions = create(engine_name)
    for path in shm.SHM_DIR.glob(f"blinkimp.{engine_name}.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    path = shm.SHM_DIR / shm.queue_pair_name(engine_name, 0)
    path.chmod(0o666)
    with pytest.raises(shm.SharedMemoryError, match="expected owner"):
        shm.open_queue_pair(engine_name, 0)
    regions.unlink()


def test_symbolic_link_is_refused(engine_name: str) -> None:
    regions = create(engine_name, 1)
    link = shm.SHM_DIR / shm.queue_pair_name(engine_name, 7)
    link.symlink_to(shm.SHM_DIR / shm.queue_pair_name(engine_name, 0))
    with pytest.raises(shm.SharedMemoryError, match="cannot open"):
        shm.open_queue_pair(engine_name, 7)
    regions.unlink()


# engine_id, max_context, vocab_size and max_requests may have any value.
FIXED_MEMBERS = ["magic", "abi_version", "header_bytes", "region_bytes", "submission_entry_bytes", "num_submissions",
                 "completion_entry_bytes", "num_completions", "arena_bytes", "submissions_offset", "completions_offset",
                 "arena_offset", "queue_pair_idx"]  # fmt: skip


@pytest.mark.parametrize("member", FIXED_MEMBERS)
def test_every_header_word_that_a_stranger_changed_is_noticed(engine_name: str, member: str) -> None:
    regions = create(engine_name)
    header = regions.queue_pairs[0].view(abi.QUEUE_PAIR_HEADER)
    header[member] += 1
    del header
    with pytest.raises(shm.SharedMemoryError, match="expected"):
        shm.open_queue_pair(engine_name, 0)
    regions.unlink()


def test_truncated_region_is_refused(engine_name: str) -> None:
    regions = create(engine_name)
    path = shm.SHM_DIR / shm.queue_pair_name(engine_name, 0)
    os.truncate(path, 100)
    with pytest.raises(shm.SharedMemoryError, match="100 bytes"):
        shm.open_queue_pair(engine_name, 0)
    regions.unlink()


def test_engine_that_does_not_exist_says_so(engine_name: str) -> None:
    with pytest.raises(shm.EngineNotFoundError, match="blinkimp serve"):
        shm.open_queue_pair(engine_name, 0)
    with pytest.raises(shm.EngineNotFoundError):
        shm.open_engine_page(engine_name)
    assert not shm.engine_is_alive(engine_name)


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 65, "a b", "ü"])
def test_engine_names_that_are_paths_are_refused(name: str) -> None:
    with pytest.raises(shm.SharedMemoryError, match="engine name"):
        create(name)


def test_live_engine_is_refused_and_untouched(engine_name: str) -> None:
    regions = create(engine_name)
    assert shm.engine_is_alive(engine_name)
    with pytest.raises(shm.EngineAlreadyRunningError, match=str(os.getpid())):
        create(engine_name)
    with shm.open_engine_page(engine_name) as page:
        assert page.view(abi.ENGINE_HEADER)["engine_id"][0] == regions.engine_id
    regions.unlink()
    assert not shm.engine_is_alive(engine_name)


def test_regions_of_a_killed_engine_are_replaced(engine_name: str) -> None:
    script = (
        "import sys, time; from blinkimp.host import shared_memory as shm\n"
        "r = shm.create_engine_regions(sys.argv[1], num_queue_pairs=3, max_context=1, vocab_size=1,"
        " geometry=shm.QueuePairGeometry(16, 64, 4096))\n"
        "print(r.engine_id, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, engine_name], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        dead_engine_id = int(host.stdout.readline())
        assert shm.engine_is_alive(engine_name)
        old = shm.open_queue_pair(engine_name, 2)  # an ingress that is still attached keeps its map
        os.kill(host.pid, signal.SIGKILL)
    assert not shm.engine_is_alive(engine_name)
    regions = create(engine_name, 1)
    assert regions.engine_id != dead_engine_id
    with pytest.raises(shm.EngineNotFoundError):
        shm.open_queue_pair(engine_name, 2)
    assert old.view(abi.QUEUE_PAIR_HEADER)["engine_id"][0] == dead_engine_id
    old.close()
    regions.unlink()


def test_what_a_killed_engine_of_another_name_left_is_removed_and_the_living_are_not(engine_name: str) -> None:
    script = (
        "import sys, os; from blinkimp.host import shared_memory as shm\n"
        "shm.create_engine_regions(sys.argv[1], num_queue_pairs=2, max_context=1, vocab_size=1,"
        " geometry=shm.QueuePairGeometry(16, 64, 4096))\n"
        "os.kill(os.getpid(), 9)"
    )
    living = create(f"{engine_name}-living")
    killed = subprocess.run([sys.executable, "-c", script, f"{engine_name}-dead"], check=False)
    assert killed.returncode == -signal.SIGKILL  # after it had made its regions
    regions = create(engine_name)
    assert not list(shm.SHM_DIR.glob(f"blinkimp.{engine_name}-dead.*"))
    assert len(list(shm.SHM_DIR.glob(f"blinkimp.{engine_name}-living.*"))) == 5
    regions.unlink()
    living.unlink()


def test_somebody_who_only_looks_does_not_keep_an_engine_from_starting(engine_name: str) -> None:
    create(engine_name).unlink()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            shm.engine_is_alive(engine_name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(200):
            create(engine_name).unlink()
    finally:
        stop.set()
        thread.join()


def test_somebody_who_is_held_up_while_he_looks_is_taken_for_no_engine(
    engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test's: each nap of the starter takes a second, and the look ends with the third."""
    looker = os.open(shm.SHM_DIR / f"blinkimp.{engine_name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(looker, fcntl.LOCK_SH)
    naps_s: list[float] = []

    def nap(duration_s: float) -> None:
        naps_s.append(duration_s)
        if len(naps_s) == 3:
            os.close(looker)

    monkeypatch.setattr(engine_lock, "time", SimpleNamespace(monotonic=lambda: float(len(naps_s)), sleep=nap))
    create(engine_name).unlink()
    assert len(naps_s) == 3


def test_one_of_many_starters_wins(engine_name: str) -> None:
    outcomes: list[shm.EngineRegions | shm.EngineAlreadyRunningError] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            outcomes.append(create(engine_name))
        except shm.EngineAlreadyRunningError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, shm.EngineRegions)]
    assert len(winners) == 1 and len(outcomes) == 8
    winners[0].unlink()


def test_full_memory_is_an_error_with_a_remedy_not_a_bus_error(
    engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever took it since it was looked at."""
    monkeypatch.setattr(shm, "_check_room", lambda *_: None)
    too_much = shm.QueuePairGeometry(num_submissions=16, num_completions=64, arena_bytes=1 << 50)
    with pytest.raises((shm.SharedMemoryError, OSError)) as caught:
        create(engine_name, geometry=too_much)
    assert "full" in str(caught.value) or "large" in str(caught.value)


@pytest.mark.parametrize("field", ["num_submissions", "num_completions", "arena_bytes"])
def test_counts_that_are_no_powers_of_two_are_refused(field: str) -> None:
    with pytest.raises(shm.SharedMemoryError, match="power of two"):
        shm.QueuePairGeometry(**{field: 5000})


def test_close_with_a_view_alive_does_not_invalidate_the_view(engine_name: str) -> None:
    regions = create(engine_name)
    region = shm.open_queue_pair(engine_name, 0)
    view = region.view(abi.QUEUE_PAIR_HEADER)
    region.close()
    region.close()
    assert view["magic"][0] == abi.QUEUE_PAIR_MAGIC
    regions.unlink()
