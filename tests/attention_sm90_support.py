"""A step of tests/attention_reference.py as device/attention.cuh reads it: swizzled KV tiles, plan, program, workspaces.

The keys and values of the step's own rows are not in the cache at first: the kernel of the test writes them there, as the QKV op
would, before the grid barrier that attention may not overtake. Until then their places are NaN.
Used by tests/host/test_attention_sm90_simt.py and tests/gpu/test_attention_sm90.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blinkimp import ring_abi as abi
from tests.attention_reference import PAGE, POISON, Array, Shape, Step

SPLIT_PAGES = 4  # kSplitPages of device/attention_math.cuh
WS_QUERY, WS_ATTENTION_PART = 2, 9  # enum Workspace of device/worker_memory.cuh
WS_ATTENTION_COUNTERS = abi.NUM_WORKSPACES - 1  # of device/attention_schedule.cuh


def swizzled(tiles: Array) -> Array:
    """[..., PAGE, head_dim] to kv_byte_offset()'s order: [..., head_dim / 64, PAGE, 8 chunks, 8], chunk ^= token mod 8."""
    *outer, tokens, head_dim = tiles.shape
    blocks = tiles.reshape(*outer, tokens, head_dim // 64, 8, 8)
    blocks = np.moveaxis(blocks, -3, -4)  # [..., blocks, tokens, chunks, 8]
    order = (
        np.arange(8)[None, :] ^ (np.arange(tokens) % 8)[:, None]
    )  # place of a chunk; the exchange is its own inverse
    return np.ascontiguousarray(np.take_along_axis(blocks, np.broadcast_to(order[..., None], blocks.shape), axis=-2))


@dataclass
class DeviceStep:
    """Host copies of what the kernel reads; address() places each of them."""

    params: Array  # ENGINE_PARAMS [1], complete
    new_rows: Array  # bf16 [rows, num_kv_heads, 2, head_dim]


def plan_bytes(step: Step, max_batch: int) -> Array:
    header = np.zeros(1, abi.STEP_PLAN)
    header["num_rows"], header["num_seqs"] = step.num_rows, len(step.shares)
    seqs = np.zeros(max_batch, abi.PLAN_SEQ)
    seqs[: len(step.shares)] = step.seqs
    rows = np.zeros(step.num_rows, abi.PLAN_ROW)
    for i, share in enumerate(step.shares):
        begin = int(step.seqs[i]["row_begin"])
        rows["position"][begin : begin + share.end - share.begin] = np.arange(share.begin, share.end)
        rows["seq_idx"][begin : begin + share.end - share.begin] = i
    parts = [part.view(np.uint8) for part in (header, seqs, rows, np.zeros(max_batch, np.uint32))]
    return np.concatenate(parts)


def part_bytes(shape: Shape, max_batch: int, max_pages: int) -> int:
    """Of the partial results: attention_slots() slots of a maximum, a sum and the outputs of each head."""
    return max_batch * -(-max_pages // SPLIT_PAGES) * shape.num_heads * (shape.head_dim + 2) * 4


def device_step(step: Step, num_ctas: int, place: Callable[[str, Array], int]) -> DeviceStep:
    """place(name, values) puts an array where the kernel can read it and returns its address."""
    shape = step.shape
    kv = step.kv.copy()
    new_rows = np.zeros((step.num_rows, shape.num_kv_heads, 2, shape.head_dim), np.uint16)
    for i, share in enumerate(step.shares):
        table = step.page_tables[step.seqs[i]["request_idx"]]
        positions = np.arange(share.begin, share.end)
        begin = int(step.seqs[i]["row_begin"])
        pages = table[positions // PAGE]
        new_rows[begin : begin + positions.size] = kv[pages, :, :, positions % PAGE]
        kv[pages, :, :, positions % PAGE] = POISON
    max_batch = len(step.shares)
    max_pages = step.page_tables.shape[1]
    ops = np.zeros(1, abi.OP)
    ops["kind"], ops["window"] = abi.OP_ATTENTION, shape.window

    params = np.zeros(1, abi.ENGINE_PARAMS)
    params["max_batch"], params["max_step_tokens"] = max_batch, step.num_rows
    params["max_pages_per_request"], params["num_pages"] = max_pages, len(step.kv)
    params["num_ops"], params["num_workers"] = 1, num_ctas
    params["spin_budget_ns"] = 2_000_000_000
    params["dims"]["num_heads"], params["dims"]["num_kv_heads"] = shape.num_heads, shape.num_kv_heads
    params["dims"]["head_dim"] = shape.head_dim
    params["dims"]["attention_scale"] = 1 / np.sqrt(shape.head_dim)
    params["page_tables"] = place("page_tables", step.page_tables)
    params["plans"] = place("plan", plan_bytes(step, max_batch))
    params["ops"] = place("ops", ops)
    params["kv_cache"] = place("kv", swizzled(kv))
    params["grid_words"] = place("grid_words", np.zeros(abi.GRID_WORDS_BYTES // 4, np.uint32))
    params["director_state"] = place("director_state", np.zeros(64, np.uint64))
    params["engine_page"] = place("engine_page", np.zeros(4096, np.uint8))
    params["workspaces"][0, WS_QUERY] = place("query", step.query)
    params["workspaces"][0, WS_ATTENTION_PART] = place(
        "parts", np.full(part_bytes(shape, max_batch, max_pages), 0xFF, np.uint8)
    )
    params["workspaces"][0, WS_ATTENTION_COUNTERS] = place(
        "counters", np.zeros(max_batch * shape.num_kv_heads, np.uint32)
    )
    return DeviceStep(params, new_rows)
