// A row's tokens by their distance from the best one: a histogram of the whole row, and a sorted window of it in shared memory.
//
// For rows whose near tokens (sampling_near.cuh) do not decide.
// To find "the token at which the running weight reaches t", in the order (logit falling, index rising), it is enough to know the weight of
// each bin of similar logits, and to sort the one bin in which t falls. A row is passed over once for the histogram and once per window;
// one window holds everything that top-k or top-p keep in nearly all real rows.
// All sums are of integers, so neither the order of additions nor that of the gathered tokens can change a result.
// A constraint's table may change between two passes (its ingress must not, but may): so no walk trusts that it finds what an earlier pass
// has counted. The token is then any one; nothing is read or written beyond its array, and all members of the group go the same way.
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling.py
#pragma once
#include <sampling_row.cuh>

namespace blinkimp {

constexpr u32 kMaxSampleLanes = 256;
constexpr u32 kNumParts = 256;
constexpr u32 kPartsPerFold = 16;
constexpr u32 kNumFolds = kNumParts / kPartsPerFold;
constexpr u32 kBinsPerPart = 6;
constexpr u32 kNumBins = kNumParts * kBinsPerPart;  // the last one is for all that is farther
constexpr f32 kBinsPerUnit = 64.0f;                 // of logit: bins of 1/64 up to 24, some hundred tokens of a usual row each
constexpr u32 kWindowTokens = 2048;
constexpr u32 kRadixBits = 11;
constexpr u32 kNumRadixBins = 1u << kRadixBits;

struct WindowTokens {
  u64 codes[kWindowTokens];  // ~order_key << 32 | id, so that rising codes are the order
  u64 sums[kWindowTokens];   // running weight of the sorted tokens, that before the window included
};

struct RadixBins {              // device/sampling_radix.cuh
  u32 low[kNumRadixBins];       // low words of each bin's weight: two 32-bit atomics with a carry, because a 64-bit
  u32 high[kNumRadixBins];      // shared-memory add is a compare-and-swap loop
};

struct SampleScratch {          // shared by the group
  union {
    WindowTokens window;
    RadixBins radix;
  } of;                         // one at a time
  u32 bin_counts[kNumBins];     // tokens
  u32 bin_low[kNumBins];        // low words of weights
  u32 bin_high[kNumBins];       // high words of weights
  u64 parts[kNumParts];         // of a sum over the group
  u64 folds[kNumFolds];         // sums of kPartsPerFold parts
  u32 num_gathered;
  u32 reserved0;
  EditScratch edits;
};
static_assert(sizeof(SampleScratch) <= 64 * 1024, "the worker's scratch");

#if BK_GPU
// Threads 0 .. kNumThreads-1 of a CTA, synchronised by a named barrier because other warps of the CTA run beside them.
template <int kBarrierId, int kNumThreads>
struct BarrierSampleGroup {
  static constexpr u32 count = kNumThreads;
  u32 id = opaque(threadIdx.x);  // or every address made of it lives through all ops of the worker's loop
  BK_INLINE void sync() const { named_barrier_sync<kBarrierId, kNumThreads>(); }
  BK_INLINE u32 atomic_add(u32* address, u32 value) const { return atom_add_relaxed_shared(address, value); }
  BK_INLINE u32 atomic_add_global(u32* address, u32 value) const { return atom_add_relaxed_gpu(address, value); }
};
#else
struct SingleSampleGroup {
  static constexpr u32 id = 0;
  static constexpr u32 count = 1;
  void sync() const {}
  u32 atomic_add(u32* address, u32 value) const {
    const u32 old = *address;
    *address = old + value;
    return old;
  }
  u32 atomic_add_global(u32* address, u32 value) const { return atomic_add(address, value); }
};
#endif

namespace sampling {

// ---- Sums over the group -----------------------------------------------------------------------------------------
// parts[0 .. kNumParts) -> folds; returns the sum of all. Ends with the folds visible to all.
template <class Group>
BK_INLINE u64 fold_parts(const Group& group, SampleScratch* scratch) {
  group.sync();  // hazard: a part is summed before its owner wrote it
  for (u32 fold = group.id; fold < kNumFolds; fold += group.count) {
    u64 sum = 0;
    for (u32 i = 0; i < kPartsPerFold; ++i) sum += scratch->parts[fold * kPartsPerFold + i];
    scratch->folds[fold] = sum;
  }
  group.sync();  // hazard: a fold is read before it was written
  u64 total = 0;
  for (u32 fold = 0; fold < kNumFolds; ++fold) total += scratch->folds[fold];
  return total;
}

// The part in which the running sum reaches *target (1 <= *target <= total); *target becomes what is missing at its beginning.
BK_INLINE u32 walk_parts(const SampleScratch* scratch, u64* target) {
  u32 fold = 0;
  while (fold < kNumFolds - 1 && scratch->folds[fold] < *target) *target -= scratch->folds[fold++];
  u32 part = fold * kPartsPerFold;
  while (part < kNumParts - 1 && scratch->parts[part] < *target) *target -= scratch->parts[part++];
  return part;
}

template <class Group>
BK_INLINE u64 sum_over_group(const Group& group, SampleScratch* scratch, u64 value) {
  for (u32 part = group.id; part < kNumParts; part += group.count) scratch->parts[part] = part == group.id ? value : 0;
  const u64 total = fold_parts(group, scratch);
  group.sync();  // hazard: the next writer of parts or folds overtakes a reader
  return total;
}

template <class Group>
BK_INLINE u64 max_over_group(const Group& group, SampleScratch* scratch, u64 value) {
  scratch->parts[group.id] = value;
  group.sync();  // hazard: a value is read before its owner wrote it
  for (u32 fold = group.id; fold < kNumFolds; fold += group.count) {
    u64 best = 0;
    for (u32 i = fold; i < group.count; i += kNumFolds) best = scratch->parts[i] > best ? scratch->parts[i] : best;
    scratch->folds[fold] = best;
  }
  group.sync();  // hazard: a fold is read before it was written
  u64 best = 0;
  for (u32 fold = 0; fold < kNumFolds; ++fold) best = scratch->folds[fold] > best ? scratch->folds[fold] : best;
  group.sync();  // hazard: the next writer of parts or folds overtakes a reader
  return best;
}

// ---- Order, distance, weight -------------------------------------------------------------------------------------
BK_INLINE u64 best_code(f32 logit, u32 idx) { return (static_cast<u64>(order_key(logit)) << 32) | (0xffffffffu - idx); }
BK_INLINE u64 window_code(f32 logit, u32 idx) { return (static_cast<u64>(~order_key(logit)) << 32) | idx; }
BK_INLINE f32 logit_of_code(u64 code) { return value_of_key(~static_cast<u32>(code >> 32)); }

BK_INLINE bool is_finite(f32 logit) { return logit > minus_infinity(); }  // of an orderable logit

struct Weighing {   // how much a logit counts
  f32 max_logit;
  f32 scale;        // log2(e) / temperature
  u64 min_weight;   // less counts as nothing; 0 and 1 are off

  BK_INLINE u64 weight(f32 logit) const {
    const u64 weight = exp2_neg_q44(mul_f32(max_logit - logit, scale));
    return weight >= min_weight ? weight : 0;
  }
  BK_INLINE u32 bin(f32 logit) const {  // rises as the logit falls
    const f32 distance = mul_f32(max_logit - logit, kBinsPerUnit);
    return distance < static_cast<f32>(kNumBins - 1) ? static_cast<u32>(distance) : kNumBins - 1;
  }
};

// ---- Histogram ---------------------------------------------------------------------------------------------------
template <class Group>
BK_INLINE void clear_bins(const Group& group, SampleScratch* scratch) {
  for (u32 bin = group.id; bin < kNumBins; bin += group.count) scratch->bin_counts[bin] = scratch->bin_low[bin] = scratch->bin_high[bin] = 0;
  group.sync();  // hazard: a bin is added to before it was cleared
}

template <class Group>
BK_INLINE void add_weight(const Group& group, u32* low_word, u32* high_word, u64 weight) {
  const u32 low = static_cast<u32>(weight);
  const u32 old = group.atomic_add(low_word, low);
  const u32 high = static_cast<u32>(weight >> 32) + (old + low < old ? 1u : 0u);
  if (high != 0) group.atomic_add(high_word, high);
}

BK_INLINE u64 bin_weight(const SampleScratch* scratch, u32 bin) {
  return (static_cast<u64>(scratch->bin_high[bin]) << 32) | scratch->bin_low[bin];
}
BK_INLINE u64 bin_amount(const SampleScratch* scratch, u32 bin, bool by_weight) {
  return by_weight ? bin_weight(scratch, bin) : scratch->bin_counts[bin];
}

// Tokens (or their weight) of the bins [begin, end).
template <class Group>
BK_INLINE u64 sum_bins(const Group& group, SampleScratch* scratch, u32 begin, u32 end, bool by_weight) {
  u64 sum = 0;
  for (u32 bin = begin + group.id; bin < end; bin += group.count) sum += bin_amount(scratch, bin, by_weight);
  return sum_over_group(group, scratch, sum);
}

// The bin in which the running count or weight reaches target (1 <= target <= that of all).
template <class Group>
BK_INLINE u32 find_bin(const Group& group, SampleScratch* scratch, u64 target, bool by_weight) {
  for (u32 part = group.id; part < kNumParts; part += group.count) {
    u64 sum = 0;
    for (u32 i = 0; i < kBinsPerPart; ++i) sum += bin_amount(scratch, part * kBinsPerPart + i, by_weight);
    scratch->parts[part] = sum;
  }
  fold_parts(group, scratch);
  u32 bin = walk_parts(scratch, &target) * kBinsPerPart;
  for (u64 amount; bin < kNumBins - 1 && (amount = bin_amount(scratch, bin, by_weight)) < target; ++bin) target -= amount;
  group.sync();  // hazard: the next writer of parts or folds overtakes a reader
  return bin;
}

// ---- Window ------------------------------------------------------------------------------------------------------
struct Window {        // sorted tokens in scratch->of.window; num_tokens 0: none yet
  u32 num_tokens;
  u64 weight_before;   // of all tokens before the first
};

// codes[0 .. num_tokens) in rising order.
template <class Group>
BK_INLINE void sort_codes(const Group& group, u64* codes, u32 num_tokens) {
  if (group.count == 1) {  // one lane does better without a network
    constexpr u32 kGaps[] = {701, 301, 132, 57, 23, 10, 4, 1};  // Ciura
    for (const u32 gap : kGaps) {
      for (u32 i = gap; i < num_tokens; ++i) {
        const u64 code = codes[i];
        u32 place = i;
        for (; place >= gap && codes[place - gap] > code; place -= gap) codes[place] = codes[place - gap];
        codes[place] = code;
      }
    }
    return;
  }
  u32 num_sorted = 1;
  while (num_sorted < num_tokens) num_sorted *= 2;
  for (u32 i = num_tokens + group.id; i < num_sorted; i += group.count) codes[i] = ~u64{0};
  group.sync();  // hazard: the network reads what another lane gathered or padded
  for (u32 num_merged = 2; num_merged <= num_sorted; num_merged *= 2) {
    for (u32 distance = num_merged / 2; distance > 0; distance /= 2) {
      for (u32 pair = group.id; pair < num_sorted / 2; pair += group.count) {
        const u32 low = 2 * pair - (pair & (distance - 1));  // distance is a power of two
        const u64 a = codes[low];
        const u64 b = codes[low + distance];
        if ((a > b) == ((low & num_merged) == 0)) {
          codes[low] = b;
          codes[low + distance] = a;
        }
      }
      group.sync();  // hazard: the next stage reads what another lane exchanged
    }
  }
}

// sums[i] = window.weight_before + weights of codes[0 .. i].
template <class Group>
BK_INLINE void sum_window(const Group& group, SampleScratch* scratch, const Window& window, const Weighing& weighing) {
  const u32 num_each = (window.num_tokens + group.count - 1) / group.count;
  const u32 begin = group.id * num_each < window.num_tokens ? group.id * num_each : window.num_tokens;
  const u32 end = window.num_tokens - begin < num_each ? window.num_tokens : begin + num_each;
  u64 sum = 0;
  for (u32 i = begin; i < end; ++i) sum += weighing.weight(logit_of_code(scratch->of.window.codes[i]));
  for (u32 part = group.id; part < kNumParts; part += group.count) scratch->parts[part] = part == group.id ? sum : 0;
  fold_parts(group, scratch);
  u64 running = window.weight_before;
  for (u32 fold = 0; fold < group.id / kPartsPerFold; ++fold) running += scratch->folds[fold];
  for (u32 part = group.id / kPartsPerFold * kPartsPerFold; part < group.id; ++part) running += scratch->parts[part];
  for (u32 i = begin; i < end; ++i) {
    running += weighing.weight(logit_of_code(scratch->of.window.codes[i]));
    scratch->of.window.sums[i] = running;
  }
  group.sync();  // hazard: the sums are searched by every lane
}

// The logits to choose by that `mask` has a bit for. False: they are more than a window holds, and the lane need not gather more of them. A
// barrier on either side of the calls of one window.
template <class Group>
BK_INLINE bool gather(const Group& group, SampleScratch* scratch, const RowBatch& batch, u32 mask) {
  BK_NO_UNROLL
  for (; mask != 0; mask &= mask - 1) {
    const u32 i = lowest_bit_u32(mask);
    const u32 place = group.atomic_add(&scratch->num_gathered, 1);
    if (place >= kWindowTokens) return false;
    scratch->of.window.codes[place] = window_code(pick(batch.chosen, i), batch.idx(i));
  }
  return true;
}

// The tokens gathered since num_gathered was cleared, sorted; none if they were too many.
template <class Group>
BK_INLINE Window sort_gathered(const Group& group, SampleScratch* scratch, u64 weight_before) {
  const u32 num_gathered = scratch->num_gathered;
  const Window window{num_gathered <= kWindowTokens ? num_gathered : 0, weight_before};
  sort_codes(group, scratch->of.window.codes, window.num_tokens);
  return window;
}

// A pass that gathers and sorts the tokens for which is_in(logit to choose by) holds, which the caller knows to be kWindowTokens at most.
template <class Group, class IsIn>
BK_INLINE Window gather_window(const Group& group, SampleScratch* scratch, const Row& row, u64 weight_before, IsIn is_in) {
  if (group.id == 0) scratch->num_gathered = 0;
  group.sync();  // hazard: a token is counted before the count was cleared; the last window is still searched
  row.for_each_batch(group, [&](const RowBatch& batch) {
    u32 are_in = 0;  // bit i: logit i
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) are_in |= is_in(batch.chosen[i]) ? 1u << i : 0u;
    gather(group, scratch, batch, are_in);
  });
  group.sync();  // hazard: the count is read before all tokens were gathered
  return sort_gathered(group, scratch, weight_before);
}

// The tokens of the bins [first_bin, last_bin], with their running weights. With a min_weight tokens below it stay out, as they are not in
// the counts either.
template <class Group>
BK_INLINE Window open_window(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& weighing, u32 first_bin,
                             u32 last_bin, u64 weight_before) {
  const Window window = gather_window(group, scratch, row, weight_before, [&](f32 logit) {
    const u32 bin = weighing.bin(logit);
    return bin >= first_bin && bin <= last_bin && is_finite(logit) && (weighing.min_weight == 0 || weighing.weight(logit) != 0);
  });
  sum_window(group, scratch, window, weighing);
  return window;
}

// The first token of the window, which has one, at which the running weight reaches target, which lies in it.
BK_INLINE u32 search_window(const SampleScratch* scratch, const Window& window, u64 target) {
  u32 begin = 0;
  u32 end = window.num_tokens - 1;
  while (begin < end) {
    const u32 middle = (begin + end) / 2;
    if (scratch->of.window.sums[middle] >= target) end = middle;
    else begin = middle + 1;
  }
  return begin;
}

}  // namespace sampling
}  // namespace blinkimp
