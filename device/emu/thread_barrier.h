// Barrier of the emulated device's worker threads: spins for the length of an op, then sleeps in the kernel.
//
// Called by reference_ops.cpp between ops, and by the emulated device's loop between steps (an idle engine sleeps there).
// Test: pytest tests/host/test_reference_invariance.py (and the same under tools/build_native.py --sanitize thread)
//
// I1  A word's generation only grows, by its one writer; bit 0 says that somebody sleeps on the word.
// I2  The sleeper sets bit 0 and the writer takes it away by compare-and-swap on the same word, so no wake-up is lost.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ptx.cuh>

namespace blinkimp {

// How long a wait spins before it sleeps: it doubles when spinning paid and halves when it did not, so threads that outnumber
// their cores soon stop burning them. Yielding instead gives the core to whoever else is busy for a slice of milliseconds: measured
// five times slower for a small model beside one busy process (Linux 6.1, 2 cores).
constexpr u64 kMostSpinNs = 200'000;
constexpr u64 kLeastSpinNs = 5'000;
constexpr u32 kPollsPerClock = 32;
constexpr u32 kMaxWorkerThreads = 256;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// A generation counter that one thread advances and others wait for. Alone on its cache line.
struct alignas(64) GenerationWord {
  u64 state = 0;  // generation << 1 | sleepers

  u64 generation() const { return ld_acquire_sys(&state) >> 1; }  // acquire: pairs with the swap in advance()

  void advance() {
    u64 seen = ld_relaxed_sys(&state);  // relaxed: only a guess, the swap decides
    for (;;) {
      const u64 found = cas_acq_rel_sys(&state, seen, ((seen >> 1) + 1) << 1);
      if (found == seen) break;
      seen = found;
    }
    if (seen & 1) syscall(SYS_futex, futex_word(), FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
  }

  void wait_for(u64 wanted) {
    u64 spin_ns = kMostSpinNs;
    wait_for(wanted, &spin_ns);
  }

  // *spin_ns: the waiting thread's own budget, kept from wait to wait.
  void wait_for(u64 wanted, u64* spin_ns) {
    for (u32 poll = 0; poll < kPollsPerClock; ++poll) {
      if (generation() >= wanted) return;
      pause_cpu();
    }
    const u64 end_ns = device_clock_ns() + *spin_ns;
    do {
      for (u32 poll = 0; poll < kPollsPerClock; ++poll) {
        if (generation() >= wanted) {
          *spin_ns = *spin_ns * 2 < kMostSpinNs ? *spin_ns * 2 : kMostSpinNs;
          return;
        }
        pause_cpu();
      }
    } while (device_clock_ns() < end_ns);
    *spin_ns = *spin_ns / 2 > kLeastSpinNs ? *spin_ns / 2 : kLeastSpinNs;
    for (;;) {
      u64 seen = ld_acquire_sys(&state);
      if ((seen >> 1) >= wanted) return;
      if ((seen & 1) == 0 && cas_acq_rel_sys(&state, seen, seen | 1) != seen) continue;
      syscall(SYS_futex, futex_word(), FUTEX_WAIT_PRIVATE, static_cast<u32>(seen | 1), nullptr, nullptr, 0);
    }
  }

 private:
  // The low half of the state: the kernel compares 32 bits, enough to see one advance.
  u32* futex_word() { return reinterpret_cast<u32*>(&state) + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 1 : 0); }
};
static_assert(sizeof(GenerationWord) == 64, "one cache line");

class ThreadBarrier {
 public:
  explicit ThreadBarrier(u32 num_threads) : num_threads_(num_threads < kMaxWorkerThreads ? num_threads : kMaxWorkerThreads) {}

  u32 num_threads() const { return num_threads_; }

  // All threads call it, each with its own index; what any wrote before is visible to all after.
  void wait(u32 thread_idx) {
    const u64 next = (ld_relaxed_sys(&arrived_[thread_idx].state) >> 1) + 1;  // relaxed: this thread's own word
    arrived_[thread_idx].advance();
    u64* spin_ns = &spins_[thread_idx].budget_ns;
    if (thread_idx == 0) {
      for (u32 other = 1; other < num_threads_; ++other) arrived_[other].wait_for(next, spin_ns);
      released_.advance();
    } else {
      released_.wait_for(next, spin_ns);
    }
  }

 private:
  struct alignas(64) Spin {
    u64 budget_ns = kMostSpinNs;
  };

  const u32 num_threads_;
  GenerationWord released_;                     // writer: thread 0
  GenerationWord arrived_[kMaxWorkerThreads];  // writer: the thread of that index; reader: thread 0
  Spin spins_[kMaxWorkerThreads];              // the thread's own
};

}  // namespace blinkimp
