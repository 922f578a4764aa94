// The workers of device/persistent_kernel.cu, as written for Hopper, on emulated CTAs: all four roles, all ops, step after step.
//
// The harness is the director: it publishes the next plan the moment that the last worker has arrived, and has overwritten the plan before the
// last by then, as a director that plans ahead may. Copies land as late as they can, in any order (ptx_sm90.cuh).
// Test: pytest tests/host/test_worker_sm90_simt.py
#include <persistent_kernel.cu>

#include <grid.h>

namespace {

using namespace blinkimp;

u32 phases_of_step(const EngineParams& params, const StepPlan& plan) {
  u32 num_phases = 0;
  for (u32 op_idx = 0; op_idx < params.num_ops; ++op_idx) num_phases += phases_in_step(reinterpret_cast<const Op*>(params.ops)[op_idx].kind, plan);
  return num_phases;
}

}  // namespace

// plans: [num_steps, plan_bytes]; plans of params are the two places that they are copied to. logits: [num_steps, max_batch, vocab] or null;
// sampled: [num_steps, max_batch] tokens.
// What the rule expects of an op of num_rows > 64 rows: host/step_costs.py counts the same.
extern "C" unsigned bk_wide_time_ns(const blinkimp::EngineParams* params, const blinkimp::Op* op, unsigned num_rows) {
  return wide_time_ns(*params, wide_tiling(*params, *op, num_rows));
}

extern "C" void bk_worker_sm90_simt(const blinkimp::EngineParams* params_of_test, const unsigned char* plans, unsigned num_steps, unsigned seed, float* logits, unsigned* sampled) {
  const EngineParams params = *params_of_test;
  const u64 num_bytes = plan_bytes(params);
  const u64 num_logits = u64{params.max_batch} * params.dims.vocab;
  u32* const published = grid_word(params, kGridWordPlan);
  u32* const arrivals = grid_word(params, kGridWordArrivals);
  const auto put_plan = [&](u32 step) {
    StepPlan* place = reinterpret_cast<StepPlan*>(params.plans[step & 1]);
    std::memset(place, 0xff, num_bytes);
    if (step < num_steps) std::memcpy(place, plans + step * num_bytes, num_bytes);
    place->step = step;
    place->flags = step < num_steps ? 0 : u32{kPlanExit};
  };
  u32 step = 0;  // in flight
  u32 expected = 0;
  const auto start = [&] {
    put_plan(step + 1);
    *published = step + 1;
    if (step < num_steps) expected += phases_of_step(params, *reinterpret_cast<const StepPlan*>(params.plans[step & 1])) * params.num_workers;
    ++simt90::grid.generation;
  };
  *arrivals = 0;
  put_plan(0);
  start();
  simt90::run_grid(params.num_workers, kWorkerThreads, seed, [&] { persistent_kernel(params); }, [&] {
    if (*arrivals > expected) simt::fail("arrivals at the grid barrier", *arrivals, expected);
    if (step == num_steps || *arrivals != expected) return false;
    std::memcpy(logits + step * num_logits, reinterpret_cast<const f32*>(params.workspaces[kWsLogits]), num_logits * sizeof(f32));
    for (u32 row = 0; row < params.max_batch; ++row) sampled[step * params.max_batch + row] = sampled_of_step(params, step)[row].token;
    step += 1;
    start();
    return true;
  });
  for (const simt90::Cta& cta : simt90::grid_ctas) {
    if (!cta.copies.empty()) simt::fail("bulk copies that nobody waited for", cta.copies.size(), 0);
    for (const auto& [address, barrier] : cta.barriers) {
      if (barrier.num_bytes != 0) simt::fail("bytes that an mbarrier still expects", static_cast<u64>(barrier.num_bytes), 0);
    }
  }
}
