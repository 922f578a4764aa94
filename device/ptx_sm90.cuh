// The Hopper data path in PTX: mbarriers, bulk copies, wgmma control, register moves, named barriers. GPU only (sm_90a).
//
// Called by device/gemm.cuh and device/worker.cuh. Widths of wgmma itself: ptx_wgmma.cuh (generated).
// Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <ptx.cuh>

namespace blinkimp {

BK_INLINE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// ---- mbarrier ----------------------------------------------------------------------------------------------------
BK_INLINE void mbarrier_init(u64* barrier, u32 num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_arrivals) : "memory");
}

// Makes the inits visible to the async proxy, before any bulk copy completes on them.
BK_INLINE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

BK_INLINE void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Without a branch: code around it stays straight.
BK_INLINE void mbarrier_arrive_if(u64* barrier, bool arrives) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(shared_address(barrier)), "r"(static_cast<u32>(arrives)) : "memory");
}

// Arrives `count` times at once (0: not at all), without a branch: a warpgroup that alone read a stage arrives for both.
BK_INLINE void mbarrier_arrive_count(u64* barrier, u32 count) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0], %1;}" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

BK_INLINE void mbarrier_arrive_expect_bytes(u64* barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_bytes) : "memory");
}

// One try of a phase wait: the hardware suspends the thread for a bounded time. True when the phase with this parity is over.
BK_INLINE bool mbarrier_try_wait(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// One look: true when the phase with this parity is over. Never waits.
BK_INLINE bool mbarrier_test_wait(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- Bulk copies -------------------------------------------------------------------------------------------------
// Global -> shared, 16-byte aligned, completes on the barrier's transaction count.
BK_INLINE void bulk_copy_to_shared(void* destination, const void* source, u32 num_bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(destination)),
               "l"(source), "r"(num_bytes), "r"(shared_address(barrier))
               : "memory");
}

// As above, of bytes that nobody reads again soon: they leave L2 first, so that what each layer reads again stays there.
BK_INLINE void bulk_copy_streamed(void* destination, const void* source, u32 num_bytes, u64* barrier) {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(destination)),
               "l"(source), "r"(num_bytes), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}

// Orders this thread's ordinary accesses against the async proxy (bulk copies, wgmma operands), both ways.
BK_INLINE void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- wgmma -------------------------------------------------------------------------------------------------------
// Shared-memory descriptor of a K-major operand, 128-byte swizzle: rows of 128 bytes in groups of 8, group_bytes apart.
BK_INLINE u64 wgmma_descriptor(u32 address, u32 group_bytes = 1024) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (static_cast<u64>(group_bytes >> 4) << 32) | (1ull << 62);
}
BK_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
BK_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
BK_INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Says to the compiler that these registers change here: what uses a product stays behind the wait for it.
template <int kRegisters>
BK_INLINE void settle(f32 (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- Warps -------------------------------------------------------------------------------------------------------
template <int kRegisters>
BK_INLINE void set_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
BK_INLINE void set_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` of the CTA over num_threads threads (a multiple of 32), all of which call it.
template <int kId, int kNumThreads>
BK_INLINE void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kNumThreads) : "memory");
}

// blockIdx.x, read anew at each call: kept in a register through a whole step it would be one of those that attention lacks.
BK_INLINE u32 cta_idx() {
  u32 value;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(value));
  return value;
}

// threadIdx.x, likewise: values computed from it would otherwise be hoisted out of the loop over ops and live through attention.
BK_INLINE u32 thread_idx() {
  u32 value;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  return value;
}
BK_INLINE bool is_first_thread() { return thread_idx() == 0; }

// A value whose origin the compiler cannot see: what is computed from it stays where it is used, instead of being hoisted out of a long
// loop into registers that the loop's other parts need.
template <class T>
BK_INLINE T* opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// A load past L1, whose copy may be older than what another SM wrote.
BK_INLINE float2 load_l2(const float2* source) { return __ldcg(source); }

// A value that is the same in all lanes of the warp, made known as such: the compiler then keeps it, and what is computed from it, in
// uniform registers.
BK_INLINE u32 uniform(u32 value) { return __shfl_sync(0xffffffffu, value, 0); }

// True in one lane of a warp all of whose lanes call it. The compiler knows that a branch on it has one thread: a copy in there is one instruction. In a
// branch on a lane number it is a loop over the lanes that might be there.
BK_INLINE bool elect_one() {
  u32 elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

// Two floats to bf16, round to nearest even; `low` stands at the lower address.
BK_INLINE u32 pack_bf16x2(f32 low, f32 high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Stops the kernel after a fault was recorded; the context is lost, the record in host memory stays.
BK_INLINE void trap() { asm volatile("trap;"); }

}  // namespace blinkimp
