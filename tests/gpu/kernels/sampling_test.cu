// device/sampling.cuh on the GPU: CTA i samples rows i, i + gridDim.x, ... with 256 threads; a 257th warp idles beside them, as a
// producer warp does in the worker. Test: pytest -m gpu tests/gpu/test_sampling_gpu.py
#include <sampling.cuh>

using namespace blinkimp;

// logits: [num_rows, row_stride] f32; edits, params, output_idx, results: [num_rows]; top: [num_rows, kMaxTopLogprobs].
extern "C" __global__ void __launch_bounds__(288, 1)
    sampling_test(const f32* logits, u32 num_rows, u32 row_stride, u32 vocab, const LogitEdits* edits, const SamplingParams* params,
                  const u32* output_idx, SampleResult* results, SampleResult* top) {
  extern __shared__ __align__(16) u8 dynamic_shared[];
  SampleScratch* scratch = reinterpret_cast<SampleScratch*>(dynamic_shared);
  if (threadIdx.x >= kMaxSampleLanes) return;
  const BarrierSampleGroup<1, kMaxSampleLanes> group{};
  for (u32 row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const SampleInput input{logits + static_cast<u64>(row) * row_stride, nullptr, vocab, 0, edits[row]};
    const SampleResult result = sample_row(group, input, params[row], output_idx[row], scratch, top + row * kMaxTopLogprobs);
    if (group.id == row % kMaxSampleLanes) results[row] = result;  // any member holds the result
    group.sync();  // the scratch is free for the next row
  }
}
