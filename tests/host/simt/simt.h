// Runs CUDA device code on the CPU, one fiber a thread, so that index arithmetic of warp-level kernels is tested without a GPU.
//
// A fiber runs until it must wait for others: a warp operation (all 32 lanes exchange values) or a named barrier. Fibers are resumed warp
// by warp in a shuffled order, each warp as far as it gets, so a missing barrier shows as wrong data. Asynchronous copies land no sooner than their
// wait, for the same reason. One CTA at a time; one host thread.
// Used by tests/host/simt/*.cuh and attention_simt.cpp. Test: pytest tests/host/test_attention_simt.py
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace simt {

[[noreturn]] inline void fail(const char* what, unsigned long long got, unsigned long long expected) {
  std::fprintf(stderr, "simt: %s: got %llu, expected %llu\n", what, got, expected);
  std::abort();
}

struct PendingCopy {
  std::uint32_t destination;
  std::uint32_t num_bytes;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  const std::uint64_t* waits_for = nullptr;  // a generation counter; runnable once it differs from `seen`
  std::uint64_t seen = 0;
  std::vector<std::vector<PendingCopy>> copy_groups;  // committed, oldest first
  std::vector<PendingCopy> open_group;
};

struct Rendezvous {
  unsigned num_arrived = 0;
  std::uint64_t generation = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Rendezvous> warps;
  std::vector<std::vector<std::uint64_t>> lane_inputs;   // [warp][lane * 16 + word]
  std::vector<std::vector<std::uint64_t>> lane_outputs;
  Rendezvous barriers[16];
  ucontext_t scheduler;
  unsigned current = 0;
  std::vector<unsigned char> shared_memory;
  std::uint64_t num_bank_conflicts = 0;
  std::mt19937 random;
  std::function<void()> body;
  std::function<bool()> when_stuck;  // all fibers wait: makes something happen that they may wait for; false: there is nothing left

  void wait(Rendezvous& place) {
    Fiber& fiber = fibers[current];
    fiber.waits_for = &place.generation;
    fiber.seen = place.generation;
    swapcontext(&fiber.context, &scheduler);
  }

  // All 32 lanes bring `num_words` words; the last to come runs op(inputs of lane 0, outputs of lane 0; 16 words apart); outputs go back.
  template <class Op>
  void warp_operation(const std::uint64_t* in, unsigned num_in, std::uint64_t* out, unsigned num_out, Op op) {
    const unsigned warp = current / 32, lane = current % 32;
    std::memcpy(&lane_inputs[warp][lane * 16], in, num_in * 8);
    if (++warps[warp].num_arrived == 32) {
      op(lane_inputs[warp].data(), lane_outputs[warp].data());
      warps[warp].num_arrived = 0;
      ++warps[warp].generation;
    } else {
      wait(warps[warp]);
    }
    std::memcpy(out, &lane_outputs[warp][lane * 16], num_out * 8);
  }

  void barrier(unsigned id, unsigned num_threads) {
    if (++barriers[id].num_arrived == num_threads) {
      barriers[id].num_arrived = 0;
      ++barriers[id].generation;
    } else {
      wait(barriers[id]);
    }
  }

  unsigned char* shared(std::uint32_t address, unsigned num_bytes) {
    if (address + num_bytes > shared_memory.size()) fail("shared memory access ends at", address + num_bytes, shared_memory.size());
    return shared_memory.data() + address;
  }

  // run() in parts, for machines that take turns (simt90/grid.h): start, then pass after pass until none is left.
  struct Pass {
    bool any_left, any_ran;
  };
  void start(unsigned num_threads, unsigned shared_bytes, std::function<void()> work);
  Pass pass();  // each warp once, in a shuffled order, as far as it gets

  void run(unsigned num_threads, unsigned shared_bytes, std::function<void()> work);
};

inline Machine machine;

inline void fiber_main() {
  machine.body();
  machine.fibers[machine.current].done = true;
  swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

inline void Machine::start(unsigned num_threads, unsigned shared_bytes, std::function<void()> work) {
  constexpr unsigned kStackBytes = 128 * 1024;
  body = std::move(work);
  shared_memory.assign(shared_bytes, 0xff);  // NaN until written
  if (fibers.size() != num_threads) {
    fibers = std::vector<Fiber>(num_threads);
    for (Fiber& fiber : fibers) fiber.stack.reset(new char[kStackBytes]);
    warps.resize(num_threads / 32);
    lane_inputs.assign(num_threads / 32, std::vector<std::uint64_t>(32 * 16));
    lane_outputs = lane_inputs;
  }
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.copy_groups.clear();
    fiber.open_group.clear();
  }
}

inline Machine::Pass Machine::pass() {
  std::vector<unsigned> order(fibers.size() / 32);
  for (unsigned warp = 0; warp < order.size(); ++warp) order[warp] = warp;
  std::shuffle(order.begin(), order.end(), random);
  Pass result{false, false};
  for (unsigned warp : order) {
    for (bool progress = true; progress;) {  // this warp as far as it gets
      progress = false;
      for (unsigned thread = warp * 32; thread < warp * 32 + 32; ++thread) {
        Fiber& fiber = fibers[thread];
        if (fiber.done) continue;
        result.any_left = true;
        if (fiber.waits_for && *fiber.waits_for == fiber.seen) continue;
        fiber.waits_for = nullptr;
        current = thread;
        swapcontext(&scheduler, &fiber.context);
        progress = result.any_ran = true;
      }
    }
  }
  return result;
}

inline void Machine::run(unsigned num_threads, unsigned shared_bytes, std::function<void()> work) {
  start(num_threads, shared_bytes, std::move(work));
  for (;;) {
    const Pass result = pass();
    if (!result.any_left) return;
    if (!result.any_ran && !(when_stuck && when_stuck())) fail("deadlock: threads that wait for lanes or barriers which never come", 1, 0);
  }
}

}  // namespace simt

// ---- What CUDA gives device code -----------------------------------------------------------------------------------
struct ThreadIndex {
  struct X {
    operator unsigned() const { return simt::machine.current; }
  } x;
};
inline ThreadIndex threadIdx;

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

namespace simt {
template <class T, class Source>
T shuffle(T value, Source source) {
  static_assert(sizeof(T) <= 8, "one or two registers");
  std::uint64_t in[2] = {0, source}, out;
  std::memcpy(&in[0], &value, sizeof value);
  machine.warp_operation(in, 2, &out, 1, [](const std::uint64_t* inputs, std::uint64_t* outputs) {
    for (unsigned lane = 0; lane < 32; ++lane) outputs[lane * 16] = inputs[inputs[lane * 16 + 1] * 16];
  });
  std::memcpy(&value, &out, sizeof value);
  return value;
}
}  // namespace simt

inline unsigned simt_lane() { return simt::machine.current % 32; }
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return simt::shuffle(value, lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return simt::shuffle(value, simt_lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  return simt::shuffle(value, simt_lane() >= distance ? simt_lane() - distance : simt_lane());
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const std::uint64_t in = value;
  std::uint64_t out;
  simt::machine.warp_operation(&in, 1, &out, 1, [](const std::uint64_t* inputs, std::uint64_t* outputs) {
    std::uint64_t ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) ballot |= inputs[lane * 16] << lane;
    for (unsigned lane = 0; lane < 32; ++lane) outputs[lane * 16] = ballot;
  });
  return static_cast<unsigned>(out);
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
