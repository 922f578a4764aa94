// Intake: one submission from a queue pair -> an accepted request, a cancel, a pong, or a rejection with a reason. Never a fault.
//
// Called by director_poll. Header checks and queues are lane 0's; the body is copied by all lanes together, because each 128 bytes
// are a PCIe read. What is checked is the copy: the ingress cannot change it any more.
// Test: pytest tests/host/test_director_intake.py
//
// Invariants (asserted by tests):
//   T1  a submission is taken only when there is credit for its answer (a CANCEL has none and needs none).
//   T2  an accepted request can run alone: its pages at full length exist, its tokens are inside the vocabulary.
//   T3  arena_consumer_pos grows only by bodies that lie inside the arena window [arena_consumer_pos, + arena_bytes).
#pragma once
#include <director_port.cuh>

namespace blinkimp {

enum IntakeVerdict : u32 {
  kIntakeLeave = 0,  // no credit, no free entry, or over quota: look again at the next poll
  kIntakeTaken = 1,
  kIntakeCopy = 2,   // the header is good: copy the body and judge it
};

constexpr u32 kTokensInFlight = 8;  // loads a lane issues before it waits for the first

// T3, and the body in one piece, aligned.
BK_INLINE bool body_lies_in_arena(const QueuePairState& queue_pair, const SubmissionEntry& entry) {
  const u64 distance = entry.arena_pos - queue_pair.arena_consumer_pos;  // wraps for positions below: then it is huge
  const u64 offset = entry.arena_pos & (queue_pair.arena_bytes - 1);
  return entry.arena_pos % kArenaAlignBytes == 0 && entry.body_bytes >= sizeof(RequestBody) && distance < queue_pair.arena_bytes &&
         distance + entry.body_bytes <= queue_pair.arena_bytes && offset + entry.body_bytes <= queue_pair.arena_bytes;
}

// 0, or the reason to reject a request for what its entry alone says; `limit` is the bound that was broken.
BK_INLINE u32 judge_header(const EngineParams& params, const DirectorState& state, const SubmissionEntry& entry, bool body_is_there,
                           u32* limit) {
  const u64 total_tokens = u64{entry.num_prompt_tokens} + entry.max_tokens;
  const u64 ids_bytes = u64{entry.body_bytes} - sizeof(RequestBody);  // of stop and prompt ids; valid if the body is there
  *limit = 0;
  if (!body_is_there) return kRejectMalformed;
  if (state.command != kCommandRun) return kRejectDraining;
  if (entry.num_prompt_tokens == 0) return kRejectPromptEmpty;
  if (entry.max_tokens == 0) return *limit = 1, kRejectBadSampling;
  if (total_tokens > params.max_context) return *limit = params.max_context, kRejectTooLong;
  if (pages_for_tokens(static_cast<u32>(total_tokens)) > params.num_pages) return *limit = params.num_pages * kPageTokens, kRejectTooLong;
  if (ids_bytes % sizeof(u32) != 0 || ids_bytes / sizeof(u32) < entry.num_prompt_tokens ||
      ids_bytes / sizeof(u32) - entry.num_prompt_tokens > kMaxStopIds)
    return kRejectMalformed;
  return 0;
}

// NaN fails each comparison.
BK_INLINE bool sampling_is_valid(const SamplingParams& sampling) {
  constexpr f32 kLargest = 3.402823466e38f;
  return sampling.temperature >= 0.0f && sampling.temperature <= kLargest && sampling.top_p > 0.0f && sampling.top_p <= 1.0f &&
         sampling.min_p >= 0.0f && sampling.min_p <= 1.0f && sampling.ignore_eos <= 1;
}

// Lane 0. The entry is done with; its arena bytes too, if they were its own.
BK_INLINE void consume_entry(QueuePairState& queue_pair, bool body_is_there) {
  if (body_is_there) queue_pair.arena_consumer_pos = queue_pair.entry.arena_pos + queue_pair.entry.body_bytes;
  queue_pair.submission_consumer_pos += 1;
  queue_pair.has_entry = 0;
  queue_pair.positions_changed = 1;
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
  if (!can_stage(state, queue_pair_idx)) return kIntakeLeave;  // T1
  if (is_clean && op == kSubmissionPing) {
    stage_completion(state, queue_pair_idx, kCompletionPong, 0, 0, entry.request_id, 0, entry.client_ns);
    consume_entry(queue_pair, false);
    return kIntakeTaken;
  }
  const bool body_is_there = op == kSubmissionRequest && body_lies_in_arena(queue_pair, entry);
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

// All lanes: ids behind the body -> the request's stop ids and tokens. True if one is outside the vocabulary.
BK_INLINE bool copy_ids(const EngineParams& params, const Lanes& lanes, const u32* ids, u32 num_stop_ids, u32 num_ids, Request* request,
                        u32* tokens) {
  u32 highest = 0;
  for (u32 begin = lanes.id; begin < num_ids; begin += lanes.count * kTokensInFlight) {
    u32 loaded[kTokensInFlight];
    for (u32 k = 0; k < kTokensInFlight; ++k) {
      const u32 i = begin + k * lanes.count;
      loaded[k] = i < num_ids ? ids[i] : 0;
    }
    for (u32 k = 0; k < kTokensInFlight; ++k) {
      const u32 i = begin + k * lanes.count;
      if (i >= num_ids) break;
      if (i < num_stop_ids) request->stop_ids[i] = loaded[k];
      else tokens[i - num_stop_ids] = loaded[k];
      highest = loaded[k] > highest ? loaded[k] : highest;
    }
  }
  return lanes.any(num_ids > 0 && highest >= params.dims.vocab);
}

// Lane 0. What the body said: 0, or the reason to reject it.
BK_INLINE u32 judge_body(const EngineParams& params, const RequestBody& body, u32 num_stop_ids, bool has_bad_id, u32* limit) {
  *limit = 0;
  if (body.num_stop_ids != num_stop_ids || (body.flags & ~u32{kRequestNoPrefixCache}) != 0 || body.sampling.reserved0 != 0 ||
      body.sampling.reserved1 != 0 || (body.reserved0 | body.reserved1 | body.reserved2 | body.reserved3 | body.reserved4 | body.reserved5) != 0)
    return kRejectMalformed;
  if (!sampling_is_valid(body.sampling)) return kRejectBadSampling;
  if (has_bad_id) return *limit = params.dims.vocab, kRejectBadToken;
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
  request->step_rows = 0;
  request->accepted_ns = state.now_ns;
  push_waiting(params, state, request_idx, false);
  stage_completion(state, queue_pair_idx, kCompletionAck, 0, 0, entry.request_id, 0, state.now_ns);
  state.status.requests_accepted += 1;
}

// All lanes. The entry that look_at_queue_pair() or fetch_entry() copied. True if it was taken.
BK_INLINE bool take_submission(const EngineParams& params, const Lanes& lanes, DirectorState& state, u32 queue_pair_idx) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  u32 verdict = kIntakeLeave;
  if (lanes.is_first()) verdict = judge_entry(params, state, queue_pair_idx);
  lanes.sync();  // hazard: the other lanes read below what lane 0 changed: the entry, the free list
  verdict = lanes.broadcast(verdict, 0);
  if (verdict != kIntakeCopy) return verdict == kIntakeTaken;

  const u32 num_ids = (queue_pair.entry.body_bytes - static_cast<u32>(sizeof(RequestBody))) / sizeof(u32);
  const u32 num_stop_ids = num_ids - queue_pair.entry.num_prompt_tokens;
  const u32 request_idx = state.table.free_first_idx;  // claimed by accept_request(), or left free
  const u64 body_address = queue_pair.arena + (queue_pair.entry.arena_pos & (queue_pair.arena_bytes - 1));
  RequestBody body{};
  if (lanes.is_first()) body = *reinterpret_cast<const RequestBody*>(body_address);
  const bool has_bad_id = copy_ids(params, lanes, reinterpret_cast<const u32*>(body_address + sizeof(RequestBody)), num_stop_ids, num_ids,
                                   request_at(params, request_idx), request_tokens(params, request_idx));
  lanes.sync();  // hazard: lane 0 reads the last token that another lane copied, and gives the body's bytes back
  if (lanes.is_first()) {
    u32 limit = 0;
    const u32 reason = judge_body(params, body, num_stop_ids, has_bad_id, &limit);
    if (reason == 0) accept_request(params, state, queue_pair_idx, request_idx, body);
    else reject_entry(state, queue_pair_idx, reason, limit);
    consume_entry(queue_pair, true);
  }
  lanes.sync();  // hazard: the other lanes read the queue pair's state for the next submission
  return true;
}

}  // namespace blinkimp
