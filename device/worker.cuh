// A worker CTA: interprets the model program over each step's plan, between grid barriers. GPU only.
//
// Four roles run the same op list side by side, each with its own cursor: the weight producer (warp 8), the input producer (warp 9), the
// scale warps (10, 11; the first of them plans attention, too) and the compute warpgroups. A role knows by counting where the grid barriers are: phases_of(op) end with each op.
// Each role waits for the grid itself, where it reads what other SMs wrote; the compute threads of a GEMM need not, their inputs come by the ring.
// Called by device/persistent_kernel.cu. Test: pytest -m gpu tests/gpu/test_engine_gpu.py
#pragma once
#include <attention.cuh>
#include <gemm_swapped.cuh>
#include <gemm_wide.cuh>
#include <gate_up_epilogue.cuh>
#include <logits_epilogue.cuh>
#include <phases.cuh>
#include <project_epilogue.cuh>
#include <qkv_epilogue.cuh>
#include <sample_op.cuh>
#include <scale_producer.cuh>
#include <trace.cuh>

namespace blinkimp {

// The kernel is compiled for a model: host/gpu_kernel.py sets these from its dimensions.
#ifndef BK_HEAD_DIM
#define BK_HEAD_DIM 128
#endif
#ifndef BK_QKV_TILE_ROWS
#define BK_QKV_TILE_ROWS 48
#endif
#ifndef BK_GATE_UP_TILE_ROWS
#define BK_GATE_UP_TILE_ROWS 112
#endif
constexpr int kHeadDim = BK_HEAD_DIM;
constexpr int kQkvTileRows = BK_QKV_TILE_ROWS;
constexpr int kGateUpTileRows = BK_GATE_UP_TILE_ROWS;
constexpr int kProjectTileRows = 32;
constexpr int kLmHeadTileRows = 112;

BK_INLINE u64 input_workspace(const EngineParams& params, const Op& op, const StepRows& plan) {
  switch (op.kind) {
    case kOpProject: return params.workspaces[op.input == kBufAttention ? kWsAttention : kWsActivation];
    case kOpLmHead: return params.workspaces[samples_every_row(plan) ? kWsNormed : kWsSampledInput];
    default: return params.workspaces[kWsNormed];
  }
}

// ---- Producers ---------------------------------------------------------------------------------------------------
BK_INLINE void weight_producer(const EngineParams& params) {
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  ProducerState& state = shared.producers[kWeightProducer];
  RingCursor cursor{0, 1};
  fetch_producer_op(params, 0, &shared.producer_ops[kWeightProducer][0]);
  for (state = ProducerState{}; begin_producer_step(params, state); state.step++) {
#pragma unroll 1
    for (; state.op_idx < params.num_ops; state.op_idx++) {
      const Op& op = enter_op(params, state, shared.producer_ops[kWeightProducer]);
      if (is_gemm(op.kind)) {
        const u32 num_rows = rows_of(op.kind, state.rows);
        if (is_wide(num_rows)) produce_weights_wide(params, num_rows, shared_memory + kRingOffset, shared, cursor);
        else produce_weights(params, op, gemm_shape(op, num_rows), shared_memory + kRingOffset, shared, cursor);
      } else if (op.kind == kOpAttention) {
        produce_attention<kHeadDim>(params, op, producer_plan(params, state), state.step, shared_memory, shared, attention_shared(shared_memory), cursor, state.num_barriers);
      }
      state.num_barriers += phases_in_step(op.kind, state.rows);
    }
    mbarrier_arrive(&shared.producers_done);
  }
  cp_async_wait<0>();  // the first op's copy
}

BK_INLINE void input_producer(const EngineParams& params) {
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  ProducerState& state = shared.producers[kInputProducer];
  RingCursor cursor{0, 1};
  fetch_producer_op(params, 0, &shared.producer_ops[kInputProducer][0]);
  for (state = ProducerState{}; begin_producer_step(params, state); state.step++) {
#pragma unroll 1
    for (; state.op_idx < params.num_ops; state.op_idx++) {
      const Op& op = enter_op(params, state, shared.producer_ops[kInputProducer]);
      state.num_barriers += phases_in_step(op.kind, state.rows) - 1;  // the input is ready before the op's last phase
      if (is_gemm(op.kind)) {
        const u32 num_rows = rows_of(op.kind, state.rows);
        const u8* input = reinterpret_cast<const u8*>(input_workspace(params, op, state.rows));
        if (is_wide(num_rows)) produce_inputs_wide(params, input, num_rows, state.num_barriers, shared_memory + kScratchOffset, shared, cursor);
        else produce_inputs(params, input, gemm_shape(op, num_rows), state.num_barriers, shared_memory + kScratchOffset, shared, cursor);
      }
      state.num_barriers++;
    }
    mbarrier_arrive(&shared.producers_done);
  }
  cp_async_wait<0>();  // the first op's copy
}

// ---- Compute -----------------------------------------------------------------------------------------------------
// Ends a phase: everything the compute threads wrote before is visible to whoever waits for the grid after. To bulk copies too: whoever starts
// one has a proxy fence between the wait and the copy.
BK_INLINE void grid_arrive(const EngineParams& params) { red_add_release_gpu(grid_word(params, kGridWordArrivals), 1); }  // pairs with wait_grid()

// Until all phases so far are over on every SM: for ops whose compute threads read what other SMs wrote.
BK_INLINE void wait_phases(const EngineParams& params, const ComputeState& state) {
  if (is_first_thread()) wait_grid(params, state.num_barriers);
  named_barrier_sync<1, kComputeThreads>();  // nobody reads what thread 0 has not acquired
}

// The barrier between the phases of an op.
BK_INLINE void phase_barrier(const EngineParams& params, ComputeState& state) {
  named_barrier_sync<1, kComputeThreads>();  // all threads' stores before thread 0's release
  if (is_first_thread()) {
    grid_arrive(params);
    state.num_barriers++;
  }
  wait_phases(params, state);
}

// The next op's descriptor on its way to shared memory, while this one runs.
BK_INLINE void fetch_op(const EngineParams& params, u32 op_idx, Op* destination) {
  const u32 thread = thread_idx();
  if (thread < sizeof(Op) / 16) cp_async_16(shared_address(destination) + thread * 16, reinterpret_cast<const u8*>(params.ops) + op_idx * sizeof(Op) + thread * 16, true);
  cp_async_commit();
}

// Ends an op: the program counter moves on, past the last op to the next step. This CTA's threads or its producers have waited for the grid in
// this op, except where it had nothing to do: it must not arrive at the op's end before the others have arrived at its beginning.
BK_INLINE void end_op(const EngineParams& params, WorkerShared& shared) {
  ComputeState& state = shared.compute;
  cp_async_wait<0>();
  // Hazard: a producer with no tile in this step may lag; the director reuses the plan's memory two steps on.
  if (is_first_thread() && state.op_idx + 1 == params.num_ops) wait_mbarrier(params, &shared.producers_done, state.step & 1, kSiteProducers);
  named_barrier_sync<1, kComputeThreads>();  // all threads are done with the op
  if (is_first_thread()) {
    state.cursors = shared.next_cursors;
    state.scales = shared.next_scales;
    state.op_buffer ^= 1;
    if (++state.op_idx == params.num_ops) {
      state.op_idx = 0;
      state.step++;
    }
    if (shared.is_idle) {
      shared.is_idle = 0;
      wait_grid(params, state.num_barriers);
    }
    state.num_barriers++;
  }
  named_barrier_sync<1, kComputeThreads>();  // nobody reads the old state
  if (is_first_thread()) grid_arrive(params);
}

// Rows of a narrow step's tile that do not exist: zeros from here to the step's end, for no op writes them. wgmma multiplies them all the same, which with a
// larger step's old rows costs as much power as with rows that exist, and at batch 1 that bounds the clock.
BK_INLINE void zero_padding(const EngineParams& params, u64 tiled_input, u32 num_columns, u32 num_rows) {
  const u32 tile_rows = input_tile_rows(num_rows);
  const u32 slice_chunks = (tile_rows - num_rows) * 8;  // of 16 bytes
  const u32 num_chunks = num_columns / kSliceColumns * slice_chunks;
  for (u32 i = cta_idx() * kComputeThreads + thread_idx(); i < num_chunks; i += params.num_workers * kComputeThreads) {
    const u64 row = static_cast<u64>(i / slice_chunks) * tile_rows + num_rows;
    *reinterpret_cast<uint4*>(tiled_input + row * (kSliceColumns * 2) + i % slice_chunks * 16) = uint4{0, 0, 0, 0};
  }
}

// kOpEmbed, one row per CTA at a time: hidden = table[token], its tiled copy times the first gain, sums of squares per 32 columns.
BK_INLINE void run_embed(const EngineParams& params, const Op& op, const StepPlan* plan) {
  const u32 hidden = opaque(params.dims.hidden);
  const u32 tile_rows = input_tile_rows(plan->num_rows);
  const f32* gain = reinterpret_cast<const f32*>(op.next_norm);
  forget_row_scales(params);
  if (plan->num_rows < tile_rows) {
    zero_padding(params, params.workspaces[kWsNormed], hidden, plan->num_rows);
    zero_padding(params, params.workspaces[kWsAttention], params.dims.num_heads * kHeadDim, plan->num_rows);
    zero_padding(params, params.workspaces[kWsActivation], params.dims.intermediate, plan->num_rows);
  }
  for (u32 row = cta_idx(); row < plan->num_rows; row += params.num_workers) {
    const u64 first = static_cast<u64>(plan_row_token(params, plan, row)) * hidden;
    for (u32 column = thread_idx(); column < hidden; column += kComputeThreads) {  // a warp holds one group of 32 columns
      const f32 value = __uint_as_float(static_cast<u32>(reinterpret_cast<const u16*>(op.weight)[first + column]) << 16);
      reinterpret_cast<f32*>(params.workspaces[kWsHidden])[static_cast<u64>(row) * hidden + column] = value;
      reinterpret_cast<u16*>(params.workspaces[kWsNormed])[tiled_offset(row, column, hidden / kSliceColumns, tile_rows)] = static_cast<u16>(pack_bf16x2(value * gain[column], 0.0f));
      f32 squares = value * value;
      for (u32 distance = kSquaresColumns / 2; distance; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
      if (thread_idx() % kSquaresColumns == 0) reinterpret_cast<f32*>(params.workspaces[kWsSquares])[static_cast<u64>(row) * (hidden / kSquaresColumns) + column / kSquaresColumns] = squares;
    }
  }
}

// First phase of kOpLmHead where not every row is sampled: the sampled rows side by side, with their sums of squares.
BK_INLINE void gather_sampled_rows(const EngineParams& params, const StepPlan* plan) {
  const u32 hidden = opaque(params.dims.hidden);
  const u32 num_slices = hidden / kSliceColumns;
  const u32 num_parts = hidden / kSquaresColumns;
  const u32 tile_rows = input_tile_rows(plan->num_rows);
  const u32 sampled_tile_rows = input_tile_rows(plan->num_sample_rows);
  const u16* normed = reinterpret_cast<const u16*>(params.workspaces[kWsNormed]);
  u16* gathered = reinterpret_cast<u16*>(params.workspaces[kWsSampledInput]);
  for (u32 sample = cta_idx(); sample < plan->num_sample_rows; sample += params.num_workers) {
    const u32 row = plan_sampled_rows(params, plan)[sample];
    for (u32 chunk = thread_idx(); chunk < hidden / 8; chunk += kComputeThreads) {
      *reinterpret_cast<uint4*>(gathered + tiled_offset(sample, chunk * 8, num_slices, sampled_tile_rows)) =
          *reinterpret_cast<const uint4*>(normed + tiled_offset(row, chunk * 8, num_slices, tile_rows));
    }
    const f32* parts = reinterpret_cast<const f32*>(params.workspaces[kWsSquares]) + static_cast<u64>(row) * num_parts;
    f32* gathered_parts = reinterpret_cast<f32*>(params.workspaces[kWsSampledSquares]) + static_cast<u64>(sample) * num_parts;
    for (u32 i = thread_idx(); i < num_parts; i += kComputeThreads) gathered_parts[i] = parts[i];
  }
}

// Where attention's output goes: the O projection's tiled input.
struct TiledStore {
  const EngineParams& params;  // read at each store: constant memory is cheaper than registers held through attention
  const ComputeState& state;

  // 8 columns from `column`, a multiple of 8: one chunk of the swizzle.
  BK_INLINE void chunk(u32 row, u32 column, uint4 words) const { *reinterpret_cast<uint4*>(place(row, column)) = words; }
  BK_INLINE void pair(u32 row, u32 column, u32 word) const { *reinterpret_cast<u32*>(place(row, column)) = word; }

 private:
  BK_INLINE u8* place(u32 row, u32 column) const {
    const u32 num_slices = params.dims.num_heads * kHeadDim / kSliceColumns;
    return reinterpret_cast<u8*>(params.workspaces[kWsAttention]) + 2 * tiled_offset(row, column, num_slices, input_tile_rows(state.num_rows));
  }
};

// Weight rows of a warpgroup in a narrow step: all of a tile of few, because two warpgroups that read the same 64 rows of inputs from shared memory are slower
// (GEMM_WIDE.md); half of others, at multiples of `granule`.
BK_INLINE constexpr int narrow_columns(int tile_rows, int granule) { return tile_rows <= static_cast<int>(kRowTile) ? tile_rows : (tile_rows / 2 + granule - 1) / granule * granule; }

// A GEMM op, narrow or wide.
template <int kTileRows, int kColumns, bool kScaled, class Epilogue>
BK_INLINE void run_gemm_rows(const EngineParams& params, const Op& op, u32 num_rows, u8* shared_memory, WorkerShared& shared, const Epilogue& epilogue) {
  if (is_wide(num_rows)) {
    run_gemm_wide<kTileRows, kScaled>(params, op, num_rows, shared_memory, shared, epilogue);
    return;
  }
  if constexpr (kIsSwappable<kTileRows, Epilogue>) {
    if (num_rows <= kMostSwappedRows) {
      if (num_rows <= kMostSwappedRows / 2) run_gemm_swapped<kTileRows, kMostSwappedRows / 2, kScaled>(params, gemm_shape(op, num_rows), shared_memory, shared, epilogue);
      else run_gemm_swapped<kTileRows, kMostSwappedRows, kScaled>(params, gemm_shape(op, num_rows), shared_memory, shared, epilogue);
      return;
    }
  }
  run_gemm<kTileRows, kColumns, kScaled>(params, gemm_shape(op, num_rows), shared_memory, shared, epilogue);
}

// The GEMM ops, at the tile widths that host/gpu_kernel.py chose. Tiles are divided at multiples of 8 rows, gate-up's at multiples of 16 (8 gate, 8 up).
BK_INLINE void run_gemm_op(const EngineParams& params, const Op& op, const StepPlan* plan, u32 num_rows, u8* shared_memory, WorkerShared& shared) {
  switch (uniform(op.kind)) {
    case kOpQkv:
      run_gemm_rows<kQkvTileRows, narrow_columns(kQkvTileRows, 8), true>(params, op, num_rows, shared_memory, shared, QkvEpilogue<kQkvTileRows, kHeadDim>{params, op, shared, plan, num_rows});
      break;
    case kOpGateUp:
      run_gemm_rows<kGateUpTileRows, narrow_columns(kGateUpTileRows, 16), true>(params, op, num_rows, shared_memory, shared, GateUpEpilogue{{}, params, op, num_rows});
      break;
    case kOpLmHead:
      run_gemm_rows<kLmHeadTileRows, narrow_columns(kLmHeadTileRows, 8), true>(params, op, num_rows, shared_memory, shared, LogitsEpilogue{{}, params, op, num_rows});
      break;
    default:
      run_gemm_rows<kProjectTileRows, narrow_columns(kProjectTileRows, 8), false>(params, op, num_rows, shared_memory, shared, ProjectEpilogue{params, op, shared, num_rows});
  }
}

// Thread 0 acquires the plan of the step that begins. False: the workers leave.
BK_INLINE bool begin_step(const EngineParams& params, ComputeState& state) {
  if (is_first_thread()) {
    const StepPlan* plan = wait_plan(params, state.step);
    state.num_rows = plan->num_rows;
    state.num_sample_rows = plan->num_sample_rows;
    state.leaves = plan->flags & kPlanExit;
  }
  named_barrier_sync<1, kComputeThreads>();  // the plan was acquired by thread 0
  return uniform(state.leaves) == 0;
}

// Op times for the trace, in kernels that were compiled for it: a traced engine pays with a look at the trace's header for each op.
BK_INLINE void trace_moment(const EngineParams& params, const ComputeState& state, OpMoment moment) {
#if defined(BK_TRACE_OPS)
  if (is_first_thread()) trace_op(params, reinterpret_cast<const StepPlan*>(params.plans[state.step & 1])->step, state.op_idx, cta_idx(), moment);
#endif
}

BK_INLINE void compute(const EngineParams& params) {
  fetch_op(params, 0, &worker_shared(worker_memory()).ops[0]);
  cp_async_wait<0>();
  named_barrier_sync<1, kComputeThreads>();  // the first op's descriptor is there
  for (;;) {
    u8* shared_memory = worker_memory();
    WorkerShared& shared = worker_shared(shared_memory);
    ComputeState& state = shared.compute;
    if (uniform(state.op_idx) == 0 && !begin_step(params, state)) return;
    const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[state.step & 1]);
    const Op& op = shared.ops[state.op_buffer];
    const u32 kind = uniform(op.kind);
    fetch_op(params, state.op_idx + 1 == params.num_ops ? 0 : state.op_idx + 1, &shared.ops[state.op_buffer ^ 1]);
    trace_moment(params, state, kOpBegins);
    if (kind == kOpLmHead && uniform(state.num_sample_rows) != uniform(state.num_rows)) {
      wait_phases(params, state);
      gather_sampled_rows(params, opaque(plan));
      phase_barrier(params, state);
    }
    if (is_gemm(kind)) {
      const u32 num_rows = uniform(kind == kOpLmHead ? state.num_sample_rows : state.num_rows);
      run_gemm_op(params, op, opaque(plan), num_rows, shared_memory, shared);
    } else if (kind == kOpAttention) {
      prepare_attention<kHeadDim>(params, op, opaque(plan), state.step, shared_memory, attention_shared(shared_memory));
      wait_phases(params, state);  // q, k and v of every SM
      const RingCursor pages = attend<kHeadDim>(params, shared_memory, shared, attention_shared(shared_memory), state.cursors.weights, TiledStore{params, state});
      if (is_first_thread()) shared.next_cursors.weights = pages;
    } else if (kind == kOpEmbed) {
      run_embed(params, op, opaque(plan));
    } else if (kind == kOpSample) {
      wait_phases(params, state);
      const LogitTiles parts{reinterpret_cast<const u64*>(params.workspaces[kWsLogitBest]), num_logit_parts(params.dims.vocab)};
      run_sample(params, opaque(plan), shared_memory + kScratchOffset, parts);
    } else {
      fail(params, kFaultBadProgram, kSiteUnknownOp, kOpSample, kind);
    }
    trace_moment(params, state, kOpIsDone);
    end_op(params, shared);
  }
}

}  // namespace blinkimp
