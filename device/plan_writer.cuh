// The words of a plan: sequences, rows, sampled rows. Who is in it was decided before.
//
// Called by scheduler.cuh and admission.cuh. Decode rows are written by all lanes side by side, chunks one after the other.
// Test: pytest tests/host/test_director_plan.py
#pragma once
#include <director_state.cuh>

namespace blinkimp {

BK_INLINE u32 chunk_rows(const DirectorState& state, const Request& request, u32 num_rows_left) {
  u32 num_rows = request.num_tokens - request.num_computed;
  if (num_rows > state.limits.prefill_chunk_tokens) num_rows = state.limits.prefill_chunk_tokens;
  return num_rows < num_rows_left ? num_rows : num_rows_left;
}

// ---- Sequences ---------------------------------------------------------------------------------------------------
BK_INLINE void write_seq(const EngineParams& params, StepPlan* plan, u32 seq_idx, u32 request_idx, const Request& request, u32 row_begin,
                         u32 sample_row, bool prefix_is_fresh) {
  PlanSeq* seq = &plan_seqs(params, plan)[seq_idx];
  seq->request_idx = request_idx;
  seq->row_begin = row_begin;
  seq->num_rows = request.step_rows;
  seq->position_begin = request.num_computed;
  seq->sample_row = sample_row;
  seq->output_idx = request.num_tokens - request.num_prompt_tokens + request.num_prior_outputs;
  seq->prefix_is_fresh = prefix_is_fresh ? 1 : 0;
  seq->reserved0 = 0;
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
      write_seq(params, plan, rank, request_idx, *request, rank, rank, false);
      plan_rows(params, plan)[rank] = PlanRow{request->last_token, request->num_computed, rank, rank};
      longest = request->num_tokens > longest ? request->num_tokens : longest;
    }
    num_written += lanes.sum(is_in ? 1 : 0);
  }
  longest = lanes.max(longest);
  draft = StepDraft{num_written, num_written, num_written, longest, longest};
}

// Lane 0. A prefill chunk; its rows are filled in later by all lanes.
BK_INLINE void write_chunk(const EngineParams& params, StepPlan* plan, u32 request_idx, bool prefix_is_fresh, StepDraft& draft) {
  const Request* request = request_at(params, request_idx);
  const u32 end = request->num_computed + request->step_rows;
  const bool samples = end == request->num_tokens;
  write_seq(params, plan, draft.num_seqs, request_idx, *request, draft.num_rows, samples ? draft.num_sample_rows : kNoRow, prefix_is_fresh);
  draft.num_seqs += 1;
  draft.num_rows += request->step_rows;
  draft.num_sample_rows += samples ? 1 : 0;
  draft.kv_tokens_before = draft.max_kv_tokens;
  draft.max_kv_tokens = end > draft.max_kv_tokens ? end : draft.max_kv_tokens;
}

// Lane 0. The plan's last sequence, a chunk that was just written, by num_rows shorter; some are left.
BK_INLINE void shorten_last_chunk(const EngineParams& params, StepPlan* plan, u32 num_rows, StepDraft& draft) {
  PlanSeq& seq = plan_seqs(params, plan)[draft.num_seqs - 1];
  seq.num_rows -= num_rows;
  request_at(params, seq.request_idx)->step_rows = seq.num_rows;
  draft.num_rows -= num_rows;
  if (seq.sample_row != kNoRow) {  // it was the prompt's last one
    seq.sample_row = kNoRow;
    draft.num_sample_rows -= 1;
  }
  const u32 end = seq.position_begin + seq.num_rows;
  draft.max_kv_tokens = end > draft.kv_tokens_before ? end : draft.kv_tokens_before;
}

// Lane 0. Chunks of running requests, in admission order.
BK_INLINE void write_running_chunks(const EngineParams& params, const DirectorState& state, StepPlan* plan, StepDraft& draft) {
  for (u32 i = 0; i < state.status.num_running; ++i) {
    const Request* request = request_at(params, state.running[i]);
    if (request->step_rows > 0 && !is_decode(*request)) write_chunk(params, plan, state.running[i], false, draft);
  }
}

// ---- Rows of the chunks ------------------------------------------------------------------------------------------
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

}  // namespace blinkimp
