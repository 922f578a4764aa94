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

BK_INLINE void direct(const EngineParams& params) {
  const Lanes lanes = Lanes::warp();
  const u32 num_phases = phases_of_program(params);
  director_init(params, lanes);
  u32 num_barriers = 0;
  for (u32 step = 0;; ) {
    director_poll(params, lanes);
    StepPlan* plan = reinterpret_cast<StepPlan*>(params.plans[step & 1]);
    const u32 num_rows = director_plan(params, lanes, plan);
    if (num_rows) {
      publish_plan(params, lanes, step);
      director_publish(params, lanes);
      num_barriers += num_phases;
      if (lanes.is_first()) wait_grid(params, num_barriers, kSiteStepWait);
      lanes.sync();  // the sampled tokens were acquired by lane 0
      director_commit(params, lanes, plan);
      step++;
      continue;
    }
    director_publish(params, lanes);
    if (director_should_exit(params, lanes)) {
      if (lanes.is_first()) plan->flags = kPlanExit;
      publish_plan(params, lanes, step);
      return;
    }
    director_idle(params, lanes);
  }
}

// ---- Workers -----------------------------------------------------------------------------------------------------
BK_INLINE void init_shared(u8* shared_memory, WorkerShared& shared) {
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < kWeightStages; i++) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], 2);  // one elected thread of each warpgroup
    }
    for (u32 i = 0; i < kInputStages; i++) {
      mbarrier_init(&shared.inputs_full[i], 1);
      mbarrier_init(&shared.inputs_empty[i], 2);
    }
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
  extern __shared__ u8 raw_shared[];
  u8* shared_memory = raw_shared + (1024 - shared_address(raw_shared) % 1024) % 1024;  // the swizzle counts from 1024-byte lines
  WorkerShared& shared = *reinterpret_cast<WorkerShared*>(shared_memory + kSharedOffset);
  const bool is_director = blockIdx.x == params.num_workers;
  init_shared(shared_memory, shared);
  if (threadIdx.x >= kComputeThreads) {
    set_registers_down<56>();
    if (!is_director && threadIdx.x == kComputeThreads) weight_producer(params, shared_memory, shared);
    if (!is_director && threadIdx.x == kComputeThreads + 32) input_producer(params, shared_memory, shared);
  } else {
    set_registers_up<224>();
    if (!is_director) {
      compute(params, shared_memory);
    } else if (threadIdx.x < 32) {
      direct(params);
    }
  }
}

}  // namespace blinkimp
