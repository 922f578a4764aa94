// A worker CTA: interprets the model program over each step's plan, between grid barriers. GPU only.
//
// Three roles run the same op list side by side, each with its own cursor: the weight producer (warp 8), the input producer (warp 9),
// the compute warpgroups. A role knows by counting where the grid barriers are: phases_of(op) barriers end with each op.
// Called by device/persistent_kernel.cu. Test: pytest -m gpu tests/gpu/test_engine_gpu.py
#pragma once
#include <portable/attention.cuh>
#include <gemm_epilogues.cuh>
#include <logits_epilogue.cuh>
#include <sample_op.cuh>
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
constexpr int kProjectTileRows = kSquaresColumns;
constexpr int kLmHeadTileRows = 112;

// Grid barriers an op ends with: one per phase.
BK_INLINE u32 phases_of(u32 kind) { return kind == kOpAttention || kind == kOpLmHead ? 2 : 1; }

// The rows a GEMM op works on: the LM head sees the sampled rows alone.
BK_INLINE u32 rows_of(u32 kind, const StepPlan& plan) { return kind == kOpLmHead ? plan.num_sample_rows : plan.num_rows; }

BK_INLINE bool is_gemm(u32 kind) { return kind == kOpQkv || kind == kOpProject || kind == kOpGateUp || kind == kOpLmHead; }

BK_INLINE u64 input_workspace(const EngineParams& params, const Op& op) {
  switch (op.kind) {
    case kOpProject: return params.workspaces[op.input == kBufAttention ? kWsAttention : kWsActivation];
    case kOpLmHead: return params.workspaces[kWsSampledInput];
    default: return params.workspaces[kWsNormed];
  }
}

// Waits for the plan of a step; an idle wait has no budget, it ends with the exit flag at the latest. Acquire: pairs with the
// director's publication in persistent_kernel.cu.
BK_INLINE const StepPlan* wait_plan(const EngineParams& params, u32 step) {
  constexpr u32 kPollSleepNs = 100;
  while (static_cast<i32>(ld_acquire_gpu(grid_word(params, kGridWordPlan)) - (step + 1)) < 0) sleep_ns(kPollSleepNs);
  return reinterpret_cast<const StepPlan*>(params.plans[step & 1]);
}

// ---- Producers ---------------------------------------------------------------------------------------------------
BK_INLINE void weight_producer(const EngineParams& params) {
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  const Op* ops = reinterpret_cast<const Op*>(params.ops);
  RingCursor cursor{0, 1};
  for (u32 step = 0;; step++) {
    const StepPlan* plan = wait_plan(params, step);
    if (plan->flags & kPlanExit) return;
    for (u32 op_idx = 0; op_idx < params.num_ops; op_idx++) {
      const Op& op = ops[op_idx];
      if (is_gemm(op.kind)) produce_weights(params, op, gemm_shape(op, rows_of(op.kind, *plan)), shared_memory, shared, cursor);
    }
    mbarrier_arrive(&shared.producers_done);
  }
}

BK_INLINE void input_producer(const EngineParams& params) {
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  const Op* ops = reinterpret_cast<const Op*>(params.ops);
  RingCursor cursor{0, 1};
  u32 num_barriers = 0;
  for (u32 step = 0;; step++) {
    const StepPlan* plan = wait_plan(params, step);
    if (plan->flags & kPlanExit) return;
    for (u32 op_idx = 0; op_idx < params.num_ops; op_idx++) {
      const Op& op = ops[op_idx];
      num_barriers += phases_of(op.kind) - 1;  // the LM head's input is ready after its first phase
      if (is_gemm(op.kind)) {
        wait_grid(params, num_barriers);
        fence_proxy_async();  // the inputs were written by ordinary stores of other SMs; the bulk copies below read them
        produce_inputs(params, reinterpret_cast<const u8*>(input_workspace(params, op)), gemm_shape(op, rows_of(op.kind, *plan)), shared_memory + kScratchOffset, shared, cursor);
      }
      num_barriers++;
    }
    mbarrier_arrive(&shared.producers_done);
  }
}

// ---- Compute -----------------------------------------------------------------------------------------------------
// A grid barrier of the compute threads: everything they wrote before is visible to all of them, on every SM, after.
BK_INLINE void grid_arrive(const EngineParams& params) {
  fence_proxy_async();  // our stores before the bulk copies of whoever waits
  named_barrier_sync<1, kComputeThreads>();
  if (is_first_thread()) red_add_release_gpu(grid_word(params, kGridWordArrivals), 1);  // pairs with wait_grid()
}

// kEndsOp: the last phase of an op; the program counter moves on, past the last op to the next step.
template <bool kEndsOp>
BK_INLINE void grid_barrier(const EngineParams& params, ComputeState& state) {
  // Hazard: a producer with no tile in this step may lag; the director reuses the plan's memory two steps on.
  if (kEndsOp && is_first_thread() && state.op_idx + 1 == params.num_ops) wait_mbarrier(params, &worker_shared(worker_memory()).producers_done, state.step & 1, kSiteProducers);
  grid_arrive(params);
  if (is_first_thread()) {
    wait_grid(params, ++state.num_barriers);
    if (kEndsOp && ++state.op_idx == params.num_ops) {
      state.op_idx = 0;
      state.step++;
    }
  }
  named_barrier_sync<1, kComputeThreads>();  // nobody reads what thread 0 has not acquired
}

// kOpEmbed, one row per CTA at a time: hidden = table[token], its tiled copy times the first gain, sums of squares per 32 columns.
BK_INLINE void run_embed(const EngineParams& params, const Op& op, const StepPlan* plan) {
  const u32 hidden = opaque(params.dims.hidden);
  const f32* gain = reinterpret_cast<const f32*>(op.next_norm);
  for (u32 row = cta_idx(); row < plan->num_rows; row += params.num_workers) {
    const u64 first = static_cast<u64>(plan_row_token(params, plan, row)) * hidden;
    for (u32 column = thread_idx(); column < hidden; column += kComputeThreads) {  // a warp holds one group of 32 columns
      const f32 value = __uint_as_float(static_cast<u32>(reinterpret_cast<const u16*>(op.weight)[first + column]) << 16);
      reinterpret_cast<f32*>(params.workspaces[kWsHidden])[static_cast<u64>(row) * hidden + column] = value;
      reinterpret_cast<u16*>(params.workspaces[kWsNormed])[tiled_offset(row, column, hidden / kSliceColumns)] = static_cast<u16>(pack_bf16x2(value * gain[column], 0.0f));
      f32 squares = value * value;
      for (u32 distance = 16; distance; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
      if (thread_idx() % 32 == 0) reinterpret_cast<f32*>(params.workspaces[kWsSquares])[static_cast<u64>(row) * (hidden / kSquaresColumns) + column / kSquaresColumns] = squares;
    }
  }
}

// First phase of kOpLmHead: the sampled rows side by side, with their 1 / rms.
BK_INLINE void gather_sampled_rows(const EngineParams& params, const StepPlan* plan) {
  const u32 hidden = opaque(params.dims.hidden);
  const u32 num_slices = hidden / kSliceColumns;
  const u16* normed = reinterpret_cast<const u16*>(params.workspaces[kWsNormed]);
  u16* gathered = reinterpret_cast<u16*>(params.workspaces[kWsSampledInput]);
  for (u32 sample = cta_idx(); sample < plan->num_sample_rows; sample += params.num_workers) {
    const u32 row = plan_sampled_rows(params, plan)[sample];
    for (u32 chunk = thread_idx(); chunk < hidden / 8; chunk += kComputeThreads) {
      *reinterpret_cast<uint4*>(gathered + tiled_offset(sample, chunk * 8, num_slices)) = *reinterpret_cast<const uint4*>(normed + tiled_offset(row, chunk * 8, num_slices));
    }
    if (thread_idx() < 32) {
      const u32 num_parts = hidden / kSquaresColumns;
      const f32* parts = reinterpret_cast<const f32*>(params.workspaces[kWsSquares]) + static_cast<u64>(row) * num_parts;
      f32 sum = 0.0f;
      for (u32 i = thread_idx(); i < num_parts; i += 32) sum += parts[i];
      for (u32 distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (is_first_thread()) reinterpret_cast<f32*>(params.workspaces[kWsSampledScale])[sample] = rsqrtf(sum / static_cast<f32>(hidden) + params.dims.norm_eps);
    }
  }
}

// kOpAttention, in two phases around a grid barrier; the output is the O projection's tiled input.
struct TiledStore {
  const EngineParams& params;  // read at each store: constant memory is cheaper than registers held through attention
  BK_INLINE void operator()(u32 row, u32 column, u32 pair) const {
    u8* output = reinterpret_cast<u8*>(params.workspaces[kWsAttention]);
    *reinterpret_cast<u32*>(output + 2 * tiled_offset(row, column, params.dims.num_heads * kHeadDim / kSliceColumns)) = pair;
  }
};

BK_INLINE void run_attention(const EngineParams& params, const Op& op, const StepPlan* plan, u8* shared_memory, ComputeState& state) {
  static_assert(sizeof(AttentionShared) <= kAttentionBlockBytes, "its place in the shared memory map");
  const ModelDims& dims = params.dims;
  AttentionShared& attention = *reinterpret_cast<AttentionShared*>(shared_memory + kAttentionBlockOffset);
  if (is_first_thread()) {
    const u64 num_slots = attention_slots(params.max_batch, params.max_pages_per_request);
    u8* parts = reinterpret_cast<u8*>(params.workspaces[kWsAttentionPart]);
    AttentionArgs& args = attention.args;
    args.seqs = plan_seqs(params, plan);
    args.num_seqs = plan->num_seqs;
    args.num_heads = dims.num_heads;
    args.num_kv_heads = dims.num_kv_heads;
    args.group = dims.num_heads / dims.num_kv_heads;
    args.window = op.window;
    args.max_pages_per_request = params.max_pages_per_request;
    args.scale = dims.attention_scale * 1.4426950408889634f;  // exponentials are powers of 2
    args.cta_idx = cta_idx();
    args.num_ctas = params.num_workers;
    args.num_slots = static_cast<u32>(num_slots);
    args.page_tables = reinterpret_cast<const u32*>(params.page_tables);
    args.query = reinterpret_cast<const u16*>(params.workspaces[kWsQuery]);
    args.kv = reinterpret_cast<const u16*>(params.kv_cache) + static_cast<u64>(op.layer) * params.num_pages * dims.num_kv_heads * 2 * kPageTokens * kHeadDim;
    args.part_outputs = reinterpret_cast<f32*>(parts);
    args.part_softmax = reinterpret_cast<float2*>(parts + num_slots * dims.num_heads * kHeadDim * sizeof(f32));
  }
  named_barrier_sync<1, kComputeThreads>();  // the arguments are complete
  const TiledStore store{params};
  attention_splits<kHeadDim, 1>(attention, shared_memory + kScratchOffset, store);
  grid_barrier<false>(params, state);
  attention_combine<kHeadDim>(attention, store);
}

// The GEMM ops, at the tile widths that host/gpu_kernel.py chose.
BK_INLINE void run_gemm_op(const EngineParams& params, const Op& op, const StepPlan* plan, u8* shared_memory, WorkerShared& shared) {
  const u32 num_rows = rows_of(op.kind, *plan);
  const GemmShape shape = gemm_shape(op, num_rows);
  switch (op.kind) {
    case kOpQkv:
      run_gemm<kQkvTileRows, true>(params, shape, shared_memory, shared, QkvEpilogue<kQkvTileRows, kHeadDim>{params, op, shared, plan, num_rows});
      break;
    case kOpGateUp:
      run_gemm<kGateUpTileRows, true>(params, shape, shared_memory, shared, GateUpEpilogue<kGateUpTileRows>{params, op, shared, num_rows});
      break;
    case kOpLmHead:
      run_gemm<kLmHeadTileRows, false>(params, shape, shared_memory, shared, LogitsEpilogue<kLmHeadTileRows>{params, op, num_rows});
      break;
    default:
      run_gemm<kProjectTileRows, false>(params, shape, shared_memory, shared, ProjectEpilogue<kProjectTileRows>{params, op, num_rows});
  }
}

// Op times for the trace, in kernels that were compiled for it: a traced engine pays with a look at the trace's header for each op.
BK_INLINE void trace_moment(const EngineParams& params, const StepPlan* plan, u32 op_idx, OpMoment moment) {
#if defined(BK_TRACE_OPS)
  if (is_first_thread()) trace_op(params, plan->step, op_idx, cta_idx(), moment);
#endif
}

BK_INLINE void compute(const EngineParams& params) {
  for (;;) {
    u8* shared_memory = worker_memory();
    WorkerShared& shared = worker_shared(shared_memory);
    ComputeState& state = shared.compute;
    if (state.op_idx == 0) {
      if (is_first_thread()) wait_plan(params, state.step);
      named_barrier_sync<1, kComputeThreads>();  // the plan was acquired by thread 0
    }
    const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[state.step & 1]);
    if (plan->flags & kPlanExit) return;
    const Op& op = reinterpret_cast<const Op*>(params.ops)[state.op_idx];
    trace_moment(params, plan, state.op_idx, kOpBegins);
    if (op.kind == kOpLmHead) {
      gather_sampled_rows(params, opaque(plan));
      grid_barrier<false>(params, state);
    }
    if (is_gemm(op.kind)) {
      run_gemm_op(params, op, opaque(plan), shared_memory, shared);
    } else if (op.kind == kOpAttention) {
      run_attention(params, op, opaque(plan), shared_memory, state);
    } else if (op.kind == kOpEmbed) {
      run_embed(params, op, opaque(plan));
    } else if (op.kind == kOpSample) {
      const LogitTiles tiles{reinterpret_cast<const u64*>(params.workspaces[kWsLogitBest]), num_logit_tiles(params.dims.vocab, kLmHeadTileRows)};
      run_sample(params, opaque(plan), shared_memory + kScratchOffset, tiles);
    } else {
      fail(params, kFaultBadProgram, kSiteUnknownOp, kOpSample, op.kind);
    }
    trace_moment(params, plan, state.op_idx, kOpIsDone);
    grid_barrier<true>(params, state);
  }
}

}  // namespace blinkimp
