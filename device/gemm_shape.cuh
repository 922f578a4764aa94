// The work of a GEMM op of at most 64 rows, and which of its tiles are whose. GPU only.
//
// All roles of all workers compute the same from the op and the row count, and walk alike. Steps of more rows: gemm_wide_tiling.cuh.
// Used by device/gemm.cuh, row_scales.cuh, gemm_wide_tiling.cuh. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <worker_memory.cuh>

namespace blinkimp {

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

// The items of a CTA: first, first + stride, ... below `end`.
struct GemmWalk {
  u32 first;
  u32 stride;
  u32 end;
};

// A walk without an item: end_op() of worker.cuh will have to know.
BK_INLINE void note_idle(WorkerShared& shared) {
  if (is_first_thread()) shared.is_idle = 1;
}

// The tiles of this CTA.
BK_INLINE GemmWalk tile_walk(const EngineParams& params, const GemmShape& shape) { return GemmWalk{cta_idx(), params.num_workers, shape.num_items}; }

}  // namespace blinkimp
