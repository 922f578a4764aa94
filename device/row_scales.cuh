// The row scales of an op that normalises its input: 1 / rms of its rows, summed up by two warps while the products run. GPU only.
//
// RMSNorm is a factor per row, so it can enter after the product: the op before leaves the sums of squares of every 32 hidden columns
// (kWsSquares), the scale warps (10 and 11) add them up in a fixed order, the epilogue multiplies. A buffer holds the rows of an item; a CTA
// whose next item has the same rows goes on with the buffer it has. Writers and readers step through the items alike.
//
// A CTA sums up at most 64 rows for itself. Of a wider step's rows it sums up a share for all CTAs: 128 rows by each for itself were 64 KB into each SM an item, in eight
// rounds of loads that queue behind the rings'. A scale goes from CTA to CTA in one word, with a tag that says of which op it is (kWsRowScales): no fence, no counter.
// Called by device/gemm.cuh and device/scale_producer.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_wide_tiling.cuh>

namespace blinkimp {

// The epilogues' side. Both warpgroups hold a reader; kNoRow is no group yet.
struct ScaleReader {
  RingCursor cursor;
  u32 group;

  BK_INLINE void enter(WorkerShared& shared, u32 next_group) {
    if (group != kNoRow && group != next_group) give_back(shared);
    group = next_group;
  }
  // Calls nothing, not even where it is too late: with a call between two main loops the assembler keeps no address of theirs in uniform registers. leave() records the fault.
  BK_INLINE const f32* wait(WorkerShared& shared) const {
    u64* full = &shared.scales_full[cursor.stage];
    if (!__all_sync(0xffffffffu, mbarrier_try_wait(full, cursor.phase))) {
      const u64 start_ns = device_clock_ns();
      while (!__all_sync(0xffffffffu, mbarrier_try_wait(full, cursor.phase))) {
        if (__any_sync(0xffffffffu, device_clock_ns() - start_ns > shared.params->spin_budget_ns)) {
          shared.scales_are_late = 1;
          break;
        }
      }
    }
    return shared.row_scale[cursor.stage];
  }
  BK_INLINE void leave(WorkerShared& shared) {
    if (shared.scales_are_late) fail(*shared.params, kFaultSpinExpired, kSiteScales, cursor.phase, shared.scales_full[cursor.stage]);
    if (group != kNoRow) give_back(shared);
    if (is_first_thread()) shared.next_scales = cursor;
  }

 private:
  BK_INLINE void give_back(WorkerShared& shared) {
    // The warpgroup's last reader of the buffer may be a slower warp than the one that arrives: each warp arrives for itself.
    __syncwarp();
    mbarrier_arrive_if(&shared.scales_empty[cursor.stage], thread_idx() % 32 == 0);
    cursor.advance(kScaleBuffers);
  }
};

// ---- The scale warps' side ---------------------------------------------------------------------------------------
// The rows that this CTA sums up, of num_rows: all of a narrow step's, of a wide one's every num_workers-th.
struct RowShare {
  u32 first;
  u32 stride;
  u32 count;
};

BK_INLINE RowShare row_share(const EngineParams& params, u32 num_rows) {
  if (!is_wide(num_rows)) return RowShare{0, 1, num_rows};
  return RowShare{cta_idx(), params.num_workers, num_rows > cta_idx() ? (num_rows - cta_idx() + params.num_workers - 1) / params.num_workers : 0};
}

BK_INLINE u64* row_scale_words(const EngineParams& params) { return reinterpret_cast<u64*>(params.workspaces[kWsRowScales]); }

// One warp's rows of the share, eight at a time so that their loads are in flight together. Rows past the last repeat it: fewer conditions, fewer registers.
// store(row, scale).
template <class Store>
BK_INLINE void sum_row_scales(const EngineParams& params, const f32* squares, const RowShare& share, u32 warp, const Store& store) {
  constexpr u32 kRowsAtOnce = 8;
  const u32 lane = thread_idx() % 32;
  const u32 num_pairs = params.dims.hidden / kSquaresColumns / 2;
  const float2* pairs = reinterpret_cast<const float2*>(squares);
#pragma unroll 1
  for (u32 first = warp * kRowsAtOnce; first < share.count; first += kScaleWarps * kRowsAtOnce) {
    f32 sums[kRowsAtOnce] = {};
#pragma unroll 1
    for (u32 pair = lane; pair < num_pairs; pair += 64) {
      float2 low[kRowsAtOnce];
      float2 high[kRowsAtOnce];
      const u32 first_row = opaque(first);  // eight rows' addresses, kept for the next turn, would take the registers of eight rows' loads
#pragma unroll
      for (u32 i = 0; i < kRowsAtOnce; i++) {
        const float2* row = pairs + (share.first + min(first_row + i, share.count - 1) * share.stride) * num_pairs;
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
    if (lane < kRowsAtOnce && first + lane < share.count) store(share.first + (first + lane) * share.stride, rsqrtf(sum / static_cast<f32>(params.dims.hidden) + params.dims.norm_eps));
  }
}

// Of a wide step: scales of rows [row_begin, row_begin + num_rows), at most 128 of them, as their CTAs have summed them up for the op of this tag.
BK_INLINE void take_row_scales(const EngineParams& params, u32 tag, u32 row_begin, u32 num_rows, u32 warp, f32* row_scale) {
  const u64* words = row_scale_words(params) + row_begin;
  const u32 first = min(warp * 32 + thread_idx() % 32, num_rows - 1);
  const u32 second = min(first + 32 * kScaleWarps, num_rows - 1);
  u64 start_ns = 0;
  for (;;) {
    const u64 one = ld_relaxed_gpu(words + first);  // both on their way; relaxed: a word has its own tag (writer: sum_own_rows() of scale_producer.cuh)
    const u64 other = ld_relaxed_gpu(words + second);
    row_scale[first] = __uint_as_float(static_cast<u32>(one));
    row_scale[second] = __uint_as_float(static_cast<u32>(other));
    if (one >> 32 == tag && other >> 32 == tag) break;
    const u64 now_ns = device_clock_ns();
    if (!start_ns) start_ns = now_ns;
    if (now_ns - start_ns > params.spin_budget_ns) fail(params, kFaultSpinExpired, kSiteScales, tag, one);
  }
}

// Where a step begins, by compute threads: the tags of the steps before may come again, in another launch or after 2^32 barriers.
BK_INLINE void forget_row_scales(const EngineParams& params) {
  for (u32 row = cta_idx() * kComputeThreads + thread_idx(); row < params.max_step_tokens; row += params.num_workers * kComputeThreads) st_relaxed_gpu(row_scale_words(params) + row, 0);
}

}  // namespace blinkimp
