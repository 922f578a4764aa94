"""Runs a model program step by step on the CPU interpreter, without director, rings or processes: for tests and measurements.

    runner = ReferenceRunner(model, num_workers=2)
    result = runner.step([Chunk(request_idx=0, tokens=prompt, sample="last")])    # result.logits, result.tokens, result.logprobs

A served model runs through the emulated device instead, which calls the same interpreter. Memory starts poisoned with NaN, so an
interpreter that reads what nothing wrote shows it. Test: pytest tests/host/test_reference_ops.py tests/host/test_families.py
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from blinkimp import native
from blinkimp.host.program import Model
from blinkimp.host.weights import aligned_empty
from blinkimp.ring_abi import (
    DIRECTOR_STATE_BYTES,
    ENGINE_PAGE,
    ENGINE_PARAMS,
    NO_ROW,
    NUM_WORKSPACES,
    PAGE_TOKENS,
    PLAN_ROW,
    PLAN_SEQ,
    REQUEST_BYTES,
    SAMPLE_RESULT,
    STEP_PLAN,
    BufferId,
    DType,
)

POISON: Final = 0xFF  # a byte that makes NaN of fp32 and of bf16 alike


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load()
    library.bk_reference_workspace_bytes.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.bk_reference_workspace_bytes.restype = ctypes.c_uint64
    library.bk_reference_check.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64]
    library.bk_reference_check.restype = ctypes.c_int
    library.bk_reference_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.bk_reference_run.restype = None
    library.bk_reference_time.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    library.bk_reference_time.restype = ctypes.c_uint64
    library.bk_reference_kernels.argtypes = []
    library.bk_reference_kernels.restype = ctypes.c_char_p
    library.bk_reference_select_kernels.argtypes = [ctypes.c_char_p]
    library.bk_reference_select_kernels.restype = ctypes.c_int
    return library


def workspace_bytes(params: NDArray[np.void], workspace_idx: int) -> int:
    """Bytes of EngineParams.workspaces[workspace_idx] that the CPU interpreter needs; 0 = unused. params: [1] ENGINE_PARAMS."""
    return int(_library().bk_reference_workspace_bytes(params.ctypes.data, workspace_idx))


def check_program(params: NDArray[np.void]) -> None:
    """Raises ValueError if the CPU interpreter cannot run params.ops. params: [1] ENGINE_PARAMS."""
    message = ctypes.create_string_buffer(256)
    if _library().bk_reference_check(params.ctypes.data, message, len(message)):
        raise ValueError(f"the CPU interpreter cannot run this program: {message.value.decode()}")


def kernels_in_use() -> str:
    """Which instruction set the inner loops use: avx512, avx2 or baseline."""
    return str(_library().bk_reference_kernels().decode())


def select_kernels(name: str) -> bool:
    """Chooses "auto", "avx512", "avx2" or "baseline"; False if this machine cannot run it."""
    return bool(_library().bk_reference_select_kernels(name.encode()))


@dataclass(frozen=True)
class Chunk:
    """One request's rows of a step. They continue at the request's length unless position_begin says otherwise."""

    request_idx: int
    tokens: Sequence[int]
    sample: Literal["all", "last", "none"] = "last"
    position_begin: int | None = None


@dataclass(frozen=True)
class StepResult:
    """Of the sampled rows, in the order of the chunks."""

    logits: NDArray[np.float32]  # [num_sample_rows, vocab]
    tokens: NDArray[np.uint32]  # [num_sample_rows]
    logprobs: NDArray[np.float32]  # [num_sample_rows]


class ReferenceRunner:
    """EngineParams with memory for the CPU interpreter, and a planner that does what it is told."""

    def __init__(
        self,
        model: Model,
        *,
        num_workers: int = 2,
        num_requests: int = 4,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        num_pages: int | None = None,
        page_seed: int = 0,
    ) -> None:
        self.model = model
        self.lengths = [0] * num_requests  # KV entries of each request
        self._memory: list[NDArray[Any]] = []
        self.params = np.zeros(1, ENGINE_PARAMS)
        params = self.params[0]
        max_pages = -(-model.max_context // PAGE_TOKENS)
        num_pages = num_pages if num_pages is not None else num_requests * max_pages
        params["num_requests"], params["max_batch"], params["max_step_tokens"] = (
            num_requests,
            max_batch,
            max_step_tokens,
        )
        params["max_context"], params["max_pages_per_request"] = model.max_context, max_pages
        params["num_pages"], params["num_ops"], params["num_workers"] = num_pages, len(model.ops), num_workers
        params["dims"], params["ops"] = model.dims[0], model.ops.ctypes.data
        self._page_tables = self._allocate("page_tables", num_requests * max_pages * 4).view(np.uint32)
        self._page_tables = self._page_tables.reshape(num_requests, max_pages)
        self._num_pages = [0] * num_requests
        # Pages are dealt in a shuffled order: an interpreter that takes them to be contiguous fails.
        self._free_pages = [int(page) for page in np.random.default_rng(page_seed).permutation(num_pages)]
        self._requests = self._allocate("requests", num_requests * REQUEST_BYTES, 0).reshape(
            num_requests, REQUEST_BYTES
        )
        self._allocate("director_state", DIRECTOR_STATE_BYTES, 0)
        self._engine_page = self._allocate("engine_page", ENGINE_PAGE.itemsize, 0).view(ENGINE_PAGE)
        self._sampled = self._allocate("sampled", 2 * max_batch * SAMPLE_RESULT.itemsize).view(SAMPLE_RESULT)
        dims = model.config
        element_bytes = 2 if int(model.dims[0]["kv_dtype"]) == DType.BF16 else 4
        page_bytes = dims.num_layers * dims.num_kv_heads * 2 * PAGE_TOKENS * dims.head_dim * element_bytes
        self.kv_cache = self._allocate("kv_cache", num_pages * page_bytes)
        self.workspaces = [self._allocate_workspace(idx) for idx in range(NUM_WORKSPACES)]
        plan_bytes = STEP_PLAN.itemsize + max_batch * (PLAN_SEQ.itemsize + 4) + max_step_tokens * PLAN_ROW.itemsize
        self._plan = aligned_empty((plan_bytes,), np.uint8)
        check_program(self.params)

    def step(self, chunks: Sequence[Chunk], output_idx: int = 0) -> StepResult:
        num_sample_rows = self.plan(chunks, output_idx)
        _library().bk_reference_run(self.params.ctypes.data, self._plan.ctypes.data)
        fault = self._engine_page[0]["fault"]
        if fault["code"]:
            raise RuntimeError(
                f"the interpreter stopped: fault {fault['code']} at op {fault['expected']}, kind {fault['seen']}"
            )
        for chunk in chunks:
            if chunk.position_begin is None:
                self.lengths[chunk.request_idx] += len(chunk.tokens)
        sampled = self._sampled[:num_sample_rows].copy()
        logits = self.buffer(BufferId.LOGITS, self.model.config.vocab)[:num_sample_rows].copy()
        return StepResult(logits, sampled["token"], sampled["logprob"])

    def time_step(self, chunks: Sequence[Chunk], num_runs: int) -> int:
        """ns of the step, run num_runs times in a row. The requests' lengths stay."""
        self.plan(chunks)
        return int(_library().bk_reference_time(self.params.ctypes.data, self._plan.ctypes.data, num_runs))

    def buffer(self, buffer_id: BufferId, num_features: int) -> NDArray[np.float32]:
        """A workspace as [rows, num_features] f32."""
        return self.workspaces[buffer_id].view(np.float32).reshape(-1, num_features)

    def plan(self, chunks: Sequence[Chunk], output_idx: int = 0) -> int:
        """Writes the StepPlan of these chunks; returns the number of sampled rows."""
        max_batch, max_rows = int(self.params[0]["max_batch"]), int(self.params[0]["max_step_tokens"])
        num_rows = sum(len(chunk.tokens) for chunk in chunks)
        if len(chunks) > max_batch or num_rows > max_rows:
            raise ValueError(
                f"a step of {len(chunks)} chunks and {num_rows} rows, expected at most {max_batch} and {max_rows}"
            )
        self._plan[:] = POISON
        header = self._plan[: STEP_PLAN.itemsize].view(STEP_PLAN)
        seqs, rows, sampled_rows = self._plan_arrays(max_batch, max_rows)
        row_idx = num_samples = longest = 0
        for seq_idx, chunk in enumerate(chunks):
            begin = self.lengths[chunk.request_idx] if chunk.position_begin is None else chunk.position_begin
            end = begin + len(chunk.tokens)
            self._reserve_pages(chunk.request_idx, end)
            longest = max(longest, end)
            seqs[seq_idx] = (chunk.request_idx, row_idx, len(chunk.tokens), begin, NO_ROW, output_idx, 0, 0)
            for position, token in enumerate(chunk.tokens, begin):
                wanted = chunk.sample == "all" or (chunk.sample == "last" and position == end - 1)
                rows[row_idx] = (token, position, seq_idx, num_samples if wanted else NO_ROW)
                if wanted:
                    if num_samples == max_batch:
                        raise ValueError(f"more sampled rows than max_batch ({max_batch})")
                    sampled_rows[num_samples] = row_idx
                    seqs[seq_idx]["sample_row"] = num_samples
                    num_samples += 1
                row_idx += 1
        header[0] = np.zeros((), STEP_PLAN)
        header["num_rows"], header["num_seqs"], header["num_sample_rows"] = row_idx, len(chunks), num_samples
        header["max_kv_tokens"] = longest
        return num_samples

    def _plan_arrays(
        self, max_batch: int, max_rows: int
    ) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint32]]:
        seqs_begin = STEP_PLAN.itemsize
        rows_begin = seqs_begin + max_batch * PLAN_SEQ.itemsize
        sampled_begin = rows_begin + max_rows * PLAN_ROW.itemsize
        return (
            self._plan[seqs_begin:rows_begin].view(PLAN_SEQ),
            self._plan[rows_begin:sampled_begin].view(PLAN_ROW),
            self._plan[sampled_begin:].view(np.uint32),
        )

    def _reserve_pages(self, request_idx: int, num_tokens: int) -> None:
        if num_tokens > self.model.max_context:
            raise ValueError(f"request {request_idx} of {num_tokens} tokens, expected at most {self.model.max_context}")
        while self._num_pages[request_idx] * PAGE_TOKENS < num_tokens:
            if not self._free_pages:
                raise ValueError(
                    f"no free KV page of {int(self.params[0]['num_pages'])}: give the runner more num_pages"
                )
            self._page_tables[request_idx, self._num_pages[request_idx]] = self._free_pages.pop()
            self._num_pages[request_idx] += 1

    def _allocate_workspace(self, idx: int) -> NDArray[np.uint8]:
        memory = self._poisoned(workspace_bytes(self.params, idx), POISON)
        self.params[0]["workspaces"][idx] = memory.ctypes.data if memory.nbytes else 0
        return memory

    def _allocate(self, member: str, num_bytes: int, fill: int = POISON) -> NDArray[np.uint8]:
        memory = self._poisoned(num_bytes, fill)
        self.params[0][member] = memory.ctypes.data
        return memory

    def _poisoned(self, num_bytes: int, fill: int) -> NDArray[np.uint8]:
        memory = aligned_empty((num_bytes,), np.uint8)
        memory[:] = fill
        self._memory.append(memory)
        return memory
