// What the host may change while the engine runs: limits of the schedule (ControlLine), and the deadlines of requests.
//
// Called by director_init and director_poll. Test: pytest tests/host/test_scheduling.py
//
// Invariants (asserted by tests):
//   N1  limits never leave what the engine was launched for: words beyond it count as the nearest that is allowed, 0 as launched.
//   N2  a request whose deadline has passed is stopped by the next poll: if it waits at once, else at the next commit.
#pragma once
#include <request_life.cuh>

namespace blinkimp {

constexpr u64 kDefaultAgingNs = 1'000'000'000;
constexpr u32 kNeverAging = 0xffffffff;
constexpr u64 kNoDeadline = 0xffffffff'ffffffff;

// ---- Limits ------------------------------------------------------------------------------------------------------
BK_INLINE u32 limit_or(u32 word, u32 most) { return word == 0 || word > most ? most : word; }

// Lane 0.
BK_INLINE void set_limits(const EngineParams& params, DirectorState& state, u32 max_running, u32 step_tokens, u32 chunk_tokens, u32 aging_ms) {
  state.limits.max_running = limit_or(max_running, params.max_batch);
  state.limits.step_tokens = limit_or(step_tokens, params.max_step_tokens);
  state.limits.prefill_chunk_tokens = limit_or(chunk_tokens, chunk_tokens == 0 ? params.prefill_chunk_tokens : params.max_step_tokens);
  state.limits.aging_ns = aging_ms == 0 ? kDefaultAgingNs : aging_ms == kNeverAging ? 0 : u64{aging_ms} * 1'000'000;
}

// Lane 0. `generation` was read with the other words of the poll; only a new one makes the rest worth their PCIe reads.
BK_INLINE void obey_tuning(const EngineParams& params, DirectorState& state, u32 generation) {
  if (generation == static_cast<u32>(state.status.tuning_generation)) return;
  const ControlLine& control = engine_page(params).control;
  // Acquire pairs with Engine.tune(), which writes the generation last. Words that change again meanwhile bring a generation of their own.
  const u32 obeyed = ld_acquire_sys(&control.tuning_generation);
  set_limits(params, state, ld_relaxed_sys(&control.max_running), ld_relaxed_sys(&control.step_tokens),
             ld_relaxed_sys(&control.prefill_chunk_tokens), ld_relaxed_sys(&control.aging_ms));
  state.status.tuning_generation = obeyed;
}

// ---- Deadlines ---------------------------------------------------------------------------------------------------
// All lanes. Looks through the request table only when some deadline may have passed; then learns when to look next.
BK_INLINE void stop_expired(const EngineParams& params, const Lanes& lanes, DirectorState& state) {
  if (state.now_ns < state.earliest_deadline_ns) return;
  constexpr u32 kMostUs = 0xffffffff;
  u32 next_us = kMostUs;
  for (u32 begin = 0; begin < params.num_requests; begin += lanes.count) {
    const u32 r = begin + lanes.id;
    const Request* request = r < params.num_requests ? request_at(params, r) : nullptr;
    bool is_expired = false;
    if (request != nullptr && request->timeout_ns != 0 && !(request->flags & (kFlagStopAsked | kFlagDropped | kFlagFinished)) &&
        (request->state == kRequestWaiting || request->state == kRequestRunning)) {
      const u64 waited_ns = state.now_ns - request->accepted_ns;
      is_expired = waited_ns >= request->timeout_ns;
      const u64 left_us = is_expired ? kMostUs : (request->timeout_ns - waited_ns) / 1000;
      const u32 look_us = left_us < kMostUs ? static_cast<u32>(left_us) : kMostUs - 1;  // later than that: look again in an hour
      if (!is_expired && look_us < next_us) next_us = look_us;
    }
    const u32 expired_mask = lanes.sum(is_expired ? 1u << lanes.id : 0);
    for (u32 lane = 0; lanes.is_first() && expired_mask >> lane != 0; ++lane) {
      if (expired_mask >> lane & 1) stop_request(params, state, begin + lane, kFinishTimeout);
      if (lane == 31) break;  // a shift by 32 is undefined
    }
    if (expired_mask != 0) lanes.sync();  // hazard: lane 0 changed entries that others look at next
  }
  next_us = ~lanes.max(~next_us);
  lanes.sync();  // hazard: all lanes compared with the old deadline
  if (lanes.is_first()) state.earliest_deadline_ns = next_us == kMostUs ? kNoDeadline : state.now_ns + u64{next_us} * 1000;
  lanes.sync();  // hazard: the next poll compares in all lanes
}

}  // namespace blinkimp
