// The director: polls queue pairs, plans steps, commits what the workers sampled, publishes completions.
//
// Called by the persistent kernel's director warp and by the emulated device's loop; DESIGN.md has the table of calls. All lanes call each
// function together. Between director_plan with rows and its director_commit a step is in flight: poll, publish and plan_ahead may run as
// often as they like. A plan that plan_ahead made is either started before that commit (start_next), or finished by the director_plan
// after it; otherwise plan and commit strictly alternate. One thread (CPU) or one warp (GPU) ever runs the director.
// Test: pytest tests/host -k director
//
// Invariants beside those of the modules (asserted by tests):
//   M1  after kCommandStop the director exits once every staged completion is published and every FINISH had its credit, or the ingress
//       gave none for ingress_timeout_ns.
//   M2  at most one step is in flight and one planned or started behind it; the tokens of a request do not depend on which steps were
//       planned ahead.
#pragma once
#include <commit.cuh>
#include <director_integrity.cuh>
#include <intake.cuh>
#include <limits.cuh>
#include <plan_ahead.cuh>

namespace blinkimp {

constexpr u32 kMaxTakeRounds = 8;  // submissions of one queue pair per poll: bounds what a burst adds to the gap between steps

// ---- Status ------------------------------------------------------------------------------------------------------
BK_INLINE u32 engine_state(const EngineParams& params, const DirectorState& state) {
  if (fault_recorded(params)) return kEngineFaulted;
  if (state.is_stopped) return kEngineStopped;
  if (state.is_parked) return kEngineParked;
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
    status.state = engine_state(params, state);
    status.num_queue_pairs_attached = num_attached;
    status.num_free_requests = state.table.num_free;
    status.num_pages = params.num_pages;
    status.num_pages_free = state.pages.num_free;
    status.num_pages_cached = state.pages.num_cached;
    status.num_pages_used = params.num_pages - num_available_pages(state.pages);
  }
  lanes.sync();  // hazard: the copy reads what lane 0 wrote
  StatusLines& page = engine_page(params).status;
  u64* words = reinterpret_cast<u64*>(&page);
  const AliasedWord* source = reinterpret_cast<const AliasedWord*>(&state.status);
  for (u32 i = lanes.id; i < sizeof(StatusLines) / sizeof(u64); i += lanes.count) {
    if (&words[i] != &page.device_ns) st_relaxed_sys(&words[i], source[i]);  // relaxed: readers take each word for itself
  }
  // Read as it is written: how soon the host sees it bounds how far the clocks are apart (host/watch_word.py).
  if (lanes.is_first()) st_relaxed_sys(&page.device_ns, device_clock_ns());
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
BK_NOINLINE void director_init(const EngineParams& params, const Lanes& lanes) {
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
    open_trace(params, state.trace);
    if (wrong != 0) {
      record_fault(params, kFaultIntegrity, kSiteDirectorInit, 0, wrong);
      state.is_stopped = 1;
    }
    state.now_ns = device_clock_ns();
    state.integrity_ns = state.now_ns;
    state.earliest_deadline_ns = kNoDeadline;
    set_limits(params, state, 0, 0, 0, 0);
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
    while (state.queue_pairs[q].num_waiting > 0) stop_request(params, state, first_waiting(state, q), kFinishDraining);
  }
  for (u32 i = state.status.num_running; i-- > 0;) stop_request(params, state, state.running[i], kFinishDraining);
}

// All lanes. Attach, leave, credit, submissions, cancels, the host's command.
BK_NOINLINE void director_poll(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  if (state.is_stopped) return;
  // Asked for first, needed last. Relaxed: the words carry all there is to know; what else a new generation brings is read again.
  const u32 command = lanes.is_first() ? ld_relaxed_sys(&engine_page(params).control.command) : 0;
  const u32 generation = lanes.is_first() ? ld_relaxed_sys(&engine_page(params).control.tuning_generation) : 0;
  if (lanes.is_first()) state.now_ns = device_clock_ns();
  lanes.sync();  // hazard: every lane ages heartbeats against now_ns
  keep_lru_room(params, lanes, state.pages);
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
  stop_expired(params, lanes, state);
  if (lanes.is_first()) {
    obey_tuning(params, state, generation);
    obey_command(params, state, command);
    for (u32 q = 0; q < params.num_queue_pairs && state.status.num_finishing > 0; ++q) flush_finishing(params, state, q);
  }
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
    if (lanes.is_first()) state.next_take_idx = (first + 1) % params.num_queue_pairs;
    lanes.sync();  // hazard: lane 0 judges entries that other lanes fetched; all start from next_take_idx
  }
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) store_positions(state.queue_pairs[q]);
  lanes.sync();  // hazard: lane 0 takes over in the next call
}

// ---- Plan --------------------------------------------------------------------------------------------------------
// Lane 0. M1.
BK_INLINE bool may_exit(const EngineParams& params, const DirectorState& state) {
  if (state.command != kCommandStop || state.num_staged > 0 || state.status.num_running > 0) return false;
  return state.status.num_finishing == 0 || device_clock_ns() - state.stop_seen_ns > params.ingress_timeout_ns;
}

// Lane 0.
BK_INLINE void write_plan_header(StepPlan* plan, const StepDraft& draft, u64 step, u32 flags) {
  plan->step = step;
  plan->num_rows = draft.num_rows;
  plan->num_seqs = draft.num_seqs;
  plan->num_sample_rows = draft.num_sample_rows;
  plan->flags = flags;
  plan->max_kv_tokens = draft.max_kv_tokens;
  plan->reserved0 = 0;
}

// All lanes. Plans the step after the one in flight, or admits to that plan what came since. `plan`: plan_of_step() of it. Returns
// whether there is one; the caller may start it once the workers are done, unless state.next_waits.
BK_NOINLINE bool director_plan_ahead(const EngineParams& params, const Lanes& lanes, StepPlan* plan) {
  DirectorState& state = director_state(params);
  if (!state.step_in_flight || state.next_plan == kNextStarted || state.is_stopped) {
    if (lanes.is_first()) record_fault(params, kFaultIntegrity, kSiteDirectorOrder, kNextReady, state.next_plan);
    return false;
  }
  const bool is_new = state.next_plan == kNextNone;
  StepDraft draft = state.next_draft;
  if (is_new) {
    if (!state.is_advanced) advance_in_flight(params, lanes, plan_of_step(params, state.status.step));
    lanes.sync();  // hazard: each lane looks at requests that another one advanced
    if (lanes.is_first()) state.is_advanced = 1;
    if (!can_plan_ahead(params, lanes, state)) return false;
    lanes.sync();  // hazard: promises change while another lane still counts credit
    for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
      QueuePairState& queue_pair = state.queue_pairs[q];
      queue_pair.num_promised_now = queue_pair.num_promised;
    }
    lanes.sync();  // hazard: credit is looked at in other lanes
  } else {
    lanes.sync();  // hazard: lane 0 admits while another lane still reads the draft
  }
  plan_step(params, lanes, state, plan, !is_new, draft);
  const bool waits = commit_makes_room(params, lanes, state, draft);
  lanes.sync();  // hazard: lane 0 changes below what the others have read; and the caller's lanes see the whole plan
  if (lanes.is_first()) {
    write_plan_header(plan, draft, state.status.step + 1, 0);
    state.next_draft = draft;
    state.next_plan = draft.num_rows > 0 ? u32{kNextReady} : u32{kNextNone};
    state.next_waits = waits ? 1 : 0;
  }
  if (draft.num_rows == 0) {  // everybody's last token is on its way
    for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) state.queue_pairs[q].num_promised_now = 0;
  }
  lanes.sync();  // hazard: the next call reads the state in all lanes
  return draft.num_rows > 0;
}

// Lane 0.
BK_INLINE void trace_start(const EngineParams& params, DirectorState& state, u64 step, u64 start_ns) {
  const StepDraft& draft = state.next_draft;
  trace_event(params, state.trace, start_ns, kTraceStepStart, 0, step, 0, pack_argument(draft.num_rows, draft.num_seqs | draft.num_sample_rows << 16));
  if (state.arrived_ns != 0) state.status.gap_ns_last = start_ns - state.arrived_ns;
}

// All lanes. The workers are done with the step in flight, since arrived_ns. What may follow: director_start_next, then its commit.
BK_INLINE void director_note_arrival(const EngineParams& params, const Lanes& lanes, u64 arrived_ns) {
  DirectorState& state = director_state(params);
  if (lanes.is_first()) {
    state.arrived_ns = arrived_ns;
    trace_event(params, state.trace, arrived_ns, kTraceStepEnd, 0, state.status.step, 0, 0);
    if (op_times_wanted(params, state.status.step)) {
      trace_event(params, state.trace, arrived_ns, kTraceOpTimes, 0, state.status.step, 0, op_times_slot(params, state.status.step));
    }
  }
}

// All lanes. The workers have the plan that director_plan_ahead made, since start_ns; the commit of the step before it follows.
BK_NOINLINE void director_start_next(const EngineParams& params, const Lanes& lanes, u64 start_ns) {
  DirectorState& state = director_state(params);
  if (lanes.is_first()) {
    if (state.next_plan != kNextReady || !state.step_in_flight) record_fault(params, kFaultIntegrity, kSiteDirectorOrder, kNextReady, state.next_plan);
    state.next_plan = kNextStarted;
    state.next_start_ns = start_ns;
    trace_start(params, state, state.status.step + 1, start_ns);
  }
  lanes.sync();  // hazard: the commit branches on it in all lanes
}

// All lanes. The workers have the plan of director_plan, since start_ns.
BK_INLINE void director_note_start(const EngineParams& params, const Lanes& lanes, u64 start_ns) {
  DirectorState& state = director_state(params);
  if (lanes.is_first()) {
    state.plan_ns = start_ns;
    state.quiet_since_ns = 0;
    trace_start(params, state, state.status.step, start_ns);
  }
}

// All lanes. After a commit, with a plan made ahead of it. Drops that plan, and returns false, if nobody in it goes on and nobody can
// find its KV.
BK_INLINE bool keep_next_plan(const EngineParams& params, const Lanes& lanes, DirectorState& state, const StepPlan* plan,
                              const StepDraft& draft) {
  bool is_wanted = state.pages.plan_fills_cache != 0;  // F2
  for (u32 i = lanes.id; i < draft.num_seqs; i += lanes.count) {
    const Request* request = request_at(params, plan_seqs(params, plan)[i].request_idx);
    is_wanted |= !(request->flags & (kFlagStopAsked | kFlagDropped | kFlagFinished));
  }
  is_wanted = lanes.any(is_wanted);
  lanes.sync();  // hazard: lane 0 changes below what the others have read
  if (lanes.is_first()) state.next_plan = kNextNone;
  if (is_wanted) return true;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) state.queue_pairs[q].num_promised = 0;
  if (lanes.is_first()) state.num_deferred = 0;
  lanes.sync();  // hazard: the ends below use that credit
  remove_ended(params, lanes, state, false);
  return false;
}

// All lanes. Fills `plan` for the next step and returns its rows; 0 rows: no step is in flight, and with kPlanExit in plan->flags the
// director has stopped and published its last status. `plan` is the one that director_plan_ahead got, if that made one.
BK_NOINLINE u32 director_plan(const EngineParams& params, const Lanes& lanes, StepPlan* plan) {
  DirectorState& state = director_state(params);
  if (state.step_in_flight) {
    if (lanes.is_first()) record_fault(params, kFaultIntegrity, kSiteDirectorOrder, 0, 1);
    return 0;
  }
  if (lanes.is_first() && may_exit(params, state)) state.is_stopped = 1;
  lanes.sync();  // hazard: all lanes branch on is_stopped
  const bool has_next = !state.is_stopped && state.next_plan == kNextReady;
  StepDraft draft = has_next ? state.next_draft : StepDraft{0, 0, 0, 0, 0};
  const bool keeps = has_next && keep_next_plan(params, lanes, state, plan, draft);
  if (!state.is_stopped) plan_step(params, lanes, state, plan, keeps, draft);
  if (lanes.is_first()) {
    write_plan_header(plan, draft, state.status.step, state.is_stopped ? u32{kPlanExit} : 0);
    state.step_in_flight = draft.num_rows > 0 ? 1 : 0;
    state.next_draft = draft;
    if (draft.num_rows == 0) state.arrived_ns = 0;
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

// All lanes, after a poll with no step in flight: nothing to plan, to publish or to end. The caller may director_wait().
BK_INLINE bool director_is_quiet(const EngineParams& params) {
  const DirectorState& state = director_state(params);
  return state.status.num_running + state.status.num_waiting + state.num_staged == 0 && state.command != kCommandStop;
}

// Whether the caller's loop is over: the last plan carried kPlanExit, or a fault was recorded.
BK_INLINE bool director_should_exit(const EngineParams& params, const Lanes& lanes) {
  // One answer for all lanes: the latch may be set between two lanes' reads of it.
  return lanes.any(director_state(params).is_stopped || fault_recorded(params));
}

// All lanes, after a poll with no step in flight. Answers that no step goes with (PONG, REJECT): a plan would only make them late.
BK_INLINE bool director_has_answers(const EngineParams& params) {
  const DirectorState& state = director_state(params);
  return state.num_staged > 0 && state.status.num_running + state.status.num_waiting == 0;
}

// The pause of a loop whose plan had no rows, while there is something to do: until credit comes, say.
BK_INLINE void director_idle(const EngineParams& params, const Lanes&) { sleep_ns(params.idle_sleep_ns); }

// ---- Publish -----------------------------------------------------------------------------------------------------
// All lanes. Completions to the rings, then the status page. Once per loop of the caller: the heartbeat counts it.
BK_NOINLINE void director_publish(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  publish_completions(params, lanes, state);
  publish_trace(params, lanes, state.trace);
  publish_status(params, lanes, state);
}

}  // namespace blinkimp
