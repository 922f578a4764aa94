// Planning ahead: what is asked before the step after the one in flight is planned, while that one runs.
//
// The plan itself is scheduler.cuh's, over requests that count already what the step in flight computes and samples. Called by
// director_plan_ahead. Test: pytest tests/host/test_director_ahead.py tests/host/test_director_stateful.py
#pragma once
#include <scheduler.cuh>

namespace blinkimp {

// All lanes, one sequence each: the requests of the step in flight count what it computes and samples, as its commit will find them.
// Those that stop without their sample keep their counts: that commit ends them.
BK_INLINE void advance_in_flight(const EngineParams& params, const Lanes& lanes, const StepPlan* plan) {
  for (u32 i = lanes.id; i < plan->num_seqs; i += lanes.count) {
    const PlanSeq seq = plan_seqs(params, plan)[i];
    Request* request = request_at(params, seq.request_idx);
    if (request->flags & (kFlagStopAsked | kFlagDropped | kFlagFinished)) continue;
    request->num_computed = seq.position_begin + seq.num_rows;
    if (seq.sample_row == kNoRow) continue;
    request->num_tokens = request->num_computed + 1;
    request->last_token = kTokenPending | seq.sample_row;
  }
}

// All lanes. S7: credit for all that run, in both steps, and pages for all rows. Changes nothing.
BK_INLINE bool can_plan_ahead(const EngineParams& params, const Lanes& lanes, const DirectorState& state) {
  bool is_short = false;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    const QueuePairState& queue_pair = state.queue_pairs[q];
    if (queue_pair.num_running * step_credit(queue_pair) > completion_credit(queue_pair)) is_short = true;
  }
  u32 num_needed = 0;
  for (u32 i = lanes.id; i < state.status.num_running; i += lanes.count) {
    const Request* request = request_at(params, state.running[i]);
    if (!is_ending(*request) && is_decode(*request) && needs_page(*request)) num_needed += 1;
  }
  num_needed = lanes.sum(num_needed);
  return !lanes.any(is_short) && num_needed <= num_available_pages(state.pages);
}

// All lanes. Whether somebody waits whom the commit of the step in flight, and nothing sooner, can give room: then the plan is better
// published after it. Requests that end without their row here leave places, pages or credit behind.
BK_INLINE bool commit_makes_room(const EngineParams& params, const Lanes& lanes, const DirectorState& state, const StepDraft& draft) {
  if (state.status.num_waiting == 0 || draft.num_rows >= state.limits.step_tokens) return false;
  bool found = false;
  for (u32 i = lanes.id; i < state.status.num_running; i += lanes.count) {
    const Request* request = request_at(params, state.running[i]);
    found |= is_ending(*request) && request->step_rows == 0;
  }
  return lanes.any(found);
}

}  // namespace blinkimp
