// Stands in for device/ptx_attention.cuh in the CPU emulation of a Hopper CTA.
// Used by tests/host/simt90. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

BK_INLINE void barrier_sync(u32 id, u32 num_threads) { simt::machine.barrier(id, num_threads); }
BK_INLINE void barrier_arrive(u32 id, u32 num_threads) {
  simt::Rendezvous& place = simt::machine.barriers[id];
  if (++place.num_arrived == num_threads) {
    place.num_arrived = 0;
    ++place.generation;
  }
}

BK_INLINE void fence_proxy_async_shared() {}

BK_INLINE u64 wgmma_tile_descriptor(u32 address, u32 block_stride_bytes) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (static_cast<u64>(block_stride_bytes >> 4) << 16) | (static_cast<u64>(1024 >> 4) << 32) | (1ull << 62);
}

}  // namespace blinkimp
