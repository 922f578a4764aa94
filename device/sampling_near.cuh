// The tokens near the best one, known before the row is read: where the first k tokens lie follows from the best token of each of a thousand
// parts of the row.
//
// If k parts have a best token whose logit, edited, lies within some distance of the anchor, then so do k tokens at least. So the pass that
// sums the row's weights gathers what lies within that distance, and top-k, greedy rows with edits and top logprobs need no other pass: of
// a language model's row some hundred tokens are gathered for k = 50. Where that fails (few allowed tokens, thousands of equal ones) the
// histogram of sampling_window.cuh decides. The best tokens come from the LM head's tiles, or from a pass of the sampling's own.
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling.py tests/host/test_sampling_edits.py
#pragma once
#include <sampling_window.cuh>

namespace blinkimp::sampling {

constexpr u32 kOwnParts = kWindowTokens;  // their best tokens lie in the window's sums, which nobody needs so early

struct PartBests {   // the best token of each part of the row by the model's logits, every token in some part
  const u64* codes;  // [num_parts] best_code(); 0: the part is empty
  u32 num_parts;
};

struct Best {  // ids are taken in rising order, so the first of equals stays
  f32 logit;
  u32 idx;
  BK_INLINE void take(f32 other, u32 other_idx) {
    const bool is_better = other > logit;
    logit = is_better ? other : logit;
    idx = is_better ? other_idx : idx;
  }
  BK_INLINE u64 code() const { return best_code(logit, idx); }
};
BK_INLINE Best no_best() { return Best{minus_infinity(), kNoRow}; }

struct BestTokens {  // best_code() of the row's, by the model's logits and by those to choose by
  u64 model;
  u64 chosen;
};

// A pass for the best tokens. With `parts` [kOwnParts] it leaves those of the group's own parts there, by the model's logits.
template <class Group>
BK_INLINE BestTokens find_best_tokens(const Group& group, SampleScratch* scratch, const Row& row, u64* parts) {
  const u32 num_own = kOwnParts / group.count;  // parts of a lane
  const u32 num_batches = (row.num_quads() + 2 * group.count - 1) / (2 * group.count);  // of a lane, at most
  const u32 num_each = parts != nullptr ? (num_batches + num_own - 1) / num_own : num_batches;  // batches of a part
  u32 num_left = num_each;
  u32 num_written = 0;
  u64 model = 0;
  Best part = no_best();
  Best chosen = no_best();
  const auto close_part = [&] {
    const u64 code = part.code();
    model = code > model ? code : model;
    if (parts != nullptr) parts[group.id * num_own + num_written++] = code;
    part = no_best();
    num_left = num_each;
  };
  row.for_each_batch(group, [&](const RowBatch& batch) {
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) part.take(batch.model[i], batch.idx(i));
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) chosen.take(batch.chosen[i], batch.idx(i));
    if (--num_left == 0) close_part();
  });
  if (num_left != num_each) close_part();
  if (parts != nullptr) {
    while (num_written < num_own) parts[group.id * num_own + num_written++] = 0;
  }
  model = max_over_group(group, scratch, model);  // its barriers stand between the parts' writers and their readers
  return BestTokens{model, max_over_group(group, scratch, chosen.code())};
}

// A distance below the anchor within which num_wanted tokens lie at least, by the logits to choose by; -inf, within which nothing lies, if
// the parts do not tell. Clears num_gathered. A multiple of a bin: those are found by their counts.
template <class Group>
BK_INLINE f32 near_distance(const Group& group, SampleScratch* scratch, const Row& row, const PartBests& parts, f32 anchor, u32 num_wanted) {
  const Weighing distances{anchor, 0.0f, 0};
  clear_bins(group, scratch);
  for (u32 part = group.id; part < parts.num_parts; part += group.count) {
    const u64 code = parts.codes[part];
    const u32 key = static_cast<u32>(code >> 32);
    if (key <= kKeyOfMinusInfinity) continue;
    f32 logit = orderable_logit(value_of_key(key));
    if (row.is_edited) logit = edited_logit(*row.scratch, 0xffffffffu - static_cast<u32>(code), logit);
    const u32 bin = distances.bin(logit < anchor ? logit : anchor);
    if (bin < kNumBins - 1) group.atomic_add(&scratch->bin_counts[bin], 1);
  }
  if (group.id == 0) scratch->num_gathered = 0;
  group.sync();  // hazard: a bin is read before all parts were counted
  if (sum_bins(group, scratch, 0, kNumBins - 1, false) < num_wanted) return minus_infinity();
  return static_cast<f32>(find_bin(group, scratch, num_wanted, false) + 1u) * (1.0f / kBinsPerUnit);
}

// What near_distance() spoke of. distance -inf: never.
BK_INLINE bool is_near(f32 anchor, f32 distance, f32 logit) { return anchor - logit < distance; }

}  // namespace blinkimp::sampling
