// The pauses of an idle director on a CPU: it spins for a moment, then sleeps, each time twice as long, up to idle_sleep_ns.
//
// Called by emulated_device.cpp and orchestrator.h. Test: pytest tests/host/test_engine.py
#pragma once
#include <emu/thread_barrier.h>

namespace blinkimp {

// An idle director goes on looking for this long before it sleeps between looks: the answer to a token often brings the next request.
constexpr u64 kIdleSpinNs = 50'000;
constexpr u32 kFirstSleepNs = 20'000;

class IdleBackoff {
 public:
  explicit IdleBackoff(u32 idle_sleep_ns) : idle_sleep_ns_(idle_sleep_ns) {}

  void was_busy() {
    busy_until_ns_ = device_clock_ns() + kIdleSpinNs;
    next_sleep_ns_ = kFirstSleepNs;
  }

  void wait() {
    if (device_clock_ns() < busy_until_ns_) {
      pause_cpu();
      return;
    }
    if (next_sleep_ns_ > idle_sleep_ns_) next_sleep_ns_ = idle_sleep_ns_;
    sleep_ns(next_sleep_ns_);
    next_sleep_ns_ *= 2;
  }

 private:
  const u32 idle_sleep_ns_;
  u32 next_sleep_ns_ = kFirstSleepNs;
  u64 busy_until_ns_ = 0;
};

}  // namespace blinkimp
