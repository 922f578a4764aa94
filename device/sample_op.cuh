// The sample op of a worker CTA: token and logprob of each row of logits. GPU only.
//
// Called by device/worker.cuh and device/portable/worker.cuh; each includes what is its own first: kComputeThreads, the workspaces. Test: pytest -m gpu tests/gpu/test_sampling_gpu.py tests/gpu/test_engine_gpu.py
#pragma once
#include <sampling.cuh>
#include <step_plan.cuh>

namespace blinkimp {

// kOpSample, one CTA per sampled row.
BK_INLINE void run_sample(const EngineParams& params, const StepPlan* plan, u8* scratch) {
  const BarrierSampleGroup<1, kComputeThreads> group;
  const PlanSeq* seqs = plan_seqs(params, plan);
  for (u32 sample = cta_idx(); sample < plan->num_sample_rows; sample += params.num_workers) {
    const PlanSeq& seq = seqs[plan_rows(params, plan)[plan_sampled_rows(params, plan)[sample]].seq_idx];
    const SamplingParams& sampling = *reinterpret_cast<const SamplingParams*>(params.requests + static_cast<u64>(seq.request_idx) * kRequestBytes);
    const f32* logits = reinterpret_cast<const f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(sample) * params.dims.vocab;
    const SampleResult result = sample_row(group, logits, params.dims.vocab, sampling, seq.output_idx, reinterpret_cast<SampleScratch*>(scratch));
    if (is_first_thread()) sampled_of_step(params, plan->step)[sample] = result;
    named_barrier_sync<1, kComputeThreads>();  // `scratch` is used again for the next row
  }
}

}  // namespace blinkimp
