// device/sample_op.cuh as the worker runs it: kComputeThreads threads of every worker CTA, over a plan that the test wrote.
// Test: pytest -m gpu tests/gpu/test_sample_op_gpu.py
#include <worker_memory.cuh>

#include <sample_op.cuh>

using namespace blinkimp;

struct RequestWords {        // what a test says of request i, which is row i of the plan
  SamplingParams sampling;
  u32 stop_ids[kMaxStopIds]; // the first num_stop_ids are valid
  u32 num_stop_ids;
  u32 num_prompt_tokens;
  u32 num_prior_outputs;
  u32 constraint;
  u32 constraint_state;
  u32 reserved0;
};

// words: [num_requests]. The request table, and for each request the next slot of the counts.
extern "C" __global__ void sample_op_requests(const EngineParams params, const RequestWords* words, u32 num_requests) {
  for (u32 i = threadIdx.x; i < num_requests; i += blockDim.x) {
    Request* request = request_at(params, i);
    *request = Request{};
    request->sampling = words[i].sampling;
    for (u32 k = 0; k < kMaxStopIds; k++) request->stop_ids[k] = words[i].stop_ids[k];
    request->num_stop_ids = words[i].num_stop_ids;
    request->num_prompt_tokens = words[i].num_prompt_tokens;
    request->num_prior_outputs = words[i].num_prior_outputs;
    request->constraint = words[i].constraint;
    request->constraint_state = words[i].constraint_state;
    request->count_slot = (i * 7 + 3) % params.max_batch + 1;
    request->serial = 100 + i;
  }
}

// One token more in each sequence of the plan: the step after this one.
extern "C" __global__ void sample_op_advance(const EngineParams params) {
  StepPlan* plan = reinterpret_cast<StepPlan*>(params.plans[0]);
  for (u32 i = threadIdx.x; i < plan->num_seqs; i += blockDim.x) {
    plan_seqs(params, plan)[i].position_begin += 1;
    plan_seqs(params, plan)[i].output_idx += 1;
  }
}

// num_tiles 0: no tiles. times: [num_blocks][2] ns, start and end.
extern "C" __global__ void __launch_bounds__(kWorkerThreads, 1) sample_op_run(const __grid_constant__ EngineParams params, u32 num_tiles, u64* times) {
  const u64 start_ns = device_clock_ns();
  const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[0]);
  const LogitTiles tiles{num_tiles != 0 ? reinterpret_cast<const u64*>(params.workspaces[kWsLogitBest]) : nullptr, num_tiles};
  sample_rows(params, plan, reinterpret_cast<SampleScratch*>(worker_memory()), tiles);
  named_barrier_sync<1, kComputeThreads>();  // the CTA's end is that of its last thread
  if (threadIdx.x == 0) {
    times[2 * blockIdx.x] = start_ns;
    times[2 * blockIdx.x + 1] = device_clock_ns();
  }
}
