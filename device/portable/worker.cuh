// A worker CTA of the portable kernel: interprets the model program over each step's plan, a grid barrier after each phase. GPU only.
//
// 256 threads, all of which do everything: no producer warps, no asynchronous proxy, no Hopper instruction. It is the kernel of every GPU
// that is not a Hopper, and on a Hopper the second implementation to compare with (`--kernel portable`).
// Called by device/portable/portable_kernel.cu. Test: pytest -m gpu tests/gpu/test_portable_gpu.py
#pragma once
#include <portable/attention.cuh>
#include <portable/epilogues.cuh>
#include <portable/grid.cuh>
#include <sample_op.cuh>

namespace blinkimp {

// The kernel is compiled for a model and an architecture: host/gpu_kernel.py sets these.
#ifndef BK_HEAD_DIM
#define BK_HEAD_DIM 128
#endif
#ifndef BK_QKV_TILE_ROWS
#define BK_QKV_TILE_ROWS 48
#endif
#ifndef BK_GATE_UP_TILE_ROWS
#define BK_GATE_UP_TILE_ROWS 112
#endif
#ifndef BK_SCRATCH_BYTES
#define BK_SCRATCH_BYTES 98304
#endif
constexpr u32 kHeadDim = BK_HEAD_DIM;
constexpr u32 kQkvTileRows = BK_QKV_TILE_ROWS;
constexpr u32 kGateUpTileRows = BK_GATE_UP_TILE_ROWS;
constexpr u32 kProjectTileRows = kNormGroup;
constexpr u32 kLmHeadTileRows = 112;
constexpr u32 kScratchBytes = BK_SCRATCH_BYTES;

// Beside the scratch, which belongs to the op that runs.
struct WorkerShared {
  f32 row_scale[kMaxItemRows];  // 1 / rms of the rows of the current item
  AttentionShared attention;
  ProgramState program;
};
constexpr u32 kSharedBesideScratchBytes = 1024;  // SHARED_BESIDE_SCRATCH_BYTES of host/gpu_kernel.py
static_assert(sizeof(WorkerShared) <= kSharedBesideScratchBytes, "it has its place");
static_assert(kAttentionSharedBytes<kHeadDim> <= kScratchBytes && sizeof(SampleScratch) <= kScratchBytes, "every op's use of the scratch");

// The map's first byte; aligned, because the attention's swizzle counts from 256-byte lines.
BK_INLINE u8* worker_scratch() {
  extern __shared__ __align__(1024) u8 dynamic_shared[];
  return dynamic_shared;
}
BK_INLINE WorkerShared& worker_shared() { return *reinterpret_cast<WorkerShared*>(worker_scratch() + kScratchBytes); }

// ---- Ops ---------------------------------------------------------------------------------------------------------
// kOpEmbed, one row per CTA at a time: hidden = table[token], its copy times the first gain, sums of squares.
BK_INLINE void run_embed(const EngineParams& params, const Op& op, const StepPlan* plan) {
  const u32 hidden = opaque(params.dims.hidden);
  const u32 thread = opaque(threadIdx.x);
  const f32* gain = reinterpret_cast<const f32*>(op.next_norm);
  for (u32 row = cta_idx(); row < plan->num_rows; row += params.num_workers) {
    const u16* source = reinterpret_cast<const u16*>(op.weight) + static_cast<u64>(plan_row_token(params, plan, row)) * hidden;
    const u64 first = static_cast<u64>(row) * hidden;
    for (u32 column = thread; column < hidden; column += kComputeThreads) {  // a warp holds one group of kNormGroup columns
      const f32 value = __uint_as_float(static_cast<u32>(source[column]) << 16);
      reinterpret_cast<f32*>(params.workspaces[kWsHidden])[first + column] = value;
      reinterpret_cast<u16*>(params.workspaces[kWsNormed])[first + column] = static_cast<u16>(pack_bf16x2(__fmul_rn(value, gain[column]), 0.0f));
      const f32 squares = warp_sum(__fmul_rn(value, value));
      if (thread % 32u == 0) reinterpret_cast<f32*>(params.workspaces[kWsSquares])[(first + column) / kNormGroup] = squares;
    }
  }
}

// 1 / rms of an item's rows from the sums of squares that the previous op left. A warp takes four rows at a time, so that their loads are in
// flight together. input_rows as in GemmArgs.
BK_INLINE void load_row_scales(const EngineParams& params, const u32* input_rows, u32 row_begin, u32 num_rows, f32* row_scale) {
  constexpr u32 kRowsAtOnce = 4;
  const u32 num_parts = opaque(params.dims.hidden) / kNormGroup;
  const u32 thread = opaque(threadIdx.x);
  const u32 lane = thread % 32u;
  const f32* squares = reinterpret_cast<const f32*>(params.workspaces[kWsSquares]) + lane;
#pragma unroll 1
  for (u32 first = thread / 32u * kRowsAtOnce; first < num_rows; first += kComputeWarps * kRowsAtOnce) {
    f32 sums[kRowsAtOnce] = {};
    u64 places[kRowsAtOnce];
#pragma unroll
    for (u32 i = 0; i < kRowsAtOnce; ++i) {
      const u32 row = row_begin + min(first + i, num_rows - 1);  // past the last one: it again, its sum is not stored
      places[i] = static_cast<u64>(input_rows != nullptr ? input_rows[row] : row) * num_parts;
    }
#pragma unroll 1
    for (u32 part = 0; part + lane < num_parts; part += 32) {
#pragma unroll
      for (u32 i = 0; i < kRowsAtOnce; ++i) sums[i] = __fadd_rn(sums[i], squares[places[i] + part]);
    }
#pragma unroll
    for (u32 i = 0; i < kRowsAtOnce; ++i) {
      const f32 mean = __fdiv_rn(warp_sum(sums[i]), static_cast<f32>(params.dims.hidden));
      if (lane == i && first + i < num_rows) row_scale[first + i] = rsqrtf(__fadd_rn(mean, params.dims.norm_eps));
    }
  }
}

// A GEMM op at the item shape that suits the number of rows. The shapes give the same bits (gemm.cuh), they differ in speed alone: few rows
// are padded to 16 or 64, many rows share weight tiles of up to 128 rows, once there are enough items for all SMs.
template <u32 TILE_ROWS, bool SCALED, class Epilogue>
BK_INLINE void run_gemm(const EngineParams& params, const GemmArgs& args, const Epilogue& epilogue) {
  constexpr u32 kTilesTogether = 128 / TILE_ROWS;
  const auto prepare = [&](u32 row_begin, u32 num_rows) {
    if constexpr (SCALED) load_row_scales(params, args.input_rows, row_begin, num_rows, worker_shared().row_scale);
  };
  const u32 cta = cta_idx();
  if (args.num_rows <= 16) {
    run_gemm_items<TILE_ROWS, 16, 1, kScratchBytes>(args, cta, params.num_workers, worker_scratch(), prepare, epilogue);
  } else if (args.num_rows <= 64) {
    run_gemm_items<TILE_ROWS, 64, 1, kScratchBytes>(args, cta, params.num_workers, worker_scratch(), prepare, epilogue);
  } else if (kTilesTogether == 1 || (args.num_tiles + kTilesTogether - 1) / kTilesTogether * ((args.num_rows + 127) / 128) < params.num_workers) {
    run_gemm_items<TILE_ROWS, 128, 1, kScratchBytes>(args, cta, params.num_workers, worker_scratch(), prepare, epilogue);
  } else {
    run_gemm_items<TILE_ROWS, 128, kTilesTogether, kScratchBytes>(args, cta, params.num_workers, worker_scratch(), prepare, epilogue);
  }
}

BK_INLINE u64 input_workspace(const EngineParams& params, const Op& op) {
  if (op.kind == kOpProject) return params.workspaces[op.input == kBufAttention ? kWsAttention : kWsActivation];
  return params.workspaces[kWsNormed];
}

BK_INLINE void run_gemm_op(const EngineParams& params, const Op& op, const StepPlan* plan) {
  const bool is_lm_head = op.kind == kOpLmHead;
  const GemmArgs args{reinterpret_cast<const u8*>(op.weight), reinterpret_cast<const u16*>(input_workspace(params, op)),
                      is_lm_head ? plan_sampled_rows(params, plan) : nullptr, is_lm_head ? plan->num_sample_rows : plan->num_rows,
                      op.in_features / kSliceColumns, op.num_tiles};
  const f32* row_scale = worker_shared().row_scale;
  switch (op.kind) {
    case kOpQkv:
      run_gemm<kQkvTileRows, true>(params, args, QkvEpilogue<kQkvTileRows, kHeadDim>{params, op, plan, row_scale});
      break;
    case kOpGateUp:
      run_gemm<kGateUpTileRows, true>(params, args, GateUpEpilogue<kGateUpTileRows>{params, op, row_scale});
      break;
    case kOpLmHead:
      run_gemm<kLmHeadTileRows, true>(params, args, LogitsEpilogue<kLmHeadTileRows>{params, op, row_scale});
      break;
    default:
      run_gemm<kProjectTileRows, false>(params, args, ProjectEpilogue<kProjectTileRows>{params, op});
  }
}

// kOpAttention, in two phases around a grid barrier.
struct RowStore {
  const EngineParams& params;
  BK_INLINE void operator()(u32 row, u32 column, u32 pair) const {
    u16* output = reinterpret_cast<u16*>(params.workspaces[kWsAttention]);
    *reinterpret_cast<u32*>(output + static_cast<u64>(row) * params.dims.num_heads * kHeadDim + column) = pair;
  }
};

BK_INLINE void fill_attention_args(const EngineParams& params, const Op& op, const StepPlan* plan, AttentionArgs& args) {
  const ModelDims& dims = params.dims;
  const u64 num_slots = attention_slots(params.max_batch, params.max_pages_per_request);
  u8* parts = reinterpret_cast<u8*>(params.workspaces[kWsAttentionPart]);
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

BK_INLINE void run_attention(const EngineParams& params, const Op& op, const StepPlan* plan) {
  AttentionShared& attention = worker_shared().attention;
  if (is_first_thread()) fill_attention_args(params, op, plan, attention.args);
  named_barrier_sync<1, kComputeThreads>();  // the arguments are complete
  const RowStore store{params};
  attention_splits<kHeadDim, 1>(attention, worker_scratch(), store);
  grid_barrier(params, worker_shared().program, false);
  attention_combine<kHeadDim>(attention, store);
}

BK_INLINE LogitTiles logit_tiles(const EngineParams& params) {
  return LogitTiles{reinterpret_cast<const u64*>(params.workspaces[kWsLogitBest]), (params.dims.vocab + kLmHeadTileRows - 1) / kLmHeadTileRows};
}

// ---- The interpreter ---------------------------------------------------------------------------------------------
BK_INLINE void work(const EngineParams& params) {
  ProgramState& state = worker_shared().program;
  if (is_first_thread()) state = ProgramState{};
  named_barrier_sync<1, kComputeThreads>();  // the state is written
#pragma unroll 1
  for (;;) {
    if (state.op_idx == 0 && wait_plan(params, state.step)->flags & kPlanExit) return;
    const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[state.step & 1]);
    const Op& op = reinterpret_cast<const Op*>(params.ops)[state.op_idx];
    switch (op.kind) {
      case kOpQkv:
      case kOpProject:
      case kOpGateUp:
      case kOpLmHead:
        run_gemm_op(params, op, opaque(plan));
        break;
      case kOpAttention:
        run_attention(params, op, opaque(plan));
        break;
      case kOpEmbed:
        run_embed(params, op, opaque(plan));
        break;
      case kOpSample:
        run_sample(params, opaque(plan), worker_scratch(), logit_tiles(params));
        break;
      default:
        fail(params, kFaultBadProgram, kSiteUnknownOp, kOpSample, op.kind);
    }
    grid_barrier(params, state, true);
  }
}

}  // namespace blinkimp
