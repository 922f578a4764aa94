"""The GPU memory of one engine: what EngineParams points to, allocated and filled in.

The workspaces are those of device/activation_layout.cuh (enum Workspace). Plain device allocations, all owned by the context.
Called by host/gpu_device.py and the GPU tests. Test: pytest -m gpu tests/gpu/test_model_gpu.py
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.gpu_driver import GpuContext
from blinkimp.host.memory_plan import EngineSizes, page_bytes_of, plan_bytes_of, prefix_cache_bytes_of
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.sampling_memory import sampling_table_bytes
from blinkimp.ring_abi import DType

ROW_GROUP: Final = 128  # rows are padded to two wgmma row tiles
SQUARES_COLUMNS: Final = 32
LOGIT_PART_COLUMNS: Final = 56  # kLogitPartColumns of device/logits_epilogue.cuh
SPLIT_PAGES: Final = 4  # kSplitPages of device/attention_math.cuh and device/portable/attention_math.cuh
ATTENTION_COUNTERS: Final = abi.NUM_WORKSPACES - 1  # kWsAttentionCounters of device/attention_schedule.cuh
ROW_SCALES: Final = 11  # kWsRowScales of device/activation_layout.cuh


def attention_part_bytes(config: ModelConfig, sizes: EngineSizes) -> int:
    """A partial result for every split of every request of a batch at its longest context: attention_slots() slots
    of num_heads * (head_dim + 2) f32."""
    num_slots = sizes.max_batch * -(-sizes.max_pages_per_request // SPLIT_PAGES)
    return num_slots * config.num_heads * (config.head_dim + 2) * 4


def workspace_sizes(config: ModelConfig, sizes: EngineSizes) -> list[int]:
    """[NUM_WORKSPACES] bytes, by enum Workspace."""
    rows = -(-sizes.max_step_tokens // ROW_GROUP) * ROW_GROUP
    sampled = -(-sizes.max_batch // ROW_GROUP) * ROW_GROUP
    used = [
        rows * config.hidden * 4,
        rows * config.hidden * 2,
        rows * config.query_features * 2,
        rows * config.query_features * 2,
        rows * config.intermediate * 2,
        rows * (config.hidden // SQUARES_COLUMNS) * 4,
        sizes.max_batch * config.vocab * 4,
        sampled * config.hidden * 2,
        sampled * (config.hidden // SQUARES_COLUMNS) * 4,
        attention_part_bytes(config, sizes),
        sizes.max_batch * -(-config.vocab // LOGIT_PART_COLUMNS) * 8,
        rows * 8,
    ]
    sizes_by_index = used + [0] * (abi.NUM_WORKSPACES - len(used))
    sizes_by_index[ATTENTION_COUNTERS] = sizes.max_batch * config.num_kv_heads * 4
    return sizes_by_index


def fill_sizes(params: NDArray[np.void], sizes: EngineSizes) -> None:
    """Copies the counts into [1] ENGINE_PARAMS, where they have the same names."""
    for name, value in sizes.__dict__.items():
        params[name] = value


def allocate_engine(
    context: GpuContext, config: ModelConfig, sizes: EngineSizes, dims: NDArray[np.void], ops: NDArray[np.void]
) -> NDArray[np.void]:
    """[1] ENGINE_PARAMS with every address set but queue_pairs and engine_page. Everything zeroed but pages and workspaces;
    of those, attention's counters are."""
    params = np.zeros(1, abi.ENGINE_PARAMS)
    fill_sizes(params, sizes)
    params["num_ops"] = len(ops)
    params["dims"] = dims[0]
    tables = {
        "director_state": abi.DIRECTOR_STATE_BYTES,
        "requests": sizes.num_requests * abi.REQUEST_BYTES,
        "tokens": sizes.num_requests * sizes.max_context * 4,
        "page_tables": sizes.num_requests * sizes.max_pages_per_request * 4,
        "free_pages": sizes.num_pages * 4,
        "page_owners": sizes.num_pages * 4,
        **({"prefix_cache": prefix_cache_bytes_of(sizes)} if sizes.prefix_cache_enabled else {}),
        "sampled": 2 * sizes.max_batch * abi.SAMPLE_RESULT.itemsize,
        "grid_words": abi.GRID_WORDS_BYTES,
        **sampling_table_bytes(sizes, config.vocab),
    }
    for name, num_bytes in tables.items():
        params[name] = context.allocate(num_bytes, name, zero=True)
    for i in range(2):
        params["plans"][0, i] = context.allocate(plan_bytes_of(sizes), "plans", zero=True)
    params["ops"] = context.allocate(ops.nbytes, "ops")
    context.upload(int(params["ops"][0]), ops)
    params["kv_cache"] = context.allocate(sizes.num_pages * page_bytes_of(config, DType.BF16), "KV pages")
    for i, num_bytes in enumerate(workspace_sizes(config, sizes)):
        if num_bytes:
            params["workspaces"][0, i] = context.allocate(num_bytes, f"workspace {i}", zero=i == ATTENTION_COUNTERS)
    return params
