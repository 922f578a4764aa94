// The row scales of an op that normalises its input: 1 / rms of its rows, summed up by two warps while the products run. GPU only.
//
// RMSNorm is a factor per row, so it can enter after the product: the op before leaves the sums of squares of every 32 hidden columns
// (kWsSquares), the scale warps (10 and 11) add them up in a fixed order, the epilogue multiplies. A buffer holds the rows of an item; a CTA
// whose next item has the same rows goes on with the buffer it has. Writers and readers step through the items alike.
// Called by device/gemm.cuh and device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_shape.cuh>

namespace blinkimp {

// The epilogues' side. Both warpgroups hold a reader; kNoRow is no group yet.
struct ScaleReader {
  RingCursor cursor;
  u32 group;

  BK_INLINE void enter(WorkerShared& shared, u32 next_group) {
    if (group != kNoRow && group != next_group) give_back(shared);
    group = next_group;
  }
  BK_INLINE const f32* wait(WorkerShared& shared) const {
    wait_mbarrier_warp(&shared.scales_full[cursor.stage], cursor.phase, kSiteScales);
    return shared.row_scale[cursor.stage];
  }
  BK_INLINE void leave(WorkerShared& shared) {
    if (group != kNoRow) give_back(shared);
    if (is_first_thread()) shared.next_scales = cursor;
  }

 private:
  BK_INLINE void give_back(WorkerShared& shared) {
    // The warpgroup's last reader of the buffer may be a slower warp than the one that arrives: each warp arrives for itself.
    __syncwarp();
    if (thread_idx() % 32 == 0) mbarrier_arrive(&shared.scales_empty[cursor.stage]);
    cursor.advance(kScaleBuffers);
  }
};

// One warp's rows of a buffer, eight at a time so that their loads are in flight together: behind what the rings have on its way a load takes 6,000 clk. Rows past the last repeat it: fewer conditions, fewer
// registers.
BK_INLINE void sum_row_scales(const EngineParams& params, const f32* squares, u32 num_rows, u32 warp, f32* row_scale) {
  constexpr u32 kRowsAtOnce = 8;
  const u32 lane = thread_idx() % 32;
  const u32 num_pairs = params.dims.hidden / kSquaresColumns / 2;
  const float2* pairs = reinterpret_cast<const float2*>(squares);
#pragma unroll 1
  for (u32 first = warp * kRowsAtOnce; first < num_rows; first += kScaleWarps * kRowsAtOnce) {
    f32 sums[kRowsAtOnce] = {};
#pragma unroll 1
    for (u32 pair = lane; pair < num_pairs; pair += 64) {
      float2 low[kRowsAtOnce];
      float2 high[kRowsAtOnce];
      const u32 first_row = opaque(first);  // eight rows' addresses, kept for the next turn, would take the registers of eight rows' loads
#pragma unroll
      for (u32 i = 0; i < kRowsAtOnce; i++) {
        const float2* row = pairs + min(first_row + i, num_rows - 1) * num_pairs;
        low[i] = load_l2(row + pair);
        high[i] = pair + 32 < num_pairs ? load_l2(row + pair + 32) : float2{0.0f, 0.0f};
      }
#pragma unroll
      for (u32 i = 0; i < kRowsAtOnce; i++) sums[i] += (low[i].x + low[i].y) + (high[i].x + high[i].y);
    }
    f32 sum = 0.0f;  // of the lane's row
#pragma unroll
    for (u32 i = 0; i < kRowsAtOnce; i++) {
      for (u32 distance = 16; distance; distance /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      if (lane == i) sum = sums[i];
    }
    if (lane < kRowsAtOnce && first + lane < num_rows) row_scale[first + lane] = rsqrtf(sum / static_cast<f32>(params.dims.hidden) + params.dims.norm_eps);
  }
}

}  // namespace blinkimp
