// device/attention.cuh, as written for the GPU, on emulated warps: both phases for every CTA of a grid. See simt.h.
// Test: pytest tests/host/test_attention_simt.py
#include <portable/attention.cuh>

namespace {

using namespace blinkimp;

struct PlainStore {
  u16* output;  // [rows, num_heads * head_dim]
  u32 row_stride;
  void operator()(u32 row, u32 column, u32 pair) const {
    std::memcpy(output + static_cast<u64>(row) * row_stride + column, &pair, 4);
  }
};

template <int kHeadDim>
void run_attention(const AttentionArgs& args, u16* output) {
  const PlainStore store{output, args.num_heads * kHeadDim};
  AttentionShared attention;
  attention.args = args;
  for (u32 cta = 0; cta < args.num_ctas; ++cta) {
    attention.args.cta_idx = cta;
    simt::machine.run(kAttentionThreads, kAttentionSharedBytes<kHeadDim>, [&] {
      attention_splits<kHeadDim, 1>(attention, simt::machine.shared_memory.data(), store);
    });
  }
  for (u32 cta = 0; cta < args.num_ctas; ++cta) {
    attention.args.cta_idx = cta;
    simt::machine.run(kAttentionThreads, 0, [&] { attention_combine<kHeadDim>(attention, store); });
  }
}

}  // namespace

extern "C" {

// Returns the number of shared-memory bank conflicts of ldmatrix, or -1 for a head_dim that is not compiled.
long long bk_attention_simt(const blinkimp::AttentionArgs* args, unsigned int head_dim, unsigned short* output, unsigned int seed) {
  simt::machine.num_bank_conflicts = 0;
  simt::machine.random.seed(seed);
  if (head_dim == 64) {
    run_attention<64>(*args, output);
  } else if (head_dim == 128) {
    run_attention<128>(*args, output);
  } else {
    return -1;
  }
  return static_cast<long long>(simt::machine.num_bank_conflicts);
}

}  // extern "C"
