// The interpreter's threads: thread 0 is the caller's own, the others wait for a step and run their share of it.
//
// Called by emulated_device.cpp and orchestrator_emulated.cpp. Test: pytest tests/host/test_engine.py
#pragma once
#include <emu/reference_ops.h>

#include <thread>
#include <vector>

namespace blinkimp {

// Threads 1 .. num_workers - 1.
class WorkerThreads {
 public:
  explicit WorkerThreads(const EngineParams& params) : params_(params), barrier_(params.num_workers) {
    try {
      for (u32 thread_idx = 1; thread_idx < params.num_workers; ++thread_idx) {
        threads_.emplace_back([this, thread_idx] { work(thread_idx); });
      }
    } catch (...) {
      leave();  // those that could be made
      throw;
    }
  }

  ~WorkerThreads() { leave(); }

  WorkerThreads(const WorkerThreads&) = delete;
  WorkerThreads& operator=(const WorkerThreads&) = delete;

  // The others set out.
  void start(const StepPlan& plan) {
    plan_ = &plan;
    steps_.advance();  // hands plan_ over: pairs with wait_for() in work()
  }

  // The caller's share of the step that was started. The last op's barrier has let everybody through when it returns, so the plan may be
  // written again.
  void finish() { run_program(params_, *plan_, 0, barrier_); }

 private:
  void leave() {
    plan_ = nullptr;
    steps_.advance();
    for (std::thread& thread : threads_) thread.join();
  }

  void work(u32 thread_idx) {
    u64 spin_ns = kMostSpinNs;
    for (u64 step = 1;; ++step) {
      steps_.wait_for(step, &spin_ns);  // asleep in the kernel while the engine is idle
      const StepPlan* plan = plan_;
      if (plan == nullptr) return;
      run_program(params_, *plan, thread_idx, barrier_);
    }
  }

  const EngineParams& params_;
  ThreadBarrier barrier_;
  GenerationWord steps_;            // writer: the director's thread; readers: the others
  const StepPlan* plan_ = nullptr;  // of the step that runs; null: leave
  std::vector<std::thread> threads_;
};

}  // namespace blinkimp
