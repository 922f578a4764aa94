// The director: polls queue pairs, plans steps, commits what the workers sampled, publishes completions.
//
// Called by the persistent kernel's director warp and by the emulated device's loop; DESIGN.md has the table of calls. All lanes call each
// function together. Between director_plan with rows and its director_commit a step is in flight: poll and publish may run as often as
// they like, plan and commit strictly alternate. One thread (CPU) or one warp (GPU) ever runs the director.
// Test: pytest tests/host -k director
//
// Invariants beside those of the modules (asserted by tests):
//   M1  each output token is published once, in order, with its output position; preemption neither repeats nor skips one.
//   M2  a cancelled request publishes no token after the commit that follows its CANCEL, then one FINISH.
//   M3  after kCommandStop the director exits once every staged completion is published and every FINISH had its credit, or the ingress
//       gave none for ingress_timeout_ns.
#pragma once
#include <director_integrity.cuh>
#include <intake.cuh>
#include <scheduler.cuh>

namespace blinkimp {

constexpr u32 kMaxTakeRounds = 8;  // submissions of one queue pair per poll: bounds what a burst adds to the gap between steps

// ---- Status ------------------------------------------------------------------------------------------------------
BK_INLINE u32 engine_state(const EngineParams& params, const DirectorState& state) {
  if (fault_recorded(params)) return kEngineFaulted;
  if (state.is_stopped) return kEngineStopped;
  return state.command == kCommandRun ? kEngineRunning : kEngineDraining;
}

typedef u64 __attribute__((may_alias)) AliasedWord;  // two u32 counters read as one word

// All lanes: 32 words, one store each on a warp.
BK_INLINE void publish_status(const EngineParams& params, const Lanes& lanes, DirectorState& state) {
  u32 num_attached = 0;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) num_attached += is_attached(state.queue_pairs[q]) ? 1 : 0;
  num_attached = lanes.sum(num_attached);
  if (lanes.is_first()) {
    StatusLines& status = state.status;
    status.heartbeat += 1;
    status.device_ns = device_clock_ns();
    status.state = engine_state(params, state);
    status.num_queue_pairs_attached = num_attached;
    status.num_free_requests = state.table.num_free;
    status.num_pages = params.num_pages;
    status.num_pages_free = state.pages.num_free;
    status.num_pages_used = params.num_pages - state.pages.num_free;
  }
  lanes.sync();  // hazard: the copy reads what lane 0 wrote
  u64* words = reinterpret_cast<u64*>(&engine_page(params).status);
  const AliasedWord* source = reinterpret_cast<const AliasedWord*>(&state.status);
  for (u32 i = lanes.id; i < sizeof(StatusLines) / sizeof(u64); i += lanes.count) {
    st_relaxed_sys(&words[i], source[i]);  // relaxed: readers take each word for itself
  }
  lanes.sync();  // hazard: lane 0 changes counters in the next call
}

// ---- Init --------------------------------------------------------------------------------------------------------
// 0, or the number of the condition that params break.
BK_INLINE u32 wrong_param(const EngineParams& params) {
  if (params.num_queue_pairs < 1 || params.num_queue_pairs > kMaxQueuePairs) return 1;
  if (params.num_requests < 1 || params.num_requests > 0xffff) return 2;  // 16 bits: pack_counts()
  if (params.max_batch < 1 || params.max_batch > kMaxBatch) return 3;
  if (params.max_step_tokens < params.max_batch || params.max_step_tokens > kMaxStepTokens) return 4;
  if (params.prefill_chunk_tokens < 1) return 5;
  if (params.max_context < 2 || params.max_pages_per_request < pages_for_tokens(params.max_context)) return 6;
  if (params.num_pages < 1 || params.num_pages > 0xffffff) return 7;  // 24 bits: the terms of kSitePageCount
  if (params.dims.vocab < 1 || params.dims.num_eos_ids > kMaxEosIds) return 8;
  if (params.max_requests_per_queue_pair < 1) return 9;
  return 0;
}

// All lanes. Zeroed state, requests and pages -> ready. A fault is recorded (kSiteDirectorInit) if params or a queue pair's header
// cannot be right: expected 0, seen the number of the condition, or 100 + queue_pair_idx.
BK_INLINE void director_init(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  u32 wrong = wrong_param(params);
  if (wrong == 0) {
    init_request_table(params, lanes, state.table, engine_page(params).header.engine_id);
    init_page_allocator(params, lanes, state.pages);
    for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
      if (!open_queue_pair(params, state.queue_pairs[q], q)) wrong = 100 + q;
    }
    wrong = lanes.max(wrong);
  }
  if (lanes.is_first()) {
    if (wrong != 0) {
      record_fault(params, kFaultIntegrity, kSiteDirectorInit, 0, wrong);
      state.is_stopped = 1;
    }
    state.now_ns = device_clock_ns();
    state.integrity_ns = state.now_ns;
  }
  lanes.sync();  // hazard: the first poll reads the state in other lanes
  publish_status(params, lanes, state);
}

// ---- Poll --------------------------------------------------------------------------------------------------------
// Lane 0. The host's command; kCommandStop ends every request.
BK_INLINE void obey_command(const EngineParams& params, DirectorState& state, u32 command) {
  if (command > kCommandStop || command <= state.command) return;  // a command is not taken back
  state.command = command;
  if (command != kCommandStop) return;
  state.stop_seen_ns = state.now_ns;
  for (u32 q = 0; q < params.num_queue_pairs; ++q) {
    while (state.queue_pairs[q].num_waiting > 0) stop_request(params, state, state.queue_pairs[q].waiting_first_idx, kFinishDraining);
  }
  for (u32 i = state.status.num_running; i-- > 0;) stop_request(params, state, state.running[i], kFinishDraining);
}

// All lanes. Attach, leave, credit, submissions, cancels, the host's command.
BK_INLINE void director_poll(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  if (state.is_stopped) return;
  // Asked for first, needed last. Relaxed: the word carries all there is to know.
  const u32 command = lanes.is_first() ? ld_relaxed_sys(&engine_page(params).control.command) : 0;
  if (lanes.is_first()) state.now_ns = device_clock_ns();
  lanes.sync();  // hazard: every lane ages heartbeats against now_ns
  u32 ready_mask = 0;
  u32 event_mask = 0;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    QueuePairState& queue_pair = state.queue_pairs[q];
    if (look_at_queue_pair(params, queue_pair, state.now_ns)) ready_mask |= 1u << q;
    if (queue_pair.event != kEventNone) event_mask |= 1u << q;
  }
  ready_mask = lanes.sum(ready_mask);
  event_mask = lanes.sum(event_mask);
  lanes.sync();  // hazard: entries and events are used by other lanes from here on
  for (u32 q = 0; q < params.num_queue_pairs && event_mask != 0; ++q) {
    if (event_mask >> q & 1) handle_event(params, lanes, state, q);
  }
  if (lanes.is_first()) {
    obey_command(params, state, command);
    for (u32 q = 0; q < params.num_queue_pairs && state.status.num_finishing > 0; ++q) flush_finishing(params, state, q);
  }
  lanes.sync();  // hazard: the intake reads credit in other lanes
  for (u32 round = 0; round < kMaxTakeRounds && ready_mask != 0; ++round) {
    u32 taken_mask = 0;
    const u32 first = state.next_take_idx;
    for (u32 k = 0; k < params.num_queue_pairs; ++k) {
      const u32 q = (first + k) % params.num_queue_pairs;
      if ((ready_mask >> q & 1) && take_submission(params, lanes, state, q)) taken_mask |= 1u << q;
    }
    ready_mask = 0;
    for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
      QueuePairState& queue_pair = state.queue_pairs[q];
      if ((taken_mask >> q & 1) && fetch_entry(queue_pair, read_commit_word(queue_pair))) ready_mask |= 1u << q;
    }
    ready_mask = lanes.sum(ready_mask);
    lanes.sync();  // hazard: lane 0 judges entries that other lanes fetched
    if (lanes.is_first()) state.next_take_idx = (first + 1) % params.num_queue_pairs;
    lanes.sync();  // hazard: the next round starts from next_take_idx
  }
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) store_positions(state.queue_pairs[q]);
  lanes.sync();  // hazard: lane 0 takes over in the next call
}

// ---- Plan --------------------------------------------------------------------------------------------------------
// Lane 0. M3.
BK_INLINE bool may_exit(const EngineParams& params, const DirectorState& state) {
  if (state.command != kCommandStop || state.num_staged > 0 || state.status.num_running > 0) return false;
  return state.status.num_finishing == 0 || device_clock_ns() - state.stop_seen_ns > params.ingress_timeout_ns;
}

// All lanes. Fills `plan` for the next step and returns its rows; 0 rows: no step is in flight, and with kPlanExit in plan->flags the
// director has stopped and published its last status.
BK_INLINE u32 director_plan(const EngineParams& params, const Lanes& lanes, StepPlan* plan) {
  DirectorState& state = director_state(params);
  if (state.step_in_flight) {
    if (lanes.is_first()) record_fault(params, kFaultIntegrity, kSiteDirectorOrder, 0, 1);
    return 0;
  }
  if (lanes.is_first() && may_exit(params, state)) state.is_stopped = 1;
  lanes.sync();  // hazard: all lanes branch on is_stopped
  StepDraft draft{0, 0, 0, 0};
  if (!state.is_stopped) draft = plan_step(params, lanes, state, plan);
  if (lanes.is_first()) {
    plan->step = state.status.step;
    plan->num_rows = draft.num_rows;
    plan->num_seqs = draft.num_seqs;
    plan->num_sample_rows = draft.num_sample_rows;
    plan->flags = state.is_stopped ? u32{kPlanExit} : 0;
    plan->max_kv_tokens = draft.max_kv_tokens;
    plan->reserved0 = 0;
    state.step_in_flight = draft.num_rows > 0 ? 1 : 0;
    state.plan_ns = device_clock_ns();
    st_relaxed_sys(&state.fault.step, state.status.step);  // relaxed: for reports only
  }
  lanes.sync();  // hazard: the caller hands the plan to the workers
  if (state.is_stopped) publish_status(params, lanes, state);
  const bool is_idle = draft.num_rows == 0 && state.status.num_running == 0 && !state.is_stopped;
  if (is_idle && state.plan_ns - state.integrity_ns > kIntegrityIntervalNs) {
    lanes.sync();  // hazard: lane 0 moves integrity_ns while another lane still compares it
    if (lanes.is_first()) state.integrity_ns = state.plan_ns;
    director_check_integrity(params, lanes);
  }
  return draft.num_rows;
}

// Whether the caller's loop is over: the last plan carried kPlanExit, or a fault was recorded.
BK_INLINE bool director_should_exit(const EngineParams& params, const Lanes&) {
  return director_state(params).is_stopped || fault_recorded(params);
}

// The pause of a loop whose plan had no rows: polling without it would fill PCIe with reads for nothing.
BK_INLINE void director_idle(const EngineParams& params, const Lanes&) { sleep_ns(params.idle_sleep_ns); }

// ---- Commit ------------------------------------------------------------------------------------------------------
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
  bool has_token;
  SampleResult sample;
};

// One lane per sequence: the request's new state.
BK_INLINE SeqResult apply_sample(const EngineParams& params, const PlanSeq& seq) {
  Request* request = request_at(params, seq.request_idx);
  SeqResult result{request->queue_pair_idx, 0, false, {0, 0.0f}};
  request->num_computed = seq.position_begin + seq.num_rows;
  request->step_rows = 0;
  if (request->flags & kFlagDropped) return result;
  if (request->flags & kFlagStopAsked) {  // M2
    request->flags |= kFlagFinished;
    result.num_completions = 1;
    return result;
  }
  if (seq.sample_row == kNoRow) return result;
  result.sample = reinterpret_cast<const SampleResult*>(params.sampled)[seq.sample_row];
  result.has_token = true;
  if (result.sample.token >= params.dims.vocab) {
    record_fault(params, kFaultIntegrity, kSiteSampledToken, params.dims.vocab, result.sample.token);
    result.sample.token = 0;  // the engine stops at the fault; until then no id leads out of the vocabulary
  }
  request_tokens(params, seq.request_idx)[request->num_tokens] = result.sample.token;
  request->num_tokens += 1;
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
BK_INLINE void stage_result(const DirectorState& state, StagedCompletion* staged, const Request& request, const SeqResult& result) {
  if (result.has_token) {
    staged->entry = CompletionEntry{kCompletionToken << kCommitKindShift, result.sample.token, request.request_id,
                                    request.num_tokens - request.num_prompt_tokens - 1, result.sample.logprob, state.now_ns};
    staged->queue_pair_idx = result.queue_pair_idx;
    staged += 1;
  }
  if (request.flags & kFlagFinished) {
    const u32 commit = (kCompletionFinish << kCommitKindShift) | (request.finish_reason << kCommitReasonShift);
    staged->entry = CompletionEntry{commit, request.num_prompt_tokens, request.request_id,
                                    request.num_tokens - request.num_prompt_tokens, 0.0f, state.now_ns};
    staged->queue_pair_idx = result.queue_pair_idx;
  }
}

// Lane 0. A request that just left the running list; its pages are free.
BK_INLINE void end_request(const EngineParams& params, DirectorState& state, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  if (!(request->flags & (kFlagFinished | kFlagDropped))) {  // cancelled while it was not in the step
    finish_detached(params, state, request_idx, request->finish_reason);
    return;
  }
  count_finish(state, (request->flags & kFlagDropped) ? u32{kFinishCancelled} : request->finish_reason);
  if (!(request->flags & kFlagDropped)) forget_request(params, state.table, request_idx);
  free_request(params, state.table, request_idx);
}

// All lanes. Requests that ended leave the running list, which keeps its order; their pages are free in the same step (L2).
BK_INLINE void remove_ended(const EngineParams& params, const Lanes& lanes, DirectorState& state) {
  const u32 num_running = state.status.num_running;
  u32 num_kept = 0;
  u32 num_ended = 0;
  for (u32 begin = 0; begin < num_running; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    const u32 request_idx = i < num_running ? state.running[i] : kNoRequest;
    const bool ends = request_idx != kNoRequest && (request_at(params, request_idx)->flags & (kFlagFinished | kFlagStopAsked | kFlagDropped));
    const bool stays = request_idx != kNoRequest && !ends;
    const u32 kept_rank = num_kept + lanes.exclusive_sum(stays ? 1 : 0);
    const u32 ended_rank = num_ended + lanes.exclusive_sum(ends ? 1 : 0);
    lanes.sync();  // hazard: entries move down over places that other lanes read above
    if (stays) state.running[kept_rank] = request_idx;
    if (ends) state.scratch[ended_rank] = request_idx;
    num_kept += lanes.sum(stays ? 1 : 0);
    num_ended += lanes.sum(ends ? 1 : 0);
  }
  if (lanes.is_first()) state.status.num_running = num_kept;
  lanes.sync();  // hazard: scratch is read by every lane below
  for (u32 k = 0; k < num_ended; ++k) {
    const u32 request_idx = state.scratch[k];
    Request* request = request_at(params, request_idx);
    move_pages_to_stack(params, lanes, state.pages.num_free, request_idx, request->num_pages);
    lanes.sync();  // hazard: lane 0 raises the stack that the others still write above
    if (lanes.is_first()) {
      state.pages.num_free += request->num_pages;
      request->num_pages = 0;
      state.queue_pairs[request->queue_pair_idx].num_running -= 1;
      end_request(params, state, request_idx);
    }
    lanes.sync();  // hazard: the next one's pages go on top
  }
}

// All lanes. After the workers: `plan` is the one that director_plan filled, EngineParams.sampled holds its sampled rows.
BK_INLINE void director_commit(const EngineParams& params, const Lanes& lanes, const StepPlan* plan) {
  DirectorState& state = director_state(params);
  if (!state.step_in_flight) {
    if (lanes.is_first()) record_fault(params, kFaultIntegrity, kSiteDirectorOrder, 1, 0);
    return;
  }
  const u32 num_seqs = plan->num_seqs;
  if (state.num_staged + num_seqs * kStepCredit > kMaxStaged) publish_completions(params, lanes, state);  // the caller never published
  u32 num_staged = state.num_staged;
  u32 staged_mask = 0;  // queue pairs that this step may write to
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) staged_mask |= state.queue_pairs[q].num_promised > 0 ? 1u << q : 0;
  staged_mask = lanes.sum(staged_mask);
  lanes.sync();  // hazard: lane 0 clears num_promised and sets now_ns, others have read them
  if (lanes.is_first()) state.now_ns = device_clock_ns();
  lanes.sync();  // hazard: completions carry now_ns
  u32 num_finished = 0;
  u32 num_outputs = 0;
  u32 num_prompt_rows = 0;
  for (u32 begin = 0; begin < num_seqs; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    SeqResult result{kNoQueuePair, 0, false, {0, 0.0f}};
    const Request* request = nullptr;
    if (i < num_seqs) {
      const PlanSeq seq = plan_seqs(params, plan)[i];
      request = request_at(params, seq.request_idx);
      num_prompt_rows += seq.num_rows == 1 && seq.position_begin >= request->num_prompt_tokens ? 0 : seq.num_rows;
      result = apply_sample(params, seq);
      num_outputs += result.has_token ? 1 : 0;
      num_finished += (request->flags & (kFlagFinished | kFlagDropped)) ? 1 : 0;
    }
    const u32 rank = num_staged + lanes.exclusive_sum(result.num_completions);
    if (request != nullptr) stage_result(state, &state.staged[rank], *request, result);
    num_staged += lanes.sum(result.num_completions);
    for (u32 q = 0; q < params.num_queue_pairs; ++q) {
      if (!(staged_mask >> q & 1)) continue;
      const u32 num_of_q = lanes.sum(result.queue_pair_idx == q ? result.num_completions : 0);
      if (lanes.is_first()) state.queue_pairs[q].num_staged += num_of_q;
    }
  }
  num_finished = lanes.sum(num_finished);
  num_outputs = lanes.sum(num_outputs);
  num_prompt_rows = lanes.sum(num_prompt_rows);
  const u32 num_deferred = state.num_deferred;
  lanes.sync();  // hazard: lane 0 changes below what the others have read
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) state.queue_pairs[q].num_promised = 0;
  if (lanes.is_first()) {
    state.num_staged = num_staged;
    state.num_deferred = 0;
    state.step_in_flight = 0;
    state.status.step += 1;
    state.status.step_ns_last = state.now_ns - state.plan_ns;
    state.status.prompt_tokens += num_prompt_rows;
    state.status.output_tokens += num_outputs;
  }
  lanes.sync();  // hazard: ends use the credit and the staging that lane 0 just set
  if (num_finished + num_deferred > 0) remove_ended(params, lanes, state);
}

// ---- Publish -----------------------------------------------------------------------------------------------------
// All lanes. Completions to the rings, then the status page. Once per loop of the caller: the heartbeat counts it.
BK_INLINE void director_publish(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  publish_completions(params, lanes, state);
  publish_status(params, lanes, state);
}

}  // namespace blinkimp
