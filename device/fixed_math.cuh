// Integer arithmetic for sampling: ordered keys of floats, 2^-d and log2 in fixed point. Same bits on every machine.
//
// Floating-point sums depend on their order and libm differs between CPU and GPU; integers do neither. So sampling weighs tokens
// with these: Qn means a u32 or u64 with n fractional bits. The only float operations are subtract, multiply and convert, and no compiler
// may contract them into an fma: products are mul_f32(), or the product and the sum never meet in one expression.
// Errors: exp2_neg_q44 <= 2^-29 relative + one unit of Q44; log2_q32 <= 2 units of Q32 (both measured by the test).
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling.py, tests/gpu/test_sampling_gpu.py
#pragma once
#include <ptx.cuh>

namespace blinkimp {

constexpr u32 kLog2FractionBits = 32;
constexpr u32 kWeightFractionBits = 44;  // 2^18 tokens of weight 1 still sum to less than 2^63
constexpr u32 kKeyOfMinusInfinity = 0x007fffff;

BK_INLINE u32 mul_hi_u32(u32 a, u32 b) {
#if BK_GPU
  return __umulhi(a, b);
#else
  return static_cast<u32>((static_cast<u64>(a) * b) >> 32);
#endif
}

BK_INLINE u64 mul_hi_u64(u64 a, u64 b) {
#if BK_GPU
  return __umul64hi(a, b);
#else
  return static_cast<u64>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

BK_INLINE u32 leading_zeros_u64(u64 value) {  // value != 0
#if BK_GPU
  return static_cast<u32>(__clzll(static_cast<long long>(value)));
#else
  return static_cast<u32>(__builtin_clzll(value));
#endif
}

BK_INLINE u32 lowest_bit_u32(u32 value) {  // its place; value != 0
#if BK_GPU
  return static_cast<u32>(__ffs(static_cast<int>(value))) - 1u;
#else
  return static_cast<u32>(__builtin_ctz(value));
#endif
}

BK_INLINE f32 minus_infinity() { return __builtin_bit_cast(f32, 0xff800000u); }  // NVRTC has no __builtin_huge_valf

// A logit that can be ordered: NaN counts as minus infinity (it never wins), +infinity as the largest number, -0 as +0.
BK_INLINE f32 orderable_logit(f32 logit) {
  constexpr f32 kLargest = 3.402823466e38f;
  f32 value = logit + 0.0f;  // -0 -> +0
  value = value > kLargest ? kLargest : value;
  return value == value ? value : minus_infinity();
}

// Order-preserving: a < b exactly when order_key(a) < order_key(b), for values of orderable_logit().
BK_INLINE u32 order_key(f32 value) {
  const u32 bits = __builtin_bit_cast(u32, value);
  return (bits >> 31) != 0u ? ~bits : bits | 0x80000000u;
}

BK_INLINE f32 value_of_key(u32 key) {
  return __builtin_bit_cast(f32, (key >> 31) != 0u ? key & 0x7fffffffu : ~key);
}

// One product, one rounding: nvcc may not make an fma of it and a sum next to it.
BK_INLINE f32 mul_f32(f32 a, f32 b) {
#if BK_GPU
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BK_INLINE f32 div_f32(f32 a, f32 b) {
#if BK_GPU
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// floor(2^44 * 2^-distance) for a distance >= 0; 0 from 45 on, and for NaN (infinity times zero).
BK_INLINE u64 exp2_neg_q44(f32 distance) {
  const f32 bounded = distance < 45.0f ? distance : 45.0f;  // no branch: four of these run side by side
  const u32 whole = static_cast<u32>(bounded);
  // Exact: both are multiples of the same power of two, and multiplying by 2^32 only moves the exponent.
  const f32 rest = bounded - static_cast<f32>(whole);
  const u32 fraction = static_cast<u32>(mul_f32(rest, 4294967296.0f));
  // 1 - 2^-f = f * q(f); q: near-minimax polynomial of degree 6 on [0, 1], coefficients in Q32 with alternating signs.
  u32 q = 0x0000bda6u;
  q = 0x0009c200u - mul_hi_u32(fraction, q);
  q = 0x005728b0u - mul_hi_u32(fraction, q);
  q = 0x027641a9u - mul_hi_u32(fraction, q);
  q = 0x0e358127u - mul_hi_u32(fraction, q);
  q = 0x3d7f7bcbu - mul_hi_u32(fraction, q);
  q = 0xb17217f7u - mul_hi_u32(fraction, q);
  const u64 power_q32 = 0x100000000ull - mul_hi_u32(fraction, q);
  return (power_q32 << (kWeightFractionBits - 32)) >> whole;
}

// log2 of value / 2^44 in Q32, for value >= 2^44: the exponent, then one bit of the fraction per squaring.
BK_INLINE u64 log2_q32(u64 value) {
  const u32 zeros = leading_zeros_u64(value);
  u64 result = static_cast<u64>(63u - zeros - kWeightFractionBits);
  u64 mantissa = value << zeros;  // Q63, in [1, 2)
  for (u32 bit = 0; bit < kLog2FractionBits; ++bit) {
    const u64 square = mul_hi_u64(mantissa, mantissa);  // Q62, in [1, 4)
    const u64 carry = square >> 63;
    mantissa = carry != 0u ? square : square << 1;
    result = (result << 1) | carry;
  }
  return result;
}

}  // namespace blinkimp
