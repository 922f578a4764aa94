// Where the splits of a narrow unit meet when several warpgroups had some: partial results in a workspace, folded by the last to arrive. GPU only.
//
// The warpgroup with the unit's first split folds its splits in registers and leaves one total; the others leave every split as it is,
// because a fold is not associative in its last bit. Each then adds the number of its splits to the unit's counter; whoever completes the
// count folds the rest in order and writes the output rows. Nobody waits, and no grid barrier is needed. Of long units owners fold a part each, and wait for all
// splits: attention_owners.cuh.
// Called by device/attention.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_owners.cuh>

namespace blinkimp {

// A unit's counter: splits that arrived in the low half, splits folded into the first total in the high half (of a unit without owners).
constexpr u32 kFoldedShift = 16;
static_assert(kFoldedShift == kOwnedFoldedShift, "leave_unit() adds to both alike");

// Splits of a row that are on their way: a lane holds head_dim / 32 neighbouring columns of each.
template <int kHeadDim>
struct MergeGroup {
  static constexpr u32 kSplits = 8;
  static constexpr u32 kPairs = kHeadDim / 64;
  float2 outputs[kSplits * kPairs];  // [split][pair of columns]

  // The first num_left splits from `part` on, which are `step` pairs apart. Zeros for what is not there: to keep what was there would take its registers from everybody.
  BK_INLINE void load(const float2* part, u32 step, u32 num_left) {
#pragma unroll
    for (u32 split = 0; split < kSplits; ++split, part += step) {
#pragma unroll
      for (u32 i = 0; i < kPairs; ++i) {
        outputs[split * kPairs + i] = split < num_left ? part[i] : float2{0.0f, 0.0f};
      }
    }
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
    f32 outputs[kColumns];
    const float2* first = reinterpret_cast<const float2*>(part_outputs<kHeadDim>(params, item_begin, row) + lane * kColumns);
#pragma unroll
    for (u32 i = 0; i < kColumns / 2; ++i) {
      const float2 value = first[i];
      outputs[i * 2] = value.x;
      outputs[i * 2 + 1] = value.y;
    }
    const u32 step = group * (kHeadDim / 2);
    const float2* part = reinterpret_cast<const float2*>(part_outputs<kHeadDim>(params, item_begin + num_folded, row) + lane * kColumns);
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
          for (u32 i = 0; i < kColumns / 2; ++i) {
            const float2 value = groups[at].outputs[split * kColumns / 2 + i];
            outputs[i * 2] = fold_value(outputs[i * 2], value.x, factors);
            outputs[i * 2 + 1] = fold_value(outputs[i * 2 + 1], value.y, factors);
          }
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
      store.pair(out_row, column + i * 2, pack_bf16x2(finish_value(outputs[i * 2], inverse_sum), finish_value(outputs[i * 2 + 1], inverse_sum)));
    }
  }
}

// The end of a narrow run that has not its whole unit: whoever completes the unit folds it, or its owners do. All threads of the warpgroup.
template <int kHeadDim, class Store>
BK_INLINE void leave_unit(const EngineParams& params, const AttentionRun& run, u8* shared_memory, u32 num_run_splits, const Store& store) {
  const bool has_owners = uniform(run.tasks_each) != 0;
  const bool owns = has_owners && uniform(run.first_task) != kNoTask;
  u32& message = attention_state<kHeadDim>(shared_memory).messages[compute_warpgroup()];
  warpgroup_sync();  // all partial results are written before the first thread releases them
  if (is_elected()) {
    u32* counter = unit_counter(params, run.unit_idx);
    const u32 added = num_run_splits + (run.first_split == 0 ? num_run_splits << kFoldedShift : 0);
    const u32 count = atom_add_acq_rel_gpu(counter, added) + added;  // pairs with itself: the last sees what the others left
    if (owns) {
      message = wait_unit(params, counter, run.num_splits, run.group * (kHeadDim / kTaskColumns) / run.tasks_each);
    } else if (!has_owners) {
      message = count;
      if (count % (1u << kFoldedShift) == run.num_splits) *counter = 0;  // for the next layer, grid barriers later
    }
  }
  warpgroup_sync();  // nobody reads the message, or partial results, before the first thread has acquired them
  const u32 said = uniform(message);
  if (owns) {
    fold_tasks<kHeadDim>(params, run, said, shared_memory + kScratchOffset + compute_warpgroup() * kQueryTileBytes<kHeadDim>, store);
  } else if (!has_owners && said % (1u << kFoldedShift) == run.num_splits) {
    merge_unit<kHeadDim>(params, run.item_begin, said >> kFoldedShift, run.num_splits, run.row_begin, run.kv_head, store);
  }
}

}  // namespace blinkimp
