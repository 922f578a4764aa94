// Stands in for device/sample_op.cuh: the largest logit of each row. Sampling has tests of its own.
// Used by tests/host/simt90/worker_sm90_simt.cpp. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <sampling_window.cuh>
#include <step_plan.cuh>

namespace blinkimp {

struct LogitTiles {
  const u64* best;
  u32 num_tiles;
};

BK_INLINE void run_sample(const EngineParams& params, const StepPlan* plan, u8*, const LogitTiles&) {
  for (u32 row = cta_idx(); row < plan->num_sample_rows; row += params.num_workers) {
    if (!is_first_thread()) continue;
    const f32* logits = reinterpret_cast<const f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(row) * params.dims.vocab;
    u32 best = 0;
    for (u32 token = 1; token < params.dims.vocab; ++token) best = logits[token] > logits[best] ? token : best;
    sampled_of_step(params, plan->step)[row] = SampleResult{best, 0.0f};
  }
}

}  // namespace blinkimp
