// Philox4x32-10, the counter-based random generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// A pure function of key and counter: no state, so a request's draws depend on its seed and the output position alone.
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling.py (the published known-answer vectors)
#pragma once
#include <fixed_math.cuh>

namespace blinkimp {

struct PhiloxCounter {
  u32 words[4];  // before: the counter; after: four random words
};

BK_INLINE PhiloxCounter philox4x32_10(PhiloxCounter counter, u64 key) {
  u32 key0 = static_cast<u32>(key);
  u32 key1 = static_cast<u32>(key >> 32);
  for (u32 round = 0; round < 10; ++round) {
    const u64 product0 = static_cast<u64>(0xd2511f53u) * counter.words[0];
    const u64 product1 = static_cast<u64>(0xcd9e8d57u) * counter.words[2];
    counter = PhiloxCounter{{static_cast<u32>(product1 >> 32) ^ counter.words[1] ^ key0, static_cast<u32>(product1),
                             static_cast<u32>(product0 >> 32) ^ counter.words[3] ^ key1, static_cast<u32>(product0)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

}  // namespace blinkimp
