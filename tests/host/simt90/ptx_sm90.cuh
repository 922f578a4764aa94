// Stands in for device/ptx_sm90.cuh in the CPU emulation of a Hopper CTA: mbarriers, bulk copies, wgmma's control, barriers.
//
// A bulk copy reads its source when it is issued, and lands by chance: at once, or when all threads wait, one by one in any order. Code that reads early or refills early sees wrong bytes, and so does code that asks for a phase two ahead of
// the one in progress: a barrier knows phases by their parity, and says that it is over. A wgmma reads its operands and writes its accumulators when the warpgroup waits for it;
// until then the accumulators are NaN: code that touches either early computes wrong results.
// Used by tests/host/simt90. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <ptx.cuh>

#include <map>

namespace blinkimp {
alignas(1024) inline u8 dynamic_shared[227 * 1024];  // what worker_memory() finds
}

namespace simt90 {

using blinkimp::f32;
using blinkimp::u32;
using blinkimp::u64;
using blinkimp::u8;

struct Barrier {
  u32 num_expected = 0;
  u32 num_pending = 0;
  long long num_bytes = 0;  // expected minus landed
  simt::Rendezvous phases;  // generation: completed phases
};

struct Copy {
  u8* destination;
  std::vector<u8> bytes;
  u64* barrier;
};

struct Wgmma {
  f32* d;                   // [columns / 2] of this thread
  std::vector<f32> before;  // d as it was, if this is the first of the thread's pending ones to write it
  const u32* a;             // [4] of this thread, or null: a_descriptor
  u64 a_descriptor;
  u64 b_descriptor;
  u32 columns;
  bool b_transposed;
  bool accumulate;
  bool a_transposed = false;
};

inline std::map<u64*, Barrier> barriers;
inline std::vector<Copy> copies;                                 // issued, not landed
inline u64 num_copied_bytes = 0;                                 // of all copies ever issued
inline std::vector<std::vector<std::vector<Wgmma>>> wgmmas;       // [thread][group], the last group still open
inline simt::Rendezvous warpgroups[3];

inline void complete(Barrier& barrier) {
  if (barrier.num_pending != 0 || barrier.num_bytes != 0) return;
  barrier.num_pending = barrier.num_expected;
  ++barrier.phases.generation;
}

inline void arrive(Barrier& barrier, u32 count) {
  if (count > barrier.num_pending) simt::fail("mbarrier arrivals in one phase, beyond the pending", count, barrier.num_pending);
  barrier.num_pending -= count;
  complete(barrier);
}

inline void arrive(u64* address, u32 count) { arrive(barriers.at(address), count); }

inline void land(const Copy& copy) {
  std::memcpy(copy.destination, copy.bytes.data(), copy.bytes.size());
  Barrier& barrier = barriers.at(copy.barrier);
  barrier.num_bytes -= static_cast<long long>(copy.bytes.size());
  complete(barrier);
}

// Any one of the copies on their way. False: there is none.
inline bool land_a_copy() {
  if (copies.empty()) return false;
  const auto place = copies.begin() + static_cast<std::ptrdiff_t>(simt::machine.random() % copies.size());
  const Copy copy = *place;
  copies.erase(place);
  land(copy);
  return true;
}

}  // namespace simt90

namespace blinkimp {

BK_INLINE u32 shared_address(const void* pointer) {
  const auto offset = static_cast<const u8*>(pointer) - dynamic_shared;
  if (offset < 0 || offset >= static_cast<long>(sizeof(dynamic_shared))) simt::fail("address outside of shared memory", static_cast<u64>(offset), 0);
  return static_cast<u32>(offset);
}

// ---- mbarrier ----------------------------------------------------------------------------------------------------
BK_INLINE void mbarrier_init(u64* barrier, u32 num_arrivals) {
  simt90::barriers[barrier] = simt90::Barrier{};
  simt90::barriers[barrier].num_expected = simt90::barriers[barrier].num_pending = num_arrivals;
}
BK_INLINE void fence_mbarrier_init() {}
BK_INLINE void mbarrier_arrive(u64* barrier) { simt90::arrive(barrier, 1); }
BK_INLINE void mbarrier_arrive_if(u64* barrier, bool arrives) {
  if (arrives) simt90::arrive(barrier, 1);
}
BK_INLINE void mbarrier_arrive_count(u64* barrier, u32 count) {
  if (count) simt90::arrive(barrier, count);
}
BK_INLINE void mbarrier_arrive_expect_bytes(u64* barrier, u32 num_bytes) {
  simt90::barriers.at(barrier).num_bytes += num_bytes;
  simt90::arrive(barrier, 1);
}
BK_INLINE bool mbarrier_try_wait(u64* barrier, u32 parity) {
  simt90::Barrier& state = simt90::barriers.at(barrier);
  while ((state.phases.generation & 1) == parity) simt::machine.wait(state.phases);
  return true;
}
BK_INLINE bool mbarrier_test_wait(u64* barrier, u32 parity) { return (simt90::barriers.at(barrier).phases.generation & 1) != parity; }

// ---- Bulk copies -------------------------------------------------------------------------------------------------
BK_INLINE void bulk_copy_to_shared(void* destination, const void* source, u32 num_bytes, u64* barrier) {
  if (shared_address(destination) % 16 || num_bytes % 16 || reinterpret_cast<u64>(source) % 16) simt::fail("bulk copy's alignment", num_bytes, 0);
  simt90::num_copied_bytes += num_bytes;
  const u8* bytes = static_cast<const u8*>(source);
  simt90::Copy copy{static_cast<u8*>(destination), {bytes, bytes + num_bytes}, barrier};
  if (simt::machine.random() % 2) simt90::land(copy);
  else simt90::copies.push_back(std::move(copy));
}
BK_INLINE void bulk_copy_streamed(void* destination, const void* source, u32 num_bytes, u64* barrier) { bulk_copy_to_shared(destination, source, num_bytes, barrier); }
BK_INLINE void fence_proxy_async() {}

// ---- wgmma -------------------------------------------------------------------------------------------------------
BK_INLINE u64 wgmma_descriptor(u32 address, u32 group_bytes = 1024) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (static_cast<u64>(group_bytes >> 4) << 32) | (1ull << 62);
}
BK_INLINE void wgmma_fence() {}
BK_INLINE void wgmma_commit() { simt90::wgmmas[simt::machine.current].emplace_back(); }

}  // namespace blinkimp

#include <wgmma_emulation.h>

namespace blinkimp {

template <int kPending>
BK_INLINE void wgmma_wait() {
  simt90::run_wgmmas(kPending);
}

template <int kRegisters>
BK_INLINE void settle(f32 (&)[kRegisters]) {}

// ---- Warps -------------------------------------------------------------------------------------------------------
template <int kId, int kNumThreads>
BK_INLINE void named_barrier_sync() {
  simt::machine.barrier(kId, kNumThreads);
}
template <int kRegisters>
BK_INLINE void set_registers_down() {}
template <int kRegisters>
BK_INLINE void set_registers_up() {}
BK_INLINE float2 load_l2(const float2* source) { return *source; }
BK_INLINE u32 cta_idx() { return simt90::cta_idx; }
BK_INLINE u32 thread_idx() { return simt::machine.current; }
BK_INLINE bool is_first_thread() { return thread_idx() == 0; }
BK_INLINE u32 uniform(u32 value) {  // also checks that it is
  const u32 first = __shfl_sync(0xffffffffu, value, 0);
  if (first != value) simt::fail("a value that should be equal in all lanes of a warp", value, first);
  return first;
}
BK_INLINE bool elect_one() { return uniform(1) != 0 && thread_idx() % 32 == 0; }
template <class T>
BK_INLINE T* opaque(T* pointer) {
  return pointer;
}

BK_INLINE u32 bf16_bits(f32 value) {  // round to nearest even
  const u32 bits = __builtin_bit_cast(u32, value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
BK_INLINE u32 pack_bf16x2(f32 low, f32 high) { return bf16_bits(low) | bf16_bits(high) << 16; }
BK_INLINE void trap() { simt::fail("trap", 1, 0); }

}  // namespace blinkimp
