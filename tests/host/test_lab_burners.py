"""blinkimp/lab/burner.py, blinkimp/lab/burner_pool.py and blinkimp/lab/burn_loops.py: each kind works, on its CPUs alone, rests when told to,
and is gone afterwards.

Run: pytest tests/host/test_lab_burners.py
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blinkimp.bench.errors import LoadError
from blinkimp.lab import burn_loops
from blinkimp.lab.burner import LOOPS, Interference, bz2_worker, missing_program
from blinkimp.lab.burner_pool import MAX_RESTING, Burners
from blinkimp.lab.host_monitor import PROC, process_counters, read_text, threads_of, tree_of
from tests.host.engine_support import wait_for
from tests.support import PATIENCE_S, python_path


@pytest.fixture(autouse=True)
def _python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())


def test_the_list_of_loops_is_that_of_the_loops() -> None:
    assert LOOPS == burn_loops.LOOPS


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and all that it has started."""
    return sum(counters.cpu_s for one in tree_of(pid) if (counters := process_counters(one)))


@pytest.mark.parametrize("kind", LOOPS)
def test_each_loop_does_some_of_its_work_in_a_short_time(kind: str) -> None:
    """A step is milliseconds long, so that its thread ends soon, and counts units."""
    work = burn_loops.Work(kind, 0, 4)
    work.step()  # compiled, and its buffers touched
    began = time.monotonic()
    assert work.step() > 0 and time.monotonic() - began < 5
    work.close()


def cpu_s_of_a_unit(kind: str) -> float:
    """A compiler's need not end."""
    if kind != "bz2":
        return 0.0
    step, before = bz2_worker(0), time.process_time()
    step()
    return time.process_time() - before


@pytest.mark.parametrize("kind", ["tlb", "bz2", "compile"])  # one of the loops, and the programs
def test_a_kind_uses_its_cpu_and_nothing_is_left_of_it(kind: str) -> None:
    assert missing_program(kind) is None  # the tests need a compiler anyway
    cpu = max(os.sched_getaffinity(0))
    with Interference(kind, 2, {cpu}) as burner:
        assert burner._process is not None
        pid = burner._process.pid
        assert os.sched_getaffinity(pid) == {cpu}
        # Enough for one of its two threads to have done a unit of its work, on a processor however slow.
        enough_s = max(0.5, 4 * cpu_s_of_a_unit(kind))
        before, deadline = cpu_s(pid), time.monotonic() + PATIENCE_S
        while cpu_s(pid) < before + enough_s and time.monotonic() < deadline:  # a compiler's time counts while it runs
            time.sleep(0.02)
            tree = tree_of(pid)
            has_compiled = kind != "compile" or any("cc1plus" in command for command in tree.values())
            if has_compiled and kind == "compile":
                break
        assert has_compiled and (kind == "compile" or cpu_s(pid) >= before + enough_s)
    assert burner.units_per_s is not None and (burner.units_per_s[kind] > 0 or kind == "compile")
    deadline = time.monotonic() + PATIENCE_S
    while any(one in tree_of(one) for one in tree) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [command for pid, command in tree_of(pid).items() if pid in tree]


def test_stress_ng_is_half_cpu_and_half_memory_and_ends_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in its place tells what it is asked for. With the real one: LAB.md."""
    stand_in, asked = tmp_path / "stress-ng", tmp_path / "asked"
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {asked}.new; mv {asked}.new {asked}; exec sleep 600\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert missing_program("stress-ng") is None
    with Interference("stress-ng", 6, os.sched_getaffinity(0)) as burner:
        assert burner._process is not None
        pid = burner._process.pid
        wait_for(asked.exists, PATIENCE_S, "it is started")
        assert asked.read_text().startswith("--cpu 3 --vm 3 --vm-bytes 128M ")
        tree: dict[int, str] = {}

        def sleeps() -> bool:
            tree.update(tree_of(pid))
            return any("sleep 600" in command for command in tree.values())

        wait_for(sleeps, PATIENCE_S, "it has become what it starts")
    wait_for(lambda: not any(Path(f"/proc/{one}").exists() for one in tree), PATIENCE_S, "all of it is gone")
    assert burner.units_per_s == {"stress-ng": 0.0}, "no run of it has ended"


def sources_compiled(pid: int) -> set[Path]:
    words = [word for command in tree_of(pid).values() for word in command.split()]
    return {Path(word) for word in words if word.startswith("/") and word.endswith(".cpp")}


def test_compilers_end_before_their_folder(capfd: pytest.CaptureFixture[str]) -> None:
    """In the middle of a unit, or between two: none says that its folder is gone, and the folder is."""
    sources: set[Path] = set()
    for _ in range(4):
        with Interference("compile", 8, os.sched_getaffinity(0)) as burner:
            assert burner._process is not None
            found = functools.partial(sources_compiled, burner._process.pid)
            wait_for(lambda found=found: len(found()) >= 2, PATIENCE_S, "some compile")
            sources |= found()
    assert sources and not any(source.parent.exists() for source in sources)
    assert capfd.readouterr().err == ""


def test_threads_of_a_mixture_take_turns() -> None:
    with Interference("arithmetic+syscall", 2, os.sched_getaffinity(0)) as burner:
        time.sleep(0.3)  # each step is some milliseconds
    assert burner.units_per_s is not None and set(burner.units_per_s) == {"arithmetic", "syscall"}
    for kind in ("arithmetic+noise", "stress-ng+bz2", ""):
        with pytest.raises(LoadError, match="joined by"):
            Interference(kind, 1, {0})


def test_no_threads_are_no_process() -> None:
    with Interference("stream", 0, {0}) as burner:
        assert burner._process is None
    assert burner.units_per_s is None


# ---- Rest ------------------------------------------------------------------------------------------------------------
def states_of(pid: int) -> set[str]:
    """Of all threads: T is stopped."""
    stats = [read_text(PROC / str(pid) / "task" / str(thread) / "stat") for thread in threads_of(pid)]
    return {stat.rpartition(")")[2].split()[0] for stat in stats if stat}


def test_what_rests_has_stopped_and_goes_on_where_it_was() -> None:
    with Burners() as burners:
        with burners.burning("arithmetic+bz2", 3, os.sched_getaffinity(0)) as burner:
            assert burner._process is not None
            pid = burner._process.pid
            began_s = cpu_s(pid)
            wait_for(lambda: cpu_s(pid) > began_s + 0.5, PATIENCE_S, "each thread has worked")
        assert states_of(pid) == {"T"} and len(threads_of(pid)) >= 4
        first, rested_s = burner.units_per_s, cpu_s(pid)
        assert first is not None and first["arithmetic"] > 0
        with burners.burning("arithmetic+bz2", 3, os.sched_getaffinity(0)) as again:
            assert again is burner
            wait_for(lambda: cpu_s(pid) > rested_s + 0.5, PATIENCE_S, "it works again")
        assert again.units_per_s is not None and again.units_per_s["arithmetic"] > 0
        assert states_of(pid) == {"T"}
    wait_for(lambda: not threads_of(pid), PATIENCE_S, "it is gone")


def test_counts_are_those_since_it_went_on() -> None:
    burner = Interference("syscall+bz2", 2, {0})
    burner._began_s = 5.0
    burner._count_since({"units": {"syscall": 600, "bz2": 60}, "at_s": 7.0})
    assert burner.units_per_s == {"syscall": 300, "bz2": 30}
    burner._began_s = 12.0
    burner._count_since({"units": {"syscall": 1000, "bz2": 60}, "at_s": 16.0})
    assert burner.units_per_s == {"syscall": 100, "bz2": 0}


def test_few_are_kept_and_none_of_those_that_cannot_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that rest are killed while they do: they must have nothing to leave behind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Burners() as burners:
        for num_threads in range(1, MAX_RESTING + 2):
            with burners.burning("syscall", num_threads, {0}):
                pass
        assert [number for _, number, _ in burners._resting] == list(range(2, MAX_RESTING + 2))
        with burners.burning("compile", 1, os.sched_getaffinity(0)) as compiler:
            assert compiler._process is not None
        assert compiler._process.returncode is not None and len(burners._resting) == MAX_RESTING
        with burners.burning("syscall", 0, {0}) as nothing:
            assert nothing._process is None
        kept = [burner._process for burner in burners._resting.values()]
    assert all(process is not None and process.returncode is not None for process in kept)
    assert not list(tmp_path.glob("blinkimp-*"))


def test_what_a_failed_cell_leaves_does_not_rest() -> None:
    with Burners() as burners:
        with pytest.raises(LoadError, match="a cell"), burners.burning("syscall", 1, os.sched_getaffinity(0)) as burner:
            raise LoadError("a cell")
        assert burner._process is not None and burner._process.returncode is not None and not burners._resting


OWNER = """
import os, time
from blinkimp.lab.burner_pool import Burners
with Burners() as burners:
    with burners.burning("syscall", 1, os.sched_getaffinity(0)) as burner:
        pass
    print(burner._process.pid, flush=True)
    time.sleep(600)
"""


def test_one_that_rests_ends_with_an_owner_that_was_killed() -> None:
    """Stopped, it cannot see that its stdin has ended."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert states_of(pid) == {"T"}
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: states_of(pid) <= {"Z"}, PATIENCE_S, "it is gone")


def test_a_process_that_ends_before_it_has_counted_is_explained() -> None:
    with (
        Burners() as burners,
        pytest.raises(LoadError, match="expected its counts"),
        burners.burning("syscall", 1, os.sched_getaffinity(0)) as burner,
    ):
        assert burner._process is not None
        os.killpg(burner._process.pid, signal.SIGKILL)


def test_a_cycle_visits_every_cache_line_once() -> None:
    links = burn_loops.random_cycle(64 * 1000, seed=1)
    at, seen = 0, set()
    for _ in range(1000):
        at = int(links[at])
        seen.add(at)
    assert seen == set(range(0, 8000, 8))


def test_a_process_that_ends_while_its_threads_are_counted_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: object = ".") -> None:
        raise ProcessLookupError(3, "No such process", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", gone)
        patch.setattr(os, "scandir", gone)
        counters = process_counters(os.getpid())
    assert counters is not None and counters.cpu_s > 0 and counters.switches == 0


def test_an_unknown_kind_and_a_missing_program_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="expected one of arithmetic"):
        Interference("noise", 1, {0})
    monkeypatch.setattr("blinkimp.lab.burner.shutil.which", lambda program: None)
    with pytest.raises(LoadError, match=r"stress-ng is not installed; install it"):
        Interference("stress-ng", 1, {0})
