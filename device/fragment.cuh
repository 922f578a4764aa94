// The products of one warpgroup as wgmma leaves them in registers, and how a fused tail walks over them. GPU only.
//
// A tail (gemm_epilogues.cuh) runs once an op and layer, and by then the instruction caches are full of other code: an instruction that is not there costs 10 to 25
// clk, one that is there 2 (PERFORMANCE.md). So there is one copy of a tail's code for all columns, but for a few steps (kMostUnrolledSteps): it takes them in
// steps, and since registers have no index the fragment moves down a step in each turn.
// Used by device/gemm.cuh, gemm_wide.cuh, the epilogues, attention's ways out. Test: pytest -m gpu tests/gpu/test_gemm.py; without a GPU: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <activation_layout.cuh>

namespace blinkimp {

// Where a fragment register lies: thread t of a warpgroup holds, for h in {0, 1} and block j, columns 8j + 2(t mod 4) + {0, 1} of row
// 16(t / 32) + (t mod 32) / 4 + 8h in d[4j + 2h] and d[4j + 2h + 1].
BK_INLINE u32 fragment_row(u32 half) {
  const u32 thread = thread_idx();  // once: it is read anew at each call
  return thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * half;
}
BK_INLINE u32 fragment_column(u32 block) { return 8 * block + (thread_idx() % 4) * 2; }

// values[i] = values[i + kBy]; the last kBy stay.
template <int kBy, int kCount, class Value>
BK_INLINE void move_down(Value (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i + kBy < kCount; i++) values[i] = values[i + kBy];
}

struct Nothing {};

// The base of an epilogue that reads nothing but the products.
struct ReadsNothing {
  static constexpr u32 kMostUnrolledSteps = 1;
  static constexpr u32 kTailRegisters = 0;
  using Rows = Nothing;
  template <int>
  using Loaded = Nothing;

  BK_INLINE Nothing rows(u32) const {
    return Nothing{};
  }
  template <int>
  BK_INLINE Nothing prefetch(const Nothing&, u32, u32) const {
    return Nothing{};
  }
};

// A fragment's tail: what it reads is on its way steps ahead, as many as there are registers for beside the products (kAhead). Behind what the rings have on
// theirs a load takes thousands of clk.
template <int kColumns, bool kWide, class Epilogue>
struct FragmentTail {
  static constexpr u32 kStep = Epilogue::template step_columns<kColumns>();
  static constexpr u32 kSteps = kColumns / kStep;
  static_assert(kColumns % kStep == 0, "whole steps");
  using Rows = typename Epilogue::Rows;
  using Loaded = typename Epilogue::template Loaded<kStep>;
  static constexpr u32 kLoadedWords = sizeof(Loaded) / 4;
  static constexpr u32 kFitting = kLoadedWords == 0 ? kSteps : (Epilogue::kTailRegisters - kColumns / 2) / kLoadedWords;
  static constexpr u32 kAhead = kFitting < 1 ? 1 : (kFitting < kSteps ? kFitting : kSteps);

  const Epilogue& epilogue;
  u32 row_begin;
  u32 column_begin;
  Rows rows;
  Loaded loaded[kAhead];  // [steps from now]

  // Before the main loop.
  BK_INLINE FragmentTail(const Epilogue& tail, u32 first_row, u32 first_column) : epilogue(tail), row_begin(first_row), column_begin(first_column), rows(tail.rows(first_row)) {
#pragma unroll
    for (u32 i = 0; i < kAhead; i++) loaded[i] = load(column_begin + i * kStep);
  }

  // With the products; d is used up.
  BK_INLINE void finish(f32 (&d)[kColumns / 2], const f32* row_scale) {
    u32 column = column_begin;
#pragma unroll (kSteps <= Epilogue::kMostUnrolledSteps ? kSteps : 1)
    for (u32 step = 0; step < kSteps; step++) {
      epilogue.template finish<kStep, kWide>(rows, row_begin, column, reinterpret_cast<f32(&)[kStep / 2]>(d), loaded[0], row_scale);
      move_down<kStep / 2>(d);
      move_down<1>(loaded);
      if constexpr (kAhead < kSteps) {
        if (step + kAhead < kSteps) loaded[kAhead - 1] = load(column + kAhead * kStep);
      }
      column += kStep;
    }
  }

 private:
  BK_INLINE Loaded load(u32 column) const { return epilogue.template prefetch<kStep>(rows, row_begin, column); }
};

}  // namespace blinkimp
