// The persistent kernel for every GPU from sm_80 on: the same program, plans and director as device/persistent_kernel.cu, workers by mma.sync
// and cp.async. One cooperative grid; the last CTA is the director, the others are workers.
//
// Launched by host/gpu_device.py with num_workers + 1 CTAs of 256 threads. With num_workers CTAs there is no director: the workers run plans that
// the host wrote beforehand (tests and tools). Compiled by NVRTC for the GPU's architecture with the macros of portable/worker.cuh.
// Test: pytest tests/compile/test_kernels.py; on a GPU: pytest -m gpu tests/gpu/test_portable_gpu.py
#include <portable/worker.cuh>

#include <director_loop.cuh>

namespace blinkimp {

extern "C" __global__ void __launch_bounds__(kComputeThreads, 1) persistent_kernel(const __grid_constant__ EngineParams params) {
  if (cta_idx() != params.num_workers) {
    work(params);
  } else if (threadIdx.x < kDirectorThreads) {
    direct(params);
  }
}

}  // namespace blinkimp
