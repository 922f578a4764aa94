// The kernel of tests/gpu/kernels/gemm_wide_test.cu, as it is compiled for Hopper, on a grid of emulated CTAs.
// Test: pytest tests/host/test_gemm_wide_simt.py
#include <gemm_epilogues.cuh>
#include <gemm_wide.cuh>
#include <producer_program.cuh>

// The kernel's own look at the clock. In ptx.cuh a look lets a spin wait for an arrival at the grid barrier, of which the last op sees none.
#define device_clock_ns() u64{0}
#include "../../gpu/kernels/gemm_wide_test.cu"
#undef device_clock_ns

#include <grid.h>

// output: [num_rows, out_features of the last op] f32; times: [num_ops + 1].
extern "C" void bk_gemm_wide_simt(const EngineParams* params, unsigned num_rows, const unsigned char* input, float* output, u64* times, unsigned seed) {
  *grid_word(*params, kGridWordArrivals) = *grid_word(*params, kGridWordPaces) = 0;
  simt90::run_grid(params->num_workers, kWorkerThreads, seed, [&] { gemm_wide_test(*params, num_rows, input, output, times); }, [] { return false; });
}
