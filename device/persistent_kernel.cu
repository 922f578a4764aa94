// The persistent kernel: one cooperative grid that serves until it is told to stop. The last CTA is the director, the others are workers.
//
// Launched by host/gpu_device.py with num_workers + 1 CTAs of 384 threads (the co-residency of all is guaranteed by the cooperative
// launch). With num_workers CTAs there is no director: the workers run plans that the host wrote beforehand (tests and tools).
// Compiled by NVRTC for sm_90a with -DBK_HEAD_DIM=64|128. Test: pytest -m gpu tests/gpu/test_engine_gpu.py
#include <worker.cuh>

#include <director_loop.cuh>

namespace blinkimp {

// ---- Workers -----------------------------------------------------------------------------------------------------
BK_INLINE void init_shared(const EngineParams& params) {
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
    mbarrier_init(&attention_shared(shared_memory).schedule_ready, 1);
    fence_mbarrier_init();
    shared.params = &params;
    shared.compute = ComputeState{};
    shared.next_cursors = ConsumerCursors{};
    shared.next_scales = RingCursor{};
    shared.is_idle = 0;
    shared.scales_are_late = 0;
    shared.num_paces = 0;
  }
  // Rows of an input stage that no copy ever wrote must at least be readable numbers to compute-sanitizer's eyes.
  for (u32 i = threadIdx.x; i < kScratchBytes / 16; i += kWorkerThreads) reinterpret_cast<uint4*>(shared_memory + kScratchOffset)[i] = uint4{0, 0, 0, 0};
  fence_proxy_async();
  __syncthreads();  // mbarriers and compute state are initialised before any role uses them
}

// The roles are the branches of one if/else, in the director's CTA too: only then does the assembler give each branch its own registers. And each ends with a
// wait for copies, of which most have none left. Without it the assembler lets all roles end in one place and takes a producer's thread for one among others that
// may go on beside it: what its copies need then goes through ordinary registers, which takes twice the time (PERFORMANCE.md, eighteenth state).
extern "C" __global__ void __launch_bounds__(kWorkerThreads, 1) persistent_kernel(const __grid_constant__ EngineParams params) {
  init_shared(params);
  const u32 warp = uniform(threadIdx.x / 32);  // roles by warp: within each the compiler may use uniform registers
  if (warp >= kComputeThreads / 32) {
    set_registers_down<56>();  // 128 x 56 + 256 x 224 = 384 x 168: what the launch has; more would wait for ever
    if (cta_idx() == params.num_workers) return;
    const u32 role = warp - kComputeThreads / 32;
    if (role >= 2) {
      scale_producer(params);
      cp_async_wait<0>();
    } else if (elect_one()) {  // both end with such a wait
      if (role == 0) weight_producer(params);
      else input_producer(params);
    }
  } else {
    set_registers_up<224>();
    if (uniform(cta_idx()) != params.num_workers) {
      compute(params);
      cp_async_wait<0>();
    } else if (warp < kDirectorThreads / 32) {
      direct(params);
      cp_async_wait<0>();
    }
  }
}

}  // namespace blinkimp
