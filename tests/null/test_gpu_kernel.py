"""What host/ says of the persistent kernel agrees with device/, and tiles are chosen to fill the SMs.

Run: pytest tests/null/test_gpu_kernel.py
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from blinkimp.config import Config, model_folder
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.gpu_kernel import (
    PORTABLE_THREADS,
    SHARED_BESIDE_SCRATCH_BYTES,
    SHARED_MEMORY_BYTES,
    WORKER_THREADS,
    KernelChoice,
    KernelChoiceError,
    KernelKind,
    capability_of,
    choose_kernel,
    kernel_shape,
)
from blinkimp.host.gpu_memory import SPLIT_PAGES, SQUARES_COLUMNS
from blinkimp.host.gpu_weights import TILE_ROWS, choose_tile_rows, grouped_order, rotated_order
from blinkimp.ring_abi import OpKind
from tests.support import ROOT


@pytest.mark.parametrize(
    ("header", "name", "value"),
    [
        ("worker_memory.cuh", "kSharedMemoryBytes", SHARED_MEMORY_BYTES),
        ("worker_memory.cuh", "kWorkerThreads", WORKER_THREADS),
        ("activation_layout.cuh", "kSquaresColumns", SQUARES_COLUMNS),
        ("attention_math.cuh", "kSplitPages", SPLIT_PAGES),
        ("portable/attention_math.cuh", "kSplitPages", SPLIT_PAGES),
        ("portable/gemm.cuh", "kComputeThreads", PORTABLE_THREADS),
        ("portable/worker.cuh", "kSharedBesideScratchBytes", SHARED_BESIDE_SCRATCH_BYTES),
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


def test_four_columns_of_o_and_down_meet_in_a_thread() -> None:
    """Columns 2q and 2q + 1 of a block of 8 are a thread's: those of two blocks must be four rows in a row."""
    order = grouped_order(64)
    assert sorted(order) == list(range(64))
    for group in order.reshape(-1, 2, 4, 2):  # [block][thread][column]
        for thread in range(4):
            four = group[:, thread].reshape(-1)
            assert np.array_equal(four, four[0] + np.arange(4)) and four[0] % 4 == 0


@pytest.mark.parametrize(
    ("choice", "arch", "kind"),
    [
        ("auto", "sm_80", "portable"),
        ("auto", "sm_89", "portable"),
        ("auto", "sm_90a", "hopper"),
        ("auto", "sm_100a", "portable"),
        ("auto", "sm_120a", "portable"),
        ("portable", "sm_90a", "portable"),
        ("hopper", "sm_90a", "hopper"),
    ],
)
def test_a_kernel_for_each_architecture(choice: KernelChoice, arch: str, kind: KernelKind) -> None:
    assert choose_kernel(choice, capability_of(arch), arch) == kind


@pytest.mark.parametrize(
    ("choice", "capability", "message"),
    [
        ("auto", (7, 5), "Tesla T4 has compute capability 7.5, expected 8.0 or newer"),
        ("portable", (7, 0), "expected 8.0 or newer"),
        ("hopper", (8, 0), "kernel=hopper needs 9.0"),
        ("hopper", (10, 0), "kernel=hopper needs 9.0"),
    ],
)
def test_a_gpu_without_a_kernel_is_refused_by_name(
    choice: KernelChoice, capability: tuple[int, int], message: str
) -> None:
    with pytest.raises(KernelChoiceError, match=message):
        choose_kernel(choice, capability, "Tesla T4")
    with pytest.raises(KernelChoiceError, match="sm_80, sm_89 or sm_90a"):
        capability_of("ampere")


@pytest.mark.parametrize(
    ("arch", "limit_kib"),
    [("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90a", 227), ("sm_100a", 227), ("sm_120a", 99)],
)
def test_shared_memory_of_the_portable_kernel_fits_each_architecture(arch: str, limit_kib: int) -> None:
    config = read_model_config(model_folder(Config()))
    shape = kernel_shape(config, 100, "portable", arch)
    assert 97 << 10 <= shape.shared_memory_bytes <= limit_kib << 10
    assert shape.defines()["BK_SCRATCH_BYTES"] == str(shape.shared_memory_bytes - SHARED_BESIDE_SCRATCH_BYTES)
