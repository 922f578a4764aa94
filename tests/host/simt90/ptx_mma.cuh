// Stands in for device/ptx_mma.cuh in the CPU emulation of a Hopper CTA: what Hopper's ops take from it.
// Used by tests/host/simt90. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

BK_INLINE u8* shared_bytes(u32 address, u32 num_bytes) {
  if (address + num_bytes > sizeof(dynamic_shared)) simt::fail("shared memory access ends at", address + num_bytes, sizeof(dynamic_shared));
  return dynamic_shared + address;
}

}  // namespace blinkimp

#include <ptx_mma_common.cuh>
