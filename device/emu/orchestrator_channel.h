// The driver's place between a host that schedules and the emulated device: commands with a doorbell, and memory that both see.
//
//   host                                             device process
//   fills batches[n & 1], commands[n & 1]
//   commanded = n + 1, rings   ------------------>   applies the batch, runs the step, copies what was sampled
//   reads what was sampled     <------------------   completed = n + 1, rings
//
// A memfd of bk_step_channel_bytes(), zeroed, that host/emulated_device.py makes and the device's process inherits. Nobody spins for long:
// waiting threads sleep in the kernel, as a driver's do. Called by orchestrator_emulated.cpp. Test: pytest tests/host/test_cpu_orchestrator.py
//
// Invariants:
//   E1  commanded - completed <= 2; batches[k] and commands[k] belong to the host while no command in between is of that parity.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <emu/thread_barrier.h>
#include <step_update.cuh>

namespace blinkimp {

enum StepCommandKind : u32 {
  kStepApply = 1,  // the batch alone
  kStepRun = 2,    // and the step that it describes
  kStepExit = 3,
};

struct StepCommand {
  u32 kind;      // StepCommandKind
  u32 has_tops;  // top logprobs are wanted
};

struct alignas(64) ChannelWord {
  u32 value;  // only grows
};

struct StepChannel {
  ChannelWord commanded;     // writer: host; reader: device
  ChannelWord completed;     // writer: device; reader: host
  ChannelWord is_faulted;    // writer: device, before `completed`: its fault is on the engine page
  StepCommand commands[2];   // writer: host; reader: device
  UpdateBatch batches[2];    // likewise
};

constexpr u64 kResultAlignBytes = 64;

inline u64 sampled_bytes(const EngineParams& params) { return u64{2} * params.max_batch * sizeof(SampleResult); }
inline u64 top_logprobs_bytes(const EngineParams& params) { return sampled_bytes(params) * kMaxTopLogprobs; }
inline u64 sampled_offset() { return (sizeof(StepChannel) + kResultAlignBytes - 1) / kResultAlignBytes * kResultAlignBytes; }
inline u64 top_logprobs_offset(const EngineParams& params) { return sampled_offset() + sampled_bytes(params); }

// ---- Doorbell ----------------------------------------------------------------------------------------------------
constexpr u64 kDoorbellSpinNs = 20'000;  // a small model's step; a sleep and a wake-up cost as much

inline void ring(ChannelWord& word, u32 value) {
  st_release_sys(&word.value, value);  // pairs with wait_for_ring()
  syscall(SYS_futex, &word.value, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
}

// Until the word has reached `wanted` or the clock until_ns. Returns whether it has. Acquire: what stood there before the ring is seen.
inline bool wait_for_ring(const ChannelWord& word, u32 wanted, u64 until_ns) {
  const u64 begin_ns = device_clock_ns();
  for (;;) {
    const u32 seen = ld_acquire_sys(&word.value);  // pairs with ring()
    if (static_cast<i32>(seen - wanted) >= 0) return true;
    const u64 now_ns = device_clock_ns();
    if (now_ns >= until_ns) return false;
    if (now_ns - begin_ns < kDoorbellSpinNs) {
      pause_cpu();
      continue;
    }
    const u64 left_ns = until_ns - now_ns;
    const timespec timeout{static_cast<time_t>(left_ns / 1'000'000'000), static_cast<long>(left_ns % 1'000'000'000)};
    syscall(SYS_futex, &word.value, FUTEX_WAIT, seen, &timeout, nullptr, 0);
  }
}

}  // namespace blinkimp
