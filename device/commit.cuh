// Commit: what the workers sampled becomes the requests' new state. All lanes side by side, one sequence of the plan each.
//
// Called by the persistent kernel's director warp and the emulated device after a step's workers are done; part of director.cuh. What it
// says to the rings is staged here and written by director_publish. As a rule the next step was planned ahead and runs already.
// Test: pytest tests/host/test_director_requests.py tests/host/test_director_stateful.py
//
// Invariants (asserted by tests):
//   K1  each output token is staged once, in order, with its output position; preemption neither repeats nor skips one.
//   K2  a cancelled request stages no token at the commit that follows its CANCEL, then one FINISH.
//   K3  a request that ends as a row of the next plan says so at once, and is freed at that plan's commit, of which it takes nothing.
#pragma once
#include <director_port.cuh>

namespace blinkimp {

// ---- One sequence ------------------------------------------------------------------------------------------------
// 0, or the FinishReason of a request that has just sampled `token` as its output number num_output.
BK_INLINE u32 stop_reason(const EngineParams& params, const Request& request, u32 token, u32 num_output) {
  if (!(request.flags & kFlagIgnoreEos)) {
    for (u32 k = 0; k < params.dims.num_eos_ids; ++k) {
      if (token == params.dims.eos_ids[k]) return kFinishEos;
    }
  }
  for (u32 k = 0; k < request.num_stop_ids; ++k) {
    if (token == request.stop_ids[k]) return kFinishStopId;
  }
  return num_output >= request.max_tokens ? u32{kFinishLength} : 0;
}

struct SeqResult {      // what one sequence brings, in the registers of its lane
  u32 queue_pair_idx;   // kNoQueuePair: no sequence
  u32 num_completions;  // 0, TOKEN, FINISH, or both
  u32 num_tops;         // TOPs that follow the TOKEN
  bool has_token;
  u32 output_idx;       // of the token; without one, outputs so far
  SampleResult sample;
};

// One lane per sequence: the request's new state. The counts may stand there already (advance_in_flight).
BK_INLINE SeqResult apply_sample(const EngineParams& params, u64 step, const PlanSeq& seq) {
  Request* request = request_at(params, seq.request_idx);
  SeqResult result{request->queue_pair_idx, 0, 0, false, seq.output_idx, {0, 0.0f}};
  if (request->flags & kFlagFinished) return result;  // K3: it ended one step ago
  request->num_computed = seq.position_begin + seq.num_rows;
  if (seq.sample_row != kNoRow) request->num_tokens = request->num_computed + 1;
  if (request->flags & kFlagDropped) return result;
  if (request->flags & kFlagStopAsked) {  // K2
    request->flags |= kFlagFinished;
    result.num_completions = 1;
    return result;
  }
  if (seq.sample_row == kNoRow) return result;
  result.sample = sampled_of_step(params, step)[seq.sample_row];
  if (is_no_token(result.sample)) {
    request->finish_reason = kFinishConstraint;
    request->flags |= kFlagFinished;
    result.num_completions = 1;
    return result;
  }
  result.has_token = true;
  result.num_tops = request->sampling.num_top_logprobs;
  if (result.sample.token >= params.dims.vocab) {
    record_fault(params, kFaultIntegrity, kSiteSampledToken, params.dims.vocab, result.sample.token);
    result.sample.token = 0;  // the engine stops at the fault; until then no id leads out of the vocabulary
  }
  request_tokens(params, seq.request_idx)[request->num_computed] = result.sample.token;
  request->last_token = result.sample.token;
  const u32 reason = stop_reason(params, *request, result.sample.token, request->num_tokens - request->num_prompt_tokens);
  if (reason != 0) {
    request->finish_reason = reason;
    request->flags |= kFlagFinished;
  }
  result.num_completions = reason != 0 ? 2 : 1;
  return result;
}

// One lane per sequence: its completions, at their place in `staged`. The credit was promised (S2).
BK_INLINE void stage_result(const DirectorState& state, StagedCompletion* staged, const Request& request, const SeqResult& result,
                            u64 step, u32 sample_row) {
  if (result.has_token) {
    const u32 tops = result.num_tops << kStagedTopShift | static_cast<u32>(step & 1) << kStagedTopStepShift | sample_row << kStagedTopRowShift;
    const u32 commit = (kCompletionToken << kCommitKindShift) | (result.num_tops != 0 ? tops : 0);
    staged->entry = CompletionEntry{commit, result.sample.token, request.request_id,
                                    result.output_idx, result.sample.logprob, state.now_ns};
    staged->queue_pair_idx = result.queue_pair_idx;
    staged += 1;
  }
  if (result.num_completions > (result.has_token ? 1u : 0u)) {
    const u32 commit = (kCompletionFinish << kCommitKindShift) | (request.finish_reason << kCommitReasonShift);
    staged->entry = CompletionEntry{commit, request.num_prompt_tokens, request.request_id,
                                    result.output_idx - request.num_prior_outputs + (result.has_token ? 1 : 0), static_cast<f32>(request.num_cached_tokens),
                                    state.now_ns};
    staged->queue_pair_idx = result.queue_pair_idx;
  }
}

// One lane per sequence: what the trace says about it, from position `pos` on. Returns how many events these are; `writes`: they are written.
BK_INLINE u32 trace_seq(const DirectorState& state, const PlanSeq& seq, const Request& request, const SeqResult& result,
                        bool writes, u64 pos) {
  u32 num_events = 0;
  const auto event = [&](u32 kind, u64 argument) {
    if (writes) write_trace_event(state.trace, pos + num_events, state.now_ns, kind, request.queue_pair_idx, state.status.step, request.request_id, argument);
    num_events += 1;
  };
  if (seq.num_rows > 1 || seq.position_begin < request.num_prompt_tokens) event(kTraceChunk, pack_argument(seq.position_begin, seq.num_rows));
  if (result.has_token) event(kTraceToken, pack_argument(result.output_idx, result.sample.token));
  const u32 num_outputs = result.output_idx + (result.has_token ? 1 : 0);
  if (result.num_completions > (result.has_token ? 1u : 0u)) event(kTraceFinished, pack_argument(request.finish_reason, num_outputs));
  return num_events;
}

// ---- Requests that ended -----------------------------------------------------------------------------------------
// Lane 0. A request that just left the running list; its pages are free.
BK_INLINE void end_request(const EngineParams& params, DirectorState& state, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  if (!(request->flags & (kFlagFinished | kFlagDropped))) {  // cancelled while it was not in the step
    finish_detached(params, state, request_idx, request->finish_reason);
    return;
  }
  count_finish(state, (request->flags & kFlagDropped) ? u32{kFinishCancelled} : request->finish_reason);
  if (!(request->flags & (kFlagDropped | kFlagForgotten))) forget_request(params, state.table, request_idx);
  free_request(params, state.table, request_idx);
}

// All lanes. Requests that ended leave the running list, which keeps its order; their pages are free in the same step (L2). With a next
// plan, its rows stay, and only their ids are free (K3).
BK_INLINE void remove_ended(const EngineParams& params, const Lanes& lanes, DirectorState& state, bool has_next) {
  keep_lru_room(params, lanes, state.pages);
  const u32 num_running = state.status.num_running;
  u32 num_kept = 0;
  u32 num_ended = 0;
  u32 num_forgotten = 0;
  for (u32 begin = 0; begin < num_running; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    const u32 request_idx = i < num_running ? state.running[i] : kNoRequest;
    const Request* request = request_idx != kNoRequest ? request_at(params, request_idx) : nullptr;
    const bool is_over = request != nullptr && (request->flags & (kFlagFinished | kFlagStopAsked | kFlagDropped));
    const bool ends = is_over && !(has_next && request->step_rows > 0);
    const bool stays = request != nullptr && !ends;
    const bool is_forgotten = is_over && stays && (request->flags & (kFlagFinished | kFlagDropped | kFlagForgotten)) == kFlagFinished;
    const u32 kept_rank = num_kept + lanes.exclusive_sum(stays ? 1 : 0);
    const u32 ended_rank = num_ended + lanes.exclusive_sum(ends ? 1 : 0);
    const u32 forgotten_rank = num_forgotten + lanes.exclusive_sum(is_forgotten ? 1 : 0);
    lanes.sync();  // hazard: entries move down over places that other lanes read above
    if (stays) state.running[kept_rank] = request_idx;
    if (ends) state.scratch[ended_rank] = request_idx;
    if (is_forgotten) state.scratch[kMaxBatch - 1 - forgotten_rank] = request_idx;
    num_kept += lanes.sum(stays ? 1 : 0);
    num_ended += lanes.sum(ends ? 1 : 0);
    num_forgotten += lanes.sum(is_forgotten ? 1 : 0);
  }
  lanes.sync();  // hazard: scratch is read by every lane below
  if (lanes.is_first()) {
    state.status.num_running = num_kept;
    for (u32 k = 0; k < num_forgotten; ++k) {
      const u32 request_idx = state.scratch[kMaxBatch - 1 - k];
      forget_request(params, state.table, request_idx);
      request_at(params, request_idx)->flags |= kFlagForgotten;
    }
  }
  lanes.sync();  // hazard: whoever is called next reads the running list
  for (u32 k = 0; k < num_ended; ++k) {
    const u32 request_idx = state.scratch[k];
    Request* request = request_at(params, request_idx);
    release_pages(params, lanes, state.pages, request_idx);
    if (lanes.is_first()) {
      state.queue_pairs[request->queue_pair_idx].num_running -= 1;
      end_request(params, state, request_idx);
    }
    lanes.sync();  // hazard: scratch and the running list are free for the caller
  }
}

// Lane 0. One more step of so many rows. Nobody waits for these stores.
BK_INLINE void count_step(const EngineParams& params, DirectorState& state, u32 num_rows) {
  StepCounts& counts = state.step_counts;
  StepCounts& page = engine_page(params).step_counts;
  u32 i = 0;
  while (i + 1 < sizeof(counts.by_rows) / sizeof(u64) && 1u << i < num_rows) ++i;
  counts.by_rows[i] += 1;
  counts.num_rows += num_rows;
  st_relaxed_sys(&page.by_rows[i], counts.by_rows[i]);  // relaxed: readers take each word for itself
  st_relaxed_sys(&page.num_rows, counts.num_rows);
}

// ---- The whole ---------------------------------------------------------------------------------------------------
// All lanes. After the workers: `plan` is the one that director_plan filled, EngineParams.sampled holds its sampled rows.
BK_NOINLINE void director_commit(const EngineParams& params, const Lanes& lanes, const StepPlan* plan) {
  DirectorState& state = director_state(params);
  if (!state.step_in_flight) {
    if (lanes.is_first()) record_fault(params, kFaultIntegrity, kSiteDirectorOrder, 1, 0);
    return;
  }
  const u32 num_seqs = plan->num_seqs;
  const u32 num_rows = plan->num_rows;
  if (state.num_staged + num_seqs * kStepCredit > kMaxStaged) publish_completions(params, lanes, state);  // the caller never published
  const bool has_next = state.next_plan != kNextNone;
  u32 num_staged = state.num_staged;
  u32 staged_mask = 0;  // queue pairs that this step may write to
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) staged_mask |= state.queue_pairs[q].num_promised > 0 ? 1u << q : 0;
  staged_mask = lanes.sum(staged_mask);
  if (lanes.is_first()) state.now_ns = device_clock_ns();
  lanes.sync();  // hazard: completions carry now_ns
  u32 num_finished = 0;
  u32 num_outputs = 0;
  u32 num_prompt_rows = 0;
  u64 trace_pos = state.trace.producer_pos;
  for (u32 begin = 0; begin < num_seqs; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    SeqResult result{kNoQueuePair, 0, 0, false, 0, {0, 0.0f}};
    u32 sample_row = kNoRow;
    const Request* request = nullptr;
    PlanSeq seq{};
    if (i < num_seqs) {
      seq = plan_seqs(params, plan)[i];
      sample_row = seq.sample_row;
      request = request_at(params, seq.request_idx);
      num_prompt_rows += seq.num_rows == 1 && seq.position_begin >= request->num_prompt_tokens ? 0 : seq.num_rows;
      result = apply_sample(params, plan->step, seq);
      num_outputs += result.has_token ? 1 : 0;
      num_finished += (request->flags & (kFlagFinished | kFlagDropped)) ? 1 : 0;
    }
    const u32 rank = num_staged + lanes.exclusive_sum(result.num_completions);
    if (request != nullptr) stage_result(state, &state.staged[rank], *request, result, plan->step, sample_row);
    num_staged += lanes.sum(result.num_completions);
    if (is_traced(params)) {
      const u32 num_events = request != nullptr ? trace_seq(state, seq, *request, result, false, 0) : 0;
      const u64 pos = trace_pos + lanes.exclusive_sum(num_events);
      if (request != nullptr) trace_seq(state, seq, *request, result, true, pos);
      trace_pos += lanes.sum(num_events);
    }
    for (u32 q = 0; q < params.num_queue_pairs; ++q) {
      if (!(staged_mask >> q & 1)) continue;
      const u32 num_of_q = lanes.sum(result.queue_pair_idx == q ? result.num_completions + result.num_tops : 0);
      if (lanes.is_first()) state.queue_pairs[q].num_staged += num_of_q;
    }
  }
  num_finished = lanes.sum(num_finished);
  num_outputs = lanes.sum(num_outputs);
  num_prompt_rows = lanes.sum(num_prompt_rows);
  const u32 num_deferred = state.num_deferred;
  lanes.sync();  // hazard: lane 0 changes below what the others have read
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    QueuePairState& queue_pair = state.queue_pairs[q];
    queue_pair.num_promised = has_next ? queue_pair.num_promised - queue_pair.num_promised_now : 0;
    queue_pair.num_promised_now = 0;
  }
  if (lanes.is_first()) {
    state.trace.producer_pos = trace_pos;
    trace_event(params, state.trace, device_clock_ns(), kTraceCommit, 0, state.status.step, 0, pack_argument(num_finished, num_outputs));
    state.num_staged = num_staged;
    state.num_deferred = 0;
    state.is_advanced = 0;
    state.status.step += 1;
    state.status.step_ns_last = (state.next_plan == kNextStarted ? state.next_start_ns : state.now_ns) - state.plan_ns;
    state.step_in_flight = 0;
    if (state.next_plan == kNextStarted) {  // it is the one in flight now
      state.step_in_flight = 1;
      state.next_plan = kNextNone;
      state.plan_ns = state.next_start_ns;
      st_relaxed_sys(&state.fault.step, state.status.step);  // relaxed: for reports only
    }
    state.status.prompt_tokens += num_prompt_rows;
    state.status.output_tokens += num_outputs;
    count_step(params, state, num_rows);
  }
  lanes.sync();  // hazard: ends use the credit and the staging that lane 0 just set
  if (num_finished + num_deferred > 0) remove_ended(params, lanes, state, has_next);
}

// ---- A last look before the next step ----------------------------------------------------------------------------
constexpr u32 kMaxWatchedSeqs = 32;  // that as many stop at one step, all of a batch, is not worth a look

// What one lane must know to see, the moment the workers are done, whether its sequence of the next plan was stopped by the token it
// should go on from. Read beforehand: the words do not change any more.
struct WatchedSeq {
  const Request* request;  // null: it goes on in any case
  u32 sample_row;          // of the step before
  u32 num_stop_ids;
};

BK_INLINE WatchedSeq watch_seq(const EngineParams& params, const StepPlan* next, u32 seq_idx) {
  const PlanSeq seq = plan_seqs(params, next)[seq_idx];
  const u32 token = plan_rows(params, next)[seq.row_begin].token;
  const Request* request = request_at(params, seq.request_idx);
  if (!(token & kTokenPending)) return WatchedSeq{nullptr, 0, 0};
  return WatchedSeq{request, token & ~kTokenPending, request->num_stop_ids};
}

// After the workers of the step before. All loads at once: each takes the better part of a microsecond.
BK_INLINE bool was_stopped(const EngineParams& params, const StepPlan* next, const WatchedSeq& seq) {
  if (seq.request == nullptr) return false;
  const u32 flags = seq.request->flags;
  const u32 token = sampled_of_step(params, next->step - 1)[seq.sample_row].token;
  bool found = (flags & (kFlagStopAsked | kFlagDropped | kFlagFinished)) != 0;
  for (u32 k = 0; k < kMaxStopIds; ++k) found |= k < seq.num_stop_ids && seq.request->stop_ids[k] == token;
  for (u32 k = 0; k < params.dims.num_eos_ids; ++k) found |= !(flags & kFlagIgnoreEos) && params.dims.eos_ids[k] == token;
  return found;
}

// All lanes. True: nobody in the next plan goes on, so it is not worth starting. director_plan finds that out by itself.
BK_INLINE bool every_seq_was_stopped(const EngineParams& params, const Lanes& lanes, const StepPlan* next) {
  if (next->num_seqs > kMaxWatchedSeqs) return false;
  bool goes_on = false;
  for (u32 i = lanes.id; i < next->num_seqs; i += lanes.count) goes_on |= !was_stopped(params, next, watch_seq(params, next, i));
  return !lanes.any(goes_on);
}

}  // namespace blinkimp
