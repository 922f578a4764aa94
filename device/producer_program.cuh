// Where a producer is in the program: its step's plan, its op, how many rows that works on. GPU only.
//
// Each producer counts for itself (ProducerState), and looks up what follows from it where it needs it: registers are few.
// Used by device/worker.cuh, scale_producer.cuh. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <phases.cuh>
#include <worker_memory.cuh>

namespace blinkimp {

// The rows a GEMM op works on: the LM head sees the sampled rows alone.
template <class Plan>
BK_INLINE u32 rows_of(u32 kind, const Plan& plan) { return kind == kOpLmHead ? plan.num_sample_rows : plan.num_rows; }

BK_INLINE bool is_gemm(u32 kind) { return kind == kOpQkv || kind == kOpProject || kind == kOpGateUp || kind == kOpLmHead; }

// Whether the op normalises its input: its epilogue needs row scales.
BK_INLINE bool is_scaled(u32 kind) { return is_gemm(kind) && kind != kOpProject; }

// Waits for the plan of a step; an idle wait has no budget, it ends with the exit flag at the latest. Acquire: pairs with the
// director's publication in persistent_kernel.cu.
BK_INLINE const StepPlan* wait_plan(const EngineParams& params, u32 step) {
  constexpr u32 kPollSleepNs = 100;
  while (static_cast<i32>(ld_acquire_gpu(grid_word(params, kGridWordPlan)) - (step + 1)) < 0) sleep_ns(kPollSleepNs);
  return reinterpret_cast<const StepPlan*>(params.plans[step & 1]);
}

// Begins a producer's step. Null: the workers leave.
BK_INLINE const StepPlan* begin_producer_step(const EngineParams& params, ProducerState& state) {
  const StepPlan* plan = wait_plan(params, state.step);
  state.op_idx = 0;
  state.rows = StepRows{plan->num_rows, plan->num_sample_rows};
  return plan->flags & kPlanExit ? nullptr : plan;
}

// The plan of the producer's step, looked up where it is used.
BK_INLINE const StepPlan* producer_plan(const EngineParams& params, const ProducerState& state) { return reinterpret_cast<const StepPlan*>(params.plans[state.step & 1]); }
BK_INLINE const Op& producer_op(const EngineParams& params, const ProducerState& state) { return reinterpret_cast<const Op*>(params.ops)[state.op_idx]; }

// ---- A producer's own copies of ops, an op ahead -------------------------------------------------------------------
// Where an op begins, its descriptor would come behind all that the rings have on their way, and until it is there nothing new is asked for: at batch 1 QKV
// lost 5 % of its time by that, O 8 (PERFORMANCE.md, fifteenth state).
BK_INLINE void fetch_producer_op(const EngineParams& params, u32 op_idx, Op* destination) {
  const u8* source = reinterpret_cast<const u8*>(params.ops) + op_idx * sizeof(Op);
#pragma unroll
  for (u32 i = 0; i < sizeof(Op) / 16; i++) cp_async_16(shared_address(destination) + i * 16, source + i * 16, true);
  cp_async_commit();
}

// The op that begins, in shared memory; the one behind it, past the last one the first, is on its way. The op before must have been fetched.
BK_INLINE const Op& enter_op(const EngineParams& params, ProducerState& state, Op (&ops)[2]) {
  cp_async_wait<0>();
  const u32 buffer = state.op_buffer;
  state.op_buffer = buffer ^ 1;
  fetch_producer_op(params, state.op_idx + 1 == params.num_ops ? 0 : state.op_idx + 1, &ops[buffer ^ 1]);
  return ops[buffer];
}

}  // namespace blinkimp
