// How often each token occurs in a running request: what repetition, frequency and presence penalties count.
//
//   EngineParams.token_counts    CountsTag [max_batch], then u16 [max_batch][counts_stride(vocab)]: kCountPromptBit and outputs
//
// Only requests with penalties have counts, in the slot that the director gave them at their admission (count_slots.cuh). The sampling
// op keeps them: it adds each token it samples, and counts the whole anew when the tag says that the slot holds something else: at the
// request's first sample, and at the first after a preemption.
// A row's counts belong to whoever samples the row; no two rows of a step share a slot.
// Called by device/sample_request.cuh. Test: pytest tests/host/test_sampling_edits.py tests/host/test_sampling_engine.py
#pragma once
#include <logit_edits.cuh>
#include <request_table.cuh>

namespace blinkimp {

struct CountsTag {    // what a slot's counts are of
  u64 serial;         // Request.serial; 0: nothing
  u32 num_tokens;     // of the request, prompt and outputs, that are counted
  u32 reserved0;
};
ABI_SIZE(CountsTag, 16);

BK_INLINE u64 counts_stride(u32 vocab) { return (u64{vocab} + 63) / 64 * 64; }

BK_INLINE CountsTag* counts_tag(const EngineParams& params, u32 slot) { return reinterpret_cast<CountsTag*>(params.token_counts) + slot; }

// u16 [vocab], of the slot
BK_INLINE u16* token_counts(const EngineParams& params, u32 slot) {
  return reinterpret_cast<u16*>(counts_tag(params, params.max_batch)) + slot * counts_stride(params.dims.vocab);
}

// Where a request's outputs begin among its tokens: the prompt's last ids may be outputs of an earlier life.
BK_INLINE u32 first_output(const Request& request) { return request.num_prompt_tokens - request.num_prior_outputs; }

// Makes the slot's counts those of the request's first num_tokens tokens. Ends with a barrier if it changed anything.
template <class Group>
BK_INLINE void refresh_counts(const Group& group, const EngineParams& params, u32 request_idx, const Request& request, u32 num_tokens) {
  CountsTag* tag = counts_tag(params, request.count_slot - 1);
  if (tag->serial == request.serial && tag->num_tokens == num_tokens) return;
  group.sync();  // hazard: the tag changes below while a member still compares it
  u32* words = reinterpret_cast<u32*>(token_counts(params, request.count_slot - 1));  // two counts each
  for (u32 i = group.id; i < counts_stride(params.dims.vocab) / 2; i += group.count) words[i] = 0;
  group.sync();  // hazard: a token is counted before its word was cleared
  const u32* tokens = request_tokens(params, request_idx);
  const u32 begin = first_output(request);
  const u32 end = num_tokens - begin < kMostCounted ? num_tokens : begin + kMostCounted;
  for (u32 i = begin + group.id; i < end; i += group.count) {
    const u32 token = tokens[i];
    group.atomic_add_global(&words[token / 2], token % 2 == 0 ? 1u : 0x10000u);
  }
  group.sync();  // hazard: bits are set with plain stores of halves of words that others still add to
  u16* counts = token_counts(params, request.count_slot - 1);
  for (u32 i = group.id; i < begin; i += group.count) counts[tokens[i]] |= kCountPromptBit;  // whoever writes an id last writes the same
  if (group.id == 0) *tag = CountsTag{request.serial, num_tokens, 0};
  group.sync();  // hazard: a count is read before it was complete
}

// One lane, after refresh_counts(): the token that the row sampled.
BK_INLINE void count_token(const EngineParams& params, const Request& request, u32 token, u32 num_tokens) {
  if (num_tokens - first_output(request) < kMostCounted) token_counts(params, request.count_slot - 1)[token] += 1;
  counts_tag(params, request.count_slot - 1)->num_tokens = num_tokens + 1;
}

}  // namespace blinkimp
