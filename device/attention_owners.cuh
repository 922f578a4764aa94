// Long units of decode: their splits are folded by several warpgroups, each some columns of some rows, once all splits are there. GPU only.
//
// In attention_merge.cuh the last warpgroup to bring splits of a unit folds them all: 129 at 32,768 tokens, 264 KB through one SM while the others wait for the
// op's end. Where a unit has so many pages that no warpgroup's range holds two places of it that are a K-th of its pages apart, the K runs at these places own
// what is folded: 32 columns of a row are a task, a warp folds one, and each owner has as many of the unit's tasks. An owner waits for all of the unit's splits;
// whoever owns nothing leaves its splits and goes.
// Invariants:
//   W1  All warpgroups of a unit agree on its owners: they follow from the unit's pages and from most_range_pages, which every CTA computes alike.
//   W2  Who waits has nothing else to do in its range, so nobody waits for it: from an owner's place to the unit's end are at least as many pages as any range
//       has. A run that is followed by another unit's would hold up its CTA's other warpgroup, whose pages stand behind its own in the ring.
//   W3  The counter is zero again when the unit's last owner has seen that all splits are there.
// Called by device/attention_merge.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_parts.cuh>

namespace blinkimp {

// A unit's counter where it has owners: splits that arrived, from here on splits folded into the first total, and owners that have seen them all.
constexpr u32 kOwnedFoldedShift = 16;
constexpr u32 kOwnersShift = 25;
static_assert(kMostOwnedRange / kSplitPages + 1 < 1u << (kOwnersShift - kOwnedFoldedShift), "splits of a unit's first run");
static_assert(kNarrowRows * 128 / kTaskColumns < 1u << (32 - kOwnersShift), "owners");

// One thread of an owner. Until all splits of the unit are there; returns how many the first total holds.
BK_INLINE u32 wait_unit(const EngineParams& params, u32* counter, u32 num_splits, u32 num_owners) {
  u64 start_ns = 0;
  u32 seen;
  for (u32 tries = 1; (seen = ld_acquire_gpu(counter)) % (1u << kOwnedFoldedShift) != num_splits; tries++) {  // pairs with leave_unit()
    if (tries % kTriesPerLook) continue;
    const u64 now_ns = device_clock_ns();
    if (!start_ns) start_ns = now_ns;
    if (now_ns - start_ns > params.spin_budget_ns) fail(params, kFaultSpinExpired, kSiteAttentionUnit, num_splits, seen);
  }
  if ((atom_add_acq_rel_gpu(counter, 1u << kOwnersShift) >> kOwnersShift) + 1 == num_owners) *counter = 0;  // W3; for the next layer, grid barriers later
  return seen % (1u << kOwnersShift) >> kOwnedFoldedShift;
}

// A task's splits on their way: two halves of `bytes` that take turns, each [splits] values and behind them the factors and sum of each split.
struct TaskBuffer {
  static constexpr u32 kSplitBytes = kTaskColumns * sizeof(f32) + sizeof(float4);
  u8* bytes;       // [2][num_splits * kSplitBytes], of the warpgroup's query tile
  u32 num_splits;  // of a half

  BK_INLINE TaskBuffer(u8* begin, u32 num_bytes) : bytes(begin), num_splits(num_bytes / 2 / kSplitBytes) {}
  BK_INLINE f32* values(u32 half) const { return reinterpret_cast<f32*>(bytes + half * num_splits * kSplitBytes); }
  BK_INLINE float4* factors(u32 half) const { return reinterpret_cast<float4*>(values(half) + num_splits * kTaskColumns); }
};

// Folds a task of the unit in order and writes its columns, in one warp. As merge_unit(): the first item is the total of num_folded splits.
template <int kHeadDim, class Store>
BK_INLINE void fold_task(const EngineParams& params, const AttentionRun& run, u32 task, u32 num_folded, const TaskBuffer& buffer, const Store& store) {
  constexpr u32 kChunks = kTaskColumns / 4;  // of 16 bytes
  constexpr u32 kTasksOfRow = kHeadDim / kTaskColumns;
  const f32 scale = params.dims.attention_scale * 1.4426950408889634f;
  const u32 lane = thread_idx() % 32u;
  const u32 row = task / kTasksOfRow;
  const u32 column = task % kTasksOfRow * kTaskColumns;
  const u32 num_left = run.num_splits - num_folded;
  const u32 stride = group_of(params) * kHeadDim;
  const f32* values = part_outputs<kHeadDim>(params, run.item_begin + num_folded, row) + column;
  const float2* softmax = part_softmax<kHeadDim>(params, run.item_begin + num_folded, row);
  const auto send = [&](u32 begin, u32 half) {
    const u32 num = begin < num_left ? min(buffer.num_splits, num_left - begin) : 0;
#pragma unroll 1
    for (u32 split = lane / kChunks; split < num; split += 32 / kChunks) {
      cp_async_16(shared_address(buffer.values(half) + split * kTaskColumns + lane % kChunks * 4), values + static_cast<u64>(begin + split) * stride + lane % kChunks * 4, true);
    }
    cp_async_commit();
  };
  send(0, 0);
  send(buffer.num_splits, 1);
  const float2 first = *part_softmax<kHeadDim>(params, run.item_begin, row);
  f32 value = part_outputs<kHeadDim>(params, run.item_begin, row)[column + lane];
  f32 maximum = first.x;
  f32 sum = first.y;
#pragma unroll 1
  for (u32 begin = 0, half = 0; begin < num_left; begin += buffer.num_splits, half ^= 1) {
    const u32 num = min(buffer.num_splits, num_left - begin);
    float4* const factors = buffer.factors(half);
#pragma unroll 1
    for (u32 i = 0; i < num; i += 32) {  // splits past the last bring what changes no maximum
      const bool is_there = i + lane < num;
      const MergeLane merge = merge_factors(is_there ? softmax[(begin + i + lane) * group_of(params)] : make_float2(minus_infinite_score(), 0.0f), scale, maximum);
      if (is_there) factors[i + lane] = float4{merge.factors.total, merge.factors.split, merge.sum, 0.0f};
    }
    cp_async_wait<1>();
    __syncwarp();  // all lanes' copies and factors are there
    const f32* own = buffer.values(half) + lane;
#pragma unroll 4
    for (u32 split = 0; split < num; ++split) {
      const float4 of_split = factors[split];
      const FoldFactors fold{of_split.x, of_split.y};
      value = fold_value(value, own[split * kTaskColumns], fold);
      sum = fold_value(sum, of_split.z, fold);
    }
    __syncwarp();  // hazard: nobody reads this half any more
    send(begin + 2 * buffer.num_splits, half);
  }
  const f32 finished = finish_value(value, __frcp_rn(sum));
  const f32 next = __shfl_xor_sync(0xffffffffu, finished, 1);
  if (lane % 2u == 0) store.pair(run.row_begin, (run.kv_head * run.group + row) * kHeadDim + column + lane, pack_bf16x2(finished, next));
}

// All threads of an owner; the unit's splits are visible to them. tile: the warpgroup's query tile, which its last run has no use for any more.
template <int kHeadDim, class Store>
BK_INLINE void fold_tasks(const EngineParams& params, const AttentionRun& run, u32 num_folded, u8* tile, const Store& store) {
  const u32 warp = uniform(thread_idx() % kWarpgroupThreads / 32u);
  const u32 tasks_each = uniform(run.tasks_each);
  if (warp >= tasks_each) return;
  const u32 num_bytes = kQueryTileBytes<kHeadDim> / tasks_each;
  fold_task<kHeadDim>(params, run, run.first_task + warp, num_folded, TaskBuffer(tile + warp * num_bytes, num_bytes), store);
}

}  // namespace blinkimp
