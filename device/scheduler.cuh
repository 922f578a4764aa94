// Scheduler: which requests are in the next step, with how many rows, on which pages.
//
// Called by director_plan and director_plan_ahead. A steady step (all decode, credit and pages suffice) is planned by all lanes side by side; what needs an
// order (prefill budget, a page shortage, admission) is decided by lane 0.
// Test: pytest tests/host/test_director_plan.py (step by step against a Python reference), tests/host/test_director_stateful.py
//
// Policy: decode rows first, in admission order; then prefill chunks of running requests; then admission, first come first served
// per queue pair and round robin between queue pairs. A decode row that needs a page when none is free preempts: first requests that
// stall for credit, youngest first; then the youngest.
//
// Invariants (checked by director_check_integrity or asserted by tests):
//   S1  num_running <= max_batch; rows of a step <= max_step_tokens; rows of one request <= prefill_chunk_tokens.
//   S2  a request is in a step only with kStepCredit promised to it (C1 counts the promise).
//   S3  a running request has pages for all its tokens, except that a decode row takes its next page when it is planned.
//   S4  the oldest running request that has credit is in every step: nobody preempts it but itself, and alone it fits (T2).
//   S5  a queue pair without credit keeps no other from batch places or pages for longer than kStallPatience plans: its running
//       requests are preempted for them. Not at once: a reader that is a step late would lose its KV for it, step after step.
//   S6  a step that preempts for a page admits nobody: what was just preempted would only come back.
//   S7  a plan made ahead, while the step before it runs, preempts nobody and stalls nobody: where pages or credit might not do for all,
//       there is none, and the step is planned after the commit. It has no row of a request that will have ended by then for sure.
#pragma once
#include <director_state.cuh>
#include <request_life.cuh>

namespace blinkimp {

constexpr u32 kStallPatience = 16;  // plans

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

BK_INLINE bool must_give_way(const Request& request) {  // S5
  return (request.flags & kFlagStalled) && request.num_stalled_plans >= kStallPatience;
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
    const u32 num_needed = queue_pair.num_running * kStepCredit;
    if (num_needed > 0 && (num_prefills + num_ending > 0 || num_needed > completion_credit(queue_pair))) short_mask |= 1u << q;
    else queue_pair.num_promised += num_needed;
  }
  short_mask = lanes.sum(short_mask);
  lanes.sync();  // hazard: num_promised is read by every lane below
  u32 num_stalled = 0;
  for (u32 q = 0; q < params.num_queue_pairs; ++q) {
    if (!(short_mask >> q & 1)) continue;
    const u32 num_affordable = completion_credit(state.queue_pairs[q]) / kStepCredit;
    u32 num_decodes = 0;
    for (u32 begin = 0; begin < num_running; begin += lanes.count) {
      const u32 i = begin + lanes.id;
      Request* request = i < num_running ? request_at(params, state.running[i]) : nullptr;
      const bool decode = request != nullptr && request->queue_pair_idx == q && request->step_rows == 1;
      const u32 rank = num_decodes + lanes.exclusive_sum(decode ? 1 : 0);
      if (decode && rank >= num_affordable) stall(request);
      num_decodes += lanes.sum(decode ? 1 : 0);
    }
    const u32 num_promised = num_decodes < num_affordable ? num_decodes : num_affordable;
    num_stalled += num_decodes - num_promised;
    lanes.sync();  // hazard: lane 0 changes the credit that the others computed num_affordable from
    if (lanes.is_first()) state.queue_pairs[q].num_promised += num_promised * kStepCredit;
  }
  if (lanes.is_first()) state.status.credit_stalls += num_stalled;
  return RunningCounts{num_prefills, num_ending};
}

// ---- Stage 2: chunks of running prefill requests -----------------------------------------------------------------
BK_INLINE u32 chunk_rows(const EngineParams& params, const Request& request, u32 num_rows_left) {
  u32 num_rows = request.num_tokens - request.num_computed;
  if (num_rows > params.prefill_chunk_tokens) num_rows = params.prefill_chunk_tokens;
  return num_rows < num_rows_left ? num_rows : num_rows_left;
}

// Lane 0. Returns the rows planned.
BK_INLINE u32 plan_running_chunks(const EngineParams& params, DirectorState& state, u32 num_prefills, u32 num_rows_left) {
  u32 num_rows = 0;
  for (u32 k = 0; k < num_prefills; ++k) {
    Request* request = request_at(params, state.running[state.scratch[k]]);
    QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
    if (completion_credit(queue_pair) < kStepCredit) {
      stall(request);
      state.status.credit_stalls += 1;
      continue;
    }
    request->step_rows = chunk_rows(params, *request, num_rows_left - num_rows);
    if (request->step_rows == 0) continue;
    num_rows += request->step_rows;
    queue_pair.num_promised += kStepCredit;
  }
  return num_rows;
}

// ---- Stage 3: pages of decode rows -------------------------------------------------------------------------------
// Lane 0. The request to preempt: the youngest that stalls, else the youngest. Its position in the running list.
BK_INLINE u32 choose_victim(const EngineParams& params, const DirectorState& state) {
  u32 youngest = kNoRequest;
  for (u32 i = state.status.num_running; i-- > 0;) {
    if (state.running[i] == kNoRequest) continue;
    if (request_at(params, state.running[i])->flags & kFlagStalled) return i;
    if (youngest == kNoRequest) youngest = i;
  }
  return youngest;
}

// Lane 0. Pages in admission order, preempting where none is left (S4, S6).
BK_INLINE void take_pages_by_preemption(const EngineParams& params, DirectorState& state) {
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const u32 request_idx = state.running[i];
    if (request_idx == kNoRequest) continue;
    Request* request = request_at(params, request_idx);
    if (request->step_rows != 1 || !is_decode(*request) || !needs_page(*request)) continue;
    while (state.running[i] != kNoRequest && !try_take_pages(params, state.pages, request_idx, 1)) {
      preempt_running(params, state, choose_victim(params, state));  // at the latest itself
    }
  }
  compact_running(state);
}

// All lanes. Returns true when requests were preempted.
BK_INLINE bool take_decode_pages(const EngineParams& params, const Lanes& lanes, DirectorState& state) {
  const u32 num_running = state.status.num_running;
  const u32 num_free = state.pages.num_free;
  u32 num_needed = 0;
  for (u32 i = lanes.id; i < num_running; i += lanes.count) {
    const Request* request = request_at(params, state.running[i]);
    if (request->step_rows == 1 && is_decode(*request) && needs_page(*request)) num_needed += 1;
  }
  num_needed = lanes.sum(num_needed);
  if (num_needed == 0) return false;
  lanes.sync();  // hazard: pages and requests change below while another lane still counts
  if (num_needed > num_free) {
    if (lanes.is_first()) take_pages_by_preemption(params, state);
    lanes.sync();  // hazard: the next stage reads the running list
    return true;
  }
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
    }
    num_taken += lanes.sum(takes ? 1 : 0);
  }
  if (lanes.is_first()) state.pages.num_free = num_free - num_taken;
  return false;
}

// ---- Stage 4: write the plan's sequences -------------------------------------------------------------------------
BK_INLINE void write_seq(const EngineParams& params, StepPlan* plan, u32 seq_idx, u32 request_idx, const Request& request, u32 row_begin,
                         u32 sample_row) {
  PlanSeq* seq = &plan_seqs(params, plan)[seq_idx];
  seq->request_idx = request_idx;
  seq->row_begin = row_begin;
  seq->num_rows = request.step_rows;
  seq->position_begin = request.num_computed;
  seq->sample_row = sample_row;
  seq->output_idx = request.num_tokens - request.num_prompt_tokens;
  seq->reserved0 = 0;
  seq->reserved1 = 0;
  if (sample_row != kNoRow) plan_sampled_rows(params, plan)[sample_row] = row_begin + request.step_rows - 1;
}

// All lanes. Decode rows: sequence, row and sampled row have the same index.
BK_INLINE void write_decodes(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan, StepDraft& draft) {
  const u32 num_running = state.status.num_running;
  u32 num_written = 0;
  u32 longest = 0;
  for (u32 begin = 0; begin < num_running; begin += lanes.count) {
    const u32 i = begin + lanes.id;
    const u32 request_idx = i < num_running ? state.running[i] : kNoRequest;
    Request* request = request_idx != kNoRequest ? request_at(params, request_idx) : nullptr;
    const bool is_in = request != nullptr && request->step_rows == 1 && is_decode(*request);
    const u32 rank = num_written + lanes.exclusive_sum(is_in ? 1 : 0);
    if (is_in) {
      write_seq(params, plan, rank, request_idx, *request, rank, rank);
      plan_rows(params, plan)[rank] = PlanRow{request->last_token, request->num_computed, rank, rank};
      longest = request->num_tokens > longest ? request->num_tokens : longest;
    }
    num_written += lanes.sum(is_in ? 1 : 0);
  }
  draft = StepDraft{num_written, num_written, num_written, lanes.max(longest)};
}

// Lane 0. A prefill chunk; its rows are filled in later by all lanes.
BK_INLINE void write_chunk(const EngineParams& params, StepPlan* plan, u32 request_idx, StepDraft& draft) {
  const Request* request = request_at(params, request_idx);
  const u32 end = request->num_computed + request->step_rows;
  const bool samples = end == request->num_tokens;
  write_seq(params, plan, draft.num_seqs, request_idx, *request, draft.num_rows, samples ? draft.num_sample_rows : kNoRow);
  draft.num_seqs += 1;
  draft.num_rows += request->step_rows;
  draft.num_sample_rows += samples ? 1 : 0;
  draft.max_kv_tokens = end > draft.max_kv_tokens ? end : draft.max_kv_tokens;
}

// Lane 0. Chunks of running requests, in admission order.
BK_INLINE void write_running_chunks(const EngineParams& params, const DirectorState& state, StepPlan* plan, StepDraft& draft) {
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const Request* request = request_at(params, state.running[i]);
    if (request->step_rows > 0 && !is_decode(*request)) write_chunk(params, plan, state.running[i], draft);
  }
}

// ---- Stage 5: admission ------------------------------------------------------------------------------------------
// Pages that stay free for the next decode rows while others run.
BK_INLINE u32 watermark_pages(const EngineParams& params, const DirectorState& state) {
  return state.status.num_running > 0 ? 1 + params.num_pages / 128 : 0;
}

// Lane 0. Makes room for a request of num_needed pages: a batch place and free pages. Only requests that have stalled for long give way
// (S5), and only if that is enough.
BK_INLINE bool make_room(const EngineParams& params, DirectorState& state, u32 num_needed) {
  const bool has_place = state.status.num_running < params.max_batch;
  if (has_place && state.pages.num_free >= num_needed + watermark_pages(params, state)) return true;
  u32 num_stalled = 0;
  u32 num_stalled_pages = 0;
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const Request* request = request_at(params, state.running[i]);
    if (!must_give_way(*request)) continue;
    num_stalled += 1;
    num_stalled_pages += request->num_pages;
  }
  if (num_stalled == 0) return false;
  const u32 num_kept = num_stalled < state.status.num_running ? watermark_pages(params, state) : 0;
  if (state.pages.num_free + num_stalled_pages < num_needed + num_kept) return false;
  bool is_enough = false;
  for (u32 i = state.status.num_running; i-- > 0 && !is_enough;) {
    if (!must_give_way(*request_at(params, state.running[i]))) continue;
    preempt_running(params, state, i);
    num_stalled -= 1;
    is_enough = state.pages.num_free >= num_needed + watermark_pages(params, state) || num_stalled == 0;
  }
  compact_running(state);
  return true;
}

// Lane 0. The request to admit, or kNoRequest. A head of queue that must wait for pages keeps its turn: small requests behind it and
// those of other queue pairs do not pass it for ever.
BK_INLINE u32 choose_admission(const EngineParams& params, DirectorState& state) {
  for (u32 k = 0; k < params.num_queue_pairs; ++k) {
    const u32 q = (state.next_admit_idx + k) % params.num_queue_pairs;
    const QueuePairState& queue_pair = state.queue_pairs[q];
    if (queue_pair.num_waiting == 0 || completion_credit(queue_pair) < kStepCredit) continue;
    const u32 request_idx = queue_pair.waiting_first_idx;
    state.next_admit_idx = q;
    if (!make_room(params, state, pages_for_tokens(request_at(params, request_idx)->num_tokens))) return kNoRequest;
    state.next_admit_idx = (q + 1) % params.num_queue_pairs;
    return request_idx;
  }
  return kNoRequest;
}

// All lanes. Admits while there are rows, places, pages and credit; appends the chunks to the plan.
BK_INLINE void admit_requests(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan, StepDraft& draft) {
  while (draft.num_rows < params.max_step_tokens) {
    u32 request_idx = kNoRequest;
    if (lanes.is_first() && state.status.num_waiting > 0) request_idx = choose_admission(params, state);
    lanes.sync();  // hazard: the other lanes read the free stack that a preemption changed
    request_idx = lanes.broadcast(request_idx, 0);
    if (request_idx == kNoRequest) break;
    Request* request = request_at(params, request_idx);
    const u32 num_needed = pages_for_tokens(request->num_tokens);
    move_pages_to_request(params, lanes, state.pages.num_free, request_idx, 0, num_needed);
    lanes.sync();  // hazard: lane 0 lowers the stack that the others still copy from
    if (lanes.is_first()) {
      remove_waiting(params, state, request_idx);
      state.pages.num_free -= num_needed;
      request->num_pages = num_needed;
      request->state = kRequestRunning;
      request->step_rows = chunk_rows(params, *request, params.max_step_tokens - draft.num_rows);
      state.running[state.status.num_running] = request_idx;
      state.status.num_running += 1;
      QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
      queue_pair.num_running += 1;
      queue_pair.num_promised += kStepCredit;
      write_chunk(params, plan, request_idx, draft);
    }
    lanes.sync();  // hazard: the next round copies from the stack that lane 0 lowered
    draft.num_rows = lanes.broadcast(draft.num_rows, 0);
  }
}

// ---- Stage 6: rows of the chunks ---------------------------------------------------------------------------------
// All lanes. Sequences [first_seq, num_seqs) are chunks.
BK_INLINE void write_chunk_rows(const EngineParams& params, const Lanes& lanes, StepPlan* plan, u32 first_seq, u32 num_seqs) {
  for (u32 seq_idx = first_seq; seq_idx < num_seqs; ++seq_idx) {
    const PlanSeq seq = plan_seqs(params, plan)[seq_idx];
    const u32* tokens = request_tokens(params, seq.request_idx) + seq.position_begin;
    for (u32 i = lanes.id; i < seq.num_rows; i += lanes.count) {
      const u32 sample_row = i + 1 == seq.num_rows ? seq.sample_row : kNoRow;
      plan_rows(params, plan)[seq.row_begin + i] = PlanRow{tokens[i], seq.position_begin + i, seq_idx, sample_row};
    }
  }
}

// ---- The whole ---------------------------------------------------------------------------------------------------
// All lanes. Stages 5 and 6: what waits and has room goes to the end of the plan; rows of the sequences from first_chunk on.
BK_INLINE void extend_plan(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan, u32 first_chunk,
                           bool may_admit, StepDraft& draft) {
  if (may_admit) admit_requests(params, lanes, state, plan, draft);
  draft.num_seqs = lanes.broadcast(draft.num_seqs, 0);
  draft.num_sample_rows = lanes.broadcast(draft.num_sample_rows, 0);
  draft.max_kv_tokens = lanes.broadcast(draft.max_kv_tokens, 0);
  write_chunk_rows(params, lanes, plan, first_chunk, draft.num_seqs);
}

// All lanes. Fills the plan's arrays and counts; 0 rows: nothing can run.
BK_INLINE StepDraft plan_step(const EngineParams& params, const Lanes& lanes, DirectorState& state, StepPlan* plan) {
  const RunningCounts counts = promise_decodes(params, lanes, state);
  const u32 num_prefills = counts.num_prefills;
  if (num_prefills > 0) {
    const u32 num_decodes = state.status.num_running - num_prefills - counts.num_ending;  // at most: stalled ones leave their row unused
    if (lanes.is_first()) plan_running_chunks(params, state, num_prefills, params.max_step_tokens - num_decodes);
    lanes.sync();  // hazard: the next stages read step_rows
  }
  const bool preempted = take_decode_pages(params, lanes, state);
  StepDraft draft;
  write_decodes(params, lanes, state, plan, draft);
  const u32 num_decode_seqs = draft.num_seqs;
  if (num_prefills > 0 && lanes.is_first()) write_running_chunks(params, state, plan, draft);
  lanes.sync();  // hazard: admission and the rows read the sequences lane 0 wrote
  draft.num_rows = lanes.broadcast(draft.num_rows, 0);
  extend_plan(params, lanes, state, plan, num_decode_seqs, !preempted, draft);  // S6
  return draft;
}

}  // namespace blinkimp
