// The director's warp of the persistent kernel: the loop around director.cuh, and its hand-off to the workers.
//
// Called by device/persistent_kernel.cu and device/portable/portable_kernel.cu in the last CTA. GPU only; the emulated device's loop is in
// emu/emulated_device.cpp. Include the kernel's own worker first: grid_word(), grid_has_passed(), phases_of() and fail() are its.
// Test: pytest -m gpu tests/gpu/test_engine_gpu.py
#pragma once
#include <director.cuh>

namespace blinkimp {

// ---- Director ----------------------------------------------------------------------------------------------------
// One warp. While the workers run step n it publishes the completions of step n - 1.
BK_INLINE void publish_plan(const EngineParams& params, const Lanes& lanes, u32 step) {
  lanes.sync();  // all lanes' parts of the plan are written before lane 0 releases it
  if (lanes.is_first()) st_release_gpu(grid_word(params, kGridWordPlan), step + 1);  // pairs with wait_plan()
}

BK_INLINE u32 phases_of_program(const EngineParams& params) {
  u32 num_phases = 0;
  for (u32 op_idx = 0; op_idx < params.num_ops; op_idx++) num_phases += phases_of(reinterpret_cast<const Op*>(params.ops)[op_idx].kind);
  return num_phases;
}

// Until the workers have passed num_barriers grid barriers. Meanwhile new submissions are taken, now and then: each look costs about 2 us of
// PCIe reads, in which the end of the step would go unnoticed.
BK_INLINE void wait_for_workers(const EngineParams& params, const Lanes& lanes, u32 num_barriers) {
  constexpr u64 kPollPeriodNs = 10000;
  const u64 start_ns = device_clock_ns();
  u64 polled_ns = 0;
  for (;;) {
    const u64 now_ns = device_clock_ns();
    const u32 arrivals = lanes.is_first() ? ld_acquire_gpu(grid_word(params, kGridWordArrivals)) : 0;  // pairs with grid_arrive()
    if (lanes.any(lanes.is_first() && grid_has_passed(params, arrivals, num_barriers))) break;
    // Later than any wait of the workers, so that the wait which really hangs is the one on record.
    if (lanes.any(now_ns - start_ns > params.spin_budget_ns / 2 * 3)) fail(params, kFaultSpinExpired, kSiteStepWait, num_barriers * params.num_workers, arrivals);
    if (lanes.any(now_ns - polled_ns > kPollPeriodNs)) {
      director_poll(params, lanes);
      polled_ns = device_clock_ns();
    }
  }
  lanes.sync();  // the sampled tokens were acquired by lane 0
}

BK_INLINE void direct(const EngineParams& params) {
  const Lanes lanes = Lanes::warp();
  const u32 num_phases = phases_of_program(params);
  director_init(params, lanes);
  u32 num_barriers = 0;
  bool has_polled = false;
  for (u32 step = 0;;) {
    if (!has_polled) director_poll(params, lanes);
    has_polled = false;
    StepPlan* plan = reinterpret_cast<StepPlan*>(params.plans[step & 1]);
    const u32 num_rows = director_plan(params, lanes, plan);
    if (!num_rows || director_should_exit(params, lanes)) {
      director_publish(params, lanes);
      if (director_should_exit(params, lanes)) {
        if (lanes.is_first()) plan->flags = kPlanExit;
        publish_plan(params, lanes, step);
        return;
      }
      director_idle(params, lanes);
      continue;
    }
    publish_plan(params, lanes, step++);
    director_publish(params, lanes);
    num_barriers += num_phases;
    wait_for_workers(params, lanes, num_barriers);
    director_commit(params, lanes, plan);
    has_polled = true;
  }
}

}  // namespace blinkimp
