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
  StepPlan gathering{};  // a step that samples some rows only: it has all phases
  gathering.num_rows = 1;
  const u32 most_phases = phases_of_program(params, gathering);
  const u32 fewest_phases = phases_of_program(params, StepPlan{});
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
    num_barriers += samples_every_row(*plan) ? fewest_phases : most_phases;
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
    for (u32 i = 0; i < kScaleBuffers; i++) {
      mbarrier_init(&shared.scales_full[i], kScaleWarps);
      mbarrier_init(&shared.scales_empty[i], kComputeThreads / 32);
    }
    mbarrier_init(&shared.producers_done, 2 + kScaleWarps);
    fence_mbarrier_init();
    shared.compute = ComputeState{};
    shared.next_cursors = ConsumerCursors{};
    shared.next_scales = RingCursor{};
  }
  // Rows of an input stage that no copy ever wrote must at least be readable numbers to compute-sanitizer's eyes.
  for (u32 i = threadIdx.x; i < kScratchBytes / 16; i += kWorkerThreads) reinterpret_cast<uint4*>(shared_memory + kScratchOffset)[i] = uint4{0, 0, 0, 0};
  fence_proxy_async();
  __syncthreads();  // mbarriers and compute state are initialised before any role uses them
}

// The roles are the branches of one if/else, in the director's CTA too: only then does the assembler give each branch its own registers.
extern "C" __global__ void __launch_bounds__(kWorkerThreads, 1) persistent_kernel(const __grid_constant__ EngineParams params) {
  init_shared();
  const u32 warp = uniform(threadIdx.x / 32);  // roles by warp: within each the compiler may use uniform registers
  if (warp >= kComputeThreads / 32) {
    set_registers_down<64>();
    if (cta_idx() == params.num_workers) return;
    const u32 role = warp - kComputeThreads / 32;
    if (role == 0 && threadIdx.x % 32 == 0) weight_producer(params);
    if (role == 1 && threadIdx.x % 32 == 0) input_producer(params);
    if (role >= 2) scale_producer(params, role - 2);
  } else {
    set_registers_up<224>();
    if (uniform(cta_idx()) != params.num_workers) {
      compute(params);
    } else if (warp == 0) {
      direct(params);
    }
  }
}

}  // namespace blinkimp
