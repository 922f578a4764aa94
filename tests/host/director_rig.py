"""A director in this process, called step by step: EngineParams and queue pairs in numpy memory, and an ingress written in Python.

The ingress here is single-threaded and may misbehave on purpose (malformed entries, no reading, no heartbeat); the real one is
nic_shim/queue_pair.py. Two libraries run the same tests: "single" is what the emulated device runs, "lanes" runs every call on four lanes,
each a thread, as a warp does (tests/host/lanes/lanes.cuh). A third, "sanitized", has AddressSanitizer and UBSan in it, for processes that
preload their runtimes (tools/fuzz_ring.py).
Used by tests/host/test_director_*.py, test_ring_director.py. Longer than 400 lines because the rig and its ingress share one memory map.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blinkimp import native
from blinkimp import ring_abi as abi
from blinkimp.host.trace_memory import TraceGeometry
from tests.host.py_ingress import Completion, PyIngress, address_of
from tests.support import ROOT

EOS_ID = 2
VOCAB = 512
NUM_PRIOR_OUTPUTS_AT = 300  # byte in a Request
HARNESS_FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
KIND_FLAGS = {
    "lanes": [
        "-DBK_TEST_LANES",
        f"-I{ROOT / 'tests/host/lanes'}",
    ],  # before device/: its lanes.cuh is the one to be found
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
}
Sampler = Callable[[int, int], int]  # (request id, output position) -> token


@functools.cache
def library(kind: str) -> ctypes.CDLL:
    """kind: "single", or one of KIND_FLAGS."""
    opened = native.load() if kind == "single" else ctypes.CDLL(str(build_harness(kind)))
    params, plan = ctypes.c_void_p, ctypes.c_void_p
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    out = ctypes.c_void_p
    for name, result, arguments in (
        ("num_lanes", u32, []),
        ("plan_bytes", u64, [params]),
        ("prefix_cache_bytes", u64, [params]),
        ("init", None, [params]),
        ("poll", None, [params]),
        ("plan", u32, [params, plan]),
        ("plan_ahead", u32, [params, plan]),
        ("every_seq_was_stopped", u32, [params, plan]),
        ("note_arrival", None, [params, u64]),
        ("start_next", None, [params, u64]),
        ("note_start", None, [params, u64]),
        ("commit", None, [params, plan]),
        ("publish", None, [params]),
        ("wait", None, [params, u64]),
        ("check_integrity", u32, [params]),
        ("age_heartbeat", None, [params, u32, u64]),
        ("age_integrity", None, [params, u64]),
        ("age_request", None, [params, u32, u64]),
        ("running", u32, [params, out]),
        ("request", None, [params, u32, out]),
        ("queue_pair", None, [params, u32, out]),
        ("pages", None, [params, out]),
        ("damage", None, [params, u32, u32, u32]),
    ):
        function = getattr(opened, f"bk_director_{name}")
        function.restype = result
        function.argtypes = arguments
    return opened


def build_harness(kind: str) -> Path:
    """The harness alone, with KIND_FLAGS. Built once per change of the sources."""
    output = ROOT / "build" / "tests" / f"director_{kind}.so"
    sources = [*(ROOT / "device").glob("*.cuh"), *(ROOT / "device").glob("*.h"), ROOT / "tests/host/lanes/lanes.cuh"]
    harness = ROOT / "device" / "emu" / "director_harness.cpp"
    newest = max(path.stat().st_mtime for path in [*sources, harness])
    if not output.exists() or output.stat().st_mtime < newest:
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_suffix(f".{os.getpid()}.tmp")
        command = ["g++", *HARNESS_FLAGS, *KIND_FLAGS[kind], f"-I{ROOT / 'device'}", str(harness), "-o", str(fresh)]
        subprocess.run(command, check=True)
        fresh.replace(output)
    return output


class RequestView(NamedTuple):
    state: int
    flags: int
    queue_pair_idx: int
    request_id: int
    num_prompt_tokens: int
    max_tokens: int
    num_tokens: int
    num_computed: int
    num_pages: int
    finish_reason: int
    num_preemptions: int


class QueuePairView(NamedTuple):
    epoch: int
    submission_consumer_pos: int
    arena_consumer_pos: int
    published_pos: int
    consumer_pos: int
    num_staged: int
    num_promised: int
    num_waiting: int
    num_running: int
    num_finishing: int
    credit: int
    has_entry: int
    num_staged_in_all: int


class PlannedSeq(NamedTuple):
    request_id: int
    num_rows: int
    position_begin: int
    samples: bool
    output_idx: int


@dataclass(frozen=True)
class Shape:
    """What a test chooses of EngineParams and of the queue pairs."""

    num_queue_pairs: int = 1
    num_requests: int = 64
    max_requests_per_queue_pair: int = 64
    max_batch: int = 8
    max_step_tokens: int = 64
    prefill_chunk_tokens: int = 32
    max_context: int = 1024
    num_pages: int = 64
    num_submissions: int = 16
    num_completions: int = 64
    arena_bytes: int = 16384
    eos_ids: tuple[int, ...] = (EOS_ID,)
    ingress_timeout_ns: int = 3_600_000_000_000  # a test that wants a stale heartbeat ages it
    trace_events: int = 0  # 0: no trace
    prefix_cache: bool = False  # a test that counts pages means each request's own
    cost_rows: int = 0  # step_costs is then abi.MAX_STEP_COSTS long
    step_costs: tuple[int, ...] = ()


class MemoryRegion:
    """A trace outside of /dev/shm: what TraceReader asks of a host.shared_memory.Region."""

    def __init__(self, geometry: TraceGeometry) -> None:
        self._memory = np.zeros(geometry.region_bytes, np.uint8)
        self._memory[: abi.TRACE_HEADER.itemsize] = geometry.header(1, 1).view(np.uint8)
        self.buffer = memoryview(self._memory.data)
        self.address = address_of(self._memory)

    def view(self, dtype: np.dtype[Any], offset_bytes: int = 0) -> NDArray[Any]:
        return np.frombuffer(self.buffer, dtype, 1, offset_bytes)

    def close(self) -> None:
        self.buffer.release()


@dataclass
class Rig:
    """The engine's memory, the director's calls, and one PyIngress for each queue pair."""

    shape: Shape
    kind: str = "single"
    ingresses: list[PyIngress] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        self.native = library(self.kind)
        self.ingresses = [
            PyIngress(q, shape.num_submissions, shape.num_completions, shape.arena_bytes)
            for q in range(shape.num_queue_pairs)
        ]
        pages_per_request = -(-shape.max_context // abi.PAGE_TOKENS)
        self.params = np.zeros(1, abi.ENGINE_PARAMS)
        params = self.params[0]
        for name in (
            "num_queue_pairs", "num_requests", "max_requests_per_queue_pair", "max_batch", "max_step_tokens",
            "prefill_chunk_tokens", "max_context", "num_pages", "ingress_timeout_ns",
        ):  # fmt: skip
            params[name] = getattr(shape, name)
        params["max_pages_per_request"] = pages_per_request
        params["cost_rows"] = shape.cost_rows
        params["step_costs"][: len(shape.step_costs)] = shape.step_costs
        params["num_workers"] = 1
        params["idle_sleep_ns"] = 1000
        params["dims"]["vocab"] = VOCAB
        params["dims"]["num_eos_ids"] = len(shape.eos_ids)
        params["dims"]["eos_ids"][: len(shape.eos_ids)] = shape.eos_ids
        self.engine_page = np.zeros(1, abi.ENGINE_PAGE)
        self.engine_page[0]["header"]["engine_id"] = 0x1234_5678_9ABC
        self.director_state = np.zeros(abi.DIRECTOR_STATE_BYTES // 8, np.uint64)
        self.requests = np.zeros(abi.REQUEST_BYTES * shape.num_requests // 8, np.uint64)
        self.tokens = np.zeros((shape.num_requests, shape.max_context), np.uint32)
        self.page_tables = np.zeros((shape.num_requests, pages_per_request), np.uint32)
        self.free_pages = np.zeros(shape.num_pages, np.uint32)
        self.page_owners = np.zeros(shape.num_pages, np.uint32)
        self.num_fresh = 0  # sequences so far that read pages filled in the same step
        self.sampled = np.zeros((2, shape.max_batch), abi.SAMPLE_RESULT)
        for name, array in (
            ("engine_page", self.engine_page), ("director_state", self.director_state), ("requests", self.requests),
            ("tokens", self.tokens), ("page_tables", self.page_tables), ("free_pages", self.free_pages),
            ("page_owners", self.page_owners), ("sampled", self.sampled),
        ):  # fmt: skip
            params[name] = address_of(array)
        for q, ingress in enumerate(self.ingresses):
            params["queue_pairs"][q] = address_of(ingress.region)
            ingress.words["header"]["max_requests"] = shape.max_requests_per_queue_pair
        if shape.prefix_cache:
            params["prefix_cache_enabled"] = 1
            cache_bytes = int(self.native.bk_director_prefix_cache_bytes(address_of(self.params)))
            self.prefix_cache = np.zeros(cache_bytes // 8 + 1, np.uint64)
            params["prefix_cache"] = address_of(self.prefix_cache)
        if shape.trace_events:
            self.trace = MemoryRegion(TraceGeometry(shape.trace_events))
            params["trace"] = self.trace.address
        self.address = address_of(self.params)
        plan_bytes = int(self.native.bk_director_plan_bytes(self.address))
        self.plans = [np.zeros(plan_bytes, np.uint8) for _ in range(2)]
        for i, plan in enumerate(self.plans):
            params["plans"][i] = address_of(plan)
        self.plan_memory = self.plans[0]  # of the step in flight
        self.num_commits = 0  # the number of that step
        self.in_flight = False
        self.next_started = False
        self.samples_of_step: dict[int, list[tuple[int, int]]] = {}  # (request id, output position) of each sampled row
        self.native.bk_director_init(self.address)
        self.check()

    # ---- Calls ---------------------------------------------------------------------------------------------------
    def poll(self) -> None:
        self.native.bk_director_poll(self.address)

    def plan(self) -> list[PlannedSeq]:
        """The planned sequences; every word of the plan is checked against the request table."""
        self.plan_memory = self.plans[self.num_commits & 1]
        num_rows = int(self.native.bk_director_plan(self.address, address_of(self.plan_memory)))
        assert num_rows == self.plan_memory[:64].view(abi.STEP_PLAN)[0]["num_rows"]
        self.in_flight = num_rows > 0
        return self.read_plan(self.plan_memory)

    def plan_ahead(self) -> tuple[list[PlannedSeq], bool]:
        """The step after the one in flight, and whether it should wait for the commit."""
        plan_memory = self.plans[(self.num_commits + 1) & 1]
        answer = int(self.native.bk_director_plan_ahead(self.address, address_of(plan_memory)))
        return (self.read_plan(plan_memory), answer == 2) if answer else ([], False)

    def plan_rows(self, plan_memory: NDArray[np.uint8]) -> NDArray[np.void]:
        header = plan_memory[:64].view(abi.STEP_PLAN)[0]
        begin = 64 + self.shape.max_batch * abi.PLAN_SEQ.itemsize
        rows: NDArray[np.void] = plan_memory[begin : begin + int(header["num_rows"]) * abi.PLAN_ROW.itemsize].view(
            abi.PLAN_ROW
        )
        return rows

    def every_seq_was_stopped(self) -> bool:
        plan_memory = self.plans[(self.num_commits + 1) & 1]
        return bool(self.native.bk_director_every_seq_was_stopped(self.address, address_of(plan_memory)))

    def start_next(self, arrived_ns: int = 0, start_ns: int = 0) -> None:
        self.native.bk_director_note_arrival(self.address, arrived_ns)
        self.native.bk_director_start_next(self.address, start_ns)
        self.next_started = True

    def read_plan(self, plan_memory: NDArray[np.uint8]) -> list[PlannedSeq]:
        header = plan_memory[:64].view(abi.STEP_PLAN)[0]
        step, num_rows = int(header["step"]), int(header["num_rows"])
        num_seqs, num_sample_rows = int(header["num_seqs"]), int(header["num_sample_rows"])
        assert num_rows <= self.shape.max_step_tokens
        seqs_end = 64 + self.shape.max_batch * abi.PLAN_SEQ.itemsize
        rows_end = seqs_end + self.shape.max_step_tokens * abi.PLAN_ROW.itemsize
        seqs = plan_memory[64:seqs_end].view(abi.PLAN_SEQ)[:num_seqs]
        rows = plan_memory[seqs_end:rows_end].view(abi.PLAN_ROW)[:num_rows]
        sampled_rows = plan_memory[rows_end:].view(np.uint32)[:num_sample_rows]
        self.check_fresh_prefixes(seqs)
        planned, row, sample_row, longest = [], 0, 0, 0
        sample_of: list[tuple[int, int]] = []
        for seq_idx, seq in enumerate(seqs):
            request_idx, begin, count = int(seq["request_idx"]), int(seq["position_begin"]), int(seq["num_rows"])
            request = self.request(request_idx)
            assert int(seq["row_begin"]) == row and count >= 1, "rows are packed"
            assert begin == request.num_computed and begin + count <= request.num_tokens
            assert request.num_pages * abi.PAGE_TOKENS >= begin + count, "S3: pages for every row"
            samples = begin + count == request.num_tokens
            assert int(seq["sample_row"]) == (sample_row if samples else abi.NO_ROW)
            own = rows[row : row + count]
            if int(own["token"][0]) & abi.TOKEN_PENDING:  # what the step before samples for it
                assert count == 1 and begin >= request.num_prompt_tokens
                sampled_in = self.samples_of_step[step - 1][int(own["token"][0]) & ~abi.TOKEN_PENDING]
                assert sampled_in == (request.request_id, int(seq["output_idx"]) - 1)
            else:
                assert np.array_equal(own["token"], self.tokens[request_idx, begin : begin + count])
            assert np.array_equal(own["position"], np.arange(begin, begin + count))
            assert (own["seq_idx"] == seq_idx).all() and (own["sample_row"][:-1] == abi.NO_ROW).all()
            assert own["sample_row"][-1] == seq["sample_row"]
            if samples:
                assert sampled_rows[sample_row] == row + count - 1
                sample_of.append((request.request_id, int(seq["output_idx"])))
                sample_row += 1
            word = (request_idx * abi.REQUEST_BYTES + NUM_PRIOR_OUTPUTS_AT) // 4
            num_prior_outputs = int(self.requests.view(np.uint32)[word])
            assert int(seq["output_idx"]) == request.num_tokens - request.num_prompt_tokens + num_prior_outputs
            planned.append(PlannedSeq(request.request_id, count, begin, samples, int(seq["output_idx"])))
            row += count
            longest = max(longest, begin + count)
        assert row == num_rows and sample_row == num_sample_rows and int(header["max_kv_tokens"]) == longest
        self.samples_of_step[step] = sample_of
        return planned

    def check_fresh_prefixes(self, seqs: NDArray[np.void]) -> None:
        """F2: who reads pages that others fill in this step says so, and nobody who begins at 0."""
        writers: dict[int, set[int]] = {}
        for seq_idx, seq in enumerate(seqs):
            begin, end = int(seq["position_begin"]), int(seq["position_begin"] + seq["num_rows"])
            for page in self.page_tables[
                int(seq["request_idx"]), begin // abi.PAGE_TOKENS : -(-end // abi.PAGE_TOKENS)
            ]:
                writers.setdefault(int(page), set()).add(seq_idx)
        for seq_idx, seq in enumerate(seqs):
            prefix = self.page_tables[int(seq["request_idx"]), : int(seq["position_begin"]) // abi.PAGE_TOKENS]
            is_fresh = any(writers.get(int(page), set()) - {seq_idx} for page in prefix)
            assert int(seq["prefix_is_fresh"]) >= is_fresh, f"sequence {seq_idx} reads pages that this step fills"
            assert not (seq["prefix_is_fresh"] and seq["position_begin"] == 0)
            self.num_fresh += is_fresh

    def commit(self, sampler: Sampler) -> None:
        self.run_workers(sampler)
        self.native.bk_director_commit(self.address, address_of(self.plan_memory))
        self.samples_of_step.pop(self.num_commits - 1, None)
        self.num_commits += 1
        self.in_flight, self.next_started = self.next_started, False
        self.plan_memory = self.plans[self.num_commits & 1]

    def run_workers(self, sampler: Sampler) -> None:
        """The step in flight."""
        for sample_row, (request_id, output_idx) in enumerate(self.samples_of_step[self.num_commits]):
            self.sampled[self.num_commits & 1, sample_row] = (sampler(request_id, output_idx), -0.5)

    def publish(self) -> None:
        self.native.bk_director_publish(self.address)

    def wait(self, timeout_ns: int) -> None:
        self.native.bk_director_wait(self.address, timeout_ns)

    def step(self, sampler: Sampler) -> int:
        """One turn of the emulated device's loop. Returns the rows."""
        self.poll()
        planned = self.plan()
        if planned:
            self.commit(sampler)
        self.publish()
        self.check()
        return sum(seq.num_rows for seq in planned)

    def attach_all(self) -> None:
        for ingress in self.ingresses:
            ingress.ask_attach()
        self.poll()
        assert all(ingress.finish_attach() for ingress in self.ingresses)

    # ---- Looks ---------------------------------------------------------------------------------------------------
    def engine_status(self, name: str) -> int:
        return int(self.engine_page[0]["status"][name])

    def request(self, request_idx: int) -> RequestView:
        out = np.zeros(len(RequestView._fields), np.uint64)
        self.native.bk_director_request(self.address, request_idx, address_of(out))
        return RequestView(*(int(value) for value in out))

    def live_requests(self) -> dict[tuple[int, int], RequestView]:
        """By (queue pair, request id)."""
        views = (self.request(request_idx) for request_idx in range(self.shape.num_requests))
        return {(view.queue_pair_idx, view.request_id): view for view in views if view.state != 0}

    def queue_pair(self, queue_pair_idx: int) -> QueuePairView:
        out = np.zeros(len(QueuePairView._fields), np.uint64)
        self.native.bk_director_queue_pair(self.address, queue_pair_idx, address_of(out))
        return QueuePairView(*(int(value) for value in out))

    def num_free_and_cached(self) -> tuple[int, int]:
        out = np.zeros(2, np.uint64)
        self.native.bk_director_pages(self.address, address_of(out))
        return int(out[0]), int(out[1])

    def running(self) -> list[int]:
        out = np.zeros(self.shape.max_batch, np.uint32)
        count = int(self.native.bk_director_running(self.address, address_of(out)))
        return [self.request(int(request_idx)).request_id for request_idx in out[:count]]

    def fault(self) -> dict[str, int]:
        record = self.engine_page[0]["fault"]
        return {name: int(record[name]) for name in ("code", "site", "expected", "seen", "step")}

    def check(self) -> None:
        """Every invariant of the director, as the director itself checks them."""
        assert self.native.bk_director_check_integrity(self.address) == 1, f"integrity fault: {self.fault()}"
        assert self.fault()["code"] == abi.FAULT_NONE, self.fault()

    def age_heartbeat(self, queue_pair_idx: int, age_ns: int) -> None:
        self.native.bk_director_age_heartbeat(self.address, queue_pair_idx, age_ns)

    def age_request(self, queue_pair_idx: int, request_id: int, age_ns: int) -> None:
        for request_idx in range(self.shape.num_requests):
            view = self.request(request_idx)
            if view.state != 0 and (view.queue_pair_idx, view.request_id) == (queue_pair_idx, request_id):
                self.native.bk_director_age_request(self.address, request_idx, age_ns)

    def tune(self, **words: int) -> None:
        """max_running, step_tokens, prefill_chunk_tokens, aging_ms; what is not named is as launched."""
        control = self.engine_page[0]["control"]
        for name in ("max_running", "step_tokens", "prefill_chunk_tokens", "aging_ms"):
            control[name] = words.get(name, 0)
        control["tuning_generation"] += 1

    def command(self, command: int) -> None:
        self.engine_page[0]["control"]["command"] = command


def outputs(completions: Iterable[Completion], request_id: int) -> list[int]:
    """The tokens of one request, with their positions checked."""
    tokens = [entry for entry in completions if entry.kind == abi.COMPLETION_TOKEN and entry.request_id == request_id]
    assert [entry.output_idx for entry in tokens] == list(range(len(tokens))), "K1: each position once, in order"
    return [entry.token for entry in tokens]


def plain_sampler(request_id: int, output_idx: int) -> int:
    """Never EOS; the same token for the same position, however often it is asked."""
    return 100 + (request_id * 7 + output_idx * 13) % 300
