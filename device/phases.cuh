// How many grid barriers an op ends with: what producers, compute threads and the director count by. GPU only.
//
// Test: pytest -m gpu tests/gpu/test_model_gpu.py
#pragma once
#include <step_plan.cuh>

namespace blinkimp {

// Every row is sampled (a decode step): the LM head reads the rows where they are.
BK_INLINE bool samples_every_row(const StepPlan& plan) { return plan.num_sample_rows == plan.num_rows; }

// One barrier per phase: attention's splits and their combination; the LM head's gathering of the sampled rows and its product.
BK_INLINE u32 phases_of(u32 kind, const StepPlan& plan) {
  if (kind == kOpAttention) return 2;
  return kind == kOpLmHead && !samples_every_row(plan) ? 2 : 1;
}

// Grid barriers of a step: they depend on samples_every_row() alone.
BK_INLINE u32 phases_of_program(const EngineParams& params, const StepPlan& plan) {
  u32 num_phases = 0;
  for (u32 op_idx = 0; op_idx < params.num_ops; op_idx++) num_phases += phases_of(reinterpret_cast<const Op*>(params.ops)[op_idx].kind, plan);
  return num_phases;
}

}  // namespace blinkimp
