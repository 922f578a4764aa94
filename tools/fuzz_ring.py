"""Writes right, half-right and wrong entries straight into submission rings, and holds every answer against what ring_abi.h says.

    python tools/fuzz_ring.py [--inputs 120000] [--seed N] [--out FILE.json]

    engine   the emulated device of a running engine, over shared memory. A client on another queue pair and the good requests between the
             wrong ones must get the right tokens.
    hostile  the same engine; bytes of committed entries, bodies, positions, epochs and heartbeats change under the director's eyes. What is
             answered does not matter, the engine and the other client do.
    rig      the director alone, step by step: as it is, on four lanes as a warp, and with AddressSanitizer and UBSan. Every invariant is
             checked after every step.

Fails on the first wrong answer, crash, fault, sanitizer report, or page that is not free or cached at the end.
Test: pytest tests/host/test_fuzz_ring.py (a slice)
"""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fuzz_command import fuzz_parser, run_fuzzer  # noqa: E402  (the path above comes first)

from blinkimp import ring_abi as abi  # noqa: E402  (the path above comes first)
from blinkimp.host.shared_memory import Region, open_queue_pair  # noqa: E402
from tests.host.director_rig import VOCAB, Shape, build_harness, plain_sampler  # noqa: E402
from tests.host.engine_support import (  # noqa: E402
    TINY_POSITIONS,
    TINY_VOCAB,
    HostProcess,
    PortClient,
    assert_all_pages_are_back,
    make_tiny_checkpoint,
    wait_for,
)
from tests.host.intake_oracle import EngineLimits  # noqa: E402
from tests.host.py_ingress import PyIngress  # noqa: E402
from tests.host.ring_fuzzer import RingFuzzer  # noqa: E402
from tests.host.sampling_rig import NUM_SLOTS, SLOT_BYTES, SamplingRig  # noqa: E402
from tests.support import python_path  # noqa: E402

NUM_PROMPTS = 24
NUM_EXPECTED = 4  # output tokens that a good prompt's answer is known for
BATCH = 24  # entries written between two looks at the answers
QUIET_S = 60.0  # within which an engine must come to rest
SHARES = {"engine": 0.5, "rig sanitized": 0.3, "rig single": 0.15, "rig lanes": 0.05}  # of the inputs
HOSTILE_SHARE = 0.15  # on top
SANITIZERS = ("libasan.so", "libubsan.so")

Counts = collections.Counter[str]


class SharedIngress(PyIngress):
    """The ingress end of a running engine's queue pair: the same words, in its shared memory."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self.region = np.frombuffer(region.buffer, np.uint8)
        self.words = self.region[: abi.QUEUE_PAIR.itemsize].view(abi.QUEUE_PAIR)[0]
        header = self.words["header"]
        self.num_submissions, self.num_completions = int(header["num_submissions"]), int(header["num_completions"])
        self.arena_bytes = int(header["arena_bytes"])
        begin = int(header["submissions_offset"])
        self.submissions = self.region[begin : begin + 64 * self.num_submissions].view(abi.SUBMISSION_ENTRY)
        begin = int(header["completions_offset"])
        self.completions = self.region[begin : begin + 32 * self.num_completions].view(abi.COMPLETION_ENTRY)
        begin = int(header["arena_offset"])
        self.arena = self.region[begin : begin + self.arena_bytes]
        self.num_cached_tokens = {}
        self.epoch = self.producer_pos = self.arena_pos = self.consumer_pos = 0

    def attach(self) -> None:
        self.ask_attach()
        wait_for(self.finish_attach, QUIET_S, "the director answers an attach")


def prompts_of(rng: random.Random, vocab: int) -> list[list[int]]:
    """Some of them begin alike for more than a page, so that they meet in the prefix cache."""
    shared = [rng.randrange(3, vocab) for _ in range(70)]
    return [
        (shared if idx % 3 == 0 else []) + [rng.randrange(3, vocab) for _ in range(rng.randint(1, 90))]
        for idx in range(NUM_PROMPTS)
    ]


# ---- Director in this process ----------------------------------------------------------------------------------------
def fuzz_rig(kind: str, num_inputs: int, seed: int) -> Counts:
    """kind: as director_rig.library() has it."""
    rng = random.Random(seed)
    shape = Shape(num_pages=40, num_requests=32, num_submissions=64, num_completions=256, prefix_cache=True)
    rig = SamplingRig(shape, kind)
    rig.attach_all()
    limits = EngineLimits(
        shape.arena_bytes, shape.num_completions, VOCAB, shape.max_context, shape.num_pages, NUM_SLOTS, SLOT_BYTES
    )
    fuzzer = RingFuzzer(rig.ingresses[0], limits, rng, [(prompt, None) for prompt in prompts_of(rng, VOCAB)])
    num_idle_steps = 0
    while fuzzer.num_entries < num_inputs or not fuzzer.is_idle:
        if fuzzer.num_entries < num_inputs:
            fuzzer.write(min(BATCH, num_inputs - fuzzer.num_entries))
        rig.step(plain_sampler)
        num_idle_steps = 0 if fuzzer.read() else num_idle_steps + 1
        if num_idle_steps > 10_000:
            raise SystemExit(f"seed {seed}: the director takes nothing and says nothing: {rig.queue_pair(0)}")
    num_free, num_cached = rig.num_free_and_cached()
    if rig.live_requests() or num_free + num_cached != shape.num_pages:
        raise SystemExit(f"seed {seed}: {num_free} pages free, {num_cached} cached of {shape.num_pages}")
    return fuzzer.counts


def fuzz_rig_sanitized(num_inputs: int, seed: int) -> Counts:
    """The same in a process of its own, which has the sanitizers' runtimes in it from the start."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        for name in SANITIZERS
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "LD_PRELOAD": ":".join(found.stdout.strip() for found in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks on purpose at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    build_harness("sanitized")  # without those runtimes in the compiler
    command = [sys.executable, str(Path(__file__)), "--sanitized", str(num_inputs), "--seed", str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if result.returncode != 0:
        raise SystemExit(f"seed {seed}, with sanitizers: status {result.returncode}\n{result.stdout}{result.stderr}")
    return collections.Counter(json.loads(result.stdout.splitlines()[-1]))


# ---- A running engine ------------------------------------------------------------------------------------------------
class Neighbour:
    """A client on the other queue pair that keeps a few requests running and knows what they must say."""

    def __init__(self, engine_name: str, prompts: list[list[int]]) -> None:
        self.client = PortClient(engine_name, 1)
        self.num_done = 0
        self.prompts = prompts
        self.expected = [self.client.generate(prompt, NUM_EXPECTED).tokens for prompt in prompts]
        self._running: dict[int, int] = {}  # request id -> prompt

    def go_on(self) -> None:
        self.client.poll()
        for request_id, idx in list(self._running.items()):
            stream = self.client.streams[request_id]
            if stream.end is not None:
                if stream.tokens != self.expected[idx]:
                    raise SystemExit(f"the neighbour's request said {stream.tokens}, expected {self.expected[idx]}")
                del self._running[request_id], self.client.streams[request_id]
                self.num_done += 1
        while len(self._running) < 3:
            idx = self.num_done % len(self.prompts)
            self._running[self.client.submit(self.prompts[idx], NUM_EXPECTED)] = idx

    def finish(self) -> None:
        self.client.wait_all(QUIET_S)
        self.client.close()


def fuzz_engine(num_inputs: int, num_hostile: int, seed: int) -> tuple[Counts, dict[str, int]]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_checkpoint(Path(folder))
        shape: dict[str, Any] = {
            "num_pages": 64,
            "max_batch": 16,
            "max_step_tokens": 128,
            "num_requests": 64,
            "arena_bytes": 65536,
        }
        rings: dict[str, Any] = {
            "num_submissions": 64,
            "num_completions": 1024,
            "constraint_slots": 3,
            "constraint_slot_bytes": 4096,
        }
        with HostProcess(model, **shape, **rings, ingress_timeout_s=30.0, log_level="warning") as host:
            neighbour = Neighbour(host.engine_name, prompts_of(rng, TINY_VOCAB))
            region = open_queue_pair(host.engine_name, 0)
            ingress = SharedIngress(region)
            limits = EngineLimits(
                ingress.arena_bytes,
                ingress.num_completions,
                TINY_VOCAB,
                TINY_POSITIONS,
                shape["num_pages"],
                3,
                rings["constraint_slot_bytes"],
            )
            ingress.attach()
            known = list(zip(neighbour.prompts, neighbour.expected, strict=True))
            fuzzer = RingFuzzer(ingress, limits, rng, known)
            quiet_since = time.monotonic()
            while fuzzer.num_entries < num_inputs or not fuzzer.is_idle:
                num_written = fuzzer.write(min(BATCH, num_inputs - fuzzer.num_entries))
                num_read = fuzzer.read()
                neighbour.go_on()
                ingress.beat()
                if num_written or num_read:
                    quiet_since = time.monotonic()
                elif time.monotonic() - quiet_since > QUIET_S:
                    raise SystemExit(f"seed {seed}: the engine takes nothing and says nothing for {QUIET_S} s")
            counts = fuzzer.counts
            _be_hostile(ingress, limits, rng, num_hostile, neighbour, counts)
            ingress.detach()
            neighbour.finish()
            counts["neighbour's requests, right output"] = neighbour.num_done
            wait_for(lambda: _is_idle(host.status()), QUIET_S, "the engine is idle")
            num_checks = host.status()["integrity_checks"]
            wait_for(lambda: host.status()["integrity_checks"] > num_checks, QUIET_S, "the idle engine checks itself")
            status = host.status()
            assert_all_pages_are_back(status)
            if host.process.poll() is not None or status["state"] != abi.EngineState.RUNNING:
                raise SystemExit(f"seed {seed}: the engine has ended: {host.process.communicate()}")
            region.close()
    names = (
        "num_pages",
        "num_pages_free",
        "num_pages_cached",
        "requests_accepted",
        "requests_rejected",
        "integrity_checks",
    )
    return counts, {name: status[name] for name in names}


def _is_idle(status: dict[str, int]) -> bool:
    return status["num_running"] + status["num_waiting"] + status["num_finishing"] + status["num_pages_used"] == 0


def _be_hostile(
    ingress: SharedIngress,
    limits: EngineLimits,
    rng: random.Random,
    num_inputs: int,
    neighbour: Neighbour,
    counts: Counts,
) -> None:
    """Entries as before, and everything that an ingress can write changes under the director's eyes. Nothing is expected of the answers."""
    known = list(zip(neighbour.prompts, neighbour.expected, strict=True))
    line = ingress.words["ingress"]
    num_left = num_inputs
    while num_left > 0:
        ingress.attach()
        fuzzer = RingFuzzer(ingress, limits, rng, known)
        for _ in range(40):
            num_written = fuzzer.write(min(BATCH, num_left))
            num_left -= num_written
            for _ in range(rng.randrange(6)):
                where = rng.choice((ingress.arena, ingress.submissions.view(np.uint8)))
                where[rng.randrange(len(where))] = rng.randrange(256)
            match rng.randrange(12):
                case 0:
                    line["completion_consumer_pos"] = rng.choice(
                        (0, 1 << 63, (1 << 64) - 1, ingress.consumer_pos + rng.randrange(4096))
                    )
                case 1:
                    line["heartbeat_ns"] = rng.getrandbits(64)
                case 2:
                    line["submission_producer_pos"] = rng.getrandbits(64)
                case 3:
                    line["epoch"] = ingress.epoch + rng.choice((1, 2, 3, 1000, 1 << 40, 1 << 63))
                case 4:
                    line["owner_pid"] = rng.getrandbits(64)
                case 5:
                    ingress.completions.view(np.uint8)[rng.randrange(32 * ingress.num_completions)] ^= 0xFF
                case _:
                    line["completion_consumer_pos"] = int(ingress.words["director"]["completion_producer_pos"])
            neighbour.go_on()
            ingress.beat()
            if num_left <= 0:
                break
        counts["entry hostile"] += fuzzer.num_entries
        counts["hostile attaches"] += 1


# ---- All -------------------------------------------------------------------------------------------------------------
def run(num_inputs: int, seed: int, parts: tuple[str, ...] = tuple(SHARES)) -> dict[str, Any]:
    """Returns what --out writes."""
    started = time.monotonic()
    result: dict[str, Any] = {"inputs": 0, "seed": seed}
    for part in parts:
        share = round(num_inputs * SHARES[part])
        if part == "engine":
            num_hostile = round(num_inputs * HOSTILE_SHARE)
            counts, result["pages"] = fuzz_engine(share, num_hostile, seed)
        elif part == "rig sanitized":
            counts = fuzz_rig_sanitized(share, seed)
        else:
            counts = fuzz_rig(part.removeprefix("rig "), share, seed)
        result[part] = dict(sorted(counts.items()))
        result["inputs"] += sum(count for name, count in counts.items() if name.startswith("entry "))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def main() -> None:
    parser = fuzz_parser(__doc__, 120_000)
    parser.add_argument(
        "--sanitized", type=int, metavar="N", help="what the part `rig sanitized` calls, under LD_PRELOAD"
    )
    arguments = parser.parse_args()
    if arguments.sanitized is not None:
        print(json.dumps(fuzz_rig("sanitized", arguments.sanitized, arguments.seed)))
        return
    run_fuzzer(arguments, run)


if __name__ == "__main__":
    main()
