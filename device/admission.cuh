// Admission: who of those that wait enters the next step, on which pages of the prefix cache and which new ones.
//
// Called by scheduler.cuh for the end of a plan. SCHEDULING.md says why it chooses as it does.
// Test: pytest tests/host/test_director_plan.py tests/host/test_director_pages.py tests/host/test_prefix_cache.py
#pragma once
#include <count_slots.cuh>
#include <plan_writer.cuh>
#include <prefix_cache.cuh>
#include <request_life.cuh>
#include <step_cost.cuh>

namespace blinkimp {

constexpr u32 kStallPatience = 16;  // plans

BK_INLINE bool must_give_way(const Request& request) {  // S5
  return (request.flags & kFlagStalled) && request.num_stalled_plans >= kStallPatience;
}

// ---- Room --------------------------------------------------------------------------------------------------------
// Pages that stay free for the next decode rows while others run.
BK_INLINE u32 watermark_pages(const EngineParams& params, const DirectorState& state) {
  return state.status.num_running > 0 ? 1 + params.num_pages / 128 : 0;
}

enum Room : u32 {
  kRoomNone = 0,
  kRoomEnough = 1,
  kRoomChanged = 2,  // somebody gave way: look again
};

// Lane 0. Looks for a batch place and num_needed pages beside num_pinned ones of the cache, which the request takes as they are. Only
// requests that have stalled for long give way (S5), one for each look, because the pages of one may be those that the newcomer shares;
// and only if it can be enough.
BK_INLINE u32 make_room(const EngineParams& params, DirectorState& state, u32 num_needed, u32 num_pinned) {
  const bool has_place = state.status.num_running < state.limits.max_running;
  const u32 num_available = num_available_pages(state.pages) - num_pinned;
  if (has_place && num_available >= num_needed + watermark_pages(params, state)) return kRoomEnough;
  u32 num_stalled = 0;
  u32 num_stalled_pages = 0;
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const Request* request = request_at(params, state.running[i]);
    if (!must_give_way(*request)) continue;
    num_stalled += 1;
    num_stalled_pages += request->num_pages;
  }
  if (num_stalled == 0) return kRoomNone;
  const u32 num_kept = num_stalled < state.status.num_running ? watermark_pages(params, state) : 0;
  if (num_available + num_stalled_pages < num_needed + num_kept) return kRoomNone;
  u32 youngest = state.status.num_running - 1;
  while (!must_give_way(*request_at(params, state.running[youngest]))) youngest -= 1;
  preempt_running(params, state, youngest);
  compact_running(state);
  return kRoomChanged;
}

// All lanes. The chunk of a sequence fills pages: they enter the prefix cache before it runs, for requests of this plan and later ones.
BK_INLINE void register_seq(const EngineParams& params, const Lanes& lanes, DirectorState& state, const PlanSeq& seq) {
  if (!uses_prefix_cache(state.pages, *request_at(params, seq.request_idx))) return;
  register_chunk(params, lanes, state.pages, seq.request_idx, seq.position_begin / kPageTokens,
                 (seq.position_begin + seq.num_rows) / kPageTokens);
}

constexpr u32 kStartCredit = 64;  // completions that a queue pair has left over where a START is said

// Lane 0. The request has its pages: from the waiting queue to the batch and the plan.
BK_INLINE void admit_request(const EngineParams& params, DirectorState& state, u32 request_idx, u32 level, StepPlan* plan,
                             StepDraft& draft) {
  Request* request = request_at(params, request_idx);
  QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
  remove_waiting(params, state, request_idx);
  request->state = kRequestRunning;
  request->running_level = level;
  charge_admission(params, state, request->queue_pair_idx, request->num_tokens - request->num_computed);
  request->step_rows = chunk_rows(state, *request, state.limits.step_tokens - draft.num_rows);
  if (request->num_preemptions == 0 && uses_prefix_cache(state.pages, *request)) {
    request->num_cached_tokens = request->num_computed;
    state.status.prefix_query_tokens += request->num_prompt_tokens;
    state.status.prefix_hit_tokens += request->num_computed;
  }
  trace_request(params, state, *request, kTraceAdmitted, pack_argument(request->num_computed, request->num_pages));
  state.running[state.status.num_running] = request_idx;
  state.status.num_running += 1;
  queue_pair.num_running += 1;
  queue_pair.num_promised += step_credit(queue_pair);
  // No credit is kept for it, and none is taken that a step could need: an ingress that lags does without.
  const bool has_room = can_stage(state, request->queue_pair_idx) && completion_credit(queue_pair) > kStartCredit;
  if (request->num_preemptions == 0 && has_room) {
    stage_completion(state, request->queue_pair_idx, kCompletionStart, 0, 0, request->request_id, request->num_cached_tokens, state.now_ns);
  }
  // Pages of the cache that it has found may be those that chunks of this plan fill (F2).
  write_chunk(params, plan, request_idx, request->num_computed > 0 && state.pages.plan_fills_cache, draft);
}

// All lanes. The plan's last chunk, from first_new on, leaves to the next step the rows that this one does better without.
BK_INLINE void cut_last_chunk(const EngineParams& params, const Lanes& lanes, StepPlan* plan, u32 first_new, StepDraft& draft) {
  if (params.cost_rows == 0 || first_new == draft.num_seqs) return;
  const u32 num_rows = rows_to_defer(params, lanes, draft.num_rows, draft.num_seqs, plan_seqs(params, plan)[draft.num_seqs - 1].num_rows);
  lanes.sync();  // hazard: lane 0 changes the sequence that the others have read
  if (lanes.is_first() && num_rows != 0) shorten_last_chunk(params, plan, num_rows, draft);
  lanes.sync();  // hazard: the other lanes read the sequence
  draft.num_rows = lanes.broadcast(draft.num_rows, 0);
}

// All lanes. Admits while there are rows, places, pages and credit; appends the chunks to the plan. Sequences from first_new on are chunks
// whose pages the cache does not know yet.
BK_INLINE void admit_requests(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan, u32 first_new,
                              bool may_admit, StepDraft& draft) {
  u32 seq_idx = first_new;
  for (;;) {
    if (!may_admit || draft.num_rows >= state.limits.step_tokens || state.status.num_waiting == 0) break;
    if (state.status.num_running >= state.limits.max_running && state.num_stalled == 0) break;  // nobody could give way
    const WaitingHead head = choose_waiting(params, lanes, state);
    const u32 request_idx = head.request_idx;
    if (request_idx == kNoRequest) break;
    for (; seq_idx < draft.num_seqs; ++seq_idx) register_seq(params, lanes, state, plan_seqs(params, plan)[seq_idx]);  // this one may find them
    Request* request = request_at(params, request_idx);
    PrefixMatch match{0, 0};
    if (uses_prefix_cache(state.pages, *request)) {
      hash_request(params, lanes, state.table.hash_key, request_idx);
      match = find_prefix(params, lanes, state.pages, request_idx);
    }
    const u32 num_needed = pages_for_tokens(request->num_tokens) - match.num_pages;
    lanes.sync();  // hazard: a preemption changes lists and pages that other lanes still look at
    u32 room = kRoomNone;
    if (lanes.is_first()) room = make_room(params, state, num_needed, match.num_unreferenced);
    lanes.sync();  // hazard: the other lanes read the lists that a preemption changed
    room = lanes.broadcast(room, 0);
    if (room == kRoomNone) break;
    if (room == kRoomChanged) continue;
    assign_count_slot(params, lanes, state, request_idx);
    take_prefix(params, lanes, state.pages, request_idx, match);
    if (num_needed > state.pages.num_free) evict_pages(params, lanes, state.pages, num_needed - state.pages.num_free);
    move_pages_to_request(params, lanes, state.pages.num_free, request_idx, match.num_pages, num_needed);
    lanes.sync();  // hazard: lane 0 lowers the stack that the others still copy from
    if (lanes.is_first()) {
      state.pages.num_free -= num_needed;
      request->num_pages = match.num_pages + num_needed;
      admit_request(params, state, request_idx, head.level, plan, draft);
    }
    lanes.sync();  // hazard: the next round copies from the stack that lane 0 lowered; the sequence is read below
    draft.num_rows = lanes.broadcast(draft.num_rows, 0);
    draft.num_seqs = lanes.broadcast(draft.num_seqs, 0);
  }
  cut_last_chunk(params, lanes, plan, seq_idx, draft);
  for (; seq_idx < draft.num_seqs; ++seq_idx) register_seq(params, lanes, state, plan_seqs(params, plan)[seq_idx]);
}

}  // namespace blinkimp
