// The sample op of a worker CTA: token and logprob of each row of logits. GPU only.
//
// Plain greedy rows cost the sum behind the logprob, and have a loop of their own. Few of them are split over CTAs: each adds the weights
// of its slice of the vocabulary to one integer, so their order does not matter, and the last to arrive writes the result: no grid barrier.
// Called by device/worker.cuh and device/portable/worker.cuh; each includes what is its own first: kComputeThreads, the workspaces.
// Test: pytest -m gpu tests/gpu/test_sampling_gpu.py tests/gpu/test_engine_gpu.py
#pragma once
#include <sample_request.cuh>

namespace blinkimp {

constexpr u32 kMaxSampleSplits = 32;  // CTAs of one row

struct SampleSplit {   // of a row that is split; zero between steps. Writers and readers: the CTAs of the row
  u64 sum;             // weights of the slices so far
  u32 num_arrived;     // CTAs that have added theirs
  u32 reserved0;
};
ABI_SIZE(SampleSplit, 16);

struct LogitTiles {  // the best logit of each tile of each row, where the LM head leaves it
  const u64* best;   // [max_batch][num_tiles] best_code(), or null: the sample op looks for itself
  u32 num_tiles;
};

// [max_batch], behind the top logprobs
BK_INLINE SampleSplit* sample_splits(const EngineParams& params) {
  return reinterpret_cast<SampleSplit*>(top_logprobs_of_step(params, 0) + 2 * u64{params.max_batch} * kMaxTopLogprobs);
}

// One slice of a plain greedy row. All CTAs of the row call it, each with its slice_idx.
template <class Group>
BK_INLINE void sample_greedy_slice(const Group& group, const EngineParams& params, const StepPlan* plan, u32 sample_idx, const f32* logits,
                                   const LogitTiles& tiles, u32 slice_idx, u32 num_slices, SampleScratch* scratch) {
  using namespace sampling;
  const u32 vocab = params.dims.vocab;
  const u64 best = best_of_tiles(group, scratch, tiles.best, tiles.num_tiles);
  const u32 max_key = static_cast<u32>(best >> 32);
  const Weighing weighing{value_of_key(max_key), kLog2OfE, 0};
  const u32 begin = static_cast<u32>(u64{vocab} * slice_idx / num_slices);
  const u32 end = static_cast<u32>(u64{vocab} * (slice_idx + 1) / num_slices);
  u64 sum = 0;
  for_each_eight(logits + begin, end - begin, group.id, group.count, [&](const f32 (&values)[8]) {
    for (const f32 value : values) sum += weighing.weight(orderable_logit(value));
  });
  sum = sum_over_group(group, scratch, sum);
  if (group.id != 0) return;
  SampleSplit* split = sample_splits(params) + sample_idx;
  red_add_relaxed_gpu(&split->sum, sum);  // relaxed: ordered by the arrival below
  // Acquire and release pair with each other: who arrives last sees what the others added.
  if (atom_add_acq_rel_gpu(&split->num_arrived, 1) + 1 < num_slices) return;
  const u64 total = atom_add_relaxed_gpu(&split->sum, u64{0});  // an atomic: the first one is read where it was added to
  *split = SampleSplit{0, 0, 0};  // for the next step; the grid barrier at the op's end stands between
  const u32 token = 0xffffffffu - static_cast<u32>(best);
  sampled_of_step(params, plan->step)[sample_idx] =
      max_key > kKeyOfMinusInfinity ? SampleResult{token, logprob_of(weighing.max_logit, log_of_sum(total), logits[token])}
                                    : SampleResult{0, minus_infinity()};
}

// The CTA's share of the step's rows.
BK_INLINE void sample_rows(const EngineParams& params, const StepPlan* plan, SampleScratch* scratch, const LogitTiles& tiles) {
  const BarrierSampleGroup<1, kComputeThreads> group;
  const u32 num_rows = plan->num_sample_rows;
  const u32 num_spare = num_rows != 0 ? params.num_workers / num_rows : 0;
  const u32 num_slices = tiles.best == nullptr || num_spare < 2 ? 1 : num_spare < kMaxSampleSplits ? num_spare : kMaxSampleSplits;
  for (u32 item = cta_idx(); item < num_rows * num_slices; item += params.num_workers) {
    const u32 sample_idx = item / num_slices;
    const u32 slice_idx = item % num_slices;
    const f32* logits = reinterpret_cast<const f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(sample_idx) * params.dims.vocab;
    const LogitTiles row_tiles{tiles.best + static_cast<u64>(sample_idx) * tiles.num_tiles, tiles.num_tiles};
    if (tiles.best != nullptr) {
      const PlanSeq& seq = sampled_seq(params, plan, sample_idx);
      const Request& request = *request_at(params, seq.request_idx);
      if (is_plain_greedy(request.sampling, request.constraint, seq.output_idx)) {
        sample_greedy_slice(group, params, plan, sample_idx, logits, row_tiles, slice_idx, num_slices, scratch);
        continue;
      }
    }
    if (slice_idx == 0) sample_request(group, params, plan, sample_idx, logits, tiles.best != nullptr ? row_tiles.best : nullptr, tiles.num_tiles, scratch);
  }
}

// kOpSample. Out of line: inlined, what it needs decided how the compiler dealt with the other ops' registers. Eight chains side by side in the
// loop above made it serialise all wgmma of the kernel (C7514, NVRTC 13.0). scratch_address: of shared memory, as a pointer would not say.
__device__ __noinline__ void run_sample_out_of_line(const EngineParams& params, const StepPlan* plan, u32 scratch_address, const u64* tile_best,
                                                    u32 num_tiles) {
  sample_rows(params, plan, reinterpret_cast<SampleScratch*>(__cvta_shared_to_generic(scratch_address)), LogitTiles{tile_best, num_tiles});
}
BK_INLINE void run_sample(const EngineParams& params, const StepPlan* plan, u8* scratch_bytes, const LogitTiles& tiles) {
  run_sample_out_of_line(params, plan, static_cast<u32>(__cvta_generic_to_shared(scratch_bytes)), tiles.best, tiles.num_tiles);
}

}  // namespace blinkimp
