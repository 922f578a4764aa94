// From the row's histogram and a window to the drawn token: the cuts of top-k and top-p and the draw are places in one order.
//
// Three ways, each right for any row it answers for, in the order in which device/sampling.cuh asks them: the window of near tokens alone;
// windows placed by the histogram; radix descents. All give the same token.
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling.py
#pragma once
#include <sampling_radix.cuh>

namespace blinkimp::sampling {

constexpr u32 kNotFound = 0xffffffff;
constexpr u64 kNoShare = ~u64{0};

struct Choice {
  u32 top_k;   // 0 is off
  u64 share;   // top_p in Q32, or kNoShare: off
  u64 random;  // 64 bits
};

// Cuts of the order, one after the other; each is a place, and what stands behind it is out. The draw's place is the token.
enum Stage : u32 {
  kStageTopK = 0,
  kStageTopP = 1,
  kStageDraw = 2,
  kNumStages = 3,
};

BK_INLINE bool stage_is_off(const Choice& choice, u32 stage) {
  return (stage == kStageTopK && choice.top_k == 0) || (stage == kStageTopP && choice.share == kNoShare);
}

// The running weight of the stage's place, where `total` weight is left before it; top-k: the running count, where `total` tokens are left.
BK_INLINE u64 target_of(const Choice& choice, u32 stage, u64 total) {
  if (stage == kStageTopK) return choice.top_k < total ? choice.top_k : total;
  if (stage == kStageDraw) return mul_hi_u64(choice.random, total) + 1u;
  const u64 target = (total >> 32) * choice.share + (((total & 0xffffffffu) * choice.share + 0xffffffffu) >> 32);
  return target > 0 ? target : 1;
}

// The token by radix descents; for any row.
template <class Group>
BK_INLINE u32 choose_by_radix(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& weighing, const Choice& choice) {
  Candidates candidates{weighing, kKeyOfMinusInfinity + 1u, kNoRow};
  BK_NO_UNROLL
  for (u32 stage = 0; stage < kNumStages; ++stage) {
    if (stage_is_off(choice, stage)) continue;
    cut_candidates(group, scratch, row, &candidates, stage != kStageTopK, [&](u64 total) { return target_of(choice, stage, total); });
  }
  return candidates.cut_idx;
}

// Makes `window` one that holds what the running weight (or count) reaches at `target`: from the best token on, if that fits. False: its
// bin alone does not fit. The new window has a token at least.
template <class Group>
BK_INLINE bool move_window(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& weighing, u64 target, bool by_weight,
                           Window* window, u64* num_before) {
  const u32 bin = find_bin(group, scratch, target, by_weight);
  const u64 num_through = sum_bins(group, scratch, 0, bin + 1, false);
  const bool from_best = num_through <= kWindowTokens;
  if (!from_best && scratch->bin_counts[bin] > kWindowTokens) return false;
  const u64 weight_before = from_best ? 0 : sum_bins(group, scratch, 0, bin, true);
  *num_before = from_best ? 0 : num_through - scratch->bin_counts[bin];
  *window = open_window(group, scratch, row, weighing, from_best ? 0 : bin, bin, weight_before);
  return window->num_tokens > 0;
}

// The token, where the window holds the first top_k of the row at least (or all of them); kNotFound where none of those weighs anything.
template <class Group>
BK_INLINE u32 choose_of_first(const Group& group, SampleScratch* scratch, const Window& window, const Weighing& weighing, const Choice& choice) {
  const WindowTokens& tokens = scratch->of.window;
  sum_window(group, scratch, window, weighing);
  u32 place = (choice.top_k < window.num_tokens ? choice.top_k : window.num_tokens) - 1;
  u64 kept = tokens.sums[place];  // weight of what is left
  if (kept == 0) return kNotFound;
  BK_NO_UNROLL
  for (u32 stage = kStageTopP; stage < kNumStages; ++stage) {
    if (stage_is_off(choice, stage)) continue;
    place = search_window(scratch, window, target_of(choice, stage, kept));
    kept = tokens.sums[place];
  }
  return static_cast<u32>(tokens.codes[place]);
}

// The token by histogram and windows, or kNotFound where they cannot hold it. has_weights: the bins have them; without, top_k is on and the
// window of the first k tokens is all that is needed. near: a window of the first tokens, sorted but not yet summed, or an empty one.
template <class Group>
BK_INLINE u32 choose_by_window(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& weighing, const Choice& choice,
                               bool has_weights, const Window& near) {
  const WindowTokens& tokens = scratch->of.window;
  if (near.num_tokens > 0) sum_window(group, scratch, near, weighing);
  const u64 num_tokens = sum_bins(group, scratch, 0, kNumBins, false);
  u64 kept = has_weights ? sum_bins(group, scratch, 0, kNumBins, true) : 0;  // weight of what is left
  Window window = near;
  u64 num_before = 0;  // tokens before the window
  u32 place = 0;       // in the window
  BK_NO_UNROLL
  for (u32 stage = 0; stage < kNumStages; ++stage) {
    const bool by_weight = stage != kStageTopK;
    if (stage_is_off(choice, stage) || (!by_weight && has_weights && choice.top_k >= num_tokens)) continue;
    const u64 target = target_of(choice, stage, by_weight ? kept : num_tokens);
    const bool is_there = by_weight && window.num_tokens > 0 && target > window.weight_before && target <= tokens.sums[window.num_tokens - 1];
    if (!is_there && !move_window(group, scratch, row, weighing, target, by_weight, &window, &num_before)) return kNotFound;
    if (!has_weights && num_before > 0) return kNotFound;
    if (by_weight) {
      place = search_window(scratch, window, target);
    } else {
      // Without weights the bins count tokens of weight 0 too; they are the last ones, and the window leaves them out.
      place = (target - num_before < window.num_tokens ? static_cast<u32>(target - num_before) : window.num_tokens) - 1;
    }
    kept = tokens.sums[place];
  }
  return static_cast<u32>(tokens.codes[place]);
}

}  // namespace blinkimp::sampling
