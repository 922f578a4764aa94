// device/gemm_wide.cuh in a kernel of its own: real rings and producers, a grid barrier after every op, plain f32 output; and the sums that it must
// equal to the last bit. -DTILE_ROWS=32, 48, ... as packed. -DSTORE=0: no output (its time alone). Launched by tests/gpu/gemm_wide_runner.py.
// Test: pytest -m gpu tests/gpu/test_gemm_wide.py      Timing: tools/bench_gemm_wide.py
#include <gemm_epilogues.cuh>
#include <gemm_wide.cuh>
#include <producer_program.cuh>

using namespace blinkimp;

#ifndef STORE
#define STORE 1
#endif

namespace {

struct PlainEpilogue : ReadsNothing {
  f32* output;  // [num_rows, num_columns]
  u32 num_rows;
  u32 num_columns;

  template <int kColumns>
  BK_INLINE static constexpr u32 step_columns() {
    return kColumns % 32 == 0 ? 32 : 16;
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(const Nothing&, u32 row_begin, u32 column_begin, f32 (&d)[kColumns / 2], const Nothing&, const f32*) const {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        const u32 column = column_begin + fragment_column(block);
        const float2 values{d[block * 4 + half * 2], d[block * 4 + half * 2 + 1]};
        const bool stored = STORE || values.x == 12345.678f;  // without stores the products must still look needed
        if (stored && row < num_rows && column < num_columns) *reinterpret_cast<float2*>(output + static_cast<u64>(row) * num_columns + column) = values;
      }
    }
  }
};

// A producer's walk over the program, as in device/worker.cuh: produce(op, op_idx).
template <class Produce>
BK_INLINE void walk_program(const EngineParams& params, WorkerShared& shared, u32 producer, const Produce& produce) {
  ProducerState& state = shared.producers[producer];
  state = ProducerState{};
  fetch_producer_op(params, 0, &shared.producer_ops[producer][0]);
  for (; state.op_idx < params.num_ops; state.op_idx++) produce(enter_op(params, state, shared.producer_ops[producer]), state.op_idx);
  cp_async_wait<0>();
}

BK_INLINE void test_barrier(const EngineParams& params, u32 num_barriers) {
  fence_proxy_async();
  named_barrier_sync<1, kComputeThreads>();  // all threads' stores before thread 0 releases them, all threads done with the cursors
  if (is_first_thread()) {
    worker_shared(worker_memory()).compute.cursors = worker_shared(worker_memory()).next_cursors;
    red_add_release_gpu(grid_word(params, kGridWordArrivals), 1);
    wait_grid(params, num_barriers);
  }
  named_barrier_sync<1, kComputeThreads>();  // nobody reads what thread 0 has not acquired
}

}  // namespace

// All ops of the program, on the same input. times: u64 [num_ops + 1], ns, written by CTA 0.
extern "C" __global__ void __launch_bounds__(kWorkerThreads, 1) gemm_wide_test(const __grid_constant__ EngineParams params, u32 num_rows, const u8* input, f32* output, u64* times) {
  u8* memory = worker_memory();
  WorkerShared& shared = worker_shared(memory);
  const Op* ops = reinterpret_cast<const Op*>(params.ops);
  if (threadIdx.x == 0) {
    shared.params = &params;
    shared.compute = ComputeState{};
    shared.num_paces = 0;
    for (u32 i = 0; i < kWeightStages; i++) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], 2);
    }
    for (u32 i = 0; i < kInputStages; i++) {
      mbarrier_init(&shared.inputs_full[i], 1);
      mbarrier_init(&shared.inputs_empty[i], 2);
    }
    fence_mbarrier_init();
  }
  for (u32 i = threadIdx.x; i < kSharedOffset / 16; i += kWorkerThreads) reinterpret_cast<uint4*>(memory)[i] = uint4{0, 0, 0, 0};
  fence_proxy_async();
  __syncthreads();  // mbarriers and zeroes before any role uses them
  if (threadIdx.x >= kComputeThreads) {
    set_registers_down<56>();
    RingCursor cursor{0, 1};
    const u32 role = uniform(threadIdx.x / 32) - kComputeThreads / 32;
    if (role < 2 && elect_one()) {
      if (role == 0) {
        walk_program(params, shared, kWeightProducer, [&](const Op&, u32) { produce_weights_wide(params, num_rows, memory + kRingOffset, shared, cursor); });
      } else {
        walk_program(params, shared, kInputProducer, [&](const Op&, u32 op_idx) {  // as if the op before had made the input
          produce_inputs_wide(params, input, num_rows, op_idx, memory + kScratchOffset, shared, cursor);
        });
      }
    }
  } else {
    set_registers_up<224>();
    const bool keeps_time = is_first_thread() && cta_idx() == 0;
    if (keeps_time) times[0] = device_clock_ns();
    for (u32 i = 0; i < uniform(params.num_ops); i++) {
      const PlainEpilogue epilogue{{}, output, num_rows, ops[i].out_features};
      run_gemm_wide<TILE_ROWS, false>(params, ops[i], uniform(num_rows), memory, shared, epilogue);
      test_barrier(params, i + 1);
      if (keeps_time) times[i + 1] = device_clock_ns();
    }
  }
}

// The sums by definition: one accumulator, wgmma k16 steps in increasing k, each awaited. One warpgroup a CTA, for one packed tile and 64 rows.
extern "C" __global__ void __launch_bounds__(128, 1) gemm_chain(const u8* weight, const u8* input, f32* output, u32 num_rows, u32 num_slices, u32 num_tiles, u32 out_features) {
  const u32 tile_idx = cta_idx() % num_tiles;
  const u32 row_tile = cta_idx() / num_tiles;
  __shared__ __align__(1024) u8 input_tile[kRowTileBytes];
  __shared__ __align__(1024) u8 weight_tile[TILE_ROWS * 128];
  f32 d[TILE_ROWS / 2];
#pragma unroll
  for (u32 i = 0; i < TILE_ROWS / 2; i++) d[i] = 0.0f;
  for (u32 slice = 0; slice < num_slices; slice++) {
    const uint4* weights = reinterpret_cast<const uint4*>(weight + (static_cast<u64>(tile_idx) * num_slices + slice) * sizeof(weight_tile));
    const uint4* inputs = reinterpret_cast<const uint4*>(input + (static_cast<u64>(row_tile) * num_slices + slice) * sizeof(input_tile));
    for (u32 i = threadIdx.x; i < sizeof(weight_tile) / 16; i += 128) reinterpret_cast<uint4*>(weight_tile)[i] = weights[i];
    for (u32 i = threadIdx.x; i < sizeof(input_tile) / 16; i += 128) reinterpret_cast<uint4*>(input_tile)[i] = inputs[i];
    fence_proxy_async();
    __syncthreads();  // both tiles are complete
    const u64 a = wgmma_descriptor(shared_address(input_tile), 1024);
    const u64 b = wgmma_descriptor(shared_address(weight_tile), 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_m64_k16<TILE_ROWS>(d, a + 2 * k, b + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // the tiles are overwritten next
  }
#pragma unroll
  for (u32 i = 0; i < TILE_ROWS / 2; i++) {
    const u32 row = row_tile * kRowTile + fragment_row(i / 2 % 2);
    const u32 column = tile_idx * TILE_ROWS + fragment_column(i / 4) + i % 2;
    if (row < num_rows && column < out_features) output[static_cast<u64>(row) * out_features + column] = d[i];
  }
}
