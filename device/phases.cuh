// How many grid barriers an op ends with: what producers, compute threads and the director count by. GPU only.
//
// Test: pytest -m gpu tests/gpu/test_model_gpu.py
#pragma once
#include <step_plan.cuh>

namespace blinkimp {

// Every row is sampled (a decode step): the LM head reads the rows where they are. Plan: a StepPlan, or StepRows of worker_memory.cuh.
template <class Plan>
BK_INLINE bool samples_every_row(const Plan& plan) { return plan.num_sample_rows == plan.num_rows; }

// One barrier per phase: the LM head has two, the gathering of the sampled rows and its product.
BK_INLINE u32 phases_of(u32 kind) { return kind == kOpLmHead ? 2 : 1; }

// Phases that a step leaves out: the gathering, when there is nothing to gather.
template <class Plan>
BK_INLINE u32 saved_phases(const Plan& plan) { return samples_every_row(plan) ? 1 : 0; }

template <class Plan>
BK_INLINE u32 phases_in_step(u32 kind, const Plan& plan) { return phases_of(kind) - (kind == kOpLmHead ? saved_phases(plan) : 0); }

}  // namespace blinkimp
