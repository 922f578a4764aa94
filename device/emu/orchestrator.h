// The host's scheduling loop (orchestrator = cpu): the director's calls in the order of director_loop.cuh, each step a launch on a link to
// the device. The ablation of the persistent kernel: same director, same workers, but the CPU stands between two steps.
//
//   plan -> launch -> { publish, plan the next one, poll until the device is done -> launch the next one -> commit } -> ...
//
// A link (CudaLink, EmulatedLink) has:
//   UpdateBatch& batch()            the batch to be filled for the next launch; waits until the device is done with it
//   bool flush()                    sends the batch alone, gives an empty one
//   bool launch(plan, has_tops)     sends the batch and a step; its results will stand in EngineParams.sampled and top_logprobs of the host
//   LinkState wait(until_ns)        for the oldest launch that was not waited for
//   bool is_whole()                 false: the device is gone
//   kPollPeriodNs                   between two looks at the queue pairs during a step
//   step_budget_ns(params)          the longest step
// Called by orchestrator_cuda.cpp and orchestrator_emulated.cpp, in a thread of the host process. host/ORCHESTRATOR.md says what it costs.
// Test: pytest tests/host/test_cpu_orchestrator.py tests/host/test_cpu_orchestrator_cuda.py
#pragma once
#include <emu/idle_backoff.h>
#include <emu/orchestrator_mirror.h>

#include <director.cuh>

namespace blinkimp {

enum LinkState : u32 {
  kLinkBusy = 0,  // until_ns has come
  kLinkDone = 1,
  kLinkLost = 2,  // nothing will come any more: the link says why, or the fault record does
};

enum OrchestratorEnd : int {  // host/cpu_orchestrator.py knows these
  kEndStopped = 0,
  kEndFaulted = 1,  // the engine page says how
  kEndLost = 2,     // the link says why
};

template <class Link>
class Orchestrator {
 public:
  // launches_ahead: the next step is launched while one runs, so that the device goes from one to the other without the host. Requests that
  // come meanwhile are a step later; whether everybody has stopped is not looked at.
  Orchestrator(const EngineParams& params, Link& link, bool launches_ahead)
      : params_(params), link_(link), launches_ahead_(launches_ahead), mirror_(params), state_(director_state(params)) {}

  OrchestratorEnd run() {
    IdleBackoff idle(params_.idle_sleep_ns);
    director_init(params_, lanes_);
    for (u64 step = 0; !fault_recorded(params_);) {
      director_poll(params_, lanes_);
      StepPlan* plan = plan_of_step(params_, step);
      const u32 num_rows = director_plan(params_, lanes_, plan);
      if (plan->flags & kPlanExit) return kEndStopped;
      if (num_rows == 0) {
        director_publish(params_, lanes_);
        if (!link_.is_whole()) return lost();
        idle.wait();
        continue;
      }
      if (!launch(plan)) return lost();
      director_note_start(params_, lanes_, device_clock_ns());
      for (bool goes_on = true; goes_on; ++step) {
        StepPlan* next = plan_of_step(params_, step + 1);
        director_publish(params_, lanes_);
        if (launches_ahead_) director_poll(params_, lanes_);  // what is not in the plan now comes a step later
        director_plan_ahead(params_, lanes_, next);
        const bool is_launched = launches_ahead_ && may_start_next();
        if (is_launched && !launch(next)) return lost();
        const LinkState end = accompany_step(next, is_launched);
        if (end == kLinkLost) return lost();
        if (end == kLinkBusy || fault_recorded(params_)) break;  // the step is not whole: nothing of it may be committed
        director_note_arrival(params_, lanes_, device_clock_ns());
        bool is_lost = false;
        if (!is_launched) {
          look(next);
          goes_on = may_start_next() && !every_seq_was_stopped(params_, lanes_, next);
          is_lost = goes_on && !launch(next);
        }
        if (goes_on && !is_lost) director_start_next(params_, lanes_, device_clock_ns());
        director_commit(params_, lanes_, plan_of_step(params_, step));
        if (is_lost) {  // this step was whole
          director_publish(params_, lanes_);
          return lost();
        }
      }
      idle.was_busy();
    }
    director_publish(params_, lanes_);
    return kEndFaulted;
  }

 private:
  static constexpr u64 kPublishPeriodNs = 1'000'000;  // of a status that no completion goes with

  bool launch(const StepPlan* plan) {
    launched_ns_ = device_clock_ns();
    return mirror_.send_step(link_, plan) && link_.launch(*plan, mirror_.has_tops());
  }

  bool may_start_next() const { return state_.next_plan == kNextReady && !state_.next_waits && !state_.is_stopped; }

  // While a step is in flight: takes submissions, and those that can still be admitted to the next plan go into it.
  void look(StepPlan* next) {
    director_poll(params_, lanes_);
    director_plan_ahead(params_, lanes_, next);
  }

  // Until the device is done with the step. kLinkBusy: it is not, and there is a fault on record.
  LinkState accompany_step(StepPlan* next, bool is_launched) {
    u64 published_ns = device_clock_ns();
    for (;;) {
      const LinkState link_state = link_.wait(device_clock_ns() + Link::kPollPeriodNs);
      if (link_state != kLinkBusy) return link_state;
      const u64 now_ns = device_clock_ns();
      if (now_ns - launched_ns_ > Link::step_budget_ns(params_)) {
        record_fault(params_, kFaultSpinExpired, kSiteStepWait, Link::step_budget_ns(params_), now_ns - launched_ns_);
        return kLinkBusy;
      }
      const u64 num_accepted = state_.status.requests_accepted;
      director_poll(params_, lanes_);
      const bool is_due = state_.next_plan == kNextNone || state_.status.requests_accepted != num_accepted;
      if (is_due && !is_launched) director_plan_ahead(params_, lanes_, next);
      if (state_.num_staged > 0 || now_ns - published_ns > kPublishPeriodNs) {
        director_publish(params_, lanes_);
        published_ns = now_ns;
      }
    }
  }

  // The workers may have recorded a fault, with a latch of their own; a status that was published since says that all is well.
  OrchestratorEnd lost() {
    if (ld_acquire_sys(&engine_page(params_).fault.code) == 0) return kEndLost;  // pairs with record_fault()
    st_relaxed_sys(&engine_page(params_).status.state, u32{kEngineFaulted});  // relaxed: nothing is read through it
    return kEndFaulted;
  }

  const EngineParams& params_;  // over host memory
  Link& link_;
  const bool launches_ahead_;
  DeviceMirror mirror_;
  DirectorState& state_;
  const Lanes lanes_ = Lanes::single();
  u64 launched_ns_ = 0;
};

}  // namespace blinkimp
