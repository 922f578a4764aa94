// Intake: one submission from a queue pair -> an accepted request, a cancel, a pong, a piece of a constraint in its slot, or a rejection
// with a reason. Never a fault.
//
// Called by director_poll. Header checks and queues are lane 0's; the body is copied by all lanes together, because each 128 bytes
// are a PCIe read. What is checked is the copy: the ingress cannot change it any more.
// Test: pytest tests/host/test_director_intake.py
//
// Invariants (asserted by tests):
//   T1  a submission is taken only when there is credit for its answer (CANCEL and CONSTRAINT have none and need none).
//   T2  an accepted request can run alone: its pages at full length exist, its tokens are inside the vocabulary.
//   T3  arena_consumer_pos grows only by bodies that lie inside the arena window [arena_consumer_pos, + arena_bytes).
#pragma once
#include <constraint.cuh>
#include <director_port.cuh>
#include <logit_edits.cuh>

namespace blinkimp {

enum IntakeVerdict : u32 {
  kIntakeLeave = 0,  // no credit, no free entry, or over quota: look again at the next poll
  kIntakeTaken = 1,
  kIntakeCopy = 2,   // the header is good: copy the body and judge it
  kIntakeLoad = 3,   // a piece of a constraint that has its place: copy it there
};

constexpr u32 kLoadsInFlight = 8;  // a lane issues so many before it waits for the first

struct alignas(16) ConstraintPart {  // what a lane copies of a constraint at once
  u32 words[4];                      // bytes as they come
};

// T3, and the body in one piece, aligned.
BK_INLINE bool body_lies_in_arena(const QueuePairState& queue_pair, const SubmissionEntry& entry, u32 least_bytes) {
  const u64 distance = entry.arena_pos - queue_pair.arena_consumer_pos;  // wraps for positions below: then it is huge
  const u64 offset = entry.arena_pos & (queue_pair.arena_bytes - 1);
  return entry.arena_pos % kArenaAlignBytes == 0 && entry.body_bytes >= least_bytes && distance < queue_pair.arena_bytes &&
         distance + entry.body_bytes <= queue_pair.arena_bytes && offset + entry.body_bytes <= queue_pair.arena_bytes;
}

// 0, or the reason to reject a request for what its entry alone says; `limit` is the bound that was broken.
BK_INLINE u32 judge_header(const EngineParams& params, const DirectorState& state, const SubmissionEntry& entry, bool body_is_there,
                           u32* limit) {
  const u64 total_tokens = u64{entry.num_prompt_tokens} + entry.max_tokens;
  const u64 list_bytes = u64{entry.body_bytes} - sizeof(RequestBody);  // of stop ids, biases, prompt; valid if the body is there
  *limit = 0;
  if (!body_is_there) return kRejectMalformed;
  if (state.command != kCommandRun) return kRejectDraining;
  if (entry.num_prompt_tokens == 0) return kRejectPromptEmpty;
  if (entry.max_tokens == 0) return *limit = 1, kRejectBadSampling;
  if (total_tokens > params.max_context) return *limit = params.max_context, kRejectTooLong;
  if (pages_for_tokens(static_cast<u32>(total_tokens)) > params.num_pages) return *limit = params.num_pages * kPageTokens, kRejectTooLong;
  if (list_bytes % sizeof(u32) != 0 || list_bytes / sizeof(u32) < entry.num_prompt_tokens ||
      list_bytes / sizeof(u32) - entry.num_prompt_tokens > kMaxStopIds + 2 * kMaxLogitBias)
    return kRejectMalformed;
  return 0;
}

// NaN fails each comparison.
BK_INLINE bool sampling_is_valid(const EngineParams& params, const SamplingParams& sampling) {
  constexpr f32 kLargest = 3.402823466e38f;
  constexpr f32 kMostPenalty = 2.0f;
  if (sampling.num_logit_bias > 0 && params.logit_biases == 0) return false;
  if (uses_penalties(sampling) && params.token_counts == 0) return false;
  return sampling.temperature >= 0.0f && sampling.temperature <= kLargest && sampling.top_p > 0.0f && sampling.top_p <= 1.0f &&
         sampling.min_p >= 0.0f && sampling.min_p <= 1.0f && sampling.ignore_eos <= 1 && sampling.repetition_penalty >= 0.0f &&
         sampling.repetition_penalty <= kLargest && sampling.presence_penalty >= -kMostPenalty &&
         sampling.presence_penalty <= kMostPenalty && sampling.frequency_penalty >= -kMostPenalty &&
         sampling.frequency_penalty <= kMostPenalty;
}

// Top logprobs that a request of this queue pair may ask for: what it publishes in one step must fit into the ring.
BK_INLINE u32 most_top_logprobs(const EngineParams& params, const QueuePairState& queue_pair) {
  if (params.top_logprobs == 0 || queue_pair.num_completions <= kStepCredit) return 0;
  return queue_pair.num_completions - kStepCredit < kMaxTopLogprobs ? queue_pair.num_completions - kStepCredit : kMaxTopLogprobs;
}

// Lane 0. The entry is done with; its arena bytes too, if they were its own.
BK_INLINE void consume_entry(QueuePairState& queue_pair, bool body_is_there) {
  if (body_is_there) queue_pair.arena_consumer_pos = queue_pair.entry.arena_pos + queue_pair.entry.body_bytes;
  queue_pair.submission_consumer_pos += 1;
  queue_pair.has_entry = 0;
  queue_pair.seen_ns = 0;
  queue_pair.positions_changed = 1;
}

// Lane 0. Of the entry that is being taken; seen_ns: when its commit word was first seen.
BK_INLINE void trace_polled(const EngineParams& params, DirectorState& state, u32 queue_pair_idx, u64 seen_ns) {
  const SubmissionEntry& entry = state.queue_pairs[queue_pair_idx].entry;
  trace_event(params, state.trace, seen_ns, kTracePolled, queue_pair_idx, state.status.step, entry.request_id, entry.client_ns);
}

BK_INLINE void reject_entry(DirectorState& state, u32 queue_pair_idx, u32 reason, u32 limit) {
  stage_completion(state, queue_pair_idx, kCompletionReject, reason, limit, state.queue_pairs[queue_pair_idx].entry.request_id, 0,
                   state.now_ns);
  state.status.requests_rejected += 1;
}

// Lane 0. A free entry of the table, the quota, and one entry kept back for each other queue pair that holds none.
BK_INLINE bool may_hold_another(const EngineParams& params, const DirectorState& state, u32 queue_pair_idx) {
  if (num_live(state.queue_pairs[queue_pair_idx]) >= params.max_requests_per_queue_pair) return false;
  u32 num_kept_back = 0;
  if (state.table.num_free <= params.num_queue_pairs) {
    for (u32 q = 0; q < params.num_queue_pairs; ++q) {
      const QueuePairState& other = state.queue_pairs[q];
      if (q != queue_pair_idx && is_attached(other) && num_live(other) == 0) num_kept_back += 1;
    }
  }
  return state.table.num_free > num_kept_back;
}

// Lane 0. Whether a piece of a constraint goes to a place in its slot. A piece that does not leaves its slot without an automaton, and so
// does one that begins a new one, until that is whole.
BK_INLINE bool judge_piece(const EngineParams& params, const QueuePairState& queue_pair, u32 queue_pair_idx) {
  const SubmissionEntry& entry = queue_pair.entry;
  if (entry.request_id >= params.num_constraint_slots) return false;
  u64* loaded_bytes = constraint_loaded_bytes(params, queue_pair_idx, static_cast<u32>(entry.request_id));
  const u64 offset = entry.client_ns;
  const bool is_next = offset == 0 || (offset == *loaded_bytes && offset % sizeof(ConstraintPart) == 0);
  const bool is_good = is_next && body_lies_in_arena(queue_pair, entry, 1) && offset + entry.body_bytes <= params.constraint_slot_bytes &&
                       (entry.num_prompt_tokens | entry.max_tokens | entry.priority) == 0 && (entry.timeout_ns | entry.cache_salt) == 0;
  if (!is_good || offset == 0) *loaded_bytes = 0;
  return is_good;
}

// All lanes. The piece that judge_piece() found good -> its place.
BK_INLINE void load_piece(const EngineParams& params, const Lanes& lanes, QueuePairState& queue_pair, u32 queue_pair_idx) {
  const SubmissionEntry& entry = queue_pair.entry;
  const u32 slot = static_cast<u32>(entry.request_id);
  const u8* source = reinterpret_cast<const u8*>(queue_pair.arena + (entry.arena_pos & (queue_pair.arena_bytes - 1)));
  u8* target = constraint_slot(params, queue_pair_idx, slot) + entry.client_ns;
  const u32 num_parts = entry.body_bytes / sizeof(ConstraintPart);
  for (u32 begin = lanes.id; begin < num_parts; begin += lanes.count * kLoadsInFlight) {
    ConstraintPart loaded[kLoadsInFlight];
    for (u32 k = 0; k < kLoadsInFlight; ++k) {
      const u32 i = begin + k * lanes.count;
      if (i < num_parts) loaded[k] = reinterpret_cast<const ConstraintPart*>(source)[i];
    }
    for (u32 k = 0; k < kLoadsInFlight; ++k) {
      const u32 i = begin + k * lanes.count;
      if (i < num_parts) reinterpret_cast<ConstraintPart*>(target)[i] = loaded[k];
    }
  }
  for (u32 i = num_parts * sizeof(ConstraintPart) + lanes.id; i < entry.body_bytes; i += lanes.count) target[i] = source[i];
  lanes.sync();  // hazard: lane 0 gives bytes back that the others still copy
  if (lanes.is_first()) {
    *constraint_loaded_bytes(params, queue_pair_idx, slot) = entry.client_ns + entry.body_bytes;
    consume_entry(queue_pair, true);
  }
  lanes.sync();  // hazard: the other lanes read the queue pair's state for the next submission
}

// Lane 0. All that can be decided without the body.
BK_INLINE u32 judge_entry(const EngineParams& params, DirectorState& state, u32 queue_pair_idx) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  const SubmissionEntry& entry = queue_pair.entry;
  const u32 op = (entry.commit >> kCommitKindShift) & 0xff;
  const bool is_clean = (entry.commit & ~(kCommitParityMask | 0xffu << kCommitKindShift)) == 0;
  if (entry.epoch != static_cast<u32>(queue_pair.epoch)) {  // of an ingress that was dropped while it wrote
    consume_entry(queue_pair, false);
    return kIntakeTaken;
  }
  if (is_clean && op == kSubmissionCancel) {
    // An id that is not live finished a moment ago: nothing to say.
    const u32 request_idx = find_request(params, state.table, queue_pair_idx, entry.request_id);
    if (request_idx != kNoRequest) stop_request(params, state, request_idx, kFinishCancelled);
    consume_entry(queue_pair, false);
    return kIntakeTaken;
  }
  if (is_clean && op == kSubmissionConstraint) {
    if (judge_piece(params, queue_pair, queue_pair_idx)) return kIntakeLoad;
    consume_entry(queue_pair, body_lies_in_arena(queue_pair, entry, 1));
    return kIntakeTaken;
  }
  if (!can_stage(state, queue_pair_idx)) return kIntakeLeave;  // T1
  if (is_clean && op == kSubmissionPing) {
    stage_completion(state, queue_pair_idx, kCompletionPong, 0, 0, entry.request_id, 0, entry.client_ns);
    consume_entry(queue_pair, false);
    return kIntakeTaken;
  }
  const bool body_is_there = op == kSubmissionRequest && body_lies_in_arena(queue_pair, entry, sizeof(RequestBody));
  u32 limit = 0;
  u32 reason = is_clean && op == kSubmissionRequest ? judge_header(params, state, entry, body_is_there, &limit) : kRejectMalformed;
  if (reason == 0 && find_request(params, state.table, queue_pair_idx, entry.request_id) != kNoRequest) reason = kRejectDuplicate;
  if (reason != 0) {
    reject_entry(state, queue_pair_idx, reason, limit);
    consume_entry(queue_pair, body_is_there);
    return kIntakeTaken;
  }
  return may_hold_another(params, state, queue_pair_idx) ? kIntakeCopy : kIntakeLeave;
}

struct BodyCounts {   // of the lists behind a body, as the body says
  u32 num_stop_ids;
  u32 num_logit_bias;
};

BK_INLINE bool counts_agree(const BodyCounts& counts, const SubmissionEntry& entry) {
  const u64 num_words = u64{counts.num_stop_ids} + 2 * u64{counts.num_logit_bias} + entry.num_prompt_tokens;
  return counts.num_stop_ids <= kMaxStopIds && counts.num_logit_bias <= kMaxLogitBias &&
         sizeof(RequestBody) + num_words * sizeof(u32) == entry.body_bytes;
}

enum BodyFault : u32 {
  kBodyBadId = 1,    // an id is outside the vocabulary
  kBodyBadBias = 2,  // a bias is not finite
};

// All lanes: the lists behind the body -> the request's stop ids, biases and tokens. Returns BodyFault bits of this lane.
BK_INLINE u32 copy_lists(const EngineParams& params, const Lanes& lanes, const u32* words, const BodyCounts& counts, u32 num_prompt_tokens,
                         u32 request_idx) {
  constexpr u32 kExponent = 0x7f800000;  // all ones: not finite
  Request* request = request_at(params, request_idx);
  u32* bias_words = reinterpret_cast<u32*>(params.logit_biases) + u64{request_idx} * kMaxLogitBias * 2;
  u32* tokens = request_tokens(params, request_idx);
  const u32 bias_begin = counts.num_stop_ids;
  const u32 prompt_begin = bias_begin + 2 * counts.num_logit_bias;
  const u32 num_words = prompt_begin + num_prompt_tokens;
  u32 highest = 0;
  u32 faults = 0;
  for (u32 begin = lanes.id; begin < num_words; begin += lanes.count * kLoadsInFlight) {
    u32 loaded[kLoadsInFlight];
    for (u32 k = 0; k < kLoadsInFlight; ++k) {
      const u32 i = begin + k * lanes.count;
      loaded[k] = i < num_words ? words[i] : 0;
    }
    for (u32 k = 0; k < kLoadsInFlight; ++k) {
      const u32 i = begin + k * lanes.count;
      if (i >= num_words) break;
      const u32 word = loaded[k];
      const bool is_bias_value = i >= bias_begin && i < prompt_begin && (i - bias_begin) % 2 != 0;
      if (i < bias_begin) request->stop_ids[i] = word;
      else if (i < prompt_begin) bias_words[i - bias_begin] = word;
      else tokens[i - prompt_begin] = word;
      if (is_bias_value) faults |= (word & kExponent) == kExponent ? u32{kBodyBadBias} : 0;
      else highest = word > highest ? word : highest;
    }
  }
  return faults | (highest >= params.dims.vocab ? u32{kBodyBadId} : 0);
}

// Lane 0. What the body said: 0, or the reason to reject it. `faults`: of copy_lists(), all lanes'.
BK_INLINE u32 judge_body(const EngineParams& params, const QueuePairState& queue_pair, u32 queue_pair_idx, const RequestBody& body,
                         u32 faults, u32* limit) {
  const SamplingParams& sampling = body.sampling;
  *limit = 0;
  if (body.num_prior_outputs > queue_pair.entry.num_prompt_tokens || (body.flags & ~u32{kRequestNoPrefixCache}) != 0 ||
      sampling.reserved0 != 0 || sampling.reserved1 != 0 ||
      (body.reserved0 | body.reserved1 | body.reserved2 | body.reserved3 | body.reserved4 | body.reserved5) != 0)
    return kRejectMalformed;
  if (!sampling_is_valid(params, sampling) || (faults & kBodyBadBias)) return kRejectBadSampling;
  if (sampling.num_top_logprobs > most_top_logprobs(params, queue_pair)) return *limit = most_top_logprobs(params, queue_pair), kRejectBadSampling;
  if (faults & kBodyBadId) return *limit = params.dims.vocab, kRejectBadToken;
  if (body.constraint != 0 && body.constraint_state >= open_constraint(params, queue_pair_idx, body.constraint).num_states)
    return *limit = params.num_constraint_slots, kRejectBadConstraint;
  return 0;
}

// Lane 0. The claimed entry becomes a waiting request; its ids are in place.
BK_INLINE void accept_request(const EngineParams& params, DirectorState& state, u32 queue_pair_idx, u32 request_idx,
                              const RequestBody& body) {
  const SubmissionEntry& entry = state.queue_pairs[queue_pair_idx].entry;
  claim_free_request(params, state.table, queue_pair_idx, entry.request_id);
  Request* request = request_at(params, request_idx);
  request->sampling = body.sampling;
  request->request_id = entry.request_id;
  request->queue_pair_idx = queue_pair_idx;
  request->flags = body.sampling.ignore_eos ? u32{kFlagIgnoreEos} : 0;
  request->num_stop_ids = body.num_stop_ids;
  request->num_prompt_tokens = entry.num_prompt_tokens;
  request->max_tokens = entry.max_tokens;
  request->num_tokens = entry.num_prompt_tokens;
  request->num_computed = 0;
  request->num_pages = 0;
  request->num_preemptions = 0;
  request->last_token = request_tokens(params, request_idx)[entry.num_prompt_tokens - 1];
  request->finish_reason = 0;
  request->timeout_ns = entry.timeout_ns;
  request->cache_salt = entry.cache_salt;
  request->priority = entry.priority;
  request->num_prior_outputs = body.num_prior_outputs;
  request->constraint = body.constraint;
  request->constraint_state = body.constraint_state;
  request->body_flags = body.flags;
  request->count_slot = 0;
  request->serial = state.status.requests_accepted + 1;
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  const u32 most_before = num_live(queue_pair) > 0 ? queue_pair.most_top_logprobs : 0;  // never less than what is promised already
  queue_pair.most_top_logprobs = body.sampling.num_top_logprobs > most_before ? body.sampling.num_top_logprobs : most_before;
  request->step_rows = 0;
  request->accepted_ns = state.now_ns;
  push_waiting(params, state, request_idx, false);
  trace_request(params, state, *request, kTraceQueued, pack_argument(entry.num_prompt_tokens, entry.max_tokens));
  stage_completion(state, queue_pair_idx, kCompletionAck, 0, 0, entry.request_id, 0, state.now_ns);
  state.status.requests_accepted += 1;
}

// All lanes. The entry that look_at_queue_pair() or fetch_entry() copied. True if it was taken.
BK_NOINLINE bool take_submission(const EngineParams& params, const Lanes& lanes, DirectorState& state, u32 queue_pair_idx) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  u32 verdict = kIntakeLeave;
  if (lanes.is_first()) {
    const u64 seen_ns = queue_pair.seen_ns;  // forgotten with the entry
    verdict = judge_entry(params, state, queue_pair_idx);
    if (verdict == kIntakeTaken) trace_polled(params, state, queue_pair_idx, seen_ns);
  }
  lanes.sync();  // hazard: the other lanes read below what lane 0 changed: the entry, the free list
  verdict = lanes.broadcast(verdict, 0);
  if (verdict == kIntakeLoad) load_piece(params, lanes, queue_pair, queue_pair_idx);
  if (verdict != kIntakeCopy) return verdict != kIntakeLeave;

  const SubmissionEntry& entry = queue_pair.entry;
  const u32 num_list_words = (entry.body_bytes - static_cast<u32>(sizeof(RequestBody))) / sizeof(u32) - entry.num_prompt_tokens;
  const u32 request_idx = state.table.free_first_idx;  // claimed by accept_request(), or left free
  const u64 body_address = queue_pair.arena + (entry.arena_pos & (queue_pair.arena_bytes - 1));
  const u32* lists = reinterpret_cast<const u32*>(body_address + sizeof(RequestBody));
  RequestBody body{};
  if (lanes.is_first()) body = *reinterpret_cast<const RequestBody*>(body_address);
  // Most requests have no bias: their lists are copied while the body, which says so, is still on its way.
  const BodyCounts guess{num_list_words <= kMaxStopIds ? num_list_words : 0, 0};
  u32 faults = 0;
  if (counts_agree(guess, entry)) faults = copy_lists(params, lanes, lists, guess, entry.num_prompt_tokens, request_idx);
  const BodyCounts counts{lanes.broadcast(body.num_stop_ids, 0), lanes.broadcast(body.sampling.num_logit_bias, 0)};
  const bool agree = counts_agree(counts, entry) && (counts.num_logit_bias == 0 || params.logit_biases != 0);
  if (agree && counts.num_logit_bias != 0) {
    lanes.sync();  // hazard: the second copy overwrites what another lane still writes for the first
    faults = copy_lists(params, lanes, lists, counts, entry.num_prompt_tokens, request_idx);
  }
  faults = (lanes.any(faults & kBodyBadId) ? u32{kBodyBadId} : 0) | (lanes.any(faults & kBodyBadBias) ? u32{kBodyBadBias} : 0);
  lanes.sync();  // hazard: lane 0 reads the last token that another lane copied, and gives the body's bytes back
  if (lanes.is_first()) {
    trace_polled(params, state, queue_pair_idx, queue_pair.seen_ns);
    u32 limit = 0;
    const u32 reason = counts_agree(counts, entry) ? judge_body(params, queue_pair, queue_pair_idx, body, faults, &limit) : u32{kRejectMalformed};
    if (reason == 0) accept_request(params, state, queue_pair_idx, request_idx, body);
    else reject_entry(state, queue_pair_idx, reason, limit);
    consume_entry(queue_pair, true);
  }
  lanes.sync();  // hazard: the other lanes read the queue pair's state for the next submission
  return true;
}

}  // namespace blinkimp
