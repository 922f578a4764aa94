// The arithmetic of attention for one row, the same in every path so that a row's bits depend on its own keys alone. GPU only.
//
// I1 A row's keys are taken in blocks of a page (64), in order, and splits of kSplitPages pages, both at fixed positions. Inside a split an
//    online softmax runs (softmax_block); at its end the split is folded into the row's total (fold_*), splits in order.
//    What its exponentials are relative to, its maximum, is that of its first block, and follows a later one only where that exceeds it by
//    more than kMaximumSlack powers of two (raised_maximum): what was added up so far is hardly ever rescaled. So exponentials reach 2^kMaximumSlack.
// I2 A block or split that is wholly masked for a row changes nothing in it: its weights are exact zeros, its factors exact ones (or they
//    multiply zeros). So it does not matter whether a path computes such a block (because other rows of its tile need it) or leaves it out.
// I3 Every product and sum that the compiler could contract is spelled out (__fmaf_rn, __fmul_rn, ...): paths that inline these
//    functions into different code get the same bits. Compile without --use_fast_math.
// I4 Both matrix products add up over k in the same steps of 16, whatever else their shape is: m64n64k16 and m64n<head_dim>k16, or with the
//    operands exchanged m64n8k16 (attention_narrow.cuh). Rows and columns of a wgmma do not mix.
// Hence decode, prefill in any chunking, and recomputation after a preemption agree bit for bit.
// Scores are kept raw (q . k); `scale` is attention_scale * log2(e) and enters with the exponential.
// Fragments: thread t of a warpgroup holds columns 8j + 2(t mod 4) + {0, 1} of rows g = 16(t / 32) + (t mod 32) / 4 and g + 8 in
// d[4j + 0..1] and d[4j + 2..3].
// Called by device/attention.cuh, attention_merge.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <ptx_attention.cuh>
#include <ptx_mma.cuh>

namespace blinkimp {

constexpr u32 kSplitPages = 4;
constexpr u32 kSplitTokens = kSplitPages * kPageTokens;
constexpr u32 kScoreWords = kPageTokens / 2;   // fragment registers of 64 rows x 64 keys
constexpr u32 kWeightWords = kPageTokens / 4;  // the same as bf16 pairs: A fragments of 4 steps of 16 keys

BK_INLINE f32 minus_infinite_score() { return __uint_as_float(0xff800000u); }

// What to subtract before the exponential: the maximum, or 0 for a row that has not seen a key (minus infinity has no difference).
BK_INLINE f32 softmax_anchor(f32 maximum) { return maximum == minus_infinite_score() ? 0.0f : maximum; }

// Powers of two by which a later block of a split may exceed the split's maximum. As in FlashAttention-4; 2^8 * 256 keys is far from what f32 and bf16 hold.
constexpr f32 kMaximumSlack = 8.0f;

// A split's maximum, given the one so far and the maximum of both, that and the block's. A row that has not seen a key (before: minus infinity) takes any.
BK_INLINE f32 raised_maximum(f32 before, f32 maximum, f32 scale) { return __fmul_rn(__fsub_rn(maximum, before), scale) > kMaximumSlack ? maximum : before; }

BK_INLINE f32 exp2_scaled_difference(f32 value, f32 anchor, f32 scale) { return exp2_approx(__fmul_rn(__fsub_rn(value, anchor), scale)); }

// Running state of a split, for the rows g and g + 8 of a thread's fragments.
struct SoftmaxState {
  f32 maximum[2];  // of the row, or at most kMaximumSlack powers of two below it; equal in the 4 lanes of a quad
  f32 sum[2];      // of this lane's columns; quad_total() adds the quad up

  BK_INLINE void reset() {
    maximum[0] = maximum[1] = minus_infinite_score();
    sum[0] = sum[1] = 0.0f;
  }
};

BK_INLINE f32 quad_total(f32 value) {
  value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Sets scores that the row of `half` must not see to minus infinity: only keys in [first_key + key_begin, first_key + key_end) are seen.
BK_INLINE void mask_scores(f32 (&scores)[kScoreWords], u32 half, i32 key_begin, i32 key_end) {
  const i32 lane_key = static_cast<i32>(opaque(threadIdx.x) % 4u * 2u);
  key_begin -= lane_key;
  key_end -= lane_key;
#pragma unroll
  for (u32 tile = 0; tile < kPageTokens / 8; ++tile) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const i32 key = static_cast<i32>(tile * 8 + i);
      if (key < key_begin || key >= key_end) scores[tile * 4 + half * 2 + i] = minus_infinite_score();
    }
  }
}

// One block: scores become exponentials, in place. factors are what the split's output so far must be multiplied with. The two rows go side by side:
// each is one long chain.
BK_INLINE void softmax_block(f32 (&scores)[kScoreWords], f32 scale, SoftmaxState& state, f32 (&factors)[2]) {
  f32 maximum[2];
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {  // four short chains
    f32 parts[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const f32* first = &scores[i * 4 + half * 2];
      const f32* second = &scores[i * 4 + 16 + half * 2];
      parts[i] = fmaxf(fmaxf(first[0], first[1]), fmaxf(second[0], second[1]));
    }
    maximum[half] = fmaxf(state.maximum[half], fmaxf(fmaxf(parts[0], parts[1]), fmaxf(parts[2], parts[3])));
  }
#pragma unroll
  for (u32 distance = 1; distance <= 2; ++distance) {
    const f32 others[2] = {__shfl_xor_sync(0xffffffffu, maximum[0], distance), __shfl_xor_sync(0xffffffffu, maximum[1], distance)};
#pragma unroll
    for (u32 half = 0; half < 2; ++half) maximum[half] = fmaxf(maximum[half], others[half]);
  }
  f32 offset[2];
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    maximum[half] = raised_maximum(state.maximum[half], maximum[half], scale);
    const f32 anchor = softmax_anchor(maximum[half]);
    offset[half] = -__fmul_rn(anchor, scale);
    factors[half] = exp2_scaled_difference(state.maximum[half], anchor, scale);
  }
  f32 sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (u32 tile = 0; tile < kPageTokens / 8; ++tile) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      f32& low = scores[tile * 4 + half * 2];
      f32& high = scores[tile * 4 + half * 2 + 1];
      low = exp2_approx(__fmaf_rn(low, scale, offset[half]));
      high = exp2_approx(__fmaf_rn(high, scale, offset[half]));
      sum[half] = __fadd_rn(sum[half], __fadd_rn(low, high));
    }
  }
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    state.sum[half] = __fmaf_rn(state.sum[half], factors[half], sum[half]);
    state.maximum[half] = maximum[half];
  }
}

// Exponentials as the A operand of the product with V: weights[4s .. 4s + 3] are the fragment of keys 16s .. 16s + 15.
BK_INLINE void pack_weights(const f32 (&exponentials)[kScoreWords], u32 (&weights)[kWeightWords]) {
#pragma unroll
  for (u32 i = 0; i < kWeightWords; ++i) weights[i] = pack_bf16x2(exponentials[2 * i], exponentials[2 * i + 1]);
}

// Multiplies rows g and g + 8 of output fragments by their factors; left out when all of the warp's are one, as they mostly are (x * 1 = x).
template <u32 kWords>
BK_INLINE void rescale_outputs(f32 (&outputs)[kWords], const f32 (&factors)[2]) {
  if (!__any_sync(0xffffffffu, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
  for (u32 i = 0; i < kWords; ++i) outputs[i] = __fmul_rn(outputs[i], factors[i / 2 % 2]);
}

// ---- Splits into the total ---------------------------------------------------------------------------------------
struct FoldTotal {  // of one row, before its first split: maximum -inf, sum 0, outputs 0
  f32 maximum;
  f32 sum;
};

struct FoldFactors {
  f32 total;
  f32 split;
};

BK_INLINE f32 fold_value(f32 total, f32 split, const FoldFactors& factors) {
  return __fmaf_rn(split, factors.split, __fmul_rn(total, factors.total));
}

// The factors of a split that meets a total of maximum `before`, given the maximum of both.
BK_INLINE FoldFactors fold_factors(f32 before, f32 split_maximum, f32 maximum, f32 scale) {
  const f32 anchor = softmax_anchor(maximum);
  return FoldFactors{exp2_scaled_difference(before, anchor, scale), exp2_scaled_difference(split_maximum, anchor, scale)};
}

// Takes a split's maximum and sum (quad_total) into the row's total; the returned factors are for its outputs.
BK_INLINE FoldFactors fold_split(FoldTotal& total, f32 split_maximum, f32 split_sum, f32 scale) {
  const f32 maximum = fmaxf(total.maximum, split_maximum);
  const FoldFactors factors = fold_factors(total.maximum, split_maximum, maximum, scale);
  total.maximum = maximum;
  total.sum = fold_value(total.sum, split_sum, factors);
  return factors;
}

// total / sum, given 1 / sum. The addition turns -0 into +0: I2 holds up to the sign of a zero, this removes it.
BK_INLINE f32 finish_value(f32 total, f32 inverse_sum) { return __fadd_rn(__fmul_rn(total, inverse_sum), 0.0f); }

}  // namespace blinkimp
