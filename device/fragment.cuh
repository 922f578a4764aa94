// The products of one warpgroup as wgmma leaves them in registers, and how a fused tail walks over them. GPU only.
//
// A tail (gemm_epilogues.cuh) runs once an op and layer, and by then the instruction caches are full of other code: an instruction that is not there costs 10 to 25
// clk, one that is there 2 (PERFORMANCE.md). So there is one copy of a tail's code for all columns: it takes them in steps, and since registers have no index
// the fragment moves down a step in each turn.
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
  static constexpr u32 kMostRolledSteps = 16;
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
  template <int>
  BK_INLINE void fetch_to_l2(const Nothing&, u32, u32) const {}
};

// A fragment's tail: what it reads is on its way steps ahead. Behind what the rings have on theirs a load takes 3,000 to 6,000 clk, so as many are sent as
// there are registers for: each step that is done leaves its products' and its loads'.
template <int kColumns, bool kWide, class Epilogue>
struct FragmentTail {
  static constexpr u32 kStep = Epilogue::template step_columns<kColumns>();
  static constexpr u32 kSteps = kColumns / kStep;
  static_assert(kColumns % kStep == 0, "whole steps");
  using Rows = typename Epilogue::Rows;
  using Loaded = typename Epilogue::template Loaded<kStep>;
  static constexpr u32 kLoadedWords = sizeof(Loaded) / 4;
  // Rolled: all steps' loads are held through the main loop, so they must fit beside its products.
  static constexpr bool kIsRolled = kSteps == 1 || (kSteps <= Epilogue::kMostRolledSteps && (kLoadedWords == 0 || kSteps * kLoadedWords + kColumns / 2 <= Epilogue::kTailRegisters));
  // Steps whose loads are sent by the beginning of a step, those that fit beside the products that are left; its own by then in any case.
  BK_INLINE static constexpr u32 loads_sent(u32 step) {
    const u32 num_products = (kSteps - step) * kStep / 2;
    const u32 num_free = Epilogue::kTailRegisters > num_products ? Epilogue::kTailRegisters - num_products : 0;
    const u32 num_sent = step + num_free / kLoadedWords;
    return num_sent < kSteps ? num_sent : kSteps;
  }
  static constexpr u32 kFirst = kIsRolled ? kSteps : loads_sent(0);  // before the main loop: where steps are rolled all, for what moves down must have come

  const Epilogue& epilogue;
  u32 row_begin;
  u32 column_begin;
  Rows rows;
  Loaded loaded[kSteps];  // [step]

  BK_INLINE FragmentTail(const Epilogue& tail, u32 first_row, u32 first_column) : epilogue(tail), row_begin(first_row), column_begin(first_column), rows(tail.rows(first_row)) {
#pragma unroll
    for (u32 i = 0; i < kFirst; i++) load(i);
    if constexpr (kFirst < kSteps && BK_FETCH) epilogue.template fetch_to_l2<kColumns>(rows, row_begin, column_begin);
  }

  // With the products; d is used up.
  BK_INLINE void finish(f32 (&d)[kColumns / 2], const f32* row_scale) {
    u32 column = column_begin;
#pragma unroll (kIsRolled ? 1 : kSteps)
    for (u32 step = 0; step < kSteps; step++) {
      if constexpr (!kIsRolled) {
#pragma unroll
        for (u32 i = kFirst; i < kSteps; i++) {
          const bool is_sent = i < (step > 0 ? loads_sent(step - 1) : kFirst);
          if (!is_sent && (i == step || i < loads_sent(step))) load(i);
        }
      }
      epilogue.template finish<kStep, kWide>(rows, row_begin, column, reinterpret_cast<f32(&)[kStep / 2]>(d), loaded[kIsRolled ? 0 : step], row_scale);
      column += kStep;
      move_down<kStep / 2>(d);
      if constexpr (kIsRolled) move_down<1>(loaded);
    }
  }

 private:
  BK_INLINE void load(u32 step) { loaded[step] = epilogue.template prefetch<kStep>(rows, row_begin, column_begin + step * kStep); }
};

}  // namespace blinkimp
