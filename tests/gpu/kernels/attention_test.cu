// device/attention.cuh in a kernel of its own: both phases around a grid barrier, plain row-major output. As in the worker, a third
// warpgroup stands beside the compute threads and gives its registers to them. -DHEAD_DIM=64 or 128. Test: pytest -m gpu tests/gpu/test_attention.py
#include <portable/attention.cuh>

using namespace blinkimp;

struct PlainStore {
  u16* output;  // [rows, num_heads * head_dim]
  u32 row_stride;
  BK_INLINE void operator()(u32 row, u32 column, u32 pair) const {
    *reinterpret_cast<u32*>(output + static_cast<u64>(row) * row_stride + column) = pair;
  }
};

// arrivals: one zeroed word. args: see attention_schedule.cuh; cta_idx and num_ctas are set here.
extern "C" __global__ void __launch_bounds__(384, 1) attention_test(const AttentionArgs args, u16* output, u32* arrivals) {
  extern __shared__ __align__(256) u8 shared_memory[];
  __shared__ AttentionShared attention;
  if (threadIdx.x >= kAttentionThreads) {
    set_registers_down<56>();
    return;
  }
  set_registers_up<224>();
  if (threadIdx.x == 0) {
    attention.args = args;
    attention.args.cta_idx = blockIdx.x;
    attention.args.num_ctas = gridDim.x;
  }
  named_barrier_sync<1, kAttentionThreads>();  // the arguments are complete
  const PlainStore store{output, args.num_heads * HEAD_DIM};
  attention_splits<HEAD_DIM, 1>(attention, shared_memory, store);
  named_barrier_sync<1, kAttentionThreads>();  // all threads' partial results are written before thread 0 releases them
  if (threadIdx.x == 0) {
    red_add_release_gpu(arrivals, 1);
    while (ld_acquire_gpu(arrivals) < gridDim.x) sleep_ns(50);
  }
  named_barrier_sync<1, kAttentionThreads>();  // nobody reads what thread 0 has not acquired
  attention_combine<HEAD_DIM>(attention, store);
}
