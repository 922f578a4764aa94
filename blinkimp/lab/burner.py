"""Interference as a process group of its own: threads of one kind of work on given CPUs, until it is told to stop.

    with Interference("stream", num_threads=16, cpus={2, 3}) as burner: ...      in the lab
    burner.units_per_s                                                           by kind, once it has ended or rests
    python -m blinkimp.lab.burner stream 16 2,3      the process itself; counts at each line of its stdin, and ends with it

Kinds are the loops of burn_loops.py, and real programs: bz2 (compression, one stream a thread), compile (g++ of a generated file, over and over),
stress-ng where it is installed. `stream+bz2` is a mixture: threads take turns. Called by blinkimp/lab/burner_pool.py.
Test: pytest tests/host/test_lab_burners.py
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from blinkimp.bench.errors import LoadError

LOOPS: Final = ("arithmetic", "stream", "llc", "tlb", "syscall")  # of burn_loops.py, which takes a second to import
PROGRAMS: Final = ("bz2", "compile", "stress-ng")
KINDS: Final = (*LOOPS, *PROGRAMS)
START_TIMEOUT_S: Final = 120.0  # numba compiles
COMPILER_TIMEOUT_S: Final = 5.0  # of one that a thread began at the last moment
STOP_TIMEOUT_S: Final = 10.0
BZ2_BLOCK_BYTES: Final = 900_000


def missing_program(kind: str) -> str | None:
    """Why a kind or a mixture cannot run here, or None."""
    programs = {"compile": "g++", "stress-ng": "stress-ng"}
    for part in kind.split("+"):
        if part in programs and shutil.which(programs[part]) is None:
            return f"{programs[part]} is not installed"
    return None


def is_kind(text: str) -> bool:
    """One of KINDS, or several joined by `+`; stress-ng is a mixture already and stands alone."""
    parts = text.split("+")
    return set(parts) <= set(KINDS) and (len(parts) == 1 or "stress-ng" not in parts)


# ---- The process -----------------------------------------------------------------------------------------------------
class Counter:
    """Units of work of one thread; its only writer."""

    def __init__(self, kind: str) -> None:
        self.kind, self.units = kind, 0
        self.is_prepared = threading.Event()


def loop_worker(kind: str, idx: int, num_threads: int) -> Callable[[], int]:
    from blinkimp.lab.burn_loops import Work

    return Work(kind, idx, num_threads).step


@functools.cache
def digits() -> bytes:
    """A block for bzip2: made once, for a hundred threads would make theirs one after the other."""
    words = random.Random(0)
    return " ".join(str(words.randrange(10**6)) for _ in range(BZ2_BLOCK_BYTES // 6)).encode()[:BZ2_BLOCK_BYTES]


def bz2_worker(idx: int) -> Callable[[], int]:
    begin = idx * 9973 % len(digits())
    block = digits()[begin:] + digits()[:begin]  # memory of its own, and no two threads in step

    def step() -> int:
        bz2.compress(block, 9)  # releases the GIL
        return len(block)

    return step


SOURCE: Final = """\
#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <vector>
template <int N> struct Chain { static std::tuple<int, std::string, double> make(int x) {
  std::map<std::string, std::vector<int>> m; m[std::to_string(x)].push_back(N);
  auto rest = Chain<N - 1>::make(x + 1); std::get<0>(rest) += static_cast<int>(m.size()); return rest; } };
template <> struct Chain<0> { static std::tuple<int, std::string, double> make(int x) { return {x, std::to_string(x), 0.5 * x}; } };
int main(int argc, char**) { auto t = Chain<60>::make(argc); return std::get<0>(t) & 1; }
"""


def compile_worker(folder: Path, idx: int) -> Callable[[], int]:
    source = folder / f"unit{idx}.cpp"
    source.write_text(SOURCE)

    def step() -> int:
        command = ["g++", "-O2", "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return 1

    return step


def stress_ng_worker(num_threads: int) -> Callable[[], int]:
    half = max(1, num_threads // 2)

    def step() -> int:
        command = [
            "stress-ng",
            "--cpu",
            str(half),
            "--vm",
            str(half),
            "--vm-bytes",
            "128M",
            "--timeout",
            "5",
            "--quiet",
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return 5 * num_threads

    return step


def run_process(kind: str, num_threads: int, cpus: set[int]) -> None:
    """Prints `ready` when every thread works, and the units done at each line of its stdin; ends with that: prints them and kills its group."""
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)  # run by hand: the group that is killed at the end must not be the shell's
    os.sched_setaffinity(0, cpus)
    parts = kind.split("+")
    # Of compilers alone: kinds that may rest are killed while they do, and would leave it behind.
    folder = Path(tempfile.mkdtemp(prefix="blinkimp-burner-")) if "compile" in parts else None

    def make(idx: int, part: str) -> Callable[[], int]:
        if part in LOOPS:
            return loop_worker(part, idx, num_threads)
        if part == "bz2":
            return bz2_worker(idx)
        return stress_ng_worker(num_threads) if folder is None else compile_worker(folder, idx)

    counters = [Counter(parts[idx % len(parts)]) for idx in range(1 if kind == "stress-ng" else num_threads)]
    for part in parts:
        if part in LOOPS:
            make(0, part)()  # compiled once, before the threads
        elif part == "bz2":
            digits()

    ends = threading.Event()
    go = threading.Event()  # none begins before all are prepared: those that burn would keep the others from it

    def work(idx: int, counter: Counter) -> None:
        step = make(idx, counter.kind)
        if counter.kind in LOOPS:
            step()  # touches its buffers: from `ready` on the work is what its name says
        counter.is_prepared.set()
        go.wait()
        while not ends.is_set():
            counter.units += step()

    threads = [threading.Thread(target=work, args=(idx, counter), daemon=True) for idx, counter in enumerate(counters)]
    for thread in threads:
        thread.start()
    for counter in counters:
        counter.is_prepared.wait()

    def tell() -> None:
        units = {part: sum(counter.units for counter in counters if counter.kind == part) for part in parts}
        print(json.dumps({"units": units, "at_s": time.monotonic()}), flush=True)

    go.set()
    print("ready", flush=True)
    for _ in sys.stdin:
        tell()
    tell()
    if folder is not None:
        # Compilers end, and none begins, before their folder is gone: they would say so.
        ends.set()
        threading.excepthook = lambda _: None  # of the threads that waited for them
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + COMPILER_TIMEOUT_S
        for thread, counter in zip(threads, counters, strict=True):
            if counter.kind == "compile":
                thread.join(max(0.0, deadline - time.monotonic()))
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # compilers and their children, and this process


# ---- Its owner -------------------------------------------------------------------------------------------------------
class Interference:
    """Runs while inside `with`; num_threads 0 is none at all. In between it may rest(): stopped, it takes nothing but memory.
    The thread that begins it must live as long: with that its process dies (host/child_process.py)."""

    def __init__(self, kind: str, num_threads: int, cpus: set[int]) -> None:
        if not is_kind(kind) or num_threads < 0 or not cpus:
            raise LoadError(
                f"interference: got kind {kind!r}, {num_threads} threads, CPUs {sorted(cpus)}; expected one of {', '.join(KINDS)} "
                "(or several joined by +, without stress-ng), 0 or more, at least one"
            )
        if num_threads and (why := missing_program(kind)) is not None:
            raise LoadError(f"interference {kind}: {why}; install it, or leave the kind out")
        self.kind, self.num_threads, self.cpus = kind, num_threads, cpus
        self.units_per_s: dict[str, float] | None = None  # by kind, since it began or went on
        self._units = dict.fromkeys(kind.split("+"), 0)  # when it began or went on, at
        self._began_s = 0.0
        self._is_resting = False
        self._process: subprocess.Popen[str] | None = None

    @property
    def can_rest(self) -> bool:
        """A compiler's children would be stopped with a file half read."""
        return self.num_threads > 0 and set(self.kind.split("+")) <= {*LOOPS, "bz2"}

    def __enter__(self) -> Self:
        if not self.num_threads:
            return self
        cpus = ",".join(map(str, sorted(self.cpus)))
        # One that is stopped does not see its stdin end.
        command = [sys.executable, "-P", "-m", "blinkimp.host.child_process", str(os.getpid()), "blinkimp.lab.burner"]
        command += [self.kind, str(self.num_threads), cpus]
        # A group of its own, so that killing it takes the compilers along.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._expect("`ready`", lambda said: said == "ready")
        self._began_s = time.monotonic()
        return self

    def rest(self) -> None:
        """Every thread is stopped when this returns."""
        assert self._process is not None and self.can_rest and not self._is_resting
        self._count_since(self._ask())
        os.killpg(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._is_resting = True

    def go_on(self) -> None:
        assert self._process is not None and self._is_resting
        os.killpg(self._process.pid, signal.SIGCONT)
        self._is_resting = False
        self._began_s = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        try:
            if not self._is_resting:
                said, _ = self._process.communicate(timeout=STOP_TIMEOUT_S)  # closes its stdin
                self._count_since(json.loads(said))
        except (subprocess.TimeoutExpired, ValueError):
            pass  # what it did is not known
        self._end()

    def _count_since(self, now: dict[str, Any]) -> None:
        """now: as run_process() tells it; its clock is this process's, too."""
        seconds = max(now["at_s"] - self._began_s, 1e-9)
        self.units_per_s = {part: (units - self._units[part]) / seconds for part, units in now["units"].items()}
        self._units = now["units"]

    def _ask(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it says nothing, which is explained
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return dict(json.loads(self._expect("its counts", lambda said: said.startswith("{"))))

    def _expect(self, what: str, is_it: Callable[[str], bool]) -> str:
        """The next line of the process."""
        assert self._process is not None and self._process.stdout is not None
        killer = threading.Timer(START_TIMEOUT_S, self._kill)
        killer.start()
        try:
            said = self._process.stdout.readline().strip()
        finally:
            killer.cancel()
        if not is_it(said):
            self._end()
            self._process = None
            raise LoadError(
                f"interference {self.kind}: got {said!r} from its process, expected {what} within {START_TIMEOUT_S:g} s; its messages stand above"
            )
        return said

    def _end(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:  # else its number may be another's by now
            self._kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a line that it did not take
                    pipe.close()

    def _kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


if __name__ == "__main__":
    run_process(sys.argv[1], int(sys.argv[2]), {int(cpu) for cpu in sys.argv[3].split(",")})
