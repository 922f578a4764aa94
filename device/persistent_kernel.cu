// The persistent kernel: one cooperative grid that serves until it is told to stop. The last CTA is the director, the others are workers.
//
// Launched by host/gpu_device.py with num_workers + 1 CTAs of 384 threads (the co-residency of all is guaranteed by the cooperative
// launch). With num_workers CTAs there is no director: the workers run plans that the host wrote beforehand (tests and tools).
// Compiled by NVRTC for sm_90a with -DBK_HEAD_DIM=64|128. Test: pytest -m gpu tests/gpu/test_engine_gpu.py
#include <director.cuh>
#include <worker.cuh>

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

// ---- Workers -----------------------------------------------------------------------------------------------------
BK_INLINE void init_shared() {
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  if (is_first_thread()) {
    for (u32 i = 0; i < kWeightStages; i++) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], 2);  // one elected thread of each warpgroup
    }
    for (u32 i = 0; i < kInputStages; i++) {
      mbarrier_init(&shared.inputs_full[i], 1);
      mbarrier_init(&shared.inputs_empty[i], 2);
    }
    mbarrier_init(&shared.producers_done, 2);
    fence_mbarrier_init();
    shared.compute = ComputeState{};
  }
  // Rows of an input stage that no copy ever wrote must at least be readable numbers to compute-sanitizer's eyes.
  for (u32 i = threadIdx.x; i < kScratchBytes / 16; i += kWorkerThreads) reinterpret_cast<uint4*>(shared_memory + kScratchOffset)[i] = uint4{0, 0, 0, 0};
  fence_proxy_async();
  __syncthreads();  // mbarriers and compute state are initialised before any role uses them
}

// The roles are the branches of one if/else, in the director's CTA too: only then does the assembler give each branch its own registers.
extern "C" __global__ void __launch_bounds__(kWorkerThreads, 1) persistent_kernel(const __grid_constant__ EngineParams params) {
  init_shared();
  if (threadIdx.x >= kComputeThreads) {
    set_registers_down<56>();
    if (cta_idx() == params.num_workers) return;
    if (threadIdx.x == kComputeThreads) weight_producer(params);
    if (threadIdx.x == kComputeThreads + 32) input_producer(params);
  } else {
    set_registers_up<224>();
    if (cta_idx() != params.num_workers) {
      compute(params);
    } else if (threadIdx.x < 32) {
      direct(params);
    }
  }
}

}  // namespace blinkimp
