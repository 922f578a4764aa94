// The work of a GEMM op of at most 64 rows, and which of its tiles are whose. GPU only.
//
// All roles of all workers compute the same from the op and the row count, and walk alike. Steps of more rows: gemm_wide_tiling.cuh.
// Used by device/gemm.cuh, gemm_pair.cuh, row_scales.cuh, gemm_wide_tiling.cuh. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <cta_pair.cuh>

// Rows of an input tile from which on a pair shares its inputs, of 8, 16, 32 and 64; 65 is never.
#ifndef BK_SHARED_INPUT_ROWS
#define BK_SHARED_INPUT_ROWS 32
#endif

namespace blinkimp {

constexpr u32 kSharedInputRows = BK_SHARED_INPUT_ROWS;

// An item is a weight tile.
struct GemmShape {
  u32 num_rows;
  u32 num_slices;
  u32 num_items;  // weight tiles; none without rows
  u32 tile_rows;
  u32 input_rows;  // of a tile of the tiled input
};

BK_INLINE GemmShape gemm_shape(const Op& op, u32 num_rows) {
  return GemmShape{num_rows, op.in_features / kSliceColumns, num_rows ? op.num_tiles : 0, op.tile_rows, input_tile_rows(num_rows)};
}

BK_INLINE bool shares_inputs(const GemmShape& shape) { return kPaired && shape.input_rows >= kSharedInputRows; }

// The items of a CTA: first, first + stride, ... below `end`.
struct GemmWalk {
  u32 first;
  u32 stride;
  u32 end;
};

// The tiles of this CTA. With shared inputs the last one may be one past the op's last: no tile, but inputs to be brought and drained.
BK_INLINE GemmWalk tile_walk(const EngineParams& params, const GemmShape& shape) {
  if (!shares_inputs(shape)) return GemmWalk{cta_idx(), params.num_workers, shape.num_items};
  return GemmWalk{cta_idx(), params.num_workers / 2 * 2, has_partner(params) ? shape.num_items + pair_rank() : 0};
}
BK_INLINE bool has_tiles(const EngineParams& params, const GemmShape& shape) {
  const GemmWalk walk = tile_walk(params, shape);
  return walk.first < walk.end;
}

}  // namespace blinkimp
