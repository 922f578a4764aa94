// PTX that attention alone needs: barriers with a run-time number, a transposed operand. GPU only.
//
// Called by device/attention*.cuh. Test: pytest -m gpu tests/gpu/test_attention_sm90.py; tests/host/simt90/ptx_attention.cuh stands in for it without a GPU.
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

// Barrier `id` of num_threads threads: sync waits for all, arrive only counts.
BK_INLINE void barrier_sync(u32 id, u32 num_threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory"); }
BK_INLINE void barrier_arrive(u32 id, u32 num_threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory"); }

// Orders this thread's ordinary accesses of shared memory against the async proxy. (Without the state space it waits for global stores, too: a
// microsecond at each run's start.)
BK_INLINE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma descriptor of a tile in blocks of rows of 128 bytes, 128-byte swizzle, 8 rows (1024 bytes) after 8 rows. K-major: the rows are M or N, k
// runs along them. MN-major (transposed): the rows are k, N runs along them and goes on in the next block.
BK_INLINE u64 wgmma_tile_descriptor(u32 address, u32 block_stride_bytes) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (static_cast<u64>(block_stride_bytes >> 4) << 16) | (static_cast<u64>(1024 >> 4) << 32) | (1ull << 62);
}

}  // namespace blinkimp
