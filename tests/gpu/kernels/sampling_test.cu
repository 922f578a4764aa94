// device/sampling.cuh on the GPU: CTA i samples rows i, i + gridDim.x, ... with 256 threads; a 257th warp idles beside them, as a
// producer warp does in the worker. Test: pytest -m gpu tests/gpu/test_sampling_gpu.py
#include <sampling.cuh>

using namespace blinkimp;

// logits: [num_rows, row_stride] f32; params: [num_rows]; output_idx: [num_rows]; results: [num_rows].
extern "C" __global__ void __launch_bounds__(288, 1)
    sampling_test(const f32* logits, u32 num_rows, u32 row_stride, u32 vocab, const SamplingParams* params, const u32* output_idx,
                  SampleResult* results) {
  __shared__ SampleScratch scratch;
  if (threadIdx.x >= kMaxSampleLanes) return;
  const BarrierSampleGroup<1, kMaxSampleLanes> group{};
  for (u32 row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const SampleResult result =
        sample_row(group, logits + static_cast<u64>(row) * row_stride, vocab, params[row], output_idx[row], &scratch);
    if (group.id == row % kMaxSampleLanes) results[row] = result;  // any member holds the result
  }
}
