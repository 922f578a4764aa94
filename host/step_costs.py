"""What a step costs by its rows, for the director: rows that would only begin a tile wait for the next step (device/step_cost.cuh).

    cost_rows, costs = step_costs(config, shape, num_workers)      EngineParams.cost_rows and .step_costs

A step of more than 64 rows takes its GEMMs' tiles in rounds: device/gemm_wide_tiling.cuh says how many and how long, and so does this. Fewer rows
take as long as the weights take to stream. A step more has another LM head and another 32 beginnings and ends of attention; what attention and
sampling do for a row costs the same on either side of a cut and is left out. Where nothing is known of rounds, as of the portable kernel, there
are no costs and no cuts.
Called by host/gpu_device.py, tools/bench_gemm_wide.py. Test: pytest tests/null/test_step_costs.py tests/host/test_worker_sm90_simt.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.gpu_kernel import KernelShape
from blinkimp.host.gpu_weights import SLICE_COLUMNS, TILE_ROWS
from blinkimp.host.model_config import ModelConfig
from blinkimp.ring_abi import OpKind

# Those of gemm_wide_tiling.cuh.
COST_ROWS: Final = 128
ROW_TILE: Final = 64
LONE_STACK: Final = 2
MAX_LONE_COLUMNS: Final = 128
MIN_COLUMNS: Final = 64
MAX_COLUMNS: Final = 256
EPILOGUE_NS: Final = 4000
BULK_COPY_NS: Final = 100
STREAM_BYTES_PER_NS: Final = 4300  # 4,600 is the roof
ATTENTION_NS: Final = 10_000  # of a layer, however little there is to do
LEAST_UNIT_NS: Final = 1000


@dataclass(frozen=True)
class Matrix:
    """A GEMM's weights, packed."""

    tile_rows: int
    out_features: int
    in_features: int


def wide_time_ns(rows: int, matrix: Matrix, tokens: int, stack: int, num_workers: int) -> int:
    """Of items of `tokens` rows and `stack` packed tiles."""
    columns = stack * matrix.tile_rows
    num_tiles = -(-matrix.out_features // matrix.tile_rows)
    items = -(-rows // tokens) * -(-num_tiles // stack)
    copies = 2 if tokens == ROW_TILE else stack + 2
    slice_ns = max(tokens * columns // 47, 2 * (tokens + columns), BULK_COPY_NS * copies)
    return -(-items // num_workers) * (matrix.in_features // SLICE_COLUMNS * slice_ns + EPILOGUE_NS)


def stacks(tile_rows: int) -> list[int]:
    """max_stack() down to min_stack()."""
    most = 1
    while 2 * most * tile_rows <= MAX_COLUMNS:
        most *= 2
    least = 2 if tile_rows == 112 else 1
    while least * tile_rows < MIN_COLUMNS:
        least *= 2
    return [most >> i for i in range(most.bit_length()) if most >> i >= least]


def has_lone_items(tile_rows: int) -> bool:
    """Whether packed tiles of this height are few enough rows for items of 64 rows."""
    return LONE_STACK * tile_rows <= MAX_LONE_COLUMNS


def least_wide_time_ns(rows: int, matrix: Matrix, num_workers: int) -> int:
    """Of the tiling that the rule takes. rows > 64."""
    times = [wide_time_ns(rows, matrix, COST_ROWS, stack, num_workers) for stack in stacks(matrix.tile_rows)]
    if rows <= COST_ROWS and has_lone_items(matrix.tile_rows):
        times.append(wide_time_ns(rows, matrix, ROW_TILE, LONE_STACK, num_workers))
    return min(times)


def matrices_of(config: ModelConfig, shape: KernelShape) -> list[Matrix]:
    """Of a layer."""
    (project_tile_rows,) = TILE_ROWS[OpKind.PROJECT]
    return [
        Matrix(shape.qkv_tile_rows, config.query_features + 2 * config.kv_features, config.hidden),
        Matrix(project_tile_rows, config.hidden, config.query_features),
        Matrix(shape.gate_up_tile_rows, 2 * config.intermediate, config.hidden),
        Matrix(project_tile_rows, config.hidden, config.intermediate),
    ]


def stream_ns(out_features: int, in_features: int) -> int:
    return 2 * out_features * in_features // STREAM_BYTES_PER_NS


def gemms_ns(rows: int, matrices: list[Matrix], num_workers: int) -> int:
    """Of a layer's GEMMs."""
    if rows <= ROW_TILE:
        return sum(stream_ns(matrix.out_features, matrix.in_features) + EPILOGUE_NS for matrix in matrices)
    return sum(least_wide_time_ns(rows, matrix, num_workers) for matrix in matrices)


def step_costs(config: ModelConfig, shape: KernelShape, num_workers: int) -> tuple[int, NDArray[np.uint16]]:
    """[abi.MAX_STEP_COSTS] of steps of half of COST_ROWS, COST_ROWS, 2 * COST_ROWS ... rows, in a unit of their own; (0, zeros): there are none."""
    if shape.kind != "hopper":
        return 0, np.zeros(abi.MAX_STEP_COSTS, np.uint16)
    matrices = matrices_of(config, shape)
    rows = [ROW_TILE, *(COST_ROWS * i for i in range(1, abi.MAX_STEP_COSTS))]
    step_ns = config.num_layers * ATTENTION_NS + stream_ns(config.vocab, config.hidden)
    times_ns = [config.num_layers * gemms_ns(count, matrices, num_workers) + step_ns for count in rows]
    unit_ns = max(LEAST_UNIT_NS, -(-max(times_ns) // np.iinfo(np.uint16).max))
    return COST_ROWS, np.array([-(-time_ns // unit_ns) for time_ns in times_ns], np.uint16)
