// The emulated device: the director and the CPU interpreter in one loop, as the persistent kernel runs them on a GPU.
//
//   poll -> plan -> start the step -> { publish, plan the next one -> step done -> poll -> start the next step -> commit } -> ...
//
// until COMMAND_STOP is carried out: the order of device/director_loop.cuh. The interpreter's threads are params.num_workers; the director is
// one of them, so what it does while a step runs is done before it takes its share of that step. In a long step it goes on polling and
// publishing, as on the GPU: Pulse does it, from a thread of its own.
// Called by host/emulated_process.py, in a process of its own, with EngineParams over that process's memory.
// Test: pytest tests/host/test_engine.py
#include <emu/idle_backoff.h>
#include <emu/worker_threads.h>

#include <parking.cuh>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace blinkimp {
namespace {

constexpr u64 kPulseNs = 50'000'000;

// Polls and publishes during a step: heartbeats, answers to pings, acknowledgements. A prompt of thousands of tokens takes seconds here.
// I1  director_ is held by whoever calls the director: the loop's thread, except while the workers run; then this one, for a moment.
class Pulse {
 public:
  explicit Pulse(const EngineParams& params) : params_(params), loop_(director_), thread_([this] { run(); }) {}

  ~Pulse() {
    stops_ = true;
    loop_.unlock();
    wake_.notify_one();
    thread_.join();
  }

  Pulse(const Pulse&) = delete;
  Pulse& operator=(const Pulse&) = delete;

  // While a step is in flight: takes submissions, and those that can still be admitted to the next plan go into it.
  void look(const Lanes& lanes) {
    director_poll(params_, lanes);
    const u64 step = director_state(params_).status.step;
    director_plan_ahead(params_, lanes, plan_of_step(params_, step + 1));
  }

  template <typename Step>
  void during(Step&& step) {
    step_runs_ = true;
    loop_.unlock();
    step();
    loop_.lock();  // waits for a poll at most
    step_runs_ = false;
  }

 private:
  void run() {
    const Lanes lanes = Lanes::single();
    std::unique_lock<std::mutex> lock(director_);
    while (!stops_) {
      wake_.wait_for(lock, std::chrono::nanoseconds(kPulseNs));
      if (stops_ || !step_runs_) continue;
      look(lanes);
      director_publish(params_, lanes);
    }
  }

  const EngineParams& params_;
  std::mutex director_;
  std::condition_variable wake_;
  std::unique_lock<std::mutex> loop_;  // the loop's hold on director_
  bool step_runs_ = false;             // under director_
  bool stops_ = false;                 // under director_
  std::thread thread_;                 // last: it uses all of the above
};

}  // namespace
}  // namespace blinkimp

using namespace blinkimp;

extern "C" {

// num_bytes: [kNumWorkspaces], 0 = not used. Of params only counts and dims are read.
void bk_emulated_workspace_bytes(const EngineParams* params, u64* num_bytes) {
  for (u32 workspace_idx = 0; workspace_idx < kNumWorkspaces; ++workspace_idx) {
    num_bytes[workspace_idx] = reference_workspace_bytes(*params, workspace_idx);
  }
}

// 0, or 1 with the reason in message: this interpreter cannot run params.
int bk_emulated_device_check(const EngineParams* params, char* message, u64 message_bytes) {
  return check_program(*params, message, message_bytes);
}

// Returns when COMMAND_STOP was carried out (0), a fault is on the engine page (1), no thread could be made (2), or the engine has parked
// (3): the next call goes on.
int bk_emulated_device_run(const EngineParams* params) try {
  const Lanes lanes = Lanes::single();
  WorkerThreads workers(*params);
  IdleBackoff idle(params->idle_sleep_ns);
  Pulse pulse(*params);
  director_launch(*params, lanes);
  DirectorState& state = director_state(*params);
  for (u64 step = 0; !fault_recorded(*params);) {
    director_poll(*params, lanes);
    StepPlan* plan = plan_of_step(*params, step);
    const u32 num_rows = director_plan(*params, lanes, plan);
    if (plan->flags & kPlanExit) return 0;
    if (num_rows == 0) {
      director_publish(*params, lanes);
      if (director_may_park(*params, lanes) && director_is_quiet(*params)) {
        director_park(*params, lanes);
        return 3;
      }
      idle.wait();
      continue;
    }
    workers.start(*plan);
    director_note_start(*params, lanes, device_clock_ns());
    for (bool goes_on = true; goes_on; ++step) {
      StepPlan* next = plan_of_step(*params, step + 1);
      director_publish(*params, lanes);
      director_plan_ahead(*params, lanes, next);
      pulse.during([&] { workers.finish(); });
      if (fault_recorded(*params)) break;  // the step is not whole: nothing of it may be committed
      director_note_arrival(*params, lanes, device_clock_ns());
      pulse.look(lanes);
      goes_on = state.next_plan == kNextReady && !state.next_waits && !every_seq_was_stopped(*params, lanes, next);
      if (goes_on) {
        workers.start(*next);
        director_start_next(*params, lanes, device_clock_ns());
      }
      director_commit(*params, lanes, plan_of_step(*params, step));
    }
    idle.was_busy();
  }
  director_publish(*params, lanes);
  return 1;
} catch (const std::system_error&) {
  return 2;
}

}  // extern "C"
