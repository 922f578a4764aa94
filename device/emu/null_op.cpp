// The null op: no model. A token for each row to sample, at a set rate, so that whatever is around the model can be measured by itself.
//
// A token is drawn evenly from the op's table by the request's seed and the output position alone, so a request's text is the same in each
// life of it, and a client can know it beforehand. Temperature, penalties and the rest of the sampling parameters are not looked at.
// Called by reference_ops.cpp; the program is host/null_program.py. Test: pytest tests/host/test_null_program.py
#include <math.h>

#include <emu/reference_ops.h>
#include <philox.cuh>
#include <sample_request.cuh>

namespace blinkimp {
namespace {

constexpr u64 kLongestSleepNs = 500'000'000;  // sleep_ns() takes less than a second

// A step ends a period after the one before, however long the director took in between. One period may be caught up with; after a longer
// pause the clock starts anew.
void wait_for_end_of_step(const OpContext& context) {
  const u64 step_ns = context.op.step_ns;
  if (step_ns == 0) return;
  u64* last_end_ns = reinterpret_cast<u64*>(context.scratch);  // nothing else of a null program uses the scratch; zeroed at first
  u64 now_ns = device_clock_ns();
  u64 end_ns = *last_end_ns + step_ns;
  if (now_ns > end_ns + step_ns) end_ns = now_ns + step_ns;
  *last_end_ns = end_ns;
  for (; now_ns < end_ns; now_ns = device_clock_ns()) {
    const u64 left_ns = end_ns - now_ns;
    sleep_ns(static_cast<u32>(left_ns < kLongestSleepNs ? left_ns : kLongestSleepNs));
  }
}

}  // namespace

void run_null(const OpContext& context) {
  if (context.thread_idx != 0) return;
  const EngineParams& params = context.params;
  const Op& op = context.op;
  const u32* table = reinterpret_cast<const u32*>(op.weight);
  const f32 logprob = -logf(static_cast<f32>(op.out_features));
  for (u32 sample_idx = 0; sample_idx < context.plan.num_sample_rows; ++sample_idx) {
    const PlanSeq& seq = sampled_seq(params, &context.plan, sample_idx);
    const SamplingParams& sampling = request_at(params, seq.request_idx)->sampling;
    const u32 word = philox4x32_10(PhiloxCounter{{seq.output_idx, 0, 0, 0}}, sampling.seed).words[0];
    const u32 drawn = static_cast<u32>(u64{word} * op.out_features >> 32);
    sampled_of_step(params, context.plan.step)[sample_idx] = SampleResult{table[drawn], logprob};
    SampleResult* top = top_logprobs_of_step(params, context.plan.step) + u64{sample_idx} * kMaxTopLogprobs;
    for (u32 k = 0; k < sampling.num_top_logprobs; ++k) top[k] = SampleResult{table[(drawn + k) % op.out_features], logprob};
  }
  wait_for_end_of_step(context);
}

}  // namespace blinkimp
