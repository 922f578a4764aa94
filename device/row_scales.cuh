// The row scales of an op that normalises its input: 1 / rms of its rows, summed up by two warps while the products run. GPU only.
//
// RMSNorm is a factor per row, so it can enter after the product: the op before leaves the sums of squares of every 32 hidden columns
// (kWsSquares), the scale warps (10 and 11) add them up in a fixed order, the epilogue multiplies. A buffer holds the 128 rows of one row
// group; a CTA whose next item has the same row group goes on with the buffer it has. Writers and readers step through the items alike.
// Called by device/gemm.cuh and device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <worker_memory.cuh>

namespace blinkimp {

// The work of one GEMM op: items = weight tiles x groups of row tiles, the groups of one weight tile next to each other so that its
// weights are in L2 for all of them. CTA c takes items c, c + num_workers, ... Both producers and the consumers iterate the same way.
struct GemmShape {
  u32 num_rows;
  u32 num_slices;
  u32 num_tiles;
  u32 tile_rows;
  u32 num_row_groups;
  u32 input_rows;  // of a tile of the tiled input
  bool wide;
};

BK_INLINE GemmShape gemm_shape(const Op& op, u32 num_rows) {
  const bool wide = num_rows > kRowTile;
  const u32 num_row_groups = wide ? (num_rows + 2 * kRowTile - 1) / (2 * kRowTile) : (num_rows ? 1u : 0u);
  return GemmShape{num_rows, op.in_features / kSliceColumns, op.num_tiles, op.tile_rows, num_row_groups, input_tile_rows(num_rows), wide};
}

// The epilogues' side. Both warpgroups hold a reader; kNoRow is no group yet.
struct ScaleReader {
  RingCursor cursor;
  u32 group;

  BK_INLINE void enter(WorkerShared& shared, u32 next_group) {
    if (group != kNoRow && group != next_group) give_back(shared);
    group = next_group;
  }
  BK_INLINE const f32* wait(const EngineParams& params, WorkerShared& shared) const {
    wait_mbarrier_warp(params, &shared.scales_full[cursor.stage], cursor.phase, kSiteScales);
    return shared.row_scale[cursor.stage];
  }
  BK_INLINE void leave(WorkerShared& shared) {
    if (group != kNoRow) give_back(shared);
  }

 private:
  BK_INLINE void give_back(WorkerShared& shared) {
    // The warpgroup's last reader of the buffer may be a slower warp than the one that arrives: each warp arrives for itself.
    __syncwarp();
    if (thread_idx() % 32 == 0) mbarrier_arrive(&shared.scales_empty[cursor.stage]);
    cursor.advance(kScaleBuffers);
  }
};

// One warp's rows of a buffer, four at a time so that their loads are in flight together. Rows past the last repeat it: fewer conditions, fewer
// registers.
BK_INLINE void sum_row_scales(const EngineParams& params, const f32* squares, u32 num_rows, u32 warp, f32* row_scale) {
  constexpr u32 kRowsAtOnce = 4;
  const u32 lane = thread_idx() % 32;
  const u32 num_pairs = params.dims.hidden / kSquaresColumns / 2;
  const float2* pairs = reinterpret_cast<const float2*>(squares);
#pragma unroll 1
  for (u32 first = warp * kRowsAtOnce; first < num_rows; first += kScaleWarps * kRowsAtOnce) {
    f32 sums[kRowsAtOnce] = {};
#pragma unroll 1
    for (u32 pair = lane; pair < num_pairs; pair += 64) {
#pragma unroll
      for (u32 i = 0; i < kRowsAtOnce; i++) {
        const float2* row = pairs + min(first + i, num_rows - 1) * num_pairs;
        const float2 low = __ldcg(row + pair);
        const float2 high = pair + 32 < num_pairs ? __ldcg(row + pair + 32) : float2{0.0f, 0.0f};
        sums[i] += (low.x + low.y) + (high.x + high.y);
      }
    }
#pragma unroll
    for (u32 i = 0; i < kRowsAtOnce; i++) {
      for (u32 distance = 16; distance; distance /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      if (lane == 0) row_scale[min(first + i, num_rows - 1)] = rsqrtf(sums[i] / static_cast<f32>(params.dims.hidden) + params.dims.norm_eps);
    }
  }
}

// The scale warps' side of one op, after the grid barrier that completes `squares`.
BK_INLINE void produce_row_scales(const EngineParams& params, const f32* squares, const GemmShape& shape, u32 warp, WorkerShared& shared, RingCursor& cursor) {
  const u32 num_items = shape.num_tiles * shape.num_row_groups;
  u32 group = kNoRow;
  for (u32 item = cta_idx(); item < num_items; item += params.num_workers) {
    const u32 next_group = item % shape.num_row_groups;
    if (next_group == group) continue;
    group = next_group;
    wait_mbarrier(params, &shared.scales_empty[cursor.stage], cursor.phase, kSiteScales);
    const u32 row_begin = group * 2 * kRowTile;
    const f32* rows = squares + static_cast<u64>(row_begin) * (params.dims.hidden / kSquaresColumns);
    sum_row_scales(params, rows, min(shape.num_rows - row_begin, 2 * kRowTile), warp, shared.row_scale[cursor.stage]);
    __syncwarp();
    if (thread_idx() % 32 == 0) mbarrier_arrive(&shared.scales_full[cursor.stage]);
    cursor.advance(kScaleBuffers);
  }
}

}  // namespace blinkimp
