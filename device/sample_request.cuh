// One sampled row of a plan: the request's parameters and edits -> its token, which its counts and its constraint take in.
//
// The step after this one may be planned already, so what the next sample depends on is kept here and not by the director: counts and the
// constraint's state. Writer: the group that samples the row; a request has one row at most in a step, and steps follow one another.
// Called by device/sample_op.cuh (GPU) and device/emu/reference_ops.cpp. Test: pytest tests/host/test_sampling_engine.py
#pragma once
#include <constraint.cuh>
#include <penalties.cuh>
#include <sampling.cuh>
#include <step_plan.cuh>

namespace blinkimp {

BK_INLINE const PlanSeq& sampled_seq(const EngineParams& params, const StepPlan* plan, u32 sample_idx) {
  const u32 row = plan_sampled_rows(params, plan)[sample_idx];
  return plan_seqs(params, plan)[plan_rows(params, plan)[row].seq_idx];
}

BK_INLINE LogitEdits edits_of_request(const EngineParams& params, u32 request_idx, const Request& request, const Constraint& constraint,
                                      u32 output_idx) {
  const SamplingParams& sampling = request.sampling;
  LogitEdits edits{};
  edits.num_bias = sampling.num_logit_bias;
  edits.bias = reinterpret_cast<const LogitBias*>(params.logit_biases) + u64{request_idx} * kMaxLogitBias;
  if (output_idx < sampling.min_tokens) {
    edits.stop_ids = request.stop_ids;
    edits.num_banned_stop_ids = request.num_stop_ids;
    edits.eos_ids = params.dims.eos_ids;
    edits.num_banned_eos_ids = params.dims.num_eos_ids;
  }
  if (uses_penalties(sampling)) {
    edits.counts = token_counts(params, request.count_slot - 1);
    edits.repetition_penalty = sampling.repetition_penalty != 0.0f ? sampling.repetition_penalty : 1.0f;
    edits.presence_penalty = sampling.presence_penalty;
    edits.frequency_penalty = sampling.frequency_penalty;
  }
  if (request.constraint != 0) {
    const bool has_state = request.constraint_state < constraint.num_states;
    // Without an automaton, or in none of its states: nothing is allowed, and the tables, which stay unread, are any address but null.
    edits.class_of_token = has_state ? constraint.class_of_token : reinterpret_cast<const u16*>(params.constraints);
    edits.next_state = has_state ? constraint.next_state + u64{request.constraint_state} * constraint.num_classes : nullptr;
    edits.num_classes = has_state ? constraint.num_classes : 0;
    edits.num_states = constraint.num_states;
  }
  return edits;
}

// Whether the row's token follows from the model's logits alone, by the largest one.
BK_INLINE bool is_plain_greedy(const SamplingParams& sampling, u32 constraint, u32 output_idx) {
  return !(sampling.temperature > 0.0f) && sampling.num_logit_bias == 0 && output_idx >= sampling.min_tokens && !uses_penalties(sampling) &&
         constraint == 0 && sampling.num_top_logprobs == 0;
}

// logits: [vocab] of the row. tile_best, num_tiles: as in SampleInput. All members of the group; ends with a barrier.
template <class Group>
BK_INLINE void sample_request(const Group& group, const EngineParams& params, const StepPlan* plan, u32 sample_idx, const f32* logits,
                              const u64* tile_best, u32 num_tiles, SampleScratch* scratch) {
  const PlanSeq& seq = sampled_seq(params, plan, sample_idx);
  Request& request = *request_at(params, seq.request_idx);
  const u32 num_tokens = seq.position_begin + seq.num_rows;  // of the request, before this sample
  const bool counts = uses_penalties(request.sampling);
  if (counts) refresh_counts(group, params, seq.request_idx, request, num_tokens);
  const Constraint constraint = request.constraint != 0 ? open_constraint(params, request.queue_pair_idx, request.constraint) : Constraint{};
  const u32 state = request.constraint_state;
  const SampleInput input{logits, tile_best, params.dims.vocab, num_tiles,
                          edits_of_request(params, seq.request_idx, request, constraint, seq.output_idx)};
  const SampleResult result =
      sample_row(group, input, request.sampling, seq.output_idx, scratch, top_logprobs_of_step(params, plan->step) + u64{sample_idx} * kMaxTopLogprobs);
  group.sync();  // hazard: lane 0 changes counts and state that another member still reads
  if (group.id == 0) {
    sampled_of_step(params, plan->step)[sample_idx] = result;
    if (!is_no_token(result)) {
      if (counts) count_token(params, request, result.token, num_tokens);
      if (request.constraint != 0) request.constraint_state = next_constraint_state(constraint, state, result.token);
    }
  }
  group.sync();  // hazard: the next row overwrites the scratch
}

}  // namespace blinkimp
