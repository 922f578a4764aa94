// Paged causal attention of a step: two phases with a grid barrier between them, called by all 256 compute threads of every CTA. GPU only.
//
//   attention_splits   prefill chunks whole, decode rows split by split        (attention_wide.cuh, attention_narrow.cuh)
//   --- grid barrier: the partial results of other CTAs are visible ---
//   attention_combine  folds the splits of each decode row and head, in order
// Scratch: kAttentionSharedBytes<head_dim> of shared memory, aligned to 256 bytes, free of readers and writers at both calls.
// store(row, column, bf16x2) writes two outputs of a plan row; column = head * head_dim + dimension (even), the lower one in the low half.
// Workspaces: attention_slots() slots of num_heads * (head_dim * 4 + 8) bytes (AttentionArgs.part_outputs, part_softmax).
// Why these shapes: work and bits are separated. attention_math.cuh fixes the bits of a row; the schedule may send a row down either path.
// Called by device/portable/worker.cuh. Test: pytest -m gpu tests/gpu/test_attention.py; without a GPU: pytest tests/host/test_attention_simt.py
#pragma once
#include <portable/attention_narrow.cuh>
#include <portable/attention_wide.cuh>

namespace blinkimp {

template <int kHeadDim>
constexpr u32 kAttentionSharedBytes =
    kWideSharedBytes<kHeadDim> > kNarrowSharedBytes<kHeadDim> ? kWideSharedBytes<kHeadDim> : kNarrowSharedBytes<kHeadDim>;
static_assert(kAttentionSharedBytes<128> <= 96 * 1024, "the worker's scratch");

template <int kHeadDim, int kBarrierId, class Store>
BK_INLINE void attention_splits(AttentionShared& attention, u8* shared_memory, const Store& store) {
  const AttentionArgs& args = attention.args;
  const u32 shared = shared_address(shared_memory);
  u32 item_idx = args.cta_idx;
  u32 num_wide_items;
  for (;; item_idx += args.num_ctas) {
    FoundItem found;
    ItemCursor<AttentionPhase::kWide> cursor;  // from the start each time: the items are long and registers rare
    const bool any = cursor.find(args, item_idx, &found);
    num_wide_items = cursor.items_before;
    if (!any) break;
    run_wide_item<kHeadDim, kBarrierId>(attention, found, shared, store);
  }
  named_barrier_sync<kBarrierId, kAttentionThreads>();  // hazard: the narrow items' loads overtake readers of the last wide item
  // Narrow items go on where the wide ones ended, so that the CTAs that had one wide item less come first.
  f32* shared_scores = reinterpret_cast<f32*>(shared_memory + kNarrowStages<kHeadDim> * kTileBytes<kHeadDim>);
  run_narrow_items<kHeadDim, kBarrierId>(args, item_idx - num_wide_items, shared, shared_scores, store);
}

// One warp per decode row and head; a lane holds head_dim / 32 neighbouring columns.
template <int kHeadDim, class Store>
BK_INLINE void attention_combine(const AttentionShared& attention, const Store& store) {
  const AttentionArgs& args = attention.args;
  const u32 thread = opaque(threadIdx.x);
  constexpr u32 kLaneColumns = kHeadDim / 32;
  constexpr u32 kWarps = kAttentionThreads / 32;
  const u32 lane = thread % 32u;
  FoundItem found;
  ItemCursor<AttentionPhase::kCombine> cursor;
  for (u32 item_idx = thread / 32u * args.num_ctas + args.cta_idx; cursor.find(args, item_idx, &found);
       item_idx += kWarps * args.num_ctas) {
    const PlanSeq& seq = args.seqs[found.seq_idx];
    const u32 num_splits =
        seq.position_begin / kSplitTokens + 1 - first_visible_key(seq.position_begin, args.window) / kSplitTokens;
    FoldTotal total{minus_infinite_score(), 0.0f};
    f32 outputs[kLaneColumns];
#pragma unroll
    for (u32 i = 0; i < kLaneColumns; ++i) outputs[i] = 0.0f;
    for (u32 split = 0; split < num_splits; ++split) {
      const u64 part = static_cast<u64>(found.slot_begin + split) * args.num_heads + found.item;
      const float2 softmax = args.part_softmax[part];
      const float2* values = reinterpret_cast<const float2*>(args.part_outputs + part * kHeadDim + lane * kLaneColumns);
      const FoldFactors factors = fold_split(total, softmax.x, softmax.y, args.scale);
#pragma unroll
      for (u32 i = 0; i < kLaneColumns / 2; ++i) {
        const float2 value = values[i];
        outputs[i * 2] = fold_value(outputs[i * 2], value.x, factors);
        outputs[i * 2 + 1] = fold_value(outputs[i * 2 + 1], value.y, factors);
      }
    }
    const f32 inverse_sum = __frcp_rn(total.sum);
#pragma unroll
    for (u32 i = 0; i < kLaneColumns / 2; ++i) {
      store(seq.row_begin, found.item * kHeadDim + lane * kLaneColumns + i * 2,
            pack_bf16x2(finish_value(outputs[i * 2], inverse_sum), finish_value(outputs[i * 2 + 1], inverse_sum)));
    }
  }
}

}  // namespace blinkimp
