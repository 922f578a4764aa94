// device/pack_weights.cu on the CPU, thread after thread. Used by tests/host/emulated_gpu.py.
#define __device__
#define __global__

struct uint4 {
  unsigned x, y, z, w;
};

namespace {
struct Index {
  unsigned x;
} blockIdx, blockDim, threadIdx;
}  // namespace

#include <pack_weights.cu>

extern "C" void bk_pack_weights(unsigned num_blocks, unsigned num_threads, void** arguments) {
  using namespace blinkimp;
  const auto word = [&](int i) { return *static_cast<const u32*>(arguments[i]); };
  const auto* source = *static_cast<const uint4**>(arguments[0]);
  auto* packed = *static_cast<uint4**>(arguments[1]);
  blockDim.x = num_threads;
  for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < num_threads; ++threadIdx.x) pack_weights(source, packed, word(2), word(3), word(4), word(5), word(6), word(7), word(8));
  }
}
