// Stands in for device/ptx_wgmma_attention.cuh in the CPU emulation of a Hopper CTA.
// Used by tests/host/simt90. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

template <int N>
BK_INLINE void wgmma_values_k16(f32 (&d)[N / 2], const u32* a, u64 b_descriptor, int accumulate) {
  simt90::issue({d, {}, a, 0, b_descriptor, N, true, accumulate != 0});
}

template <int N>
BK_INLINE void wgmma_columns_k16(f32 (&d)[N / 2], u64 a_descriptor, u64 b_descriptor, int accumulate) {
  simt90::issue({d, {}, nullptr, a_descriptor, b_descriptor, N, false, accumulate != 0, true});
}

}  // namespace blinkimp
