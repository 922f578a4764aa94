// C entry points of device/sampling.cuh on the CPU: one row with one lane, one row with many lanes (threads), and its parts.
//
// bk_sample_row_lanes runs the code path of the GPU (barriers, atomics) with std::threads, so that the sanitizers see it and
// a test can show that the number of lanes does not change a bit.
// Called by tests/host/test_sampling.py and tests/gpu/test_sampling_gpu.py (the reference of the GPU).
#include <pthread.h>
#include <sampling.cuh>
#include <thread>
#include <vector>

namespace blinkimp {
namespace {

struct ThreadSampleGroup {
  u32 id;
  u32 count;
  pthread_barrier_t* barrier;  // of all `count` threads; owner: bk_sample_row_lanes
  void sync() const { pthread_barrier_wait(barrier); }
  u32 atomic_add(u32* address, u32 value) const { return atom_add_relaxed_shared(address, value); }
};

SampleInput input_of(const f32* logits, u32 vocab, const LogitEdits* edits) {
  return SampleInput{logits, nullptr, vocab, 0, edits != nullptr ? *edits : LogitEdits{}};
}

}  // namespace
}  // namespace blinkimp

extern "C" {

// logits: [vocab] f32; edits: one or null; params and result: one each; top: [params->num_top_logprobs].
void bk_sample_row(const float* logits, unsigned int vocab, const blinkimp::LogitEdits* edits, const blinkimp::SamplingParams* params,
                   unsigned int output_idx, blinkimp::SampleResult* result, blinkimp::SampleResult* top) {
  using namespace blinkimp;
  static thread_local SampleScratch scratch;
  *result = sample_row(SingleSampleGroup{}, input_of(logits, vocab, edits), *params, output_idx, &scratch, top);
}

// The same with every cut and draw by radix descents.
void bk_sample_row_radix(const float* logits, unsigned int vocab, const blinkimp::LogitEdits* edits,
                         const blinkimp::SamplingParams* params, unsigned int output_idx, blinkimp::SampleResult* result,
                         blinkimp::SampleResult* top) {
  using namespace blinkimp;
  static thread_local SampleScratch scratch;
  *result = sample_row<true>(SingleSampleGroup{}, input_of(logits, vocab, edits), *params, output_idx, &scratch, top);
}

// The same by num_lanes threads (1 .. 256), with the best_code() of each tile as the LM head leaves them: [num_tiles], or null. Returns 0, or
// the errno value of a barrier that could not be made.
int bk_sample_row_lanes(const float* logits, unsigned int vocab, const blinkimp::LogitEdits* edits,
                        const blinkimp::SamplingParams* params, unsigned int output_idx, unsigned int num_lanes,
                        const unsigned long long* tile_best, unsigned int num_tiles, blinkimp::SampleResult* result,
                        blinkimp::SampleResult* top) {
  using namespace blinkimp;
  pthread_barrier_t barrier;
  if (const int error = pthread_barrier_init(&barrier, nullptr, num_lanes)) return error;
  SampleInput input = input_of(logits, vocab, edits);
  const std::vector<u64> tiles(tile_best, tile_best + num_tiles);  // u64 need not be unsigned long long
  if (tile_best != nullptr) {
    input.tile_best = tiles.data();
    input.num_tiles = num_tiles;
  }
  std::vector<SampleScratch> scratch(1);
  std::vector<SampleResult> results(num_lanes);
  std::vector<std::thread> threads;
  for (u32 lane = 0; lane < num_lanes; ++lane) {
    threads.emplace_back([&, lane] {
      const ThreadSampleGroup group{lane, num_lanes, &barrier};
      results[lane] = sample_row(group, input, *params, output_idx, scratch.data(), top);
    });
  }
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&barrier);
  *result = results[0];
  for (const SampleResult& other : results) {
    if (other.token != result->token) result->token = kNoRow;  // members disagree: no token has this id
  }
  return 0;
}

// counter: 4 words, in place.
void bk_philox4x32_10(unsigned int* counter, unsigned long long key) {
  const blinkimp::PhiloxCounter output =
      blinkimp::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key);
  for (int i = 0; i < 4; ++i) counter[i] = output.words[i];
}

// Element-wise, [num_values] each.
void bk_exp2_neg_q44(const float* distances, unsigned long long* weights, unsigned int num_values) {
  for (unsigned int i = 0; i < num_values; ++i) weights[i] = blinkimp::exp2_neg_q44(distances[i]);
}

void bk_log2_q32(const unsigned long long* values, unsigned long long* logs, unsigned int num_values) {
  for (unsigned int i = 0; i < num_values; ++i) logs[i] = blinkimp::log2_q32(values[i]);
}

}  // extern "C"
