// The grid's words, barriers and faults of the portable kernel: every phase of an op ends with one barrier over all worker CTAs.
//
// The names are those that device/director_loop.cuh expects of a kernel's worker. Used by device/portable/worker.cuh.
// Test: pytest -m gpu tests/gpu/test_portable_gpu.py
#pragma once
#include <fault.cuh>
#include <portable/gemm.cuh>
#include <ptx_sm90.cuh>

namespace blinkimp {

BK_INLINE u32* grid_word(const EngineParams& params, u32 word_idx) { return reinterpret_cast<u32*>(params.grid_words) + word_idx; }

// Grid barriers an op ends with: one per phase.
BK_INLINE u32 phases_of(u32 kind) { return kind == kOpAttention ? 2 : 1; }

// No step leaves a phase out here.
BK_INLINE u32 saved_phases(const StepPlan&) { return 0; }

// Records a fault and stops the kernel. The record lies in pinned host memory, so losing the context to the trap does not lose it.
// Out of line: its addresses would take registers from the loops around each wait.
__device__ __noinline__ void fail(const EngineParams& params, u32 code, u32 site, u64 expected, u64 seen) {
  // Another wait was first: its record must be whole before this trap stops the context, and takes microseconds to be.
  if (!record_fault(params, code, site, expected, seen)) sleep_ns(1000000);
  fence_acq_rel_sys();  // the record has left the SM before the trap
  trap();
}

BK_INLINE bool grid_has_passed(const EngineParams& params, u32 arrivals, u32 num_barriers) {
  return static_cast<i32>(arrivals - num_barriers * params.num_workers) >= 0;  // both count modulo 2^32, at most one step apart
}

// Where a worker CTA is in the program. In shared memory: what lives through all ops would take registers that some op lacks.
// Writer: thread 0 between two barriers, so that nobody reads it meanwhile; readers: all threads.
struct ProgramState {
  u32 step;
  u32 op_idx;
  u32 num_barriers;  // grid barriers passed since launch
  u32 reserved0;
};

// All threads of all worker CTAs: what they wrote before is visible to all of them after. ends_op: the program counter moves on, past the last op to
// the next step.
BK_INLINE void grid_barrier(const EngineParams& params, ProgramState& state, bool ends_op) {
  named_barrier_sync<1, kComputeThreads>();  // this CTA's writes are done before thread 0 releases them, its reads of the state before it writes
  if (is_first_thread()) {
    const u32 num_barriers = ++state.num_barriers;
    if (ends_op && ++state.op_idx == params.num_ops) {
      state.op_idx = 0;
      state.step++;
    }
    u32* arrivals = grid_word(params, kGridWordArrivals);
    red_add_release_gpu(arrivals, 1);  // pairs with the acquire below, and with the director's in wait_for_workers()
    const u64 start_ns = device_clock_ns();
    u32 seen;
    while (!grid_has_passed(params, seen = ld_acquire_gpu(arrivals), num_barriers)) {
      if (device_clock_ns() - start_ns > params.spin_budget_ns) fail(params, kFaultSpinExpired, kSiteGridBarrier, num_barriers * params.num_workers, seen);
    }
  }
  named_barrier_sync<1, kComputeThreads>();  // nobody reads what thread 0 has not acquired, nor the old state
}

// Waits for the plan of a step; an idle wait has no budget, it ends with the exit flag at the latest. All threads of the CTA.
BK_INLINE const StepPlan* wait_plan(const EngineParams& params, u32 step) {
  constexpr u32 kPollSleepNs = 100;
  if (is_first_thread()) {  // pairs with publish_plan() of device/director_loop.cuh
    while (static_cast<i32>(ld_acquire_gpu(grid_word(params, kGridWordPlan)) - (step + 1)) < 0) sleep_ns(kPollSleepNs);
  }
  named_barrier_sync<1, kComputeThreads>();  // the plan was acquired by thread 0
  return reinterpret_cast<const StepPlan*>(params.plans[step & 1]);
}

}  // namespace blinkimp
