// The only place with raw asm or atomics of the control plane: loads and stores with order and scope, clocks, sleeps.
//
// Each function has a GPU branch (PTX) and a CPU branch (GCC __atomic builtins), so that the director compiles for both.
// Names carry op, order, scope: sys = visible to the host and to other processes, gpu = visible to all CTAs.
// Called by device/*_port.cuh, device/director.cuh, device/worker.cuh. The Hopper data path is in ptx_sm90.cuh.
// Test: pytest tests/host/test_ingress_port.py tests/host/test_ring_director.py (both ends of a ring)
#pragma once
#include <program_abi.h>

#if defined(__CUDACC__)
#define BK_GPU 1
#define BK_INLINE __device__ __forceinline__
#define BK_NOINLINE __device__ __noinline__  // of the director, whose calls cost nothing beside what they do: inlined, they are most of the compile time
#else
#define BK_GPU 0
#define BK_INLINE inline
#define BK_NOINLINE inline
#include <time.h>
#endif

namespace blinkimp {

// ---- Loads and stores --------------------------------------------------------------------------------------------
BK_INLINE u32 ld_acquire_sys(const u32* address) {
#if BK_GPU
  u32 value;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

BK_INLINE u64 ld_acquire_sys(const u64* address) {
#if BK_GPU
  u64 value;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

BK_INLINE u32 ld_relaxed_sys(const u32* address) {
#if BK_GPU
  u32 value;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_RELAXED);
#endif
}

BK_INLINE u64 ld_relaxed_sys(const u64* address) {
#if BK_GPU
  u64 value;
  asm volatile("ld.relaxed.sys.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_RELAXED);
#endif
}

BK_INLINE void st_relaxed_sys(u32* address, u32 value) {
#if BK_GPU
  asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
#endif
}

BK_INLINE void st_relaxed_sys(u64* address, u64 value) {
#if BK_GPU
  asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
#endif
}

BK_INLINE void st_release_sys(u32* address, u32 value) {
#if BK_GPU
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

BK_INLINE void st_release_sys(u64* address, u64 value) {
#if BK_GPU
  asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

BK_INLINE u32 ld_acquire_gpu(const u32* address) {
#if BK_GPU
  u32 value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

BK_INLINE void st_release_gpu(u32* address, u32 value) {
#if BK_GPU
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

// One word from SM to SM that says itself what it is: nothing else is ordered by it.
BK_INLINE u32 ld_relaxed_gpu(const u32* address) {
#if BK_GPU
  u32 value;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_RELAXED);
#endif
}

BK_INLINE u64 ld_relaxed_gpu(const u64* address) {
#if BK_GPU
  u64 value;
  asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_RELAXED);
#endif
}

BK_INLINE void st_relaxed_gpu(u64* address, u64 value) {
#if BK_GPU
  asm volatile("st.relaxed.gpu.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
#endif
}

// Among warps of one CTA, through its shared memory (generic addresses).
BK_INLINE u32 ld_acquire_cta(const u32* address) {
#if BK_GPU
  u32 value;
  asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

BK_INLINE void st_release_cta(u32* address, u32 value) {
#if BK_GPU
  asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

// Adds to a word of device memory; returns the value seen before. Relaxed: the sums are read after a barrier.
BK_INLINE u32 atom_add_relaxed_gpu(u32* address, u32 value) {
#if BK_GPU
  u32 seen;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(seen) : "l"(address), "r"(value) : "memory");
  return seen;
#else
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#endif
}

BK_INLINE u64 atom_add_relaxed_gpu(u64* address, u64 value) {
#if BK_GPU
  u64 seen;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;" : "=l"(seen) : "l"(address), "l"(value) : "memory");
  return seen;
#else
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#endif
}

BK_INLINE void red_add_relaxed_gpu(u32* address, u32 value) {
#if BK_GPU
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#endif
}

BK_INLINE void red_add_relaxed_gpu(u64* address, u64 value) {
#if BK_GPU
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
  __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#endif
}

// The same, and what came before it in each thread that added is seen by those that add later.
BK_INLINE u32 atom_add_acq_rel_gpu(u32* address, u32 value) {
#if BK_GPU
  u32 seen;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(seen) : "l"(address), "r"(value) : "memory");
  return seen;
#else
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
#endif
}

// Compare-and-swap; returns the value seen before.
BK_INLINE u32 cas_acq_rel_cta(u32* address, u32 expected, u32 desired) {
#if BK_GPU
  u32 seen;
  asm volatile("atom.acq_rel.cta.cas.b32 %0, [%1], %2, %3;" : "=r"(seen) : "l"(address), "r"(expected), "r"(desired) : "memory");
  return seen;
#else
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
#endif
}

BK_INLINE void red_add_release_gpu(u32* address, u32 value) {
#if BK_GPU
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_fetch_add(address, value, __ATOMIC_RELEASE);
#endif
}

// Adds to a word of shared memory among threads of one CTA (CPU: of one process); returns the value seen before. Relaxed: the
// sums are read after a barrier.
BK_INLINE u32 atom_add_relaxed_shared(u32* address, u32 value) {
#if BK_GPU
  u32 seen;
  asm volatile("atom.relaxed.cta.shared::cta.add.u32 %0, [%1], %2;"
               : "=r"(seen)
               : "r"(static_cast<u32>(__cvta_generic_to_shared(address))), "r"(value)
               : "memory");
  return seen;
#else
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#endif
}

// Exchange; returns the value seen before.
BK_INLINE u64 exchange_acq_rel_sys(u64* address, u64 value) {
#if BK_GPU
  u64 seen;
  asm volatile("atom.acq_rel.sys.exch.b64 %0, [%1], %2;" : "=l"(seen) : "l"(address), "l"(value) : "memory");
  return seen;
#else
  return __atomic_exchange_n(address, value, __ATOMIC_ACQ_REL);
#endif
}

// Compare-and-swap; returns the value seen before. Acquire and release: the winner sees what the loser published.
BK_INLINE u64 cas_acq_rel_sys(u64* address, u64 expected, u64 desired) {
#if BK_GPU
  u64 seen;
  asm volatile("atom.acq_rel.sys.cas.b64 %0, [%1], %2, %3;" : "=l"(seen) : "l"(address), "l"(expected), "l"(desired) : "memory");
  return seen;
#else
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
#endif
}

// ---- Fences, clocks, waits ---------------------------------------------------------------------------------------
BK_INLINE void fence_acq_rel_sys() {
#if BK_GPU
  asm volatile("fence.acq_rel.sys;" ::: "memory");
#else
  __atomic_thread_fence(__ATOMIC_ACQ_REL);
#endif
}

// Pair for publishing several words with one fence, such as ring entries: write payloads, fence_publish_sys(), then st_publish_sys() each commit word.
// CPU: the fence is nothing and each store releases, because ThreadSanitizer does not model fences; on x86 it costs nothing.
BK_INLINE void fence_publish_sys() {
#if BK_GPU
  asm volatile("fence.acq_rel.sys;" ::: "memory");
#endif
}

BK_INLINE void st_publish_sys(u32* address, u32 value) {
#if BK_GPU
  asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

BK_INLINE void st_publish_sys(u64* address, u64 value) {
#if BK_GPU
  asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

// Device clock in ns: %globaltimer on the GPU, CLOCK_MONOTONIC on the emulated device.
BK_INLINE u64 device_clock_ns() {
#if BK_GPU
  u64 value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
#else
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<u64>(now.tv_sec) * 1000000000ull + static_cast<u64>(now.tv_nsec);
#endif
}

BK_INLINE void sleep_ns(u32 duration_ns) {
#if BK_GPU
  asm volatile("nanosleep.u32 %0;" ::"r"(duration_ns));
#else
  timespec request{0, static_cast<long>(duration_ns)};
  nanosleep(&request, nullptr);
#endif
}

}  // namespace blinkimp
