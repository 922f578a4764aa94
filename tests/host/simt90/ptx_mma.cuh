// Stands in for device/ptx_mma.cuh in the CPU emulation of a Hopper CTA: only what attention takes from it.
// Used by tests/host/simt90. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

BK_INLINE u32 opaque(u32 value) { return value; }
BK_INLINE f32 exp2_approx(f32 x) { return __builtin_exp2f(x); }

}  // namespace blinkimp
