// Accessors of a StepPlan: its three arrays stand right behind the 64-byte header; and of what the workers sampled.
//
// Written by the director (director_plan), read by the workers and the CPU interpreter.
// Test: pytest tests/host/test_director_plan.py
#pragma once
#include <ptx.cuh>

namespace blinkimp {

BK_INLINE u64 plan_bytes(const EngineParams& params) {
  return sizeof(StepPlan) + u64{params.max_batch} * sizeof(PlanSeq) + u64{params.max_step_tokens} * sizeof(PlanRow) +
         u64{params.max_batch} * sizeof(u32);
}

// [max_batch], the first num_seqs are valid
BK_INLINE PlanSeq* plan_seqs(const EngineParams&, StepPlan* plan) { return reinterpret_cast<PlanSeq*>(plan + 1); }
BK_INLINE const PlanSeq* plan_seqs(const EngineParams&, const StepPlan* plan) { return reinterpret_cast<const PlanSeq*>(plan + 1); }

// [max_step_tokens], the first num_rows are valid
BK_INLINE PlanRow* plan_rows(const EngineParams& params, StepPlan* plan) {
  return reinterpret_cast<PlanRow*>(plan_seqs(params, plan) + params.max_batch);
}
BK_INLINE const PlanRow* plan_rows(const EngineParams& params, const StepPlan* plan) {
  return reinterpret_cast<const PlanRow*>(plan_seqs(params, plan) + params.max_batch);
}

// [max_batch], the first num_sample_rows are valid: the row that each sampled row stands for
BK_INLINE u32* plan_sampled_rows(const EngineParams& params, StepPlan* plan) {
  return reinterpret_cast<u32*>(plan_rows(params, plan) + params.max_step_tokens);
}
BK_INLINE const u32* plan_sampled_rows(const EngineParams& params, const StepPlan* plan) {
  return reinterpret_cast<const u32*>(plan_rows(params, plan) + params.max_step_tokens);
}

// Step n uses plans[n & 1], so that the workers may still read plan n while the director writes n + 1.
BK_INLINE StepPlan* plan_of_step(const EngineParams& params, u64 step) { return reinterpret_cast<StepPlan*>(params.plans[step & 1]); }

// ---- What was sampled --------------------------------------------------------------------------------------------
// Two sets, because the director reads those of step n while the workers already run n + 1. Writer: the workers.
BK_INLINE SampleResult* sampled_of_step(const EngineParams& params, u64 step) {
  return reinterpret_cast<SampleResult*>(params.sampled) + (step & 1) * params.max_batch;
}

// What a row gives when no token is allowed. Token 0, because a step that was planned ahead goes on from it; no logprob is positive.
BK_INLINE SampleResult no_token() { return SampleResult{0, 1.0f}; }
BK_INLINE bool is_no_token(const SampleResult& result) { return result.logprob > 0.0f; }

// [max_batch, kMaxTopLogprobs]
BK_INLINE SampleResult* top_logprobs_of_step(const EngineParams& params, u64 step) {
  return reinterpret_cast<SampleResult*>(params.top_logprobs) + (step & 1) * params.max_batch * kMaxTopLogprobs;
}

// The input token of a row. A plan that was made while the step before ran knows only where that step puts it.
BK_INLINE u32 plan_row_token(const EngineParams& params, const StepPlan* plan, u32 row) {
  const u32 token = plan_rows(params, plan)[row].token;
  return token & kTokenPending ? sampled_of_step(params, plan->step - 1)[token & ~kTokenPending].token : token;
}

}  // namespace blinkimp
