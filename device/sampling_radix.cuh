// The slow way to a token by its place in the order: radix descents over the whole row, which no row can defeat.
//
// For rows that the windows of sampling_window.cuh cannot hold: thousands of tokens with nearly the same logit where the cut or the draw
// falls. Five passes over the row and more for each cut. Same results.
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling.py
#pragma once
#include <sampling_window.cuh>

namespace blinkimp::sampling {

constexpr u32 kRadixBinsPerPart = kNumRadixBins / kNumParts;

// The tokens still in play: of some weight, and not behind the cut in the order (key falling, index rising).
struct Candidates {
  Weighing weighing;
  u32 cut_key;
  u32 cut_idx;

  BK_INLINE u64 weight(u32 idx, f32 logit) const {
    const u32 key = order_key(logit);
    return key < cut_key || (key == cut_key && idx > cut_idx) ? 0 : weighing.weight(logit);
  }
};

// One digit of the descent: bins over digits of the code of all candidates whose code continues `prefix`; higher digits first. The code is
// the key, or the index among those of fixed_key. A candidate counts its weight, or 1. Returns the sum over all bins.
template <class Group>
BK_INLINE u64 fill_radix_bins(const Group& group, SampleScratch* scratch, const Row& row, const Candidates& candidates, bool by_index,
                              u32 fixed_key, u32 prefix, u32 shift, u32 num_bits, bool by_weight) {
  RadixBins& bins = scratch->of.radix;
  for (u32 bin = group.id; bin < kNumRadixBins; bin += group.count) bins.low[bin] = bins.high[bin] = 0;
  group.sync();  // hazard: a bin is added to before it was cleared
  const u32 prefix_shift = shift + num_bits;
  row.for_each(group, [&](u32 idx, f32, f32 logit) {
    const u32 key = order_key(logit);
    if (by_index && key != fixed_key) return;
    const u32 code = by_index ? row.vocab - 1u - idx : key;
    if (prefix_shift < 32u && (code >> prefix_shift) != prefix) return;
    const u64 weight = candidates.weight(idx, logit);
    if (weight == 0) return;
    const u32 bin = kNumRadixBins - 1u - ((code >> shift) & ((1u << num_bits) - 1u));
    add_weight(group, &bins.low[bin], &bins.high[bin], by_weight ? weight : 1);
  });
  group.sync();  // hazard: a bin is read before all candidates were added
  for (u32 part = group.id; part < kNumParts; part += group.count) {
    u64 sum = 0;
    for (u32 i = 0; i < kRadixBinsPerPart; ++i) {
      const u32 bin = part * kRadixBinsPerPart + i;
      sum += (static_cast<u64>(bins.high[bin]) << 32) | bins.low[bin];
    }
    scratch->parts[part] = sum;
  }
  return fold_parts(group, scratch);
}

// The digit at which the running sum reaches *target.
BK_INLINE u32 walk_radix_bins(const SampleScratch* scratch, u64* target) {
  const RadixBins& bins = scratch->of.radix;
  u32 bin = walk_parts(scratch, target) * kRadixBinsPerPart;
  for (; bin < kNumRadixBins - 1; ++bin) {
    const u64 amount = (static_cast<u64>(bins.high[bin]) << 32) | bins.low[bin];
    if (amount >= *target) break;
    *target -= amount;
  }
  return kNumRadixBins - 1u - bin;
}

// Moves the cut to the token at which the running count or weight reaches target_of(sum of all candidates).
template <class Group, class TargetOf>
BK_INLINE void cut_candidates(const Group& group, SampleScratch* scratch, const Row& row, Candidates* candidates, bool by_weight,
                              TargetOf target_of) {
  u32 num_idx_bits = 1;
  while (num_idx_bits < 32u && ((row.vocab - 1u) >> num_idx_bits) != 0u) ++num_idx_bits;
  u64 target = 0;
  u32 key = 0;
  u32 prefix = 0;
  bool by_index = false;  // digits of the key, then of the index among equals
  BK_NO_UNROLL
  for (u32 shift = 32;;) {
    const u32 num_bits = shift < kRadixBits ? shift : kRadixBits;
    const u64 total = fill_radix_bins(group, scratch, row, *candidates, by_index, key, prefix, shift - num_bits, num_bits, by_weight);
    if (shift == 32 && !by_index) target = target_of(total);
    prefix = (prefix << num_bits) | walk_radix_bins(scratch, &target);
    group.sync();  // hazard: the next digit clears bins that a member still reads
    shift -= num_bits;
    if (shift > 0) continue;
    if (by_index) break;
    by_index = true;
    key = prefix;
    prefix = 0;
    shift = num_idx_bits;
  }
  candidates->cut_key = key;
  candidates->cut_idx = row.vocab - 1u - prefix;
}

}  // namespace blinkimp::sampling
