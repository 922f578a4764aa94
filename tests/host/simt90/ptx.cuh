// Stands before device/ptx.cuh in the CPU emulation of a Hopper CTA: the same functions, except that a spin gives way to other threads.
//
// device_clock_ns() or sleep_ns() is what every spin of the device code calls between two looks, so it is where a fiber waits: until some thread
// arrives at the grid barrier, adds to or stores a word for other CTAs, or a plan is published. (Waits for mbarriers block in mbarrier_try_wait and never spin.) Also what simt.h lacks of CUDA.
// Used by tests/host/simt90/*.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <simt.h>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads, blocks)
#define __noinline__ __attribute__((noinline))
#define __shared__
#define __align__(bytes)

#define device_clock_ns device_clock_ns_of_cpu
#define red_add_relaxed_gpu red_add_relaxed_of_cpu
#define red_add_release_gpu red_add_release_of_cpu
#define sleep_ns sleep_ns_of_cpu
#define st_relaxed_gpu st_relaxed_gpu_of_cpu
#include_next <ptx.cuh>
#undef device_clock_ns
#undef red_add_relaxed_gpu
#undef red_add_release_gpu
#undef sleep_ns
#undef st_relaxed_gpu

struct uint2 {
  unsigned x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline void __syncwarp() { __any_sync(0xffffffffu, false); }
inline void __syncthreads() { simt::machine.barrier(0, static_cast<unsigned>(simt::machine.fibers.size())); }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == 0xffffffffu; }

namespace simt90 {
inline simt::Rendezvous grid;  // its generation counts arrivals at grid barriers
inline unsigned cta_idx = 0;   // of the CTA that runs
}  // namespace simt90

namespace blinkimp {

BK_INLINE u64 device_clock_ns() {
  simt::machine.wait(simt90::grid);
  return 0;
}

BK_INLINE void sleep_ns(u32) { simt::machine.wait(simt90::grid); }

template <class Word>
BK_INLINE void red_add_relaxed_gpu(Word* address, Word value) {
  red_add_relaxed_of_cpu(address, value);
  ++simt90::grid.generation;
}

BK_INLINE void red_add_release_gpu(u32* address, u32 value) {
  red_add_release_of_cpu(address, value);
  ++simt90::grid.generation;
}

BK_INLINE void st_relaxed_gpu(u64* address, u64 value) {
  st_relaxed_gpu_of_cpu(address, value);
  ++simt90::grid.generation;
}

}  // namespace blinkimp
