"""What host/ says of the persistent kernel agrees with device/, and tiles are chosen to fill the SMs.

Run: pytest tests/null/test_gpu_kernel.py
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from blinkimp.host.gpu_kernel import SHARED_MEMORY_BYTES, WORKER_THREADS
from blinkimp.host.gpu_memory import SPLIT_PAGES, SQUARES_COLUMNS
from blinkimp.host.gpu_weights import TILE_ROWS, choose_tile_rows, rotated_order
from blinkimp.ring_abi import OpKind
from tests.support import ROOT


@pytest.mark.parametrize(
    ("header", "name", "value"),
    [
        ("worker_memory.cuh", "kSharedMemoryBytes", SHARED_MEMORY_BYTES),
        ("worker_memory.cuh", "kWorkerThreads", WORKER_THREADS),
        ("worker_memory.cuh", "kSquaresColumns", SQUARES_COLUMNS),
        ("portable/attention_math.cuh", "kSplitPages", SPLIT_PAGES),
        ("worker.cuh", "kLmHeadTileRows", TILE_ROWS[OpKind.LM_HEAD][0]),
    ],
)
def test_host_and_device_state_the_same_number(header: str, name: str, value: int) -> None:
    text = (ROOT / "device" / header).read_text()
    found = re.search(rf"constexpr (?:u32|int) {name} = (\d+);", text)
    assert found is not None and int(found[1]) == value


def test_llama_3_8b_tiles_fill_the_workers() -> None:
    assert choose_tile_rows(OpKind.QKV, 6144, 131) == 48  # 128 tiles
    assert choose_tile_rows(OpKind.PROJECT, 4096, 131) == 32  # 128 tiles
    assert choose_tile_rows(OpKind.GATE_UP, 28672, 131) == 112  # 256 tiles, two for each
    assert choose_tile_rows(OpKind.QKV, 6144, 131, head_rows=128) == 128  # per-head norms: a tile is a head


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_that_rotate_together_are_neighbours(head_dim: int) -> None:
    order = rotated_order(head_dim)
    assert sorted(order) == list(range(head_dim))
    assert all(high - low == head_dim // 2 for low, high in pairwise(order[:2]))
    assert np.array_equal(order[1::2] - order[::2], np.full(head_dim // 2, head_dim // 2))
