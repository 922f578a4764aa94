// Sampling of one token from one row of logits: one source for the GPU (a group of up to 256 threads) and the CPU (one lane).
//
//   SampleResult sample_row(group, logits, vocab, params, output_idx, scratch)
// All members of the group call it together with equal arguments; all get the result. `scratch` is shared by the group (shared
// memory on the GPU); sample_row's last use of it is followed by a barrier, so it is free on return. The group is any type with `u32 id, count` (count <= 256), `sync()` (a barrier that orders memory among members) and
// `atomic_add(u32*, u32) -> u32 old`. GPU: BarrierSampleGroup below. CPU: SingleSampleGroup.
//
// What it computes, in this order (the order of vLLM; NaN counts as -inf and never wins):
//   temperature 0   greedy: the largest logit, the lowest index among equals; the other parameters are ignored
//   temperature     s = (logit - max) / temperature, weight w = floor(2^44 * e^s). A token of weight 0 (less than 2^-44 of the
//                   best token's probability) is out
//   min_p           keeps w >= min_p * max w
//   top_k           keeps the first k in the order (logit falling, then index rising): exactly k, also among equals
//   top_p           of what is left, keeps the shortest prefix in that order whose weight is >= top_p of it; one token at least
//   draw            token with probability w / sum(w): R = Philox4x32-10(key seed, counter output_idx) scaled to [0, sum w), the
//                   first token by index whose running sum exceeds R. One draw for the row costs one Philox call, where
//                   Gumbel noise would cost one per token and two logarithms
//   logprob         (logit - max) - log(sum of 2^44 e^(logit - max)): unscaled logits, the whole vocabulary
// A row without any finite logit gives token 0 with logprob -inf.
//
// Every decision is taken on integers (fixed_math.cuh), so the order in which threads add cannot change it: the result is the
// same, bit for bit, for every group size, on CPU and GPU. Thresholds come from a radix descent over ordered keys, without sorting.
// Compile without --use_fast_math / -ftz=true: they would change the f32 subtraction and product that everything starts from.
// Called by the worker's sample op (GPU) and device/emu/reference_ops.cpp. Test: pytest tests/host/test_sampling.py
#pragma once
#include <philox.cuh>
#if BK_GPU
#include <ptx_mma.cuh>
#endif

namespace blinkimp {

constexpr u32 kMaxSampleLanes = 256;
constexpr u32 kRadixBits = 11;
constexpr u32 kNumRadixBins = 1u << kRadixBits;
constexpr u32 kNumParts = 256;  // a descent over index ranges splits each range in this many
constexpr u32 kPartsPerFold = 16;
constexpr u32 kNumFolds = kNumParts / kPartsPerFold;

struct SampleScratch {        // 18,560 bytes
  u32 bins_low[kNumRadixBins];   // low words of each bin's weight: two 32-bit atomics with a carry, because a 64-bit
  u32 bins_high[kNumRadixBins];  // shared-memory add is a compare-and-swap loop
  u64 parts[kNumParts];          // weight of each part of the index range
  u64 folds[kNumFolds];          // sums of kPartsPerFold parts
};
ABI_SIZE(SampleScratch, 18560);

#if BK_GPU
// Threads 0 .. kNumThreads-1 of a CTA, synchronised by a named barrier because other warps of the CTA run beside them.
template <int kBarrierId, int kNumThreads>
struct BarrierSampleGroup {
  static constexpr u32 count = kNumThreads;
  u32 id = opaque(threadIdx.x);  // or every address made of it lives through all ops of the worker's loop
  BK_INLINE void sync() const { named_barrier_sync<kBarrierId, kNumThreads>(); }
  BK_INLINE u32 atomic_add(u32* address, u32 value) const { return atom_add_relaxed_shared(address, value); }
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
};
#endif

namespace sampling {

struct LogitQuad {
  f32 values[4];  // logits of four neighbouring ids
};

// fn(idx, logit) for the logits [begin, end), by aligned 16-byte loads where four lie inside; quads start, start + stride, ...
template <class Fn>
BK_INLINE void for_each_logit(const f32* logits, u32 begin, u32 end, u32 start, u32 stride, Fn fn) {
  const f32* first = logits + begin;
  const u32 num_lead = (static_cast<u32>(reinterpret_cast<u64>(first)) / sizeof(f32)) % 4u;  // of the first quad, before `begin`
  const u32 num_logits = end - begin;
  const u32 num_quads = (num_lead + num_logits + 3u) / 4u;
  for (u32 quad_idx = start; quad_idx < num_quads; quad_idx += stride) {
    const u32 offset = quad_idx * 4u - num_lead;  // wraps below zero in the first quad: then it is >= num_logits
    if (offset < num_logits && num_logits - offset >= 4u) {
#if BK_GPU
      const float4 loaded = *reinterpret_cast<const float4*>(first + offset);
      const LogitQuad quad{{loaded.x, loaded.y, loaded.z, loaded.w}};
#else
      LogitQuad quad;
      __builtin_memcpy(&quad, first + offset, sizeof(quad));
#endif
      for (u32 i = 0; i < 4; ++i) fn(begin + offset + i, orderable_logit(quad.values[i]));
    } else {
      for (u32 i = 0; i < 4; ++i) {
        if (offset + i < num_logits) fn(begin + offset + i, orderable_logit(first[offset + i]));
      }
    }
  }
}

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
  while (scratch->folds[fold] < *target) *target -= scratch->folds[fold++];
  u32 part = fold * kPartsPerFold;
  while (scratch->parts[part] < *target) *target -= scratch->parts[part++];
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

// The tokens still in play: weight of at least min_weight, and not behind the cut in the order (key falling, index rising).
struct Candidates {
  f32 max_logit;
  f32 scale;  // log2(e) / temperature
  u64 min_weight;
  u32 cut_key;
  u32 cut_idx;

  BK_INLINE u64 weight(u32 idx, f32 logit) const {
    const u32 key = order_key(logit);
    if (key < cut_key || (key == cut_key && idx > cut_idx)) return 0;
    const f32 distance = max_logit - logit;
    const u64 weight = exp2_neg_q44(distance * scale);
    return weight >= min_weight ? weight : 0;
  }
};

// One digit of the descent: bins over `digit(code)` of all candidates whose code continues `prefix`; higher digits first.
// measure(weight) is what a candidate counts: 1 for top-k, its weight for top-p.
template <class Group, class Measure>
BK_INLINE u64 fill_bins(const Group& group, SampleScratch* scratch, const f32* logits, u32 vocab, const Candidates& candidates,
                        bool by_index, u32 fixed_key, u32 prefix, u32 shift, u32 num_bits, Measure measure) {
  for (u32 bin = group.id; bin < kNumRadixBins; bin += group.count) scratch->bins_low[bin] = scratch->bins_high[bin] = 0;
  group.sync();  // hazard: a bin is added to before it was cleared
  const u32 prefix_shift = shift + num_bits;
  for_each_logit(logits, 0, vocab, group.id, group.count, [&](u32 idx, f32 logit) {
    const u32 key = order_key(logit);
    if (by_index && key != fixed_key) return;
    const u32 code = by_index ? vocab - 1u - idx : key;
    if (prefix_shift < 32u && (code >> prefix_shift) != prefix) return;
    const u64 amount = measure(candidates.weight(idx, logit));
    if (amount == 0) return;
    const u32 bin = kNumRadixBins - 1u - ((code >> shift) & ((1u << num_bits) - 1u));
    const u32 low = static_cast<u32>(amount);
    const u32 old = group.atomic_add(&scratch->bins_low[bin], low);
    const u32 high = static_cast<u32>(amount >> 32) + (old + low < old ? 1u : 0u);
    if (high != 0) group.atomic_add(&scratch->bins_high[bin], high);
  });
  group.sync();  // hazard: a bin is read before all candidates were added
  constexpr u32 kBinsPerPart = kNumRadixBins / kNumParts;
  for (u32 part = group.id; part < kNumParts; part += group.count) {
    u64 sum = 0;
    for (u32 i = 0; i < kBinsPerPart; ++i) {
      const u32 bin = part * kBinsPerPart + i;
      sum += (static_cast<u64>(scratch->bins_high[bin]) << 32) | scratch->bins_low[bin];
    }
    scratch->parts[part] = sum;
  }
  return fold_parts(group, scratch);
}

// The digit at which the running sum reaches *target.
BK_INLINE u32 walk_bins(const SampleScratch* scratch, u64* target, u64* amount) {
  u32 bin = walk_parts(scratch, target) * (kNumRadixBins / kNumParts);
  for (;; ++bin) {
    *amount = (static_cast<u64>(scratch->bins_high[bin]) << 32) | scratch->bins_low[bin];
    if (*amount >= *target) return kNumRadixBins - 1u - bin;
    *target -= *amount;
  }
}

// Moves the cut to the last token of the shortest prefix that measures at least target_of(total); 0 leaves it where it is.
template <class Group, class Measure, class TargetOf>
BK_INLINE void cut_candidates(const Group& group, SampleScratch* scratch, const f32* logits, u32 vocab, Candidates* candidates,
                              Measure measure, TargetOf target_of) {
  u64 target = 0;
  u64 amount = 0;  // of the candidates that continue the prefix
  u32 prefix = 0;
  for (u32 shift = 32; shift > 0;) {  // digits of 11, 11 and 10 bits
    const u32 num_bits = shift < kRadixBits ? shift : kRadixBits;
    const u64 total = fill_bins(group, scratch, logits, vocab, *candidates, false, 0, prefix, shift - num_bits, num_bits, measure);
    if (shift == 32) target = target_of(total);
    if (target != 0) prefix = (prefix << num_bits) | walk_bins(scratch, &target, &amount);
    group.sync();  // hazard: the next digit clears bins that a member still reads
    if (target == 0) return;
    shift -= num_bits;
  }
  // All candidates of the last bin have the same logit, so the same measure; the lowest indices of them stay.
  const u32 key = prefix;
  const u64 each = measure(candidates->weight(0, value_of_key(key)));
  u32 last_idx = candidates->cut_key == key ? candidates->cut_idx : kNoRow;
  if ((target + each - 1u) / each * each < amount) {
    u32 num_idx_bits = 1;
    while (num_idx_bits < 32u && ((vocab - 1u) >> num_idx_bits) != 0u) ++num_idx_bits;
    prefix = 0;
    for (u32 shift = num_idx_bits; shift > 0;) {
      const u32 num_bits = shift < kRadixBits ? shift : kRadixBits;
      fill_bins(group, scratch, logits, vocab, *candidates, true, key, prefix, shift - num_bits, num_bits, measure);
      prefix = (prefix << num_bits) | walk_bins(scratch, &target, &amount);
      group.sync();  // hazard: the next digit clears bins that a member still reads
      shift -= num_bits;
    }
    last_idx = vocab - 1u - prefix;
  }
  candidates->cut_key = key;
  candidates->cut_idx = last_idx;
}

// The first token by index whose running weight exceeds `random` scaled to [0, total weight).
template <class Group>
BK_INLINE u32 draw_token(const Group& group, SampleScratch* scratch, const f32* logits, u32 vocab, const Candidates& candidates,
                         u64 random) {
  u32 begin = 0;
  u32 end = vocab;
  u64 target = 0;
  while (end - begin > 1u) {
    const u32 num_each = (end - begin + kNumParts - 1u) / kNumParts;
    for (u32 part = group.id; part < kNumParts; part += group.count) {
      const u32 part_begin = begin + (part * num_each < end - begin ? part * num_each : end - begin);
      const u32 part_end = end - part_begin < num_each ? end : part_begin + num_each;
      u64 sum = 0;
      for_each_logit(logits, part_begin, part_end, 0, 1, [&](u32 idx, f32 logit) { sum += candidates.weight(idx, logit); });
      scratch->parts[part] = sum;
    }
    const u64 total = fold_parts(group, scratch);
    if (target == 0) target = mul_hi_u64(random, total) + 1u;  // total >= 1: the best token has weight 2^44
    begin += walk_parts(scratch, &target) * num_each;
    end = end - begin < num_each ? end : begin + num_each;
    group.sync();  // hazard: the next round writes parts that a member still reads
  }
  return begin;
}

}  // namespace sampling

template <class Group>
BK_INLINE SampleResult sample_row(const Group& group, const f32* logits, u32 vocab, const SamplingParams& params, u32 output_idx,
                                  SampleScratch* scratch) {
  using namespace sampling;
  constexpr f32 kLog2OfE = 1.44269504f;
  constexpr u64 kUnitWeight = 1ull << kWeightFractionBits;

  // The best token: largest key, then lowest index.
  u64 best = 0;
  for_each_logit(logits, 0, vocab, group.id, group.count, [&](u32 idx, f32 logit) {
    const u64 code = (static_cast<u64>(order_key(logit)) << 32) | (0xffffffffu - idx);
    best = code > best ? code : best;
  });
  best = max_over_group(group, scratch, best);
  const u32 max_key = static_cast<u32>(best >> 32);
  if (max_key <= kKeyOfMinusInfinity) return SampleResult{0, minus_infinity()};
  const f32 max_logit = value_of_key(max_key);

  // The sum behind the logprob, over the unscaled logits.
  const Candidates everything{max_logit, kLog2OfE, 0, 0, kNoRow};
  u64 sum = 0;
  for_each_logit(logits, 0, vocab, group.id, group.count, [&](u32 idx, f32 logit) { sum += everything.weight(idx, logit); });
  sum = sum_over_group(group, scratch, sum);

  u32 token = 0xffffffffu - static_cast<u32>(best);
  if (params.temperature > 0.0f) {
    const f32 scale = kLog2OfE / params.temperature;
    const f32 min_weight = params.min_p * static_cast<f32>(kUnitWeight);  // exact: a power of two
    Candidates candidates{max_logit, scale < 3.0e38f ? scale : 3.0e38f, 1, kKeyOfMinusInfinity + 1u, kNoRow};
    if (min_weight > 1.0f) {
      candidates.min_weight = static_cast<u64>(min_weight);
      if (static_cast<f32>(candidates.min_weight) < min_weight) ++candidates.min_weight;
    }
    if (params.top_k > 0 && params.top_k < vocab) {
      cut_candidates(
          group, scratch, logits, vocab, &candidates, [](u64 weight) -> u64 { return weight != 0 ? 1 : 0; },
          [&](u64 total) -> u64 { return total > params.top_k ? params.top_k : 0; });
    }
    if (params.top_p < 1.0f) {
      const u64 share = static_cast<u64>(params.top_p * 4294967296.0f);  // Q32
      cut_candidates(
          group, scratch, logits, vocab, &candidates, [](u64 weight) { return weight; },
          [&](u64 total) {
            const u64 target = (total >> 32) * share + (((total & 0xffffffffu) * share + 0xffffffffu) >> 32);
            return target > 0 ? target : 1;
          });
    }
    const PhiloxCounter bits = philox4x32_10(PhiloxCounter{{output_idx, 0, 0, 0}}, params.seed);
    token = draw_token(group, scratch, logits, vocab, candidates, (static_cast<u64>(bits.words[1]) << 32) | bits.words[0]);
  }

  // ln(sum / 2^44) in Q32; ln 2 = 0xb17217f7d1cf79ac / 2^64.
  const u64 log_sum = mul_hi_u64(log2_q32(sum), 0xb17217f7d1cf79acull);
  const f32 distance = max_logit - orderable_logit(logits[token]);
  return SampleResult{token, 0.0f - (distance + static_cast<f32>(log_sum) * (1.0f / 4294967296.0f))};
}

}  // namespace blinkimp
