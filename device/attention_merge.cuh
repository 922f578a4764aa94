// Where the splits of a narrow unit meet when several warpgroups had some: partial results in a workspace, folded by the last to arrive. GPU only.
//
// The warpgroup with the unit's first split folds its splits in registers and leaves one total; the others leave every split as it is,
// because a fold is not associative in its last bit. Each then adds the number of its splits to the unit's counter; whoever completes the
// count folds the rest in order and writes the output rows. Nobody waits, and no grid barrier is needed.
// Workspace kWsAttentionPart: f32 outputs [items, group, head_dim], float2 (maximum, sum) [items, group]; items:
// attention_slots() * num_kv_heads. kWsAttentionCounters is zero between ops (allocated zeroed; the last to arrive resets).
// Called by device/attention.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_tile.cuh>

namespace blinkimp {

// A unit's counter: splits that arrived in the low half, splits folded into the first total in the high half.
constexpr u32 kFoldedShift = 16;

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

// A lane's columns of a row, side by side: one load.
template <int kHeadDim>
struct alignas(kHeadDim / 32 * sizeof(f32)) MergeColumns {
  f32 values[kHeadDim / 32];  // [column]
};

// Splits of a row that are on their way.
template <int kHeadDim>
struct MergeGroup {
  static constexpr u32 kSplits = 8;
  using Columns = MergeColumns<kHeadDim>;
  Columns outputs[kSplits];  // [split]

  // The first num_left splits from `part` on, which are `step` columns of lanes apart. Zeros for what is not there: to keep what was there would take its registers from everybody.
  BK_INLINE void load(const Columns* part, u32 step, u32 num_left) {
#pragma unroll
    for (u32 split = 0; split < kSplits; ++split, part += step) outputs[split] = split < num_left ? *part : Columns{};
  }
};

// Folds the items of one unit in order and writes its rows: the first is the total of num_folded splits, the others are splits num_folded ..
// num_splits - 1. One warp a row. 32,768 tokens have 128 splits, and only as many warpgroups are at work as there are kv heads: so three groups of splits are on
// their way at once.
template <int kHeadDim, class Store>
BK_INLINE void merge_unit(const EngineParams& params, u32 item_begin, u32 num_folded, u32 num_splits, u32 out_row, u32 kv_head, const Store& store) {
  using Group = MergeGroup<kHeadDim>;
  constexpr u32 kColumns = kHeadDim / 32;
  constexpr u32 kGroupsAtOnce = 3;
  const f32 scale = params.dims.attention_scale * 1.4426950408889634f;
  const u32 lane = thread_idx() % 32u;
  const u32 group = group_of(params);
#pragma unroll 1
  for (u32 row = thread_idx() % 128u / 32u; row < group; row += 4) {
    // Splits past the last bring what changes no maximum.
    const auto load_softmax = [&](u32 split) { return split < num_splits ? *part_softmax<kHeadDim>(params, item_begin + split, row) : make_float2(minus_infinite_score(), 0.0f); };
    float2 softmax = load_softmax(num_folded + lane);
    const float2 first_softmax = *part_softmax<kHeadDim>(params, item_begin, row);
    const auto columns_of = [&](u32 item) { return reinterpret_cast<const MergeColumns<kHeadDim>*>(part_outputs<kHeadDim>(params, item, row)) + lane; };
    MergeColumns<kHeadDim> outputs = *columns_of(item_begin);
    const u32 step = group * 32;
    const MergeColumns<kHeadDim>* part = columns_of(item_begin + num_folded);
    Group groups[kGroupsAtOnce];
    u32 num_unsent = num_splits - num_folded;
    const auto send = [&](Group& to) {
      to.load(part, step, num_unsent);
      part += Group::kSplits * step;
      num_unsent -= min(num_unsent, Group::kSplits);
    };
#pragma unroll
    for (u32 i = 0; i < kGroupsAtOnce; ++i) send(groups[i]);
    FoldTotal total{first_softmax.x, first_softmax.y};
    MergeLane merge{};
#pragma unroll 1
    for (u32 split_begin = num_folded; split_begin < num_splits;) {
#pragma unroll
      for (u32 at = 0; at < kGroupsAtOnce; ++at) {  // each has its registers: to move what is on its way is to wait for it
        const u32 in_warp = (split_begin - num_folded) % 32u;  // the factors of 32 splits are a warp's work
        if (in_warp == 0) {
          merge = merge_factors(softmax, scale, total.maximum);
          softmax = load_softmax(split_begin + 32 + lane);
        }
#pragma unroll
        for (u32 split = 0; split < Group::kSplits; ++split) {  // those past the last, too: total * 1 + 0 * 0. A branch between two would leave each shuffle's latency by itself
          const FoldFactors factors{__shfl_sync(0xffffffffu, merge.factors.total, in_warp + split), __shfl_sync(0xffffffffu, merge.factors.split, in_warp + split)};
          total.sum = fold_value(total.sum, __shfl_sync(0xffffffffu, merge.sum, in_warp + split), factors);
#pragma unroll
          for (u32 i = 0; i < kColumns; ++i) outputs.values[i] = fold_value(outputs.values[i], groups[at].outputs[split].values[i], factors);
        }
        split_begin += Group::kSplits;
        if (split_begin >= num_splits) break;
        send(groups[at]);
      }
    }
    const f32 inverse_sum = __frcp_rn(total.sum);
    const u32 column = (kv_head * group + row) * kHeadDim + lane * kColumns;
#pragma unroll
    for (u32 i = 0; i < kColumns / 2; ++i) {
      store.pair(out_row, column + i * 2, pack_bf16x2(finish_value(outputs.values[i * 2], inverse_sum), finish_value(outputs.values[i * 2 + 1], inverse_sum)));
    }
  }
}

// The end of a narrow run that has not its whole unit: whoever completes the unit folds it. All threads of the warpgroup.
template <int kHeadDim, class Store>
BK_INLINE void leave_unit(const EngineParams& params, const AttentionRun& run, u8* shared_memory, u32 num_run_splits, const Store& store) {
  warpgroup_sync();  // all partial results are written before the first thread releases them
  if (is_elected()) {
    u32* counter = unit_counter(params, run.unit_idx);
    const u32 added = num_run_splits + (run.first_split == 0 ? num_run_splits << kFoldedShift : 0);
    const u32 count = atom_add_acq_rel_gpu(counter, added) + added;  // pairs with itself: the last sees what the others left
    attention_state<kHeadDim>(shared_memory).messages[compute_warpgroup()] = count;
    if (count % (1u << kFoldedShift) == run.num_splits) *counter = 0;  // for the next layer, grid barriers later
  }
  warpgroup_sync();  // nobody reads the message, or partial results, before the first thread has acquired them
  const u32 count = uniform(attention_state<kHeadDim>(shared_memory).messages[compute_warpgroup()]);
  if (count % (1u << kFoldedShift) == run.num_splits) {
    merge_unit<kHeadDim>(params, run.item_begin, count >> kFoldedShift, run.num_splits, run.row_begin, run.kv_head, store);
  }
}

}  // namespace blinkimp
