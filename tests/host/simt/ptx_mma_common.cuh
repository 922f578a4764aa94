// What both emulations of device/ptx_mma.cuh have in common: tests/host/simt/ptx_mma.cuh and tests/host/simt90/ptx_mma.cuh include it, each
// behind its own shared_bytes(). Test: pytest tests/host/test_attention_simt.py tests/host/test_attention_sm90_simt.py
#pragma once

namespace blinkimp {

// A copy's bytes are read when it is issued and land when its thread waits.
BK_INLINE void cp_async(u32 shared_destination, const void* source, u32 num_bytes, bool valid) {
  if (shared_destination % num_bytes != 0) simt::fail("cp.async destination modulo its size", shared_destination % num_bytes, 0);
  simt::PendingCopy copy{shared_destination, num_bytes, {}};
  if (valid) std::memcpy(copy.bytes, source, num_bytes);
  simt::machine.fibers[simt::machine.current].open_group.push_back(copy);
}
BK_INLINE void cp_async_16(u32 shared_destination, const void* source, bool valid) { cp_async(shared_destination, source, 16, valid); }
BK_INLINE void cp_async_4(u32 shared_destination, const void* source) { cp_async(shared_destination, source, 4, true); }
BK_INLINE void cp_async_commit() {
  simt::Fiber& fiber = simt::machine.fibers[simt::machine.current];
  fiber.copy_groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}
template <int kPending>
BK_INLINE void cp_async_wait() {
  simt::Fiber& fiber = simt::machine.fibers[simt::machine.current];
  while (fiber.copy_groups.size() > kPending) {
    for (const simt::PendingCopy& copy : fiber.copy_groups.front()) std::memcpy(shared_bytes(copy.destination, copy.num_bytes), copy.bytes, copy.num_bytes);
    fiber.copy_groups.erase(fiber.copy_groups.begin());
  }
}

BK_INLINE u32 opaque(u32 value) { return value; }
BK_INLINE f32 exp2_approx(f32 x) { return __builtin_exp2f(x); }
BK_INLINE f32 reciprocal_approx(f32 x) { return 1.0f / x; }

}  // namespace blinkimp
