// Sampling of one token from one row of logits: one source for the GPU (a group of up to 256 threads) and the CPU (one lane).
//
//   SampleResult sample_row(group, input, sampling, output_idx, scratch, top)
// All members of the group call it together with equal arguments; all get the result. `scratch` is shared by the group (shared
// memory on the GPU); sample_row's last use of it is followed by a barrier, so it is free on return. The group is any type with
// `u32 id, count` (count <= 256), `sync()` (a barrier that orders memory among members) and `atomic_add(u32*, u32) -> u32 old`.
// GPU: BarrierSampleGroup. CPU: SingleSampleGroup.
//
// What it computes, in this order (the order of vLLM; NaN counts as -inf and never wins):
//   edits           device/logit_edits.cuh: bias, min_tokens, penalties, constraint; for greedy and sampled decoding alike
//   temperature 0   greedy: the largest logit, the lowest index among equals; what follows is ignored
//   temperature     s = (logit - max) / temperature, weight w = floor(2^44 * e^s). A token of weight 0 (less than 2^-44 of the
//                   best token's probability) is out
//   min_p           keeps w >= min_p * max w
//   top_k           keeps the first k in the order (logit falling, then index rising): exactly k, also among equals
//   top_p           of what is left, keeps the shortest prefix in that order whose weight is >= top_p of it; one token at least
//   draw            token with probability w / sum(w): R = Philox4x32-10(key seed, counter output_idx) scaled to [0, sum w), the
//                   first token in that order whose running sum exceeds R. One draw for the row costs one Philox call, where
//                   Gumbel noise would cost one per token and two logarithms
//   logprob         (logit - max) - log(sum of 2^44 e^(logit - max)): the model's own logits, before any edit, the whole vocabulary
//   top             the first num_top_logprobs tokens in the order of the model's own logits, with their logprobs
// A row in which the model has no finite logit gives token 0 with logprob -inf; one in which the edits leave nothing gives no_token().
//
// Every decision is taken on integers (fixed_math.cuh), so the order in which threads add cannot change it: the result is the
// same, bit for bit, for every group size, on CPU and GPU.
// Compile without --use_fast_math / -ftz=true: they would change the f32 subtraction and product that everything starts from.
// Called by device/sample_request.cuh. Test: pytest tests/host/test_sampling.py tests/host/test_sampling_edits.py
#pragma once
#include <philox.cuh>
#include <sampling_choose.cuh>
#include <sampling_near.cuh>
#include <step_plan.cuh>

namespace blinkimp {

struct SampleInput {      // a row, uniform over the group
  const f32* logits;      // [vocab], the model's
  const u64* tile_best;   // [num_tiles] best_code() of the logits, every one in some tile; or null
  u32 vocab;
  u32 num_tiles;
  LogitEdits edits;
};

namespace sampling {

constexpr f32 kLog2OfE = 1.44269504f;
constexpr u64 kUnitWeight = 1ull << kWeightFractionBits;

// best_code() of the model's logits, from the tiles' own.
template <class Group>
BK_INLINE u64 best_of_tiles(const Group& group, SampleScratch* scratch, const u64* tile_best, u32 num_tiles) {
  u64 best = 0;
  for (u32 tile = group.id; tile < num_tiles; tile += group.count) best = tile_best[tile] > best ? tile_best[tile] : best;
  return max_over_group(group, scratch, best);
}

// ln(sum / 2^44) in Q32 -> f32; ln 2 = 0xb17217f7d1cf79ac / 2^64.
BK_INLINE f32 log_of_sum(u64 sum) { return static_cast<f32>(mul_hi_u64(log2_q32(sum), 0xb17217f7d1cf79acull)) * (1.0f / 4294967296.0f); }

BK_INLINE f32 logprob_of(f32 max_logit, f32 log_sum, f32 logit) {
  const f32 distance = max_logit - orderable_logit(logit);
  return 0.0f - (distance + log_sum);
}

struct SurveyWants {
  f32 near;      // of near_distance(): gather what is nearer to the model's best logit, or -inf
  bool bins;     // counts of the logits to choose by
  bool weights;  // and their weights
};

// The sum of the weights of the model's logits, and on the way what else is wanted.
template <class Group>
BK_INLINE u64 survey(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& raw, const Weighing& weighing,
                     const SurveyWants& wants) {
  if (wants.bins) clear_bins(group, scratch);
  const bool same_weight = !row.is_edited && weighing.scale == raw.scale && weighing.min_weight <= 1;
  u64 sum = 0;
  u64 far_weight = 0;  // of the last bin: half of some rows is there, too many to meet in one word
  u32 num_far = 0;
  f32 near = wants.near;
  row.for_each_batch(group, [&](const RowBatch& batch) {
    u64 weights[kBatch];
    u32 are_near = 0;  // bit i: logit i
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) {
      weights[i] = raw.weight(batch.model[i]);
      sum += weights[i];
      are_near |= is_near(raw.max_logit, near, batch.chosen[i]) ? 1u << i : 0u;
    }
    if (!gather(group, scratch, batch, are_near)) near = minus_infinity();  // thousands of equal ones would queue at one word
    if (!wants.bins) return;
    if (!wants.weights) {
      BK_UNROLL
      for (u32 i = 0; i < kBatch; ++i) weights[i] = is_finite(batch.chosen[i]) ? 1 : 0;
    } else if (!same_weight) {
      BK_UNROLL
      for (u32 i = 0; i < kBatch; ++i) weights[i] = weighing.weight(batch.chosen[i]);
    }
    u32 bins[kBatch];
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) {
      bins[i] = weights[i] != 0 ? weighing.bin(batch.chosen[i]) : kNumBins;
      num_far += bins[i] == kNumBins - 1 ? 1 : 0;
      far_weight += bins[i] == kNumBins - 1 ? weights[i] : 0;
    }
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) {
      if (bins[i] >= kNumBins - 1) continue;
      group.atomic_add(&scratch->bin_counts[bins[i]], 1);
      if (wants.weights) add_weight(group, &scratch->bin_low[bins[i]], &scratch->bin_high[bins[i]], weights[i]);
    }
  });
  if (num_far != 0) {
    group.atomic_add(&scratch->bin_counts[kNumBins - 1], num_far);
    if (wants.weights) add_weight(group, &scratch->bin_low[kNumBins - 1], &scratch->bin_high[kNumBins - 1], far_weight);
  }
  return sum_over_group(group, scratch, sum);  // its barriers stand between the writers of bins and gathered tokens and their readers
}

// The first num_top tokens of a window that has them all, with their logprobs. Ends with a barrier.
template <class Group>
BK_INLINE void write_top(const Group& group, const SampleScratch* scratch, const Weighing& raw, f32 log_sum, u32 num_top, SampleResult* top) {
  for (u32 i = group.id; i < num_top; i += group.count) {
    const u64 code = scratch->of.window.codes[i];
    top[i] = SampleResult{static_cast<u32>(code), logprob_of(raw.max_logit, log_sum, logit_of_code(code))};
  }
  group.sync();  // hazard: another window, or the next row, overwrites this one
}

// The model's first tokens, with their logprobs, by passes of their own; what is missing is token 0 with -inf. near: of near_distance(), for
// the model's logits and num_top tokens.
template <class Group>
BK_INLINE void report_top(const Group& group, SampleScratch* scratch, const Row& model_row, const Weighing& raw, f32 log_sum, u32 num_top,
                          f32 near, SampleResult* top) {
  if (near > 0.0f) {
    const Window window = gather_window(group, scratch, model_row, 0, [&](f32 logit) { return is_near(raw.max_logit, near, logit); });
    if (window.num_tokens >= num_top) {
      write_top(group, scratch, raw, log_sum, num_top, top);
      return;
    }
  }
  survey(group, scratch, model_row, raw, raw, SurveyWants{minus_infinity(), true, false});
  const u64 num_tokens = sum_bins(group, scratch, 0, kNumBins, false);
  const u32 num_found = num_top < num_tokens ? num_top : static_cast<u32>(num_tokens);
  const u32 last_bin = find_bin(group, scratch, num_found, false);
  const bool fits = sum_bins(group, scratch, 0, last_bin + 1, false) <= kWindowTokens;
  if (fits) {
    gather_window(group, scratch, model_row, 0, [&](f32 logit) { return is_finite(logit) && raw.bin(logit) <= last_bin; });
    write_top(group, scratch, raw, log_sum, num_found, top);
  }
  u64 last = ~u64{0};  // best_code() of the one before
  for (u32 i = fits ? num_found : 0; i < num_top; ++i) {
    SampleResult found{0, minus_infinity()};
    if (i < num_found) {  // too many equal ones for a window: one pass for each
      u64 best = 0;
      model_row.for_each(group, [&](u32 idx, f32 logit, f32) {
        const u64 code = best_code(logit, idx);
        if (code < last && code > best) best = code;
      });
      last = max_over_group(group, scratch, best);
      found = SampleResult{0xffffffffu - static_cast<u32>(last), logprob_of(raw.max_logit, log_sum, value_of_key(static_cast<u32>(last >> 32)))};
    }
    if (group.id == 0) top[i] = found;
  }
}

constexpr u32 kMostNear = 512;       // tokens that near_distance() is asked for: of 2,291 parts at 128,256 tokens; more than 2,048 may be as near
constexpr u32 kSpeculatedNear = 256; // tokens that hold the nucleus or the draw of most rows

}  // namespace sampling

// top: [sampling.num_top_logprobs]. kByRadix: tests compare the two ways to a token.
template <bool kByRadix = false, class Group>
BK_INLINE SampleResult sample_row(const Group& group, const SampleInput& input, const SamplingParams& sampling, u32 output_idx,
                                  SampleScratch* scratch, SampleResult* top) {
  using namespace sampling;
  const sampling::Row row{input.logits, input.vocab, input.edits.has_any(), input.edits.counts, &scratch->edits};
  const sampling::Row model_row{input.logits, input.vocab, false, nullptr, nullptr};
  if (row.is_edited) prepare_edits(group, input.edits, &scratch->edits);

  // The best token by the model, and of each part of the row.
  const bool has_tiles = input.tile_best != nullptr;
  u64* own_parts = scratch->of.window.sums;
  PartBests parts{input.tile_best, input.num_tiles};
  BestTokens best{0, 0};
  if (has_tiles) {
    best.model = best.chosen = best_of_tiles(group, scratch, input.tile_best, input.num_tiles);
  } else {
    best = find_best_tokens(group, scratch, row, own_parts);
    parts = PartBests{own_parts, kOwnParts / group.count * group.count};
  }
  const u32 num_top = sampling.num_top_logprobs < kMaxTopLogprobs ? sampling.num_top_logprobs : kMaxTopLogprobs;
  if (static_cast<u32>(best.model >> 32) <= kKeyOfMinusInfinity) {
    for (u32 i = group.id; i < num_top; i += group.count) top[i] = SampleResult{0, minus_infinity()};
    return row.is_edited && scratch->edits.edits.class_of_token != nullptr ? no_token() : SampleResult{0, minus_infinity()};
  }
  const Weighing raw{value_of_key(static_cast<u32>(best.model >> 32)), kLog2OfE, 0};

  const bool is_sampled = sampling.temperature > 0.0f;
  Weighing weighing{raw.max_logit, kLog2OfE, 1};
  Choice choice{0, kNoShare, 0};
  if (is_sampled) {
    const f32 scale = kLog2OfE / sampling.temperature;
    weighing.scale = scale < 3.0e38f ? scale : 3.0e38f;
    const f32 min_weight = mul_f32(sampling.min_p, static_cast<f32>(kUnitWeight));  // exact: a power of two
    if (min_weight > 1.0f) {
      weighing.min_weight = static_cast<u64>(min_weight);
      if (static_cast<f32>(weighing.min_weight) < min_weight) ++weighing.min_weight;
    }
    choice.top_k = sampling.top_k < input.vocab ? sampling.top_k : 0;
    if (sampling.top_p < 1.0f) choice.share = static_cast<u64>(mul_f32(sampling.top_p, 4294967296.0f));  // Q32
    const PhiloxCounter bits = philox4x32_10(PhiloxCounter{{output_idx, 0, 0, 0}}, sampling.seed);
    choice.random = (static_cast<u64>(bits.words[1]) << 32) | bits.words[0];
  }
  const bool is_narrow = choice.top_k > 0 && choice.top_k <= kWindowTokens;  // the first k tokens are all it takes

  // How near what the survey should gather is: the first tokens, if they decide; else as many as mostly do.
  const u32 num_first = !is_sampled ? (row.is_edited ? 1 : 0) : is_narrow ? choice.top_k : 0;
  u32 num_near = is_sampled && !is_narrow ? kSpeculatedNear : num_first;
  if (!row.is_edited && num_top > num_near) num_near = num_top;
  f32 near = minus_infinity();
  if (!kByRadix && num_near > 0 && num_near <= kMostNear) near = near_distance(group, scratch, row, parts, raw.max_logit, num_near);

  // The survey: alone, if the first tokens decide and are among those gathered; else, or then again, with bins.
  u32 token = kNotFound;
  bool has_top = num_top == 0;
  bool is_stuck = false;  // the edits leave nothing
  bool knows_chosen = !has_tiles || !row.is_edited;
  f32 log_sum = 0.0f;
  BK_NO_UNROLL
  for (bool by_first = num_first > 0 && near > 0.0f;; by_first = false) {
    if (!by_first && !knows_chosen) {
      best.chosen = find_best_tokens(group, scratch, row, nullptr).chosen;
      knows_chosen = true;
    }
    if (!by_first) {
      is_stuck = static_cast<u32>(best.chosen >> 32) <= kKeyOfMinusInfinity;
      weighing.max_logit = value_of_key(static_cast<u32>(best.chosen >> 32));
    }
    const bool draws = is_sampled && !is_stuck;
    const bool wants_bins = draws && !by_first;
    log_sum = log_of_sum(survey(group, scratch, row, raw, weighing, SurveyWants{near, wants_bins, wants_bins && !is_narrow}));
    const Window window = near > 0.0f ? sort_gathered(group, scratch, 0) : Window{0, 0};
    if (!has_top && !row.is_edited && window.num_tokens >= num_top) {
      write_top(group, scratch, raw, log_sum, num_top, top);
      has_top = true;
    }
    if (by_first) {
      if (window.num_tokens >= num_first) {
        weighing.max_logit = logit_of_code(scratch->of.window.codes[0]);
        token = is_sampled ? choose_of_first(group, scratch, window, weighing, choice) : static_cast<u32>(scratch->of.window.codes[0]);
      }
      group.sync();  // hazard: the next pass, or the next row, overwrites a window that a member still reads
      if (token != kNotFound) break;
      near = minus_infinity();
      continue;
    }
    token = 0xffffffffu - static_cast<u32>(best.chosen);
    if (!draws) break;
    token = kByRadix ? kNotFound : choose_by_window(group, scratch, row, weighing, choice, !is_narrow, window);
    group.sync();  // hazard: the descent, or the next row, overwrites a window that a member still reads
    if (token == kNotFound) token = choose_by_radix(group, scratch, row, weighing, choice);
    break;
  }
  if (!has_top) {
    const f32 top_near = has_tiles ? near_distance(group, scratch, model_row, parts, raw.max_logit, num_top) : minus_infinity();
    report_top(group, scratch, model_row, raw, log_sum, num_top, top_near, top);
  }
  if (is_stuck || token >= input.vocab) return no_token();
  return SampleResult{token, logprob_of(raw.max_logit, log_sum, input.logits[token])};
}

}  // namespace blinkimp
