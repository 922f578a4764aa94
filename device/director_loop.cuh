// The director's two warps of the persistent kernel: the loop around director.cuh, and the hand-off to the workers. GPU only.
//
//   warp 0  the director: plans, commits, polls queue pairs, publishes completions; waits for host memory now and then, 2 us each time
//   warp 1  the dispatcher: watches the workers and nothing else. When the last one arrives and the next plan is armed, it publishes that
//           plan at once; whatever the director is in the middle of, the workers go on within a pause and two reads of L2
// Both look now and then and not all the time: what they read slows the workers down (PERFORMANCE.md, what the director costs the workers).
//
// Called by device/persistent_kernel.cu and device/portable/portable_kernel.cu in the last CTA, by kDirectorThreads threads. Include the
// kernel's own worker first: grid_word(), grid_has_passed(), phases_of(), saved_phases() and fail() are its. The emulated device's loop, which makes the same
// calls in the same order but sleeps where this one looks (idle.cuh), is in emu/emulated_device.cpp. Test: pytest -m gpu tests/gpu/test_engine_gpu.py
//
// Invariants:
//   H1  a plan is published by the director, or by the dispatcher while it is armed: the swap of armed_step decides, once for each step.
//   H2  an armed plan is not touched; the director disarms it first, and if it comes too late the plan is on its way.
//   H3  the dispatcher never reads or writes director state; what it found stands in the hand-off before arrived_step says so.
#pragma once
#include <idle.cuh>
#include <parking.cuh>

namespace blinkimp {

constexpr u32 kDirectorThreads = 64;
constexpr u32 kLeaveStep = 0xffffffff;
constexpr u32 kWatchSleepNs = 200;    // of the dispatcher, for a step
constexpr u32 kArrivalSleepNs = 500;  // and for its workers, at most twice that: of a step, ten thousandths
constexpr u64 kQuietRoundNs = 1000000;  // an idle engine's plans, status, attaches beside others and integrity checks: they take some 15 us

// In the shared memory of the director's CTA. Steps are counted from 1 here; 0 = none.
struct Handoff {
  u32 watched_step;  // writer: director. The step in flight; kLeaveStep: nothing to watch any more
  u32 armed_step;    // the step whose plan may be published. Director: sets it, takes it back; dispatcher: takes it (H1)
  u32 arrived_step;  // writer: dispatcher. The last step whose workers are done
  u32 started_step;  // writer: dispatcher, before arrived_step. The last step whose plan it published
  u64 arrived_ns;    // writer: dispatcher, before arrived_step. When it saw the last arrival
  u64 started_ns;    // likewise. When the plan was published
};

BK_INLINE Handoff& handoff() {
  extern __shared__ __align__(1024) u8 director_shared[];  // the CTA's dynamic shared memory: nobody else uses it here
  return *reinterpret_cast<Handoff*>(director_shared);
}

// Lane 0. Everything written before, by whoever this warp has synced with, is in the plan that the workers acquire.
BK_INLINE void publish_plan(const EngineParams& params, u32 step) {
  st_release_gpu(grid_word(params, kGridWordPlan), step + 1);  // pairs with wait_plan()
}

BK_INLINE u32 phases_of_program(const EngineParams& params) {
  u32 num_phases = 0;
  for (u32 op_idx = 0; op_idx < params.num_ops; op_idx++) num_phases += phases_of(reinterpret_cast<const Op*>(params.ops)[op_idx].kind);
  return num_phases;
}

// ---- Dispatcher --------------------------------------------------------------------------------------------------
// All lanes. Until the grid has passed num_barriers barriers. Meanwhile, once the next plan is armed, each lane looks up the sequence that it
// will judge; *num_watched: of how many, kMaxWatchedSeqs + 1 when they are too many or none is known.
BK_INLINE void watch_workers(const EngineParams& params, const Lanes& lanes, u32 step, u32 num_barriers, WatchedSeq* watched, u32* num_watched) {
  const StepPlan* next = plan_of_step(params, step + 1);
  const u64 start_ns = device_clock_ns();
  for (bool looked = false;;) {
    const u32 arrivals = lanes.is_first() ? ld_acquire_gpu(grid_word(params, kGridWordArrivals)) : 0;  // pairs with the workers' arrivals
    if (lanes.any(lanes.is_first() && grid_has_passed(params, arrivals, num_barriers))) break;
    if (!looked && lanes.any(lanes.is_first() && ld_acquire_cta(&handoff().armed_step) == step + 2)) {  // pairs with arm_next()
      lanes.sync();  // the plan was acquired by lane 0
      looked = true;
      *num_watched = next->num_seqs;
      if (*num_watched <= kMaxWatchedSeqs && lanes.id < *num_watched) *watched = watch_seq(params, next, lanes.id);
    }
    sleep_ns(kArrivalSleepNs);
    // Later than any wait of the workers, so that the wait which really hangs is the one on record.
    if (lanes.any(device_clock_ns() - start_ns > params.spin_budget_ns / 2 * 3)) fail(params, kFaultSpinExpired, kSiteStepWait, num_barriers * params.num_workers, arrivals);
  }
  lanes.sync();  // the sampled tokens were acquired by lane 0
}

// Warp 1. One round for each step.
BK_INLINE void dispatch(const EngineParams& params, const Lanes& lanes) {
  Handoff& shared = handoff();
  const u32 num_phases = phases_of_program(params);
  u32 num_barriers = 0;
  for (u32 step = 0;; ++step) {
    u32 in_flight;
    // Pairs with watch_step(). The pause is for the power of an idle engine: a step lasts much longer.
    while ((in_flight = lanes.broadcast(lanes.is_first() ? ld_acquire_cta(&shared.watched_step) : 0, 0)) == step) sleep_ns(kWatchSleepNs);
    if (in_flight == kLeaveStep) return;
    num_barriers += num_phases - saved_phases(*plan_of_step(params, step));
    WatchedSeq watched{nullptr, 0, 0};
    u32 num_watched = kMaxWatchedSeqs + 1;
    watch_workers(params, lanes, step, num_barriers, &watched, &num_watched);
    const u64 arrived_ns = device_clock_ns();
    const bool is_armed = lanes.any(lanes.is_first() && cas_acq_rel_cta(&shared.armed_step, step + 2, 0) == step + 2);  // H1
    bool starts = is_armed;
    if (is_armed && num_watched <= kMaxWatchedSeqs) {
      const StepPlan* next = plan_of_step(params, step + 1);
      const bool goes_on = lanes.id < num_watched && !was_stopped(params, next, watched);
      starts = lanes.any(goes_on || next->num_seqs != num_watched);  // requests that came after the look go on
    }
    if (lanes.is_first()) {
      if (starts) publish_plan(params, step + 1);
      shared.arrived_ns = arrived_ns;
      if (starts) shared.started_ns = device_clock_ns();
      if (starts) shared.started_step = step + 2;
      st_release_cta(&shared.arrived_step, step + 1);  // pairs with has_arrived()
    }
  }
}

// ---- Director ----------------------------------------------------------------------------------------------------
// All lanes, as are those below.
BK_INLINE void watch_step(const Lanes& lanes, u32 step) {
  if (lanes.is_first()) st_release_cta(&handoff().watched_step, step + 1);
}

BK_INLINE bool has_arrived(const Lanes& lanes, u32 step) {
  return lanes.any(lanes.is_first() && ld_acquire_cta(&handoff().arrived_step) == step + 1);
}

BK_INLINE void arm_next(const Lanes& lanes, u32 step) {
  lanes.sync();  // all lanes' parts of the plan are written before lane 0 releases it
  if (lanes.is_first()) st_release_cta(&handoff().armed_step, step + 2);
}

BK_INLINE bool disarm_next(const Lanes& lanes, u32 step) {
  const bool is_ours = lanes.any(lanes.is_first() && cas_acq_rel_cta(&handoff().armed_step, step + 2, 0) == step + 2);  // H2
  lanes.sync();  // hazard: the plan is changed by all lanes
  return is_ours;
}

// While the workers run `step`: plans the next one, takes submissions, admits them to that plan. Each look at the queue pairs is about 2 us of reads over PCIe;
// what comes between the last look and the step's end waits for another step, one request in a hundred.
BK_INLINE void accompany_step(const EngineParams& params, const Lanes& lanes, u32 step) {
  constexpr u64 kPollPeriodNs = 50000;
  constexpr u64 kPublishPeriodNs = 1000000;  // of a status that no completion goes with
  DirectorState& state = director_state(params);
  StepPlan* next = plan_of_step(params, step + 1);
  bool is_armed = false;
  bool is_due = true;  // the next plan wants to be made, or to take in what came since
  u64 polled_ns = 0;
  u64 published_ns = device_clock_ns();
  while (!has_arrived(lanes, step)) {
    if (is_due && !director_should_exit(params, lanes) && (!is_armed || disarm_next(lanes, step))) {
      is_armed = director_plan_ahead(params, lanes, next) && !state.next_waits;
      if (is_armed) arm_next(lanes, step);
    }
    is_due = false;
    const u64 now_ns = lanes.clock_ns();
    if (now_ns - polled_ns <= kPollPeriodNs) continue;
    const u64 num_accepted = state.status.requests_accepted;
    lanes.sync();  // hazard: lane 0 counts up while another lane still reads
    director_poll(params, lanes);
    polled_ns = now_ns;
    is_due = state.next_plan == kNextNone || state.status.requests_accepted != num_accepted;
    if (state.num_staged > 0 || now_ns - published_ns > kPublishPeriodNs) {
      director_publish(params, lanes);
      published_ns = now_ns;
    }
  }
  lanes.sync();  // what the dispatcher left, and the sampled tokens, were acquired by lane 0
}

// With no step in flight: workers and dispatcher leave.
BK_INLINE void leave(const EngineParams& params, const Lanes& lanes, u32 step) {
  lanes.sync();  // hazard: another lane still looks at the plan
  if (!lanes.is_first()) return;
  plan_of_step(params, step)->flags = kPlanExit;
  publish_plan(params, step);
  st_release_cta(&handoff().watched_step, kLeaveStep);
}

// Warp 0.
BK_INLINE void direct_steps(const EngineParams& params, const Lanes& lanes) {
  Handoff& shared = handoff();
  director_launch(params, lanes);
  bool has_polled = false;
  u64 round_ns = 0;  // the last time that all was looked after
  for (u32 step = 0;;) {
    // Nothing is in flight.
    if (!has_polled) director_poll(params, lanes);
    has_polled = false;
    if (director_has_answers(params)) director_publish(params, lanes);
    const u64 now_ns = lanes.clock_ns();
    const bool is_quiet = director_is_quiet(params);
    if (is_quiet && now_ns - round_ns < kQuietRoundNs) {  // an idle engine looks for submissions and does little else
      director_wait(params, lanes, round_ns + kQuietRoundNs);
      continue;
    }
    round_ns = now_ns;
    if (director_may_park(params, lanes) && is_quiet) {
      director_park(params, lanes);
      leave(params, lanes, step);
      return;
    }
    StepPlan* plan = plan_of_step(params, step);
    const u32 num_rows = director_plan(params, lanes, plan);
    if (!num_rows || director_should_exit(params, lanes)) {
      director_publish(params, lanes);
      if (director_should_exit(params, lanes)) {
        leave(params, lanes, step);
        return;
      }
      if (!is_quiet) director_idle(params, lanes);
      has_polled = is_quiet;  // a moment ago
      continue;
    }
    lanes.sync();  // all lanes' parts of the plan are written before lane 0 releases it
    if (lanes.is_first()) publish_plan(params, step);
    director_note_start(params, lanes, device_clock_ns());
    // One step behind the other: commit what arrived while the next one runs.
    for (bool goes_on = true; goes_on; ++step) {
      watch_step(lanes, step);
      director_publish(params, lanes);
      accompany_step(params, lanes, step);
      director_note_arrival(params, lanes, shared.arrived_ns);
      goes_on = shared.started_step == step + 2;
      if (goes_on) director_start_next(params, lanes, shared.started_ns);
      lanes.sync();  // hazard: the dispatcher writes these words again once it watches the next step
      director_commit(params, lanes, plan_of_step(params, step));
    }
    has_polled = true;  // a moment ago
  }
}

// Warps 0 and 1 of the director's CTA.
BK_INLINE void direct(const EngineParams& params) {
  const Lanes lanes = Lanes::warp();
  if (threadIdx.x == 0) handoff() = Handoff{};
  named_barrier_sync<2, kDirectorThreads>();  // the hand-off is empty before either warp looks at it
  if (threadIdx.x < 32) direct_steps(params, lanes);
  else dispatch(params, lanes);
}

}  // namespace blinkimp
