"""Runs single steps of the persistent kernel without a director: the test writes the plan, the workers run the program, or a part of it.

    runner = StepRunner(folder)                              a checkpoint folder; weights packed and placed as in serving
    runner.run([Request(tokens, num_computed)], ops=...)     one launch: plan 0 is the step, plan 1 says exit
    runner.launch(runner.prepare(requests, ops=...))         the same in two, for who takes the time of the launch alone
    runner.workspace(...) / .logits(rows) / .sampled(num)    what the step left behind
Used by tests/gpu/test_gemm.py, tests/gpu/test_model_gpu.py, tools/bench_ops.py. Its own test: tests/null/test_step_runner.py
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from blinkimp import ring_abi as abi
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.gpu_driver import GpuContext
from blinkimp.host.gpu_kernel import (
    KERNEL_NAME,
    PACK_SOURCE,
    KernelKind,
    kernel_shape,
)
from blinkimp.host.gpu_memory import ATTENTION_COUNTERS, ROW_SCALES, allocate_engine, workspace_sizes
from blinkimp.host.gpu_weights import GpuTarget
from blinkimp.host.memory_plan import EngineSizes
from blinkimp.host.program import load_model
from tests.gpu.gpu_harness import device_kernel

PLAN_EXIT = 1

Pick = Callable[[NDArray[np.void]], NDArray[np.void]]


def write_checkpoint(
    folder: Path, config: dict[str, Any], rng: np.random.Generator, dtype: Any = np.float32
) -> dict[str, NDArray[Any]]:
    """A random checkpoint of a supported family: weights of unit gain, so that activations stay of order one. Returns the tensors."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", hidden // heads)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        return np.asarray(rng.standard_normal((rows, columns)) / np.sqrt(columns), dtype)

    def gain(size: int) -> NDArray[Any]:
        return np.asarray(1 + 0.1 * rng.standard_normal(size), dtype)

    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((vocab, hidden)).astype(dtype),
        "model.norm.weight": gain(hidden),
    }
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    biased = config["architectures"][0] == "Qwen2ForCausalLM"
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if biased:
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = (0.5 * rng.standard_normal(rows)).astype(dtype)
        if config["architectures"][0] == "Qwen3ForCausalLM":
            tensors[f"{prefix}.self_attn.q_norm.weight"] = gain(head_dim)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = gain(head_dim)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
        tensors[f"{prefix}.input_layernorm.weight"] = gain(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = gain(hidden)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def llama_config(**changes: Any) -> dict[str, Any]:
    """A small Llama with every part that a large one has."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1344, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip
    return config | changes


@dataclass
class Request:
    """One request's share of a step: rows [num_computed, len(tokens)) are computed, the last one is sampled."""

    tokens: NDArray[np.uint32]
    num_computed: int
    request_idx: int
    sample: bool = True
    output_idx: int = 0
    prefix_of: int | None = (
        None  # its first num_computed tokens are in this request's pages, which may be filled in this very step
    )

    @property
    def num_rows(self) -> int:
        return len(self.tokens) - self.num_computed


def in_steps(requests: list[Request], max_rows: int) -> Iterator[list[Request]]:
    """The requests in their order, in steps of at most max_rows rows; none has more by itself."""
    step: list[Request] = []
    for request in requests:
        if step and sum(other.num_rows for other in step) + request.num_rows > max_rows:
            yield step
            step = []
        step.append(request)
    if step:
        yield step


class StepRunner:
    """An engine's memory on the GPU and its kernel, driven step by step."""

    _program, _program_bytes = 0, 0  # where programs other than the model's are put, and how much fits there

    def __init__(
        self, folder: Path, *, max_step_tokens: int = 2048, max_batch: int = 256, num_requests: int = 256, max_context: int = 4096,
        num_pages: int = 256, load_format: Any = "auto", kernel: KernelKind = "hopper", num_workers: int = 0, cubin: bytes = b"",
    ) -> None:  # fmt: skip
        """num_workers: 0, all SMs but one. cubin: of the kernel, where it is compiled already."""
        self.context = GpuContext()
        self.config = read_model_config(folder)
        self.num_workers = num_workers or self.context.properties.num_multiprocessors - 1
        self.shape = kernel_shape(self.config, self.num_workers, kernel, self.context.properties.arch)
        self.cubin = cubin or device_kernel(self.shape.source, self.shape.defines())
        target = GpuTarget(self.context, self.config, device_kernel(PACK_SOURCE), self.num_workers)
        max_context = min(max_context, self.config.max_positions)
        self.model = load_model(folder, target, compute="bf16", max_context=max_context, load_format=load_format)
        target.finish()
        self.sizes = EngineSizes(
            num_queue_pairs=0, num_requests=num_requests, max_requests_per_queue_pair=num_requests, max_batch=max_batch,
            max_step_tokens=max_step_tokens, prefill_chunk_tokens=max_step_tokens, max_context=max_context,
            max_pages_per_request=-(-max_context // abi.PAGE_TOKENS), num_pages=num_pages,
        )  # fmt: skip
        self.params = allocate_engine(self.context, self.config, self.sizes, self.model.dims, self.model.ops)
        self.params["num_workers"] = self.num_workers
        self.params["spin_budget_ns"] = 2_000_000_000
        self.page = np.frombuffer(
            mmap.mmap(-1, mmap.PAGESIZE), np.uint8
        )  # the engine page: where a fault would be recorded
        self.params["engine_page"] = self.context.register_host(self.page.ctypes.data, self.page.nbytes)
        self.function = self.context.load_kernel(self.cubin, KERNEL_NAME, self.shape.shared_memory_bytes)
        self.page_tables = np.zeros((num_requests, self.sizes.max_pages_per_request), np.uint32)
        self.free_pages = list(np.random.default_rng(1).permutation(num_pages))  # scattered, as after hours of serving
        self.num_pages_of = np.zeros(num_requests, int)
        self.num_shared_of = np.zeros(num_requests, int)  # of them, those of others
        self.requests = np.zeros((num_requests, abi.REQUEST_BYTES), np.uint8)

    def close(self) -> None:
        self.context.close()

    def __enter__(self) -> StepRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def release(self, request_idx: int) -> None:
        """Gives a request's own pages back."""
        num_shared, num = self.num_shared_of[request_idx], self.num_pages_of[request_idx]
        self.free_pages.extend(self.page_tables[request_idx, num_shared:num])
        self.num_pages_of[request_idx] = self.num_shared_of[request_idx] = 0

    def plan(self, requests: list[Request]) -> NDArray[np.uint8]:
        """The bytes of a StepPlan and its arrays; pages are assigned on the way."""
        sizes = self.sizes
        num_wanted = sum(request.num_rows for request in requests)
        assert num_wanted <= sizes.max_step_tokens and len(requests) <= sizes.max_batch, (
            f"a step of {len(requests)} requests: got {num_wanted} rows, expected {sizes.max_step_tokens} at most, of {sizes.max_batch} requests at "
            "most; cut it with in_steps()"
        )
        header = np.zeros(1, abi.STEP_PLAN)
        seqs = np.zeros(sizes.max_batch, abi.PLAN_SEQ)
        rows = np.zeros(sizes.max_step_tokens, abi.PLAN_ROW)
        sampled = np.zeros(sizes.max_batch, np.uint32)
        num_rows = num_samples = 0
        for i, request in enumerate(requests):
            if request.prefix_of is not None:
                num_shared, left_over = divmod(request.num_computed, abi.PAGE_TOKENS)
                assert left_over == 0 and self.num_pages_of[request.request_idx] == 0, (
                    "full pages, of a request that has none"
                )
                self.page_tables[request.request_idx, :num_shared] = self.page_tables[request.prefix_of, :num_shared]
                self.num_pages_of[request.request_idx] = self.num_shared_of[request.request_idx] = num_shared
            while self.num_pages_of[request.request_idx] * abi.PAGE_TOKENS < len(request.tokens):
                self.page_tables[request.request_idx, self.num_pages_of[request.request_idx]] = self.free_pages.pop()
                self.num_pages_of[request.request_idx] += 1
            count = request.num_rows
            last = num_rows + count - 1
            sample_row = num_samples if request.sample else abi.NO_ROW
            is_fresh = request.prefix_of is not None
            seqs[i] = (
                request.request_idx,
                num_rows,
                count,
                request.num_computed,
                sample_row,
                request.output_idx,
                is_fresh,
                0,
            )
            block = rows[num_rows : num_rows + count]
            block["token"], block["position"] = (
                request.tokens[request.num_computed :],
                np.arange(request.num_computed, len(request.tokens)),
            )
            block["seq_idx"], block["sample_row"] = i, abi.NO_ROW
            if request.sample:
                rows[last]["sample_row"] = num_samples
                sampled[num_samples] = last
                num_samples += 1
            num_rows += count
        header["num_rows"], header["num_seqs"], header["num_sample_rows"] = num_rows, len(requests), num_samples
        header["max_kv_tokens"] = max(len(request.tokens) for request in requests)
        return np.concatenate([part.view(np.uint8).reshape(-1) for part in (header, seqs, rows, sampled)])

    def run(self, requests: list[Request], *, ops: Pick | None = None) -> None:
        """One step; without requests, none. `ops` makes the program that runs of the model's: a part of it, or longer than it."""
        self.launch(self.prepare(requests, ops=ops))

    def prepare(self, requests: list[Request], *, ops: Pick | None = None) -> NDArray[np.void]:
        """[1] ENGINE_PARAMS of a launch: plans and program are on the GPU. They stay until the next call, whatever was launched."""
        params, context = self.params.copy(), self.context
        if ops is not None:
            params["ops"], params["num_ops"] = self._place_program(ops(self.model.ops))
        exit_plan = np.zeros(1, abi.STEP_PLAN)
        exit_plan["flags"] = PLAN_EXIT
        context.upload(int(params["plans"][0, 0]), self.plan(requests) if requests else exit_plan)
        context.upload(int(params["plans"][0, 1]), exit_plan)
        context.upload(int(params["page_tables"][0]), self.page_tables)
        context.upload(int(params["requests"][0]), self.requests)
        return params

    def _place_program(self, program: NDArray[np.void]) -> tuple[int, int]:
        """(address, number of ops): never over the model's own, which has room for itself alone."""
        assert len(program), "a program: got no ops, expected at least one; an empty one would run what lies behind it"
        if program.nbytes > self._program_bytes:
            if self._program_bytes:
                self.context.free(self._program)
            self._program = self.context.allocate(program.nbytes, f"a program of {len(program)} ops")
            self._program_bytes = program.nbytes
        self.context.upload(self._program, program)
        return self._program, len(program)

    def launch(self, params: NDArray[np.void]) -> None:
        """Runs what prepare() put there, and waits for its end."""
        context = self.context
        words = np.zeros(abi.GRID_WORDS_BYTES // 4, np.uint32)
        words[abi.GRID_WORD_PLAN] = 2  # both plans are published
        context.upload(int(params["grid_words"][0]), words)
        self.set_workspace(
            ROW_SCALES, np.zeros(workspace_sizes(self.config, self.sizes)[ROW_SCALES], np.uint8)
        )  # a program may lack the embed op, which does so
        context.launch(
            self.function, self.num_workers, self.shape.num_threads, [params],
            shared_memory_bytes=self.shape.shared_memory_bytes, cooperative=True,
        )  # fmt: skip
        try:
            context.synchronize()
        except Exception as error:
            fault = self.page[: abi.ENGINE_PAGE.itemsize].view(abi.ENGINE_PAGE)[0]["fault"]
            raise AssertionError(
                f"{error}; fault record {dict(zip(abi.FAULT_RECORD.names or (), fault.tolist(), strict=True))}"
            ) from error

    # ---- Workspaces ----------------------------------------------------------------------------------------------
    def workspace(self, idx: int, dtype: Any) -> NDArray[Any]:
        values = np.empty(workspace_sizes(self.config, self.sizes)[idx] // np.dtype(dtype).itemsize, dtype)
        self.context.download(int(self.params["workspaces"][0, idx]), values)
        return values

    def set_workspace(self, idx: int, values: NDArray[Any]) -> None:
        self.context.upload(int(self.params["workspaces"][0, idx]), values)

    def poison_workspaces(self) -> None:
        for idx, num_bytes in enumerate(workspace_sizes(self.config, self.sizes)):
            if num_bytes and idx != ATTENTION_COUNTERS:  # zero is what they hold between ops
                self.context.fill(int(self.params["workspaces"][0, idx]), 0xFF, num_bytes)

    def sampled(self, num: int) -> NDArray[np.void]:
        values = np.empty(self.sizes.max_batch, abi.SAMPLE_RESULT)
        self.context.download(int(self.params["sampled"][0]), values)
        return values[:num]

    def logits(self, num: int) -> NDArray[np.float32]:
        return self.workspace(6, np.float32).reshape(self.sizes.max_batch, self.config.vocab)[:num]

    def kv_pages(self) -> NDArray[np.uint16]:
        """[layers, pages, kv_heads, 2, PAGE_TOKENS, head_dim] bf16 bits, whatever the kernel's layout is."""
        config = self.config
        values = np.empty(
            (config.num_layers, self.sizes.num_pages, config.num_kv_heads, 2, abi.PAGE_TOKENS * config.head_dim),
            np.uint16,
        )
        self.context.download(int(self.params["kv_cache"][0]), values)
        token, dim = np.arange(abi.PAGE_TOKENS)[:, None], np.arange(config.head_dim)[None, :]
        place = token * config.head_dim + dim
        if self.shape.kind == "hopper":  # kv_byte_offset() of device/kv_layout.cuh
            place = dim // 64 * (abi.PAGE_TOKENS * 64) + token * 64 + ((dim % 64 // 8) ^ (token % 8)) * 8 + dim % 8
        return values[..., place]


def tiled_index(num_rows: int, num_columns: int) -> NDArray[np.int64]:
    """[num_rows, num_columns] element offsets of tiled_offset() in device/activation_layout.cuh, in a step of num_rows rows."""
    tile_rows = next((rows for rows in (8, 16, 32) if num_rows <= rows), 64)
    row, column = np.arange(num_rows)[:, None], np.arange(num_columns)[None, :]
    within = (row % tile_rows) * 64 + ((column % 64 // 8) ^ (row % 8)) * 8 + column % 8
    return ((row // tile_rows) * (num_columns // 64) + column // 64) * tile_rows * 64 + within
