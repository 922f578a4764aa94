// Before each step that the host launches (orchestrator = cpu): applies what the host changed, and makes the persistent kernel run one step.
//
// The step itself is the persistent kernel of this GPU, hopper or portable, the very same cubin, launched without its director's CTA: its
// workers find plan 0 published, then plan 1, which says exit. Launched by emu/orchestrator_cuda.cpp on the same stream right before it,
// with any number of blocks of any number of threads. Test: pytest tests/compile/test_kernels.py -k launched; pytest -m gpu
// tests/gpu/test_cpu_orchestrator_gpu.py
#include <portable/grid.cuh>

#include <step_update.cuh>

namespace blinkimp {

constexpr u32 kPlansOfLaunch = 2;  // the step and the exit

// batch: pinned host memory. Hazard: the batch's reads cross PCIe, a microsecond each, so each block takes pieces of its own, not parts of all.
extern "C" __global__ void begin_step(const __grid_constant__ EngineParams params, const UpdateBatch* batch) {
  for (u32 i = blockIdx.x; i < batch->num_pieces; i += gridDim.x) apply_piece(params, *batch, i, threadIdx.x, blockDim.x);
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  // Plain stores: the step's launch comes after this kernel's end.
  *grid_word(params, kGridWordPlan) = kPlansOfLaunch;
  *grid_word(params, kGridWordArrivals) = 0;
  *grid_word(params, kGridWordPaces) = 0;
}

}  // namespace blinkimp
