// Waiting requests: a queue for each queue pair and priority level, and which request of all of them is next.
//
// Called by request_life.cuh (push, remove) and admission.cuh (choose). SCHEDULING.md says why: whatever waits, a choice looks at the heads
// of the queues only, one queue pair a lane.
// Test: pytest tests/host/test_scheduling.py tests/host/test_director_stateful.py
//
// Invariants (checked by director_check_integrity or asserted by tests):
//   W1  a queue is in order of arrival, preempted requests before it; level_mask names the queues that are not empty.
//   W2  what waits for kNumLevels times the aging period goes before whatever has just arrived at its queue pair, which has its share of
//       the engine whatever others send: nobody starves.
//   W3  among queue pairs whose best request has the same level, the one that was served fewer tokens is next; what it was served while
//       it was not waiting, or more than kFairWindowTokens ahead of the others, is not held against it.
#pragma once
#include <director_state.cuh>

namespace blinkimp {

constexpr u32 kFairUnitTokens = 8;                       // shares are compared in units of so many tokens
constexpr u32 kFairWindowTokens = (1 << 14) * kFairUnitTokens;

// ---- Levels ------------------------------------------------------------------------------------------------------
// Priorities from -kNumLevels / 2 to kNumLevels / 2 - 1 have a level each, 0 is the best; those beyond count as the nearest.
BK_INLINE u32 level_of(const Request& request) {
  constexpr i32 kHalf = kNumLevels / 2;
  const i32 priority = request.priority < -kHalf ? -kHalf : request.priority >= kHalf ? kHalf - 1 : request.priority;
  return static_cast<u32>(priority + kHalf);
}

// The level that its wait has brought it to: one lower for each aging period, but not below `best`, the level of the most urgent that wait.
// So among equals a wait is worth nothing, and a queue pair does not get more than its share by letting many wait.
BK_INLINE u32 effective_level(const DirectorState& state, const Request& request, u32 best) {
  const u64 num_periods = state.limits.aging_ns != 0 ? (state.now_ns - request.accepted_ns) / state.limits.aging_ns : 0;
  const u32 level = level_of(request);
  return num_periods < u64{level - best} ? level - static_cast<u32>(num_periods) : best;
}

// ---- Queues ------------------------------------------------------------------------------------------------------
// Lane 0.
BK_INLINE void push_waiting(const EngineParams& params, DirectorState& state, u32 request_idx, bool at_front) {
  Request* request = request_at(params, request_idx);
  QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
  const u32 level = level_of(*request);
  WaitingQueue& queue = state.waiting[request->queue_pair_idx][level];
  if (!(queue_pair.level_mask >> level & 1)) queue = WaitingQueue{kNoRequest, kNoRequest};
  queue_pair.level_mask |= 1u << level;
  request->state = kRequestWaiting;
  if (!at_front) {
    request->num_hashed_pages = request->num_cached_tokens = 0;
    if (request->timeout_ns != 0 && state.now_ns + request->timeout_ns < state.earliest_deadline_ns) {
      state.earliest_deadline_ns = state.now_ns + request->timeout_ns;
    }
  }
  request->next_idx = at_front ? queue.first_idx : kNoRequest;
  request->prev_idx = at_front ? kNoRequest : queue.last_idx;
  if (request->next_idx != kNoRequest) request_at(params, request->next_idx)->prev_idx = request_idx;
  else queue.last_idx = request_idx;
  if (request->prev_idx != kNoRequest) request_at(params, request->prev_idx)->next_idx = request_idx;
  else queue.first_idx = request_idx;
  queue_pair.num_waiting += 1;
  state.status.num_waiting += 1;
}

// Lane 0.
BK_INLINE void remove_waiting(const EngineParams& params, DirectorState& state, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  QueuePairState& queue_pair = state.queue_pairs[request->queue_pair_idx];
  const u32 level = level_of(*request);
  WaitingQueue& queue = state.waiting[request->queue_pair_idx][level];
  if (request->next_idx != kNoRequest) request_at(params, request->next_idx)->prev_idx = request->prev_idx;
  else queue.last_idx = request->prev_idx;
  if (request->prev_idx != kNoRequest) request_at(params, request->prev_idx)->next_idx = request->next_idx;
  else queue.first_idx = request->next_idx;
  if (queue.first_idx == kNoRequest) queue_pair.level_mask &= ~(1u << level);
  queue_pair.num_waiting -= 1;
  state.status.num_waiting -= 1;
}

// Any request that waits in a queue pair where some do: to end them all.
BK_INLINE u32 first_waiting(const DirectorState& state, u32 queue_pair_idx) {
  u32 level = 0;
  while (!(state.queue_pairs[queue_pair_idx].level_mask >> level & 1)) level += 1;
  return state.waiting[queue_pair_idx][level].first_idx;
}

// ---- Choice ------------------------------------------------------------------------------------------------------
struct WaitingHead {
  u32 request_idx;
  u32 level;  // effective
};

// One lane. The best head of a queue pair in which somebody waits; of two that wait has made equal, the one that waits longer.
BK_INLINE WaitingHead best_head(const EngineParams& params, const DirectorState& state, u32 queue_pair_idx, u32 best_level) {
  WaitingHead best{kNoRequest, 0};
  for (u32 mask = state.queue_pairs[queue_pair_idx].level_mask, level = 0; mask != 0; mask >>= 1, ++level) {
    if (!(mask & 1)) continue;
    const u32 head_idx = state.waiting[queue_pair_idx][level].first_idx;
    const u32 head_level = effective_level(state, *request_at(params, head_idx), best_level);
    if (best.request_idx == kNoRequest || head_level <= best.level) best = WaitingHead{head_idx, head_level};
  }
  return best;
}

// Tokens that a queue pair is ahead of the one served last when that was chosen (W3).
BK_INLINE u32 fair_lead(const DirectorState& state, const QueuePairState& queue_pair) {
  if (queue_pair.served_tokens <= state.served_floor) return 0;
  const u64 lead = queue_pair.served_tokens - state.served_floor;
  return lead < kFairWindowTokens ? static_cast<u32>(lead) : kFairWindowTokens - 1;
}

// All lanes. The request to admit if there is room, or kNoRequest. Nothing changes: who must wait for pages keeps its turn, so that small
// requests behind it and those of other queue pairs do not pass it for ever.
BK_INLINE WaitingHead choose_waiting(const EngineParams& params, const Lanes& lanes, const DirectorState& state) {
  constexpr u32 kLowestKey = 0xffffffff;
  u32 best_key = kLowestKey;
  u32 candidate_mask = 0;
  u32 levels_mask = 0;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    const QueuePairState& queue_pair = state.queue_pairs[q];
    if (queue_pair.num_waiting == 0 || completion_credit(queue_pair) < step_credit(queue_pair)) continue;
    candidate_mask |= 1u << q;
    levels_mask |= queue_pair.level_mask;
  }
  u32 best_level = kNumLevels;
  for (u32 level = kNumLevels; level-- > 0;) best_level = levels_mask >> level & 1 ? level : best_level;
  best_level = ~lanes.max(~best_level);
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    if (!(candidate_mask >> q & 1)) continue;
    const QueuePairState& queue_pair = state.queue_pairs[q];
    const u32 level = best_head(params, state, q, best_level).level;
    const u32 turn = (q + params.num_queue_pairs - state.next_admit_idx) % params.num_queue_pairs;
    const u32 key = level << 19 | fair_lead(state, queue_pair) / kFairUnitTokens << 5 | turn;
    best_key = key < best_key ? key : best_key;
  }
  best_key = ~lanes.max(~best_key);
  if (best_key == kLowestKey) return WaitingHead{kNoRequest, 0};
  return best_head(params, state, (state.next_admit_idx + best_key % 32) % params.num_queue_pairs, best_level);
}

// Lane 0. The request that was chosen is admitted and has num_rows_left tokens to compute.
BK_INLINE void charge_admission(const EngineParams& params, DirectorState& state, u32 queue_pair_idx, u32 num_rows_left) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  state.served_floor += fair_lead(state, queue_pair);
  queue_pair.served_tokens = state.served_floor + num_rows_left;
  state.next_admit_idx = (queue_pair_idx + 1) % params.num_queue_pairs;
}

}  // namespace blinkimp
