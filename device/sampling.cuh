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
#include <sampling_radix.cuh>
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
constexpr u32 kNotFound = 0xffffffff;
constexpr u64 kNoShare = ~u64{0};
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

// The weights of the model's logits, and on the way the bins of the logits to choose by: counts, and weights if asked for.
template <class Group>
BK_INLINE u64 survey(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& raw, const Weighing& weighing,
                     bool wants_bins, bool wants_weights) {
  if (wants_bins) clear_bins(group, scratch);
  const bool same_weight = !row.is_edited && weighing.scale == raw.scale && weighing.min_weight <= 1;
  u64 sum = 0;
  u64 far_weight = 0;  // of the last bin: half of some rows is there, too many to meet in one word
  u32 num_far = 0;
  row.for_each(group, [&](u32, f32 model_logit, f32 logit) {
    const u64 model_weight = raw.weight(model_logit);
    sum += model_weight;
    if (!wants_bins || order_key(logit) <= kKeyOfMinusInfinity) return;
    u64 weight = 1;
    if (wants_weights) weight = same_weight ? model_weight : weighing.weight(logit);
    if (weight == 0) return;
    const u32 bin = weighing.bin(logit);
    if (bin == kNumBins - 1) {
      num_far += 1;
      far_weight += weight;
      return;
    }
    group.atomic_add(&scratch->bin_counts[bin], 1);
    if (wants_weights) add_weight(group, &scratch->bin_low[bin], &scratch->bin_high[bin], weight);
  });
  if (num_far != 0) {
    group.atomic_add(&scratch->bin_counts[kNumBins - 1], num_far);
    if (wants_weights) add_weight(group, &scratch->bin_low[kNumBins - 1], &scratch->bin_high[kNumBins - 1], far_weight);
  }
  return sum_over_group(group, scratch, sum);  // its barriers stand between the bins' writers and their readers
}

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

// The token by histogram and windows, or kNotFound where they cannot hold it. has_weights: the bins have them; without, top_k is on and the
// window of the first k tokens is all that is needed.
template <class Group>
BK_INLINE u32 choose_by_window(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& weighing, const Choice& choice,
                               bool has_weights) {
  const WindowTokens& tokens = scratch->of.window;
  const u64 num_tokens = sum_bins(group, scratch, 0, kNumBins, false);
  u64 kept = has_weights ? sum_bins(group, scratch, 0, kNumBins, true) : 0;  // weight of what is left
  Window window{0, 0};
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

// The model's first tokens, with their logprobs; what is missing is token 0 with -inf.
template <class Group>
BK_INLINE void report_top(const Group& group, SampleScratch* scratch, const Row& row, const Weighing& raw, f32 log_sum, u32 num_top,
                          SampleResult* top) {
  const Row model_row{row.logits, row.vocab, false, nullptr, nullptr};
  clear_bins(group, scratch);
  u32 num_far = 0;
  model_row.for_each(group, [&](u32, f32 logit, f32) {
    const u32 bin = raw.bin(logit);
    if (order_key(logit) <= kKeyOfMinusInfinity) return;
    if (bin == kNumBins - 1) num_far += 1;
    else group.atomic_add(&scratch->bin_counts[bin], 1);
  });
  if (num_far != 0) group.atomic_add(&scratch->bin_counts[kNumBins - 1], num_far);
  group.sync();  // hazard: a bin is read before all tokens were counted
  const u64 num_tokens = sum_bins(group, scratch, 0, kNumBins, false);
  const u32 num_found = num_top < num_tokens ? num_top : static_cast<u32>(num_tokens);
  const u32 last_bin = find_bin(group, scratch, num_found, false);
  const bool fits = sum_bins(group, scratch, 0, last_bin + 1, false) <= kWindowTokens;
  if (fits) open_window(group, scratch, model_row, raw, 0, last_bin, 0);
  u64 last = ~u64{0};  // best_code() of the one before
  for (u32 i = 0; i < num_top; ++i) {
    SampleResult found{0, minus_infinity()};
    if (i < num_found && fits) {
      const u64 code = scratch->of.window.codes[i];
      found = SampleResult{static_cast<u32>(code), logprob_of(raw.max_logit, log_sum, logit_of_code(code))};
    } else if (i < num_found) {  // too many equal ones for a window: one pass for each
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
  group.sync();  // hazard: the next row overwrites the window that lane 0 still reads
}

}  // namespace sampling

// top: [sampling.num_top_logprobs], written by lane 0. kByRadix: tests compare the two ways to a token.
template <bool kByRadix = false, class Group>
BK_INLINE SampleResult sample_row(const Group& group, const SampleInput& input, const SamplingParams& sampling, u32 output_idx,
                                  SampleScratch* scratch, SampleResult* top) {
  using namespace sampling;
  const sampling::Row row{input.logits, input.vocab, input.edits.has_any(), &input.edits, &scratch->edits};
  if (row.is_edited) prepare_edits(group, input.edits, &scratch->edits);

  // The best token, of the model and after the edits: largest key, then lowest index.
  u64 model_best = 0;
  u64 best = 0;
  if (input.tile_best != nullptr) model_best = best_of_tiles(group, scratch, input.tile_best, input.num_tiles);
  if (row.is_edited || input.tile_best == nullptr) {
    u64 model_seen = 0;
    row.for_each(group, [&](u32 idx, f32 model_logit, f32 logit) {
      const u64 model_code = best_code(model_logit, idx);
      const u64 code = best_code(logit, idx);
      model_seen = model_code > model_seen ? model_code : model_seen;
      best = code > best ? code : best;
    });
    if (input.tile_best == nullptr) model_best = max_over_group(group, scratch, model_seen);
  }
  best = row.is_edited ? max_over_group(group, scratch, best) : model_best;
  const u32 num_top = sampling.num_top_logprobs < kMaxTopLogprobs ? sampling.num_top_logprobs : kMaxTopLogprobs;
  if (static_cast<u32>(model_best >> 32) <= kKeyOfMinusInfinity) {
    for (u32 i = group.id; i < num_top; i += group.count) top[i] = SampleResult{0, minus_infinity()};
    return input.edits.class_of_token != nullptr ? no_token() : SampleResult{0, minus_infinity()};
  }

  // The sum behind the logprob, over the model's logits; the bins of what is drawn from.
  const bool is_stuck = static_cast<u32>(best >> 32) <= kKeyOfMinusInfinity;
  const bool draws = sampling.temperature > 0.0f && !is_stuck;
  const Weighing raw{value_of_key(static_cast<u32>(model_best >> 32)), kLog2OfE, 0};
  Weighing weighing{value_of_key(static_cast<u32>(best >> 32)), kLog2OfE, 1};
  Choice choice{0, kNoShare, 0};
  if (draws) {
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
  const u64 sum = survey(group, scratch, row, raw, weighing, draws, draws && !is_narrow);
  const f32 log_sum = log_of_sum(sum);

  u32 token = 0xffffffffu - static_cast<u32>(best);
  if (draws) {
    token = kByRadix ? kNotFound : choose_by_window(group, scratch, row, weighing, choice, !is_narrow);
    group.sync();  // hazard: the descent, or the next row, overwrites a window that a member still reads
    if (token == kNotFound) token = choose_by_radix(group, scratch, row, weighing, choice);
  }
  if (num_top > 0) report_top(group, scratch, row, raw, log_sum, num_top, top);
  if (is_stuck || token >= input.vocab) return no_token();
  return SampleResult{token, logprob_of(raw.max_logit, log_sum, input.logits[token])};
}

}  // namespace blinkimp
