// The fused tail of the LM head's product: row scale, logits of the sampled rows, and the best logit of every 56 columns of a row. GPU only.
//
// The best ones spare the sample op a pass over the vocabulary: a row of 128,256 logits has 2,291 of them.
// Called by device/gemm.cuh (the epilogue interface of gemm_epilogues.cuh). Test: pytest -m gpu tests/gpu/test_gemm.py tests/gpu/test_sampling_gpu.py
#pragma once
#include <gemm_epilogues.cuh>
#include <sampling_window.cuh>

namespace blinkimp {

constexpr u32 kLogitPartColumns = 56;  // half of the LM head's tile: what one warpgroup has in the narrow shape

BK_INLINE u32 num_logit_parts(u32 vocab) { return (vocab + kLogitPartColumns - 1) / kLogitPartColumns; }

// The largest of the 4 lanes' values that share a fragment row.
BK_INLINE u64 quad_max(u64 value) {
#pragma unroll
  for (u32 distance = 1; distance < 4; distance *= 2) {
    const u64 other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

struct LogitsEpilogue : ReadsNothing {
  const EngineParams& params;
  const Op& op;
  u32 num_rows;  // sampled ones
  static constexpr bool kTakesPieces = false;  // but 56 columns, for the best of them

  template <int kColumns>
  BK_INLINE static constexpr u32 step_columns() {
    return kLogitPartColumns;
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(const Nothing&, u32 row_begin, u32 column_begin, f32 (&d)[kColumns / 2], const Nothing&, const f32* row_scale) const {
    static_assert(kColumns % kLogitPartColumns == 0, "whole parts");
    constexpr u32 kPartBlocks = kLogitPartColumns / 8;
    const u32 num_parts = num_logit_parts(params.dims.vocab);
    const bool stores_pairs = params.dims.vocab % 2 == 0;  // stores of two logits: half as many. An odd vocabulary leaves rows unaligned
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      const bool is_live = row < num_rows;
      const f32 scale = row_scale[row % (2 * kRowTile)];
      f32* logits = reinterpret_cast<f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(row) * params.dims.vocab;
#pragma unroll
      for (u32 part = 0; part < kColumns / kLogitPartColumns; part++) {
        u32 best_key = 0;
        u32 best_column = 0;
        const auto consider = [&](u32 column, f32 logit) {
          const u32 key = is_live && column < op.out_features ? order_key(orderable_logit(logit)) : 0;
          const bool is_better = key > best_key;  // columns rise, so the first of equals stays
          best_key = is_better ? key : best_key;
          best_column = is_better ? column : best_column;
        };
#pragma unroll
        for (u32 block = part * kPartBlocks; block < (part + 1) * kPartBlocks; block++) {
          const u32 column = column_begin + fragment_column(block);
          const float2 pair{d[block * 4 + half * 2] * scale, d[block * 4 + half * 2 + 1] * scale};
          consider(column, pair.x);
          consider(column + 1, pair.y);
          if (!is_live || column >= op.out_features) continue;
          if (stores_pairs) {
            *reinterpret_cast<float2*>(logits + column) = pair;
          } else {
            logits[column] = pair.x;
            if (column + 1 < op.out_features) logits[column + 1] = pair.y;
          }
        }
        const u64 best = quad_max((static_cast<u64>(best_key) << 32) | (0xffffffffu - best_column));  // sampling::best_code()
        const u32 part_idx = column_begin / kLogitPartColumns + part;
        if (is_live && thread_idx() % 4 == 0 && part_idx < num_parts) reinterpret_cast<u64*>(params.workspaces[kWsLogitBest])[static_cast<u64>(row) * num_parts + part_idx] = best;
      }
    }
  }
};

}  // namespace blinkimp
