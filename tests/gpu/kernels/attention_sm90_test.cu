// device/attention.cuh in a kernel of its own, with the roles of a worker CTA: pages through the ring, planning warp, two compute warpgroups.
// -DHEAD_DIM=64 or 128. Test: pytest -m gpu tests/gpu/test_attention.py
#include <attention.cuh>

using namespace blinkimp;

namespace {

constexpr u32 kAttentionOffset = kSharedOffset + sizeof(WorkerShared);

struct PlainStore {
  u16* output;  // [rows, num_heads * head_dim]
  u32 row_stride;
  BK_INLINE void chunk(u32 row, u32 column, uint4 words) const { *reinterpret_cast<uint4*>(output + static_cast<u64>(row) * row_stride + column) = words; }
  BK_INLINE void pair(u32 row, u32 column, u32 word) const { *reinterpret_cast<u32*>(output + static_cast<u64>(row) * row_stride + column) = word; }
};

BK_INLINE void test_barrier(const EngineParams& params, u32 num_barriers) {
  fence_proxy_async();
  named_barrier_sync<1, kComputeThreads>();  // all threads' stores are done before thread 0 releases them
  if (is_first_thread()) {
    red_add_release_gpu(grid_word(params, kGridWordArrivals), 1);
    wait_grid(params, num_barriers);
  }
  named_barrier_sync<1, kComputeThreads>();  // nobody reads what thread 0 has not acquired
}

// Stands for the QKV op: the keys and values of the step's rows, [rows, num_kv_heads, 2, head_dim], into their pages.
BK_INLINE void write_new_rows(const EngineParams& params, const Op& op, const StepPlan* plan, const u16* new_rows) {
  const u32 num_kv_heads = params.dims.num_kv_heads;
  const u32 row_chunks = num_kv_heads * 2 * HEAD_DIM / 8;
  for (u32 idx = cta_idx() * kComputeThreads + thread_idx(); idx < plan->num_rows * row_chunks; idx += params.num_workers * kComputeThreads) {
    const PlanRow& row = plan_rows(params, plan)[idx / row_chunks];
    const u32 request_idx = plan_seqs(params, plan)[row.seq_idx].request_idx;
    const u32 page_id = page_table_of(params, request_idx)[row.position / kPageTokens];
    const u32 in_row = idx % row_chunks * 8;
    const u32 kv_head = in_row / (2 * HEAD_DIM);
    u8* tile = const_cast<u8*>(kv_tile<HEAD_DIM>(params, op.layer, page_id, kv_head)) + in_row / HEAD_DIM % 2 * kKvTileBytes<HEAD_DIM>;
    *reinterpret_cast<uint4*>(tile + kv_byte_offset(row.position % kPageTokens, in_row % HEAD_DIM)) = *reinterpret_cast<const uint4*>(new_rows + static_cast<u64>(idx) * 8);
  }
}

}  // namespace

// All attention ops of the program, over plans[0]; times [num_ops]: ns at the end of each. new_rows: 0, or what stands for the QKV op's output.
extern "C" __global__ void __launch_bounds__(kWorkerThreads, 1) attention_test(const __grid_constant__ EngineParams params, const u16* new_rows, u16* output, u64* times) {
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  AttentionShared& attention = *reinterpret_cast<AttentionShared*>(shared_memory + kAttentionOffset);
  const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[0]);
  if (is_first_thread()) {
    for (u32 i = 0; i < kWeightStages; i++) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], 2);
    }
    mbarrier_init(&attention.schedule_ready, 1);
    fence_mbarrier_init();
    shared.compute = ComputeState{};
  }
  __syncthreads();  // mbarriers are initialised before any role uses them
  const u32 warp = uniform(threadIdx.x / 32);
  if (warp >= kComputeThreads / 32) {
    set_registers_down<56>();
    if (warp == kComputeThreads / 32 && elect_one()) {
      RingCursor cursor{0, 1};
      for (u32 op_idx = 0; op_idx < params.num_ops; op_idx++) {
        produce_attention<HEAD_DIM>(params, reinterpret_cast<const Op*>(params.ops)[op_idx], plan, 0, shared_memory, shared, attention, cursor, op_idx + 1);
      }
    }
    if (warp == kComputeThreads / 32 + 2) {
      find_windows(params, attention);
      plan_attention(params, plan, attention);
    }
  } else {
    set_registers_up<224>();
    for (;;) {  // the op's number stands in shared memory, as in the worker: attention needs the registers
      const u32 op_idx = uniform(shared.compute.op_idx);
      if (op_idx == params.num_ops) break;
      const Op& op = reinterpret_cast<const Op*>(params.ops)[op_idx];
      if (new_rows) write_new_rows(params, op, plan, new_rows);
      prepare_attention<HEAD_DIM>(params, op, opaque(plan), 0, shared_memory, attention);
      test_barrier(params, op_idx + 1);
      if (cta_idx() == 0 && is_first_thread()) times[op_idx] = device_clock_ns();
      const RingCursor cursor = attend<HEAD_DIM>(params, shared_memory, shared, attention, shared.compute.cursors.weights, PlainStore{output, params.dims.num_heads * HEAD_DIM});
      named_barrier_sync<1, kComputeThreads>();  // all threads have read the old state
      if (is_first_thread()) {
        shared.compute.cursors.weights = cursor;
        shared.compute.op_idx++;
      }
      named_barrier_sync<1, kComputeThreads>();  // the next op's number is written
    }
  }
}
