// Lanes as threads: the director's warp code on several lanes of a CPU, so that ThreadSanitizer and the tests see every missing sync.
//
// Takes the place of device/lanes.cuh when tests/host/lanes stands before device/ on the include path (-DBK_TEST_LANES). Every member
// waits for all lanes, as a warp's converged instruction does; a lane that skips a call hangs the test instead of passing it.
// Used by tests/host/director_rig.py and tests/host/test_sanitizers.py
#pragma once
#include <ptx.cuh>

#include <pthread.h>

#include <thread>
#include <vector>

namespace blinkimp {

constexpr u32 kNumTestLanes = 4;

struct LaneGroup {
  pthread_barrier_t barrier;
  u32 values[kNumTestLanes];  // [lane], one collective call at a time

  LaneGroup() { pthread_barrier_init(&barrier, nullptr, kNumTestLanes); }
  ~LaneGroup() { pthread_barrier_destroy(&barrier); }
};

struct Lanes {
  u32 id;
  u32 count;
  LaneGroup* group = nullptr;  // null: one lane alone, `Lanes{0, 1}`

  bool is_first() const { return id == 0; }
  // The collectives below go on waiting where a planted fault takes the syncs away.
  void sync() const {
#if !defined(BK_PLANT_NO_SYNC)
    wait();
#endif
  }
  void wait() const {
    if (group != nullptr) pthread_barrier_wait(&group->barrier);
  }

  // Everybody's values, then `combine` over them. The second wait keeps the next call from overwriting what a slow lane still reads.
  template <typename Combine>
  u32 collect(u32 value, Combine combine) const {
    if (group == nullptr) return combine(&value, 1);
    group->values[id] = value;
    wait();
    const u32 result = combine(group->values, count);
    wait();
    return result;
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

  Lanes lane(u32 id) { return Lanes{id, kNumTestLanes, &group_}; }

  LaneGroup group_;
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
