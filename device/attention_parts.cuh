// Partial results of narrow units that several warpgroups share: where they stand, and the factors that fold them. GPU only.
//
// Workspace kWsAttentionPart: f32 outputs [items, group, head_dim], float2 (maximum, sum) [items, group]; items:
// attention_slots() * num_kv_heads. kWsAttentionCounters is zero between ops (allocated zeroed; the last to arrive resets).
// Called by device/attention_merge.cuh, attention_owners.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_tile.cuh>

namespace blinkimp {

template <int kHeadDim>
BK_INLINE f32* part_outputs(const EngineParams& params, u32 item_idx, u32 row) {
  return reinterpret_cast<f32*>(params.workspaces[kWsAttentionPart]) + (static_cast<u64>(item_idx) * group_of(params) + row) * kHeadDim;
}

template <int kHeadDim>
BK_INLINE float2* part_softmax(const EngineParams& params, u32 item_idx, u32 row) {
  const u64 num_parts = attention_slots(params) * params.dims.num_heads;
  return reinterpret_cast<float2*>(params.workspaces[kWsAttentionPart] + num_parts * kHeadDim * sizeof(f32)) + static_cast<u64>(item_idx) * group_of(params) + row;
}

BK_INLINE u32* unit_counter(const EngineParams& params, u32 unit_idx) {
  return reinterpret_cast<u32*>(params.workspaces[kWsAttentionCounters]) + unit_idx;
}

// The first warp of a warpgroup leaves the fragments of the unit's rows (a narrow unit has no others).
template <int kHeadDim>
BK_INLINE void store_part(const EngineParams& params, u32 item_idx, const f32 (&outputs)[kHeadDim / 2], const f32 (&maximum)[2], const f32 (&sum)[2]) {
  const u32 lane = thread_idx() % 128u;
  if (lane >= 32) return;
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 row = lane / 4u + half * 8u;
    if (row >= group_of(params)) continue;
    f32* values = part_outputs<kHeadDim>(params, item_idx, row) + lane % 4u * 2u;
#pragma unroll
    for (u32 tile = 0; tile < kHeadDim / 8; ++tile) *reinterpret_cast<float2*>(values + tile * 8) = make_float2(outputs[tile * 4 + half * 2], outputs[tile * 4 + half * 2 + 1]);
    if (lane % 4u == 0) *part_softmax<kHeadDim>(params, item_idx, row) = make_float2(maximum[half], sum[half]);
  }
}

// A lane's split of several in a row, with what the fold needs of it. The factors come from prefix maxima, which are exact in any order: so they are
// those of fold_split() one after the other, without its chain of exponentials.
struct MergeLane {
  FoldFactors factors;
  f32 sum;
};

// softmax: (maximum, sum) of the lane's split. before: maximum of the total so far; afterwards with these splits.
BK_INLINE MergeLane merge_factors(float2 softmax, f32 scale, f32& before) {
  const u32 lane = thread_idx() % 32u;
  f32 prefix = softmax.x;
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const f32 below = __shfl_up_sync(0xffffffffu, prefix, distance);
    if (lane >= distance) prefix = fmaxf(prefix, below);
  }
  prefix = fmaxf(prefix, before);
  const f32 previous = __shfl_up_sync(0xffffffffu, prefix, 1);
  const MergeLane merge{fold_factors(lane == 0 ? before : previous, softmax.x, prefix, scale), softmax.y};
  before = __shfl_sync(0xffffffffu, prefix, 31);
  return merge;
}

}  // namespace blinkimp
