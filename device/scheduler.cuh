// Scheduler: which requests are in the next step, with how many rows, on which pages.
//
// Called by director_plan and director_plan_ahead. A steady step (all decode, credit and pages suffice) is planned by all lanes side by
// side; what needs an order (prefill budget, a page shortage, admission) is decided by lane 0. admission.cuh lets in, plan_writer.cuh writes.
// Test: pytest tests/host/test_director_plan.py (step by step against a Python reference), tests/host/test_director_stateful.py
//
// Policy (SCHEDULING.md): decode rows first, in admission order; then prefill chunks of running requests; then admission, by level and
// share. A decode row that needs a page when none is to be had preempts: first requests that stall for credit, youngest first; then those
// of the worst level, youngest first.
//
// Invariants (checked by director_check_integrity or asserted by tests):
//   S1  num_running <= max_batch; rows of a step <= step_tokens, or decode rows only; rows of one request <= prefill_chunk_tokens.
//   S2  a request is in a step only with step_credit() of its queue pair promised to it (C1 counts the promise).
//   S3  a running request has pages for all its tokens, except that a decode row takes its next page when it is planned.
//   S4  of the running requests of the best level, the oldest that has credit is in every step: nobody preempts it but itself, and alone
//       it fits (T2).
//   S5  a queue pair without credit keeps no other from batch places or pages for longer than kStallPatience plans: its running
//       requests are preempted for them. Not at once: a reader that is a step late would lose its KV for it, step after step.
//   S6  a step that preempts for a page admits nobody: what was just preempted would only come back.
//   S7  a plan made ahead, while the step before it runs, preempts nobody and stalls nobody: where pages or credit might not do for all,
//       there is none, and the step is planned after the commit. It has no row of a request that will have ended by then for sure.
#pragma once
#include <admission.cuh>

namespace blinkimp {

BK_INLINE bool needs_page(const Request& request) { return pages_for_tokens(request.num_tokens) > request.num_pages; }

// Will not need a row after the step in flight: stopped, or that step samples its last output. None of these when nothing is in flight.
BK_INLINE bool is_ending(const Request& request) {
  return (request.flags & (kFlagStopAsked | kFlagDropped | kFlagFinished)) != 0 ||
         request.num_tokens - request.num_prompt_tokens >= request.max_tokens;
}

// Lack of credit keeps a running request out of this step.
BK_INLINE void stall(Request* request) {
  request->step_rows = 0;
  request->flags |= kFlagStalled;
  request->num_stalled_plans += 1;
}

// One lane. At a position of its own.
BK_INLINE void trace_stall(const EngineParams& params, const DirectorState& state, u64 pos, const Request& request) {
  if (!is_traced(params)) return;
  write_trace_event(state.trace, pos, state.now_ns, kTraceStalled, request.queue_pair_idx, state.status.step, request.request_id, 0);
}

// ---- Stage 1: credit of decode rows ------------------------------------------------------------------------------
struct RunningCounts {
  u32 num_prefills;
  u32 num_ending;
};

// All lanes. Every running decode request gets step_rows = 1 unless its queue pair's credit ends before it (S2).
// The positions of prefill requests in the running list are in state.scratch, in order.
BK_INLINE RunningCounts promise_decodes(const EngineParams& params, const Lanes& lanes, DirectorState& state) {
  const u32 num_running = state.status.num_running;
  u32 num_prefills = 0;
  u32 num_ending = 0;
  for (u32 begin = 0; begin < num_running; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    bool prefill = false;
    if (i < num_running) {
      Request* request = request_at(params, state.running[i]);
      const bool ends = is_ending(*request);
      prefill = !ends && !is_decode(*request);
      num_ending += ends ? 1 : 0;
      if (!(request->flags & kFlagStalled)) request->num_stalled_plans = 0;
      request->step_rows = prefill || ends ? 0 : 1;
      request->flags &= ~u32{kFlagStalled};
    }
    const u32 rank = num_prefills + lanes.exclusive_sum(prefill ? 1 : 0);
    if (prefill) state.scratch[rank] = i;
    num_prefills += lanes.sum(prefill ? 1 : 0);
  }
  num_ending = lanes.sum(num_ending);
  // A queue pair needs a closer look when its credit may not do for all its requests, or when they are not all decode.
  u32 short_mask = 0;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    QueuePairState& queue_pair = state.queue_pairs[q];
    queue_pair.num_promised = queue_pair.num_promised_now;
    queue_pair.served_tokens += queue_pair.num_running;  // a row each, as a rule; prompts are charged at admission
    const u32 num_needed = queue_pair.num_running * step_credit(queue_pair);
    if (num_needed > 0 && (num_prefills + num_ending > 0 || num_needed > completion_credit(queue_pair))) short_mask |= 1u << q;
    else queue_pair.num_promised += num_needed;
  }
  short_mask = lanes.sum(short_mask);
  lanes.sync();  // hazard: num_promised is read by every lane below
  const u64 trace_pos = state.trace.producer_pos;
  u32 num_stalled = 0;
  for (u32 q = 0; q < params.num_queue_pairs; ++q) {
    if (!(short_mask >> q & 1)) continue;
    const u32 num_affordable = completion_credit(state.queue_pairs[q]) / step_credit(state.queue_pairs[q]);
    u32 num_decodes = 0;
    for (u32 begin = 0; begin < num_running; begin += lanes.count) {
      const u32 i = begin + lanes.id;
      Request* request = i < num_running ? request_at(params, state.running[i]) : nullptr;
      const bool decode = request != nullptr && request->queue_pair_idx == q && request->step_rows == 1;
      const u32 rank = num_decodes + lanes.exclusive_sum(decode ? 1 : 0);
      if (decode && rank >= num_affordable) {
        stall(request);
        trace_stall(params, state, trace_pos + num_stalled + rank - num_affordable, *request);
      }
      num_decodes += lanes.sum(decode ? 1 : 0);
    }
    const u32 num_promised = num_decodes < num_affordable ? num_decodes : num_affordable;
    num_stalled += num_decodes - num_promised;
    lanes.sync();  // hazard: lane 0 changes the credit that the others computed num_affordable from
    if (lanes.is_first()) state.queue_pairs[q].num_promised += num_promised * step_credit(state.queue_pairs[q]);
  }
  lanes.sync();  // hazard: lane 0 moves the position that the others' events count from
  if (lanes.is_first()) {
    state.status.credit_stalls += num_stalled;
    if (is_traced(params)) state.trace.producer_pos += num_stalled;
    state.num_stalled = num_stalled;
  }
  return RunningCounts{num_prefills, num_ending};
}

// ---- Stage 2: chunks of running prefill requests -----------------------------------------------------------------
// Lane 0. Returns the rows planned.
BK_INLINE u32 plan_running_chunks(const EngineParams& params, DirectorState& state, u32 num_prefills, u32 num_rows_left) {
  u32 num_rows = 0;
  for (u32 k = 0; k < num_prefills; ++k) {
    Request* request = request_at(params, state.running[state.scratch[k]]);
    QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
    if (completion_credit(queue_pair) < step_credit(queue_pair)) {
      stall(request);
      trace_request(params, state, *request, kTraceStalled, 0);
      state.status.credit_stalls += 1;
      state.num_stalled += 1;
      continue;
    }
    request->step_rows = chunk_rows(state, *request, num_rows_left - num_rows);
    if (request->step_rows == 0) continue;
    num_rows += request->step_rows;
    queue_pair.num_promised += step_credit(queue_pair);
  }
  return num_rows;
}

// ---- Stage 3: pages of decode rows -------------------------------------------------------------------------------
// Lane 0. The request to preempt: the youngest that stalls, else of those with the worst level at their admission the youngest. Its
// position in the running list.
BK_INLINE u32 choose_victim(const EngineParams& params, const DirectorState& state) {
  u32 victim = kNoRequest;
  u32 worst = 0;
  for (u32 i = state.status.num_running; i-- > 0;) {
    if (state.running[i] == kNoRequest) continue;
    const Request* request = request_at(params, state.running[i]);
    if (request->flags & kFlagStalled) return i;
    if (victim != kNoRequest && request->running_level <= worst) continue;
    victim = i;
    worst = request->running_level;
  }
  return victim;
}

// Lane 0. Pages in admission order, preempting where none is left (S4, S6).
BK_INLINE void take_pages_by_preemption(const EngineParams& params, DirectorState& state) {
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const u32 request_idx = state.running[i];
    if (request_idx == kNoRequest) continue;
    Request* request = request_at(params, request_idx);
    if (request->step_rows != 1 || !is_decode(*request) || !needs_page(*request)) continue;
    while (state.running[i] != kNoRequest && !try_take_page(params, state.pages, request_idx)) {
      preempt_running(params, state, choose_victim(params, state));  // at the latest itself
    }
  }
  compact_running(state);
}

// All lanes. Decode rows of this plan whose step before filled a page: it enters the prefix cache. Its tokens are known, because the one that
// may still be on its way is the first of the next page.
// candidates: [num_candidates] request_idx, among them all that took a page for this plan.
BK_INLINE void register_decode_pages(const EngineParams& params, const Lanes& lanes, DirectorState& state, const u32* candidates,
                                     u32 num_candidates) {
  for (u32 begin = 0; begin < num_candidates; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    const u32 request_idx = i < num_candidates ? candidates[i] : kNoRequest;
    const Request* request = request_idx != kNoRequest ? request_at(params, request_idx) : nullptr;
    // Pages of a prompt were registered with the chunks that fill them.
    const bool filled = request != nullptr && request->step_rows == 1 && is_decode(*request) && request->num_computed % kPageTokens == 0 &&
                        request->num_computed / kPageTokens == request->num_linked_pages + 1 && uses_prefix_cache(state.pages, *request);
    if (lanes.any(filled)) register_decoded(params, lanes, state.pages, state.table.hash_key, filled ? request_idx : kNoRequest);
  }
}

enum DecodePages : u32 {
  kDecodePagesNone = 0,
  kDecodePagesTaken = 1,
  kDecodePagesByPreemption = 2,
};

// All lanes. Who took a page stands in state.scratch, unless pages were short.
BK_INLINE DecodePages take_decode_pages(const EngineParams& params, const Lanes& lanes, DirectorState& state, u32* num_takers) {
  const u32 num_running = state.status.num_running;
  u32 num_needed = 0;
  for (u32 i = lanes.id; i < num_running; i += lanes.count) {
    const Request* request = request_at(params, state.running[i]);
    if (request->step_rows == 1 && is_decode(*request) && needs_page(*request)) num_needed += 1;
  }
  num_needed = lanes.sum(num_needed);
  if (num_needed == 0) return kDecodePagesNone;
  lanes.sync();  // hazard: pages and requests change below while another lane still counts
  if (num_needed > num_available_pages(state.pages)) {
    lanes.sync();  // hazard: lane 0 takes pages while another lane still counts them
    if (lanes.is_first()) take_pages_by_preemption(params, state);
    lanes.sync();  // hazard: the next stage reads the running list
    return kDecodePagesByPreemption;
  }
  if (num_needed > state.pages.num_free) evict_pages(params, lanes, state.pages, num_needed - state.pages.num_free);
  const u32 num_free = state.pages.num_free;
  u32 num_taken = 0;
  for (u32 begin = 0; begin < num_running; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    const u32 request_idx = i < num_running ? state.running[i] : kNoRequest;
    Request* request = request_idx != kNoRequest ? request_at(params, request_idx) : nullptr;
    const bool takes = request != nullptr && request->step_rows == 1 && is_decode(*request) && needs_page(*request);
    const u32 rank = num_taken + lanes.exclusive_sum(takes ? 1 : 0);
    if (takes) {
      move_pages_to_request(params, Lanes{0, 1}, num_free - rank, request_idx, request->num_pages, 1);
      request->num_pages += 1;
      state.scratch[rank] = request_idx;
    }
    num_taken += lanes.sum(takes ? 1 : 0);
  }
  lanes.sync();  // hazard: all lanes read num_free above; pages are registered by other lanes than took them
  if (lanes.is_first()) state.pages.num_free = num_free - num_taken;
  *num_takers = num_taken;
  return kDecodePagesTaken;
}

// ---- The whole ---------------------------------------------------------------------------------------------------
// All lanes. Stages 1 to 4: those that run. Returns whether others may be admitted (S6).
BK_INLINE bool plan_running(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan, u32* num_decode_seqs,
                            StepDraft& draft) {
  if (lanes.is_first()) state.pages.plan_fills_cache = 0;
  const RunningCounts counts = promise_decodes(params, lanes, state);
  const u32 num_prefills = counts.num_prefills;
  if (num_prefills > 0) {
    const u32 num_decodes = state.status.num_running - num_prefills - counts.num_ending;  // at most: stalled ones leave their row unused
    const u32 num_left = state.limits.step_tokens > num_decodes ? state.limits.step_tokens - num_decodes : 0;
    if (lanes.is_first()) plan_running_chunks(params, state, num_prefills, num_left);
    lanes.sync();  // hazard: the next stages read step_rows
  }
  u32 num_takers = 0;
  const DecodePages taken = take_decode_pages(params, lanes, state, &num_takers);
  if (taken != kDecodePagesNone && state.pages.prefix_enabled) {
    const bool is_listed = taken == kDecodePagesTaken;
    register_decode_pages(params, lanes, state, is_listed ? state.scratch : state.running, is_listed ? num_takers : state.status.num_running);
  }
  write_decodes(params, lanes, state, plan, draft);
  *num_decode_seqs = draft.num_seqs;
  if (num_prefills > 0 && lanes.is_first()) write_running_chunks(params, state, plan, draft);
  lanes.sync();  // hazard: admission and the rows read the sequences lane 0 wrote
  draft.num_rows = lanes.broadcast(draft.num_rows, 0);
  draft.num_seqs = lanes.broadcast(draft.num_seqs, 0);
  return taken != kDecodePagesByPreemption;
}

// All lanes. Fills the plan's arrays and counts; 0 rows: nothing can run. `extends`: `draft` is planned already, and what waits and has room
// goes to its end.
BK_INLINE void plan_step(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan, bool extends,
                         StepDraft& draft) {
  keep_lru_room(params, lanes, state.pages);
  u32 first_chunk = draft.num_seqs;
  const bool may_admit = extends || plan_running(params, lanes, state, plan, &first_chunk, draft);
  admit_requests(params, lanes, state, plan, first_chunk, may_admit, draft);
  draft.num_seqs = lanes.broadcast(draft.num_seqs, 0);
  draft.num_sample_rows = lanes.broadcast(draft.num_sample_rows, 0);
  draft.max_kv_tokens = lanes.broadcast(draft.max_kv_tokens, 0);
  write_chunk_rows(params, lanes, plan, first_chunk, draft.num_seqs);
}

}  // namespace blinkimp
