// Reads device memory as fast as bulk copies can bring it into shared memory, and does nothing with it: the bandwidth a step could have.
//
// One thread of each CTA keeps kNumStages tiles in flight over its share of the buffer, num_passes times.
// Launched by tools/stream_rate.py. Test: pytest tests/compile/test_stream_rate.py, and on a GPU `python tools/stream_rate.py`
#include <ptx_sm90.cuh>

namespace blinkimp {

constexpr u32 kTileBytes = 16384;
constexpr u32 kNumStages = 13;  // 208 KB a CTA
constexpr u32 kMaxTries = 1u << 26;  // of a wait that the hardware already makes long

extern "C" __global__ void __launch_bounds__(32) stream_rate(const u8* buffer,  // [num_tiles * kTileBytes], host fills and owns
                                                             u64 num_tiles, u32 num_passes) {
  extern __shared__ __align__(128) u8 stages[];  // [kNumStages][kTileBytes]
  __shared__ u64 filled[kNumStages];
  if (threadIdx.x != 0) return;
  for (u32 stage_idx = 0; stage_idx < kNumStages; ++stage_idx) mbarrier_init(&filled[stage_idx], 1);
  fence_mbarrier_init();

  const u64 num_mine = num_tiles / gridDim.x * num_passes;  // the host makes num_tiles a multiple of the grid
  const u64 num_a_pass = num_tiles / gridDim.x;
  auto request = [&](u64 idx) {
    const u32 stage_idx = idx % kNumStages;
    const u64 tile_idx = (idx % num_a_pass) * gridDim.x + blockIdx.x;
    mbarrier_arrive_expect_bytes(&filled[stage_idx], kTileBytes);
    bulk_copy_to_shared(stages + stage_idx * kTileBytes, buffer + tile_idx * kTileBytes, kTileBytes, &filled[stage_idx]);
  };
  for (u64 idx = 0; idx < kNumStages && idx < num_mine; ++idx) request(idx);
  for (u64 idx = 0; idx < num_mine; ++idx) {
    u32 num_tries = 0;
    while (!mbarrier_try_wait(&filled[idx % kNumStages], (idx / kNumStages) & 1)) {
      if (++num_tries == kMaxTries) trap();
    }
    if (idx + kNumStages < num_mine) request(idx + kNumStages);
  }
}

}  // namespace blinkimp
