"""Sizes follow from configuration, model and memory, and add up. Test: pytest tests/null/test_memory_plan.py"""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp import ring_abi as abi
from blinkimp.config import Config, ConfigError, load_config
from blinkimp.host.memory_plan import (
    MAX_BATCH,
    DeviceKind,
    EngineSizes,
    MemoryPlan,
    MemoryPlanError,
    page_bytes_of,
    plan_bytes_of,
    plan_memory,
    table_bytes_of,
)
from blinkimp.host.model_config import ModelConfig, parse_config
from blinkimp.lab.shapes import LLAMA_3_8B
from blinkimp.ring_abi import DType
from tests.support import ROOT

GIB = 1 << 30


def llama(**changes: Any) -> ModelConfig:
    return parse_config(LLAMA_3_8B | {"max_position_embeddings": 131072} | changes)


def workspace(sizes: EngineSizes) -> int:
    return sizes.max_step_tokens * 100_000


def plan(
    config: Config, model: ModelConfig, available: int, kind: DeviceKind = "gpu", weights: int = 16 * GIB
) -> MemoryPlan:
    return plan_memory(
        config, model, kind=kind, kv_dtype=DType.BF16, weight_bytes=weights, available_bytes=available, workspace_bytes=workspace
    )  # fmt: skip


def test_page_bytes_of_the_8b_shape() -> None:
    assert page_bytes_of(llama(), DType.BF16) == 32 * 8 * 2 * 64 * 128 * 2
    assert page_bytes_of(llama(), DType.F32) == 2 * page_bytes_of(llama(), DType.BF16)


def test_automatic_sizes_on_a_large_gpu() -> None:
    result = plan(Config(), llama(), 139 * GIB)
    sizes = result.sizes
    assert (sizes.max_batch, sizes.max_context, sizes.max_pages_per_request) == (256, 32768, 512)
    assert sizes.num_queue_pairs * sizes.max_requests_per_queue_pair <= sizes.num_requests == 4096
    assert result.kv_bytes > 100 * GIB
    assert result.free_bytes > 0


def test_emulated_device_takes_pages_for_one_full_batch_only() -> None:
    sizes = plan(Config(), llama(max_position_embeddings=1024), 64 * GIB, "emulated", weights=GIB).sizes
    assert sizes.max_batch == 64
    assert sizes.num_pages == 64 * 16


def test_table_adds_up() -> None:
    result = plan(Config(), llama(), 139 * GIB)
    parts = result.weight_bytes + result.kv_bytes + result.table_bytes + result.workspace_bytes + result.free_bytes
    assert parts == result.available_bytes
    rows = {line[:17].strip(): float(line[17:].split()[0]) for line in result.table().splitlines()}
    assert set(rows) == {"weights", "KV pages", "request tables", "workspace", "left free"}
    assert sum(rows.values()) == pytest.approx(result.available_bytes / 2**20, abs=0.5)


def test_plan_bytes_are_those_of_step_plan_cuh() -> None:
    sizes = plan(Config(max_batch=3, max_step_tokens=5), llama(), 139 * GIB).sizes
    assert plan_bytes_of(sizes) == 64 + 3 * 32 + 5 * 16 + 3 * 4


def test_automatic_context_shrinks_to_what_one_request_can_fill() -> None:
    result = plan(Config(num_requests=16), llama(), 19 * GIB)
    assert 0 < result.sizes.max_context < 32768
    assert result.sizes.max_context % abi.PAGE_TOKENS == 0
    assert result.sizes.num_pages >= result.sizes.max_pages_per_request


def test_context_that_was_asked_for_does_not_shrink() -> None:
    with pytest.raises(MemoryPlanError, match="max_context 32768 needs 512 pages"):
        plan(Config(num_requests=16, max_context=32768), llama(), 19 * GIB)


def test_model_larger_than_memory_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match="0 pages"):
        plan(Config(), llama(), 10 * GIB)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"max_batch": 256, "num_requests": 128}, "max_batch"),
        ({"max_batch": 257}, "max_batch"),
        ({"max_batch": 64, "max_step_tokens": 32}, "max_step_tokens"),
        ({"max_step_tokens": 64, "max_batch": 8, "prefill_chunk_tokens": 65}, "prefill_chunk_tokens"),
        ({"num_requests": 2, "num_queue_pairs": 4}, "num_requests"),
        ({"max_context": 200_000}, "max_context"),
        ({"max_context": 1}, "max_context is 1; expected at least 2"),
        ({"num_pages": 0x1000000}, "num_pages is 16777216; expected at most 16777215"),
        ({"num_pages": 1_000_000}, "KV pages"),
        ({"num_pages": 511}, "511 KV pages"),
    ],
)
def test_contradictions_are_named(settings_: dict[str, int], named: str) -> None:
    with pytest.raises(MemoryPlanError, match=named):
        plan(Config(**settings_), llama(), 139 * GIB)  # type: ignore[arg-type]  # ints only


def test_the_emulated_device_takes_larger_batches_than_a_gpu() -> None:
    assert plan(Config(max_batch=512), llama(), 139 * GIB, kind="emulated").sizes.max_batch == 512
    with pytest.raises(MemoryPlanError, match="max_batch is 513; expected 1 to 512"):
        plan(Config(max_batch=513), llama(), 139 * GIB, kind="emulated")


def director_refuses(sizes: EngineSizes, model: ModelConfig, kind: DeviceKind) -> int:
    """What wrong_param() of device/director.cuh returns, by its own source: 0, or the number of the condition that is broken."""
    source = (ROOT / "device" / "director.cuh").read_text()
    body = source[source.index("u32 wrong_param(") : source.index("void director_init(")]
    conditions = re.findall(r"^  if \((.*)\) return (\d+);", body, flags=re.MULTILINE)
    assert len(conditions) == body.count(" return ") - 1 == 9, "each line was read"
    dims = SimpleNamespace(vocab=model.vocab, num_eos_ids=0)
    names = {
        "params": SimpleNamespace(**dataclasses.asdict(sizes), dims=dims),
        "kMaxQueuePairs": abi.MAX_QUEUE_PAIRS,
        "kMaxBatch": MAX_BATCH[kind],
        "kMaxStepTokens": abi.MAX_STEP_TOKENS,
        "kMaxEosIds": abi.MAX_EOS_IDS,
        "pages_for_tokens": lambda num_tokens: -(-num_tokens // abi.PAGE_TOKENS),
    }
    return next((int(number) for text, number in conditions if eval(text.replace("||", " or "), names)), 0)


def around(*bounds: int) -> st.SearchStrategy[int]:
    return st.sampled_from(sorted({max(bound + step, 0) for bound in bounds for step in (-1, 0, 1)}))


@settings(max_examples=500, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "max_context": around(1, 2, 64, 32768, 131072),
            "num_pages": around(1, 512, 0xFFFFFF),
            "num_requests": around(1, 4, 256, 0xFFFF),
            "num_queue_pairs": around(1, 4, abi.MAX_QUEUE_PAIRS),
            "max_batch": around(1, 256, 512),
            "max_step_tokens": around(1, 256, 512, abi.MAX_STEP_TOKENS),
            "prefill_chunk_tokens": around(1, 256, abi.MAX_STEP_TOKENS),
        },
    ),
    max_positions=st.sampled_from([1, 2, 3, 63, 64, 65, 131072]),
    available=st.sampled_from([1 << 34, 1 << 38, 1 << 52]),
    kind=st.sampled_from(["gpu", "emulated"]),
)
def test_the_director_refuses_nothing_that_was_planned(
    changes: dict[str, int], max_positions: int, available: int, kind: DeviceKind
) -> None:
    model = llama(max_position_embeddings=max_positions)
    try:
        sizes = plan(load_config(changes, environ={}), model, available, kind, weights=1 << 20).sizes
    except (ConfigError, MemoryPlanError):
        return
    assert director_refuses(sizes, model, kind) == 0, sizes


@settings(max_examples=200, deadline=None)
@given(
    available=st.integers(1 << 20, 1 << 38),
    max_batch=st.integers(0, 600),
    num_requests=st.integers(1, 8192),
    max_context=st.integers(0, 4096),
    fraction=st.floats(0.05, 1.0),
    kind=st.sampled_from(["gpu", "emulated"]),
)
def test_whatever_is_planned_fits_and_is_consistent(
    available: int, max_batch: int, num_requests: int, max_context: int, fraction: float, kind: DeviceKind
) -> None:
    config = Config(
        max_batch=max_batch, num_requests=num_requests, max_context=max_context, kv_memory_fraction=fraction
    )
    try:
        result = plan(config, llama(max_position_embeddings=4096), available, kind, weights=1 << 20)
    except MemoryPlanError:
        return
    sizes = result.sizes
    assert result.free_bytes >= 0
    assert 1 <= sizes.max_batch <= sizes.max_step_tokens <= abi.MAX_STEP_TOKENS
    assert 1 <= sizes.prefill_chunk_tokens <= sizes.max_step_tokens
    assert sizes.max_pages_per_request * abi.PAGE_TOKENS >= sizes.max_context
    assert sizes.max_pages_per_request <= sizes.num_pages
    assert sizes.max_requests_per_queue_pair >= 1
    assert table_bytes_of(sizes, llama().vocab) == result.table_bytes
    if max_context:
        assert sizes.max_context == max_context
