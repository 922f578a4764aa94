// What a request changes at the model's logits before a token is chosen: bias, bans, penalties, constraint. In this order, as vLLM:
//
//   bias        logit + bias. Ids named twice add up, the last one first
//   bans        the model's EOS ids and the request's stop ids, while the output is shorter than min_tokens: minus infinity
//   repetition  of ids in prompt or output: a positive logit divided by the penalty, another multiplied with it
//   frequency   logit - penalty * times in the output;   presence: logit - penalty for ids in the output
//   constraint  ids that the automaton's state does not allow: minus infinity
//
// Pure functions of id and logit, computed anew by every pass over the row: the logits in memory stay the model's. Every float operation
// is one rounding (mul_f32 is never contracted), so GPU and CPU agree to the bit.
// Called by device/sampling.cuh. Test: pytest tests/host/test_sampling_edits.py
#pragma once
#include <fixed_math.cuh>

namespace blinkimp {

constexpr u32 kMaxSparseEdits = kMaxLogitBias + kMaxStopIds + kMaxEosIds;
constexpr u32 kEditBuckets = 2048;  // far more than entries: nearly every id finds its bucket empty
constexpr u32 kIdsPerBucket = 64;   // neighbours share a bucket: four of them look once, and a warp's 128 ask for two or three words
constexpr u16 kNoEdit = 0xffff;

constexpr u32 kCountPromptBit = 0x8000;  // of a token's count: it is in the prompt
constexpr u32 kMostCounted = 0x7fff;     // outputs; later ones are not counted

struct LogitEdits {            // of one row, uniform over the group; all zero: no edits
  const LogitBias* bias;       // [num_bias], the request's
  const u32* stop_ids;         // [num_banned_stop_ids], the request's
  const u32* eos_ids;          // [num_banned_eos_ids], the model's
  const u16* counts;           // [vocab] kCountPromptBit and outputs, 8-byte aligned; or null: no penalties
  const u16* class_of_token;   // [vocab] of the constraint, or null: none. Not trusted
  const u16* next_state;       // [num_classes] of the constraint's state. Not trusted
  u32 num_bias;                // <= kMaxLogitBias
  u32 num_banned_stop_ids;     // <= kMaxStopIds
  u32 num_banned_eos_ids;      // <= kMaxEosIds
  u32 num_classes;             // 0: the automaton's state is none of its states, nothing is allowed
  u32 num_states;
  f32 repetition_penalty;      // 1 is off
  f32 presence_penalty;
  f32 frequency_penalty;

  BK_INLINE u32 num_sparse() const { return num_bias + num_banned_stop_ids + num_banned_eos_ids; }
  BK_INLINE bool has_any() const { return num_sparse() != 0 || counts != nullptr || class_of_token != nullptr; }
};

struct EditScratch {                  // shared by the group
  LogitEdits edits;                   // the row's, without the sparse ones' addresses: here they cost a pass over the row no registers
  u16 first[kEditBuckets];            // by edit_bucket() of an id: index of an entry, or kNoEdit
  u16 next[kMaxSparseEdits];          // the bucket's next entry, or kNoEdit
  LogitBias entries[kMaxSparseEdits]; // biases, then bans with a bias of minus infinity
};

BK_INLINE u32 edit_bucket(u32 token) { return token / kIdsPerBucket % kEditBuckets; }

BK_INLINE bool uses_penalties(const SamplingParams& sampling) {
  return (sampling.repetition_penalty != 0.0f && sampling.repetition_penalty != 1.0f) || sampling.presence_penalty != 0.0f ||
         sampling.frequency_penalty != 0.0f;
}

// Takes over the edits and builds the lookup of biases and bans. Ends with a barrier. Each bucket has one owner, so its chain is in the same
// order for any group.
template <class Group>
BK_INLINE void prepare_edits(const Group& group, const LogitEdits& edits, EditScratch* scratch) {
  const u32 num_entries = edits.num_sparse();
  if (group.id == 0) {
    LogitEdits kept = edits;
    kept.bias = nullptr;  // what follows is in the entries, and nobody else's address may be kept in memory: a kernel parameter would
    kept.stop_ids = kept.eos_ids = nullptr;  // be copied to where it has one
    scratch->edits = kept;
  }
  for (u32 i = group.id; i < kEditBuckets; i += group.count) scratch->first[i] = kNoEdit;
  for (u32 i = group.id; i < num_entries; i += group.count) {
    const u32 stop = i - edits.num_bias;
    const u32 eos = stop - edits.num_banned_stop_ids;
    scratch->entries[i] = i < edits.num_bias                ? edits.bias[i]
                          : stop < edits.num_banned_stop_ids ? LogitBias{edits.stop_ids[stop], minus_infinity()}
                                                             : LogitBias{edits.eos_ids[eos], minus_infinity()};
  }
  group.sync();  // hazard: an entry is linked before it was written, or its bucket before it was cleared
  for (u32 i = 0; i < num_entries; ++i) {
    const u32 bucket = edit_bucket(scratch->entries[i].token);
    if (bucket % group.count != group.id) continue;
    scratch->next[i] = scratch->first[bucket];
    scratch->first[bucket] = static_cast<u16>(i);
  }
  group.sync();  // hazard: a chain is followed before it was linked
}

BK_INLINE f32 penalised_logit(const LogitEdits& edits, u32 seen, f32 logit) {
  const f32 penalty = edits.repetition_penalty;
  f32 value = logit;
  if (penalty != 1.0f) value = value > 0.0f ? div_f32(value, penalty) : mul_f32(value, penalty);
  const u32 num_outputs = seen & kMostCounted;
  if (num_outputs == 0) return value;
  value = value - mul_f32(edits.frequency_penalty, static_cast<f32>(num_outputs));
  return value - edits.presence_penalty;
}

// One id below vocab. `logit` of orderable_logit(); so is the result. Whole rows: Row::edit() of device/sampling_row.cuh.
BK_INLINE f32 edited_logit(const EditScratch& scratch, u32 idx, f32 logit) {
  const LogitEdits& edits = scratch.edits;
  f32 value = logit;
  if (edits.num_sparse() != 0) {
    for (u32 i = scratch.first[edit_bucket(idx)]; i != kNoEdit; i = scratch.next[i]) {
      if (scratch.entries[i].token == idx) value = value + scratch.entries[i].bias;
    }
  }
  if (edits.counts != nullptr) {
    const u32 seen = edits.counts[idx];
    if (seen != 0) value = penalised_logit(edits, seen, value);
  }
  if (edits.class_of_token != nullptr) {
    const u32 token_class = edits.num_classes != 0 ? edits.class_of_token[idx] : 0;
    if (token_class >= edits.num_classes || edits.next_state[token_class] >= edits.num_states) value = minus_infinity();
  }
  return orderable_logit(value);
}

}  // namespace blinkimp
