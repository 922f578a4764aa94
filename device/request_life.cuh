// How requests change state: queues, finish, cancel, preempt. Each function runs in lane 0.
//
// Called by intake.cuh (accept, cancel), scheduler.cuh (preempt), director_port.cuh (an ingress that left), director.cuh (commit).
// Test: pytest tests/host/test_director_requests.py
//
// Invariants (checked by director_check_integrity, cited by tests):
//   L1  accepted == finished (all reasons) + waiting + running. Each accepted request is finished once, with one FINISH, unless its
//       ingress left.
//   L2  pages of a request are free as soon as it stops running; a FINISH that waits for credit holds none.
//   L3  while a step is in flight or planned no running request loses its pages: its end is deferred to a commit, and if the next step
//       has it as a row, to that one's.
#pragma once
#include <waiting.cuh>

namespace blinkimp {

// Lane 0. An event of a request, now.
BK_INLINE void trace_request(const EngineParams& params, DirectorState& state, const Request& request, u32 kind, u64 argument) {
  trace_event(params, state.trace, state.now_ns, kind, request.queue_pair_idx, state.status.step, request.request_id, argument);
}

// ---- Running list ------------------------------------------------------------------------------------------------
// Order stays: it is the order of admission. The caller takes care of the pages.
BK_INLINE void remove_running(const EngineParams& params, DirectorState& state, u32 request_idx) {
  u32 num_kept = 0;
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const u32 kept_idx = state.running[i];
    if (kept_idx != request_idx) state.running[num_kept++] = kept_idx;
  }
  state.status.num_running = num_kept;
  state.queue_pairs[request_at(params, request_idx)->queue_pair_idx].num_running -= 1;
}

// ---- The end of a request ----------------------------------------------------------------------------------------
BK_INLINE void count_finish(DirectorState& state, u32 reason) {
  StatusLines& status = state.status;
  if (reason == kFinishEos) status.finished_eos += 1;
  else if (reason == kFinishStopId) status.finished_stop_id += 1;
  else if (reason == kFinishLength) status.finished_length += 1;
  else if (reason == kFinishDraining) status.finished_draining += 1;
  else if (reason == kFinishTimeout) status.finished_timeout += 1;
  else if (reason == kFinishConstraint) status.finished_constraint += 1;
  else status.finished_cancelled += 1;
}

BK_INLINE void stage_finish(DirectorState& state, const Request& request) {
  stage_completion(state, request.queue_pair_idx, kCompletionFinish, request.finish_reason, request.num_prompt_tokens,
                   request.request_id, request.num_tokens - request.num_prompt_tokens, state.now_ns);
  state.staged[state.num_staged - 1].entry.logprob = static_cast<f32>(request.num_cached_tokens);
}

// A request that is in no list and holds no pages any more: FINISH now, or in the finishing queue until there is credit.
BK_INLINE void finish_detached(const EngineParams& params, DirectorState& state, u32 request_idx, u32 reason) {
  Request* request = request_at(params, request_idx);
  request->finish_reason = reason;
  count_finish(state, reason);
  trace_request(params, state, *request, kTraceFinished, pack_argument(reason, request->num_tokens - request->num_prompt_tokens));
  // Not past an earlier FINISH of the queue pair that still waits: credit goes to the oldest.
  QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
  if (queue_pair.num_finishing == 0 && can_stage(state, request->queue_pair_idx)) {
    stage_finish(state, *request);
    forget_request(params, state.table, request_idx);
    free_request(params, state.table, request_idx);
    return;
  }
  request->state = kRequestFinishing;
  request->flags = 0;
  request->step_rows = 0;
  request->next_idx = kNoRequest;
  if (queue_pair.num_finishing == 0) queue_pair.finishing_first_idx = request_idx;
  else request_at(params, queue_pair.finishing_last_idx)->next_idx = request_idx;
  queue_pair.finishing_last_idx = request_idx;
  queue_pair.num_finishing += 1;
  state.status.num_finishing += 1;
}

// Stages the FINISH entries that have waited for credit, oldest first.
BK_INLINE void flush_finishing(const EngineParams& params, DirectorState& state, u32 queue_pair_idx) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  while (queue_pair.num_finishing > 0 && can_stage(state, queue_pair_idx)) {
    const u32 request_idx = queue_pair.finishing_first_idx;
    queue_pair.finishing_first_idx = request_at(params, request_idx)->next_idx;
    queue_pair.num_finishing -= 1;
    state.status.num_finishing -= 1;
    stage_finish(state, *request_at(params, request_idx));
    forget_request(params, state.table, request_idx);
    free_request(params, state.table, request_idx);
  }
}

// Ends a live request before its time: CANCEL, or kCommandStop. Whatever its state.
BK_INLINE void stop_request(const EngineParams& params, DirectorState& state, u32 request_idx, u32 reason) {
  Request* request = request_at(params, request_idx);
  if (request->state == kRequestWaiting) {
    remove_waiting(params, state, request_idx);
    finish_detached(params, state, request_idx, reason);
  } else if (request->state == kRequestRunning && pages_are_planned(state)) {  // L3
    if (request->flags & (kFlagStopAsked | kFlagDropped | kFlagFinished)) return;
    request->flags |= kFlagStopAsked;
    request->finish_reason = reason;
    state.num_deferred += 1;
  } else if (request->state == kRequestRunning) {
    remove_running(params, state, request_idx);
    release_pages(params, state.pages, request_idx);
    finish_detached(params, state, request_idx, reason);
  }  // kRequestFinishing: it has ended already, its FINISH is on the way
}

// ---- An ingress that left ----------------------------------------------------------------------------------------
// Ends all requests of a queue pair without a word to the ring; what was staged for it is dropped.
BK_INLINE void drop_requests(const EngineParams& params, DirectorState& state, u32 queue_pair_idx) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  while (queue_pair.num_waiting > 0) {
    const u32 request_idx = first_waiting(state, queue_pair_idx);
    remove_waiting(params, state, request_idx);
    trace_request(params, state, *request_at(params, request_idx), kTraceFinished, kFinishCancelled);
    count_finish(state, kFinishCancelled);
    forget_request(params, state.table, request_idx);
    free_request(params, state.table, request_idx);
  }
  while (queue_pair.num_finishing > 0) {
    const u32 request_idx = queue_pair.finishing_first_idx;
    queue_pair.finishing_first_idx = request_at(params, request_idx)->next_idx;
    queue_pair.num_finishing -= 1;
    state.status.num_finishing -= 1;
    forget_request(params, state.table, request_idx);
    free_request(params, state.table, request_idx);
  }
  u32 num_kept = 0;
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const u32 request_idx = state.running[i];
    Request* request = request_at(params, request_idx);
    const bool drop_it = request->queue_pair_idx == queue_pair_idx && !(request->flags & (kFlagDropped | kFlagFinished));
    if (drop_it) {
      forget_request(params, state.table, request_idx);
      trace_request(params, state, *request, kTraceFinished, pack_argument(kFinishCancelled, request->num_tokens - request->num_prompt_tokens));
    }
    if (drop_it && pages_are_planned(state)) {  // L3
      if (!(request->flags & kFlagStopAsked)) state.num_deferred += 1;
      request->flags |= kFlagDropped;
    } else if (drop_it) {
      release_pages(params, state.pages, request_idx);
      count_finish(state, kFinishCancelled);
      free_request(params, state.table, request_idx);
      queue_pair.num_running -= 1;
      continue;
    }
    state.running[num_kept++] = request_idx;
  }
  state.status.num_running = num_kept;
  for (u32 i = 0; i < state.num_staged; ++i) {
    if (state.staged[i].queue_pair_idx == queue_pair_idx) state.staged[i].queue_pair_idx = kNoQueuePair;
  }
  queue_pair.num_staged = 0;
  queue_pair.num_promised = 0;  // dropped requests publish nothing, so nothing is owed to the step in flight
  queue_pair.num_promised_now = 0;
}

// ---- Preemption --------------------------------------------------------------------------------------------------
// Frees the pages of running[running_idx] and sends it to the front of its queue; its KV is computed again from its tokens. The entry
// of the running list becomes kNoRequest; compact_running() closes the gap.
BK_INLINE void preempt_running(const EngineParams& params, DirectorState& state, u32 running_idx) {
  const u32 request_idx = state.running[running_idx];
  Request* request = request_at(params, request_idx);
  QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
  if (request->step_rows > 0) queue_pair.num_promised -= step_credit(queue_pair);
  trace_request(params, state, *request, kTracePreempted, request->num_tokens);
  release_pages(params, state.pages, request_idx);
  request->num_computed = 0;
  request->step_rows = 0;
  request->flags &= ~kFlagStalled;
  request->num_preemptions += 1;
  queue_pair.num_running -= 1;
  push_waiting(params, state, request_idx, true);
  state.running[running_idx] = kNoRequest;
  state.status.preemptions += 1;
}

BK_INLINE void compact_running(DirectorState& state) {
  u32 num_kept = 0;
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const u32 request_idx = state.running[i];
    if (request_idx != kNoRequest) state.running[num_kept++] = request_idx;
  }
  state.status.num_running = num_kept;
}

}  // namespace blinkimp
