// Lanes as threads: the director's warp code on several lanes of a CPU, so that ThreadSanitizer and the tests see every missing sync.
//
// Takes the place of device/lanes.cuh when tests/host/lanes stands before device/ on the include path (-DBK_TEST_LANES). Every member
// waits for all lanes, as a warp's converged instruction does; a lane that skips a call hangs the test instead of passing it. As on the
// GPU only sync() orders memory: the collectives wait with relaxed atomics, from which ThreadSanitizer infers nothing.
// Used by tests/host/director_rig.py and tests/host/test_sanitizers.py
#pragma once
#include <ptx.cuh>

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <thread>
#include <vector>

namespace blinkimp {

constexpr u32 kNumTestLanes = 4;

struct LaneGroup {
  pthread_barrier_t barrier;
  u32 values[2][kNumTestLanes];  // [parity of the collective call][lane]
  u64 num_arrived = 0;           // at collective calls, all lanes together

  LaneGroup() { pthread_barrier_init(&barrier, nullptr, kNumTestLanes); }
  ~LaneGroup() { pthread_barrier_destroy(&barrier); }

  // The last to arrive wakes the others. They sleep in the kernel, as on a busy CPU a thread that only yields waits a time slice of others
  // at each look. (x86-64: the low word comes first.)
  void arrive_and_wait(u64 num_awaited) {
    u32* const word = reinterpret_cast<u32*>(&num_arrived);
    if (__atomic_add_fetch(&num_arrived, 1, __ATOMIC_RELAXED) == num_awaited) {
      syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, kNumTestLanes, nullptr, nullptr, 0);
      return;
    }
    for (;;) {
      const u64 seen = __atomic_load_n(&num_arrived, __ATOMIC_RELAXED);
      if (seen >= num_awaited) return;
      syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, static_cast<u32>(seen), nullptr, nullptr, 0);  // at once where it has changed
    }
  }
};

struct Lanes {
  u32 id;
  u32 count;
  LaneGroup* group = nullptr;     // null: one lane alone, `Lanes{0, 1}`
  u64* num_calls = nullptr;       // of collectives, by this lane

  bool is_first() const { return id == 0; }
  void sync() const {
#if !defined(BK_PLANT_NO_SYNC)
    if (group != nullptr) pthread_barrier_wait(&group->barrier);
#endif
  }

  // Everybody's values, then `combine` over them. Two sets of values: a lane that writes for call n + 2 has seen everybody arrive at
  // call n + 1, so nobody reads those of call n any more.
  template <typename Combine>
  u32 collect(u32 value, Combine combine) const {
    if (group == nullptr) return combine(&value, 1);
    const u64 call = (*num_calls)++;
    u32* shared = group->values[call & 1];
    __atomic_store_n(&shared[id], value, __ATOMIC_RELAXED);
    group->arrive_and_wait((call + 1) * count);
    u32 seen[kNumTestLanes];
    for (u32 i = 0; i < count; ++i) seen[i] = __atomic_load_n(&shared[i], __ATOMIC_RELAXED);
    return combine(seen, count);
  }

  bool any(bool value) const {
    return collect(value ? 1 : 0, [](const u32* values, u32 n) {
             u32 found = 0;
             for (u32 i = 0; i < n; ++i) found |= values[i];
             return found;
           }) != 0;
  }
  u32 broadcast(u32 value, u32 source_lane) const {
    return collect(value, [=](const u32* values, u32) { return values[source_lane]; });
  }
  u64 clock_ns() const {
    const u64 now_ns = device_clock_ns();
    const u32 low = broadcast(static_cast<u32>(now_ns), 0);
    return u64{broadcast(static_cast<u32>(now_ns >> 32), 0)} << 32 | low;
  }
  u32 sum(u32 value) const {
    return collect(value, [](const u32* values, u32 n) {
      u32 total = 0;
      for (u32 i = 0; i < n; ++i) total += values[i];
      return total;
    });
  }
  u32 max(u32 value) const {
    return collect(value, [](const u32* values, u32 n) {
      u32 highest = 0;
      for (u32 i = 0; i < n; ++i) highest = values[i] > highest ? values[i] : highest;
      return highest;
    });
  }
  u32 exclusive_sum(u32 value) const {
    const u32 lane = id;
    return collect(value, [=](const u32* values, u32) {
      u32 total = 0;
      for (u32 i = 0; i < lane; ++i) total += values[i];
      return total;
    });
  }
};

// Runs `call` once on every lane and returns when all have. Threads that live as long as the process: a call costs two waits.
class TestLanes {
 public:
  static TestLanes& instance() {
    static TestLanes* lanes = new TestLanes;  // never destroyed: its threads must not outlive it at exit
    return *lanes;
  }

  template <typename Call>
  void run(Call& call) {
    context_ = &call;
    invoke_ = [](void* context, const Lanes& lanes) { (*static_cast<Call*>(context))(lanes); };
    pthread_barrier_wait(&begin_);
    invoke_(context_, lane(0));
    pthread_barrier_wait(&end_);
  }

 private:
  TestLanes() {
    pthread_barrier_init(&begin_, nullptr, kNumTestLanes);
    pthread_barrier_init(&end_, nullptr, kNumTestLanes);
    for (u32 id = 1; id < kNumTestLanes; ++id) {
      std::thread([this, id] {
        for (;;) {
          pthread_barrier_wait(&begin_);
          invoke_(context_, lane(id));
          pthread_barrier_wait(&end_);
        }
      }).detach();
    }
  }

  Lanes lane(u32 id) { return Lanes{id, kNumTestLanes, &group_, &num_calls_[id * 16]}; }

  LaneGroup group_;
  u64 num_calls_[kNumTestLanes * 16] = {};  // [lane], a line each
  pthread_barrier_t begin_;
  pthread_barrier_t end_;
  void* context_ = nullptr;                          // the caller's, between begin_ and end_
  void (*invoke_)(void*, const Lanes&) = nullptr;
};

template <typename Call>
void run_on_test_lanes(Call call) {
  TestLanes::instance().run(call);
}

}  // namespace blinkimp
