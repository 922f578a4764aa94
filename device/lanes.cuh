// Lanes: the threads that run one piece of director code together. A warp on the GPU, one lane on the CPU.
//
// Control-plane code is written once over this: loops go `for (u32 i = lanes.id; i < n; i += lanes.count)`, decisions that
// need an order are taken by lane 0 (`lanes.is_first()`) and shared with broadcast(). All lanes call each member together.
// Test: the director's tests (tests/host), and tests/gpu for the warp.
#pragma once
#include <ptx.cuh>

namespace blinkimp {

struct Lanes {
  u32 id;
  u32 count;

  BK_INLINE bool is_first() const { return id == 0; }

#if BK_GPU
  BK_INLINE static Lanes warp() { return Lanes{threadIdx.x % 32u, 32u}; }
  // Hazard: without it a lane reads director state that another lane has not written yet.
  BK_INLINE void sync() const { __syncwarp(); }
  BK_INLINE bool any(bool value) const { return __any_sync(0xffffffffu, value); }
  BK_INLINE u32 broadcast(u32 value, u32 source_lane) const { return __shfl_sync(0xffffffffu, value, source_lane); }
  // One reading for all: lanes that compare clocks of their own would part ways.
  BK_INLINE u64 clock_ns() const {
    return __shfl_sync(0xffffffffu, device_clock_ns(), 0);
  }
  BK_INLINE u32 sum(u32 value) const { return __reduce_add_sync(0xffffffffu, value); }
  BK_INLINE u32 max(u32 value) const { return __reduce_max_sync(0xffffffffu, value); }
  BK_INLINE u32 exclusive_sum(u32 value) const {
    u32 inclusive = value;
    for (u32 distance = 1; distance < 32; distance *= 2) {
      u32 below = __shfl_up_sync(0xffffffffu, inclusive, distance);
      if (id >= distance) inclusive += below;
    }
    return inclusive - value;
  }
#else
  static Lanes single() { return Lanes{0, 1}; }
  void sync() const {}
  bool any(bool value) const { return value; }
  u32 broadcast(u32 value, u32) const { return value; }
  u64 clock_ns() const { return device_clock_ns(); }
  u32 sum(u32 value) const { return value; }
  u32 max(u32 value) const { return value; }
  u32 exclusive_sum(u32) const { return 0; }
#endif
};

}  // namespace blinkimp
