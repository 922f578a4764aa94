"""From configuration, model and free memory to the sizes of everything an engine allocates.

    plan = plan_memory(config, model_config, kind="emulated", kv_dtype=..., weight_bytes=...,
                       available_bytes=..., workspace_bytes=device.workspace_bytes)
    plan.sizes -> EngineParams, plan.table() -> what the operator sees

Pages get what is left after weights, tables and workspaces; nothing is allocated here. Called by host/engine.py.
Test: pytest tests/null/test_memory_plan.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from blinkimp import ring_abi as abi
from blinkimp.config import Config
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.sampling_memory import constraint_slot_bytes_of, sampling_table_bytes
from blinkimp.ring_abi import DType

DeviceKind = Literal["gpu", "emulated"]

MAX_CONTEXT_CAP: Final = 32768  # of an automatic max_context; a longer one must be asked for
DEFAULT_MAX_BATCH: Final[dict[DeviceKind, int]] = {"gpu": 256, "emulated": 64}
# Rows of one step. A step is the wait of every running request for a newcomer's prompt: large enough to fill tensor cores on a
# GPU, about 50 ms of CPU time for a 10 M parameter model on the emulated device.
DEFAULT_STEP_TOKENS: Final[dict[DeviceKind, int]] = {"gpu": 2048, "emulated": 128}
# kMaxBatch of device/director_state.cuh: its running list has so many places.
MAX_BATCH: Final[dict[DeviceKind, int]] = {"gpu": 256, "emulated": 512}
MAX_REQUESTS: Final = 0xFFFF  # and its counters are packed into 16 bits (director.cuh)
MIN_CONTEXT: Final = 2  # a token of the prompt and one of the output (director_init)
MAX_PAGES: Final = 0xFFFFFF  # and the terms of its page count into 24 (director_integrity.cuh)
PAGE_TABLE_BYTES: Final = 4 + 4  # of free_pages and page_owners, for each page
# Of device/prefix_layout.cuh: sizeof(CachedPage), kPrefixWays, kMinPrefixSets, kLruPagesPerPage, sizeof(PrefixLink)
CACHED_PAGE_BYTES, PREFIX_WAYS, MIN_PREFIX_SETS, LRU_PAGES_PER_PAGE, PREFIX_LINK_BYTES = 320, 8, 16, 3, 16


class MemoryPlanError(ValueError):
    """The configuration cannot fit, or contradicts itself."""


@dataclass(frozen=True)
class EngineSizes:
    """The counts of EngineParams (device/program_abi.h), by the same names."""

    num_queue_pairs: int
    num_requests: int
    max_requests_per_queue_pair: int
    max_batch: int
    max_step_tokens: int
    prefill_chunk_tokens: int
    max_context: int
    max_pages_per_request: int
    num_pages: int
    prefix_cache_enabled: int = 0
    num_constraint_slots: int = 0
    constraint_slot_bytes: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    kind: DeviceKind
    sizes: EngineSizes
    page_bytes: int
    weight_bytes: int
    table_bytes: int
    workspace_bytes: int
    available_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.sizes.num_pages * self.page_bytes

    @property
    def free_bytes(self) -> int:
        return self.available_bytes - self.weight_bytes - self.table_bytes - self.workspace_bytes - self.kv_bytes

    def table(self) -> str:
        """The plan as lines of text."""
        sizes = self.sizes
        tokens = sizes.num_pages * abi.PAGE_TOKENS
        rows = [
            ("weights", self.weight_bytes, ""),
            (
                "KV pages",
                self.kv_bytes,
                f"{sizes.num_pages} pages, {tokens} tokens, {self.page_bytes >> 10} KiB a page",
            ),
            ("request tables", self.table_bytes, f"{sizes.num_requests} requests of up to {sizes.max_context} tokens"),
            ("workspace", self.workspace_bytes, f"{sizes.max_step_tokens} rows a step, batch {sizes.max_batch}"),
            ("left free", self.free_bytes, f"of {self.available_bytes / 2**20:.0f} MiB available"),
        ]
        return "\n".join(
            f"  {name:<15}{num_bytes / 2**20:>12.1f} MiB  {what}".rstrip() for name, num_bytes, what in rows
        )


def resolve_max_context(config: Config, model: ModelConfig) -> int:
    """Tokens of one request, prompt and output together."""
    max_context = config.max_context or min(model.max_positions, MAX_CONTEXT_CAP)
    if max_context < MIN_CONTEXT:
        raise MemoryPlanError(
            f"max_context is {max_context}; expected at least {MIN_CONTEXT}: a token of the prompt and one of the output; raise it, leave it 0 "
            "for automatic, or use a model with more positions"
        )
    if config.max_context > model.max_positions:
        raise MemoryPlanError(
            f"max_context is {config.max_context}, but the model has {model.max_positions} positions; "
            f"set max_context to at most {model.max_positions}, or 0 for automatic"
        )
    return max_context


def page_bytes_of(model: ModelConfig, kv_dtype: DType) -> int:
    """One page of all layers: [num_layers, num_kv_heads, 2, PAGE_TOKENS, head_dim]."""
    item_bytes = 2 if kv_dtype == DType.BF16 else 4
    return model.num_layers * model.num_kv_heads * 2 * abi.PAGE_TOKENS * model.head_dim * item_bytes


def plan_bytes_of(sizes: EngineSizes) -> int:
    """One StepPlan with its arrays."""
    seqs, rows = sizes.max_batch * abi.PLAN_SEQ.itemsize, sizes.max_step_tokens * abi.PLAN_ROW.itemsize
    return abi.STEP_PLAN.itemsize + seqs + rows + sizes.max_batch * 4


def prefix_cache_bytes_of(sizes: EngineSizes) -> int:
    """EngineParams.prefix_cache (device/prefix_layout.cuh); 0 where it is off."""
    if not sizes.prefix_cache_enabled:
        return 0
    num_sets = MIN_PREFIX_SETS
    while num_sets < sizes.num_pages:
        num_sets *= 2
    per_page = CACHED_PAGE_BYTES + 4 * LRU_PAGES_PER_PAGE
    links = sizes.num_requests * sizes.max_pages_per_request * PREFIX_LINK_BYTES
    return sizes.num_pages * per_page + links + num_sets * PREFIX_WAYS * 4


def table_bytes_of(sizes: EngineSizes, vocab: int) -> int:
    """Everything EngineParams points to, but weights, KV pages and workspaces."""
    per_request = abi.REQUEST_BYTES + 4 * sizes.max_context + 4 * sizes.max_pages_per_request
    step = 2 * plan_bytes_of(sizes) + 2 * sizes.max_batch * abi.SAMPLE_RESULT.itemsize
    fixed = abi.DIRECTOR_STATE_BYTES + abi.GRID_WORDS_BYTES
    pages = sizes.num_pages * PAGE_TABLE_BYTES + prefix_cache_bytes_of(sizes)
    return sizes.num_requests * per_request + pages + step + fixed + sum(sampling_table_bytes(sizes, vocab).values())


def plan_memory(
    config: Config,
    model: ModelConfig,
    *,
    kind: DeviceKind,
    kv_dtype: DType,
    weight_bytes: int,
    available_bytes: int,
    workspace_bytes: Callable[[EngineSizes], int],
) -> MemoryPlan:
    """Sizes that fit. Automatic values shrink to what there is; values that were asked for are kept or refused."""
    page_bytes = page_bytes_of(model, kv_dtype)
    sizes = _sizes_without_pages(config, model, kind)
    workspace = workspace_bytes(sizes)
    # Of the tables, what grows with the pages. Sets are a power of two: at most two for each page.
    bytes_per_page = PAGE_TABLE_BYTES
    if config.prefix_cache:
        bytes_per_page += CACHED_PAGE_BYTES + 4 * LRU_PAGES_PER_PAGE + 2 * 4 * PREFIX_WAYS

    def left_for_pages(of: EngineSizes) -> int:
        left_bytes = available_bytes - weight_bytes - workspace - table_bytes_of(of, model.vocab)
        return int(left_bytes * config.kv_memory_fraction) // (page_bytes + bytes_per_page)

    num_fitting = left_for_pages(sizes)
    if config.max_context == 0 and 0 < num_fitting < sizes.max_pages_per_request:
        # Automatic context: one request must be able to run to its end, so the context shrinks to the pages that fit.
        sizes = _with_context(sizes, num_fitting * abi.PAGE_TOKENS)
        num_fitting = left_for_pages(sizes)
    if config.num_pages > MAX_PAGES:
        raise MemoryPlanError(
            f"num_pages is {config.num_pages}; expected at most {MAX_PAGES}, the director's limit; lower it, or leave it 0 for automatic"
        )
    num_fitting = min(num_fitting, MAX_PAGES)
    num_pages = config.num_pages or min(num_fitting, _most_useful_pages(sizes, kind))
    if num_pages > num_fitting or num_pages < sizes.max_pages_per_request:
        raise MemoryPlanError(
            f"{num_pages} KV pages cannot be: {max(num_fitting, 0)} pages of {page_bytes} bytes fit into "
            f"{config.kv_memory_fraction} x ({available_bytes} bytes available - {weight_bytes} weights - {workspace} workspace - "
            f"{table_bytes_of(sizes, model.vocab)} tables), and one request of max_context {sizes.max_context} needs "
            f"{sizes.max_pages_per_request} pages; lower max_context, num_requests or max_step_tokens, set num_pages between the two, "
            "or use a smaller model"
        )
    sizes = EngineSizes(**{**sizes.__dict__, "num_pages": num_pages})
    return MemoryPlan(
        kind, sizes, page_bytes, weight_bytes, table_bytes_of(sizes, model.vocab), workspace, available_bytes
    )


def _sizes_without_pages(config: Config, model: ModelConfig, kind: DeviceKind) -> EngineSizes:
    max_context = resolve_max_context(config, model)
    max_batch = config.max_batch or min(DEFAULT_MAX_BATCH[kind], config.num_requests)
    max_step_tokens = config.max_step_tokens or max(DEFAULT_STEP_TOKENS[kind], max_batch)
    prefill_chunk_tokens = config.prefill_chunk_tokens or max_step_tokens
    _require(
        "num_requests",
        config.num_requests,
        config.num_queue_pairs,
        MAX_REQUESTS,
        "num_queue_pairs and the director's limit",
    )
    _require(
        "max_batch", max_batch, 1, min(MAX_BATCH[kind], config.num_requests), "num_requests and the director's limit"
    )
    _require("max_step_tokens", max_step_tokens, max_batch, abi.MAX_STEP_TOKENS, "max_batch and the step limit")
    _require("prefill_chunk_tokens", prefill_chunk_tokens, 1, max_step_tokens, "max_step_tokens")
    sizes = EngineSizes(
        num_queue_pairs=config.num_queue_pairs,
        num_requests=config.num_requests,
        # An even share, so that an ingress that never reads cannot keep the others out of the table.
        max_requests_per_queue_pair=config.num_requests // config.num_queue_pairs,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        prefill_chunk_tokens=prefill_chunk_tokens,
        max_context=max_context,
        max_pages_per_request=0,
        num_pages=0,
        prefix_cache_enabled=int(config.prefix_cache),
        num_constraint_slots=config.constraint_slots,
        # Without slots 0, which is how an ingress knows that it has to refuse constraints.
        constraint_slot_bytes=constraint_slot_bytes_of(config.constraint_slot_bytes, kind, model.vocab)
        if config.constraint_slots
        else 0,
    )
    return _with_context(sizes, max_context)


def _with_context(sizes: EngineSizes, max_context: int) -> EngineSizes:
    max_pages = -(-max_context // abi.PAGE_TOKENS)
    return EngineSizes(**{**sizes.__dict__, "max_context": max_context, "max_pages_per_request": max_pages})


def _most_useful_pages(sizes: EngineSizes, kind: DeviceKind) -> int:
    """Pages past this could never be filled; the emulated device stops at one full batch, for it shares the machine's memory."""
    num_requests = sizes.max_batch if kind == "emulated" else sizes.num_requests
    return num_requests * sizes.max_pages_per_request


def _require(name: str, value: int, least: int, most: int, bound_by: str) -> None:
    if not least <= value <= most:
        raise MemoryPlanError(
            f"{name} is {value}; expected {least} to {most} ({bound_by}); change one of them, or leave it 0 for automatic"
        )
