// The fused tail of the LM head's product: row scale, logits of the sampled rows. GPU only.
//
// Called by device/gemm.cuh (the epilogue interface of gemm_epilogues.cuh). Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_epilogues.cuh>

namespace blinkimp {

struct LogitsEpilogue {
  const EngineParams& params;
  const Op& op;
  u32 num_rows;  // sampled ones

  template <int kColumns, bool kWide>
  BK_INLINE NothingPrefetched prefetch(u32, u32) const {
    return NothingPrefetched{};
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(u32 row_begin, u32 column_begin, f32 (&d)[kColumns / 2], const NothingPrefetched&, const f32* row_scale) const {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      if (row >= num_rows) continue;
      const f32 scale = row_scale[row % (2 * kRowTile)];
      f32* logits = reinterpret_cast<f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(row) * params.dims.vocab;
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        const u32 column = column_begin + fragment_column(block);
        const f32 low = d[block * 4 + half * 2] * scale;
        const f32 high = d[block * 4 + half * 2 + 1] * scale;
        if (column < op.out_features) logits[column] = low;  // an odd vocabulary leaves rows unaligned: no paired store
        if (column + 1 < op.out_features) logits[column + 1] = high;
      }
    }
  }
};

}  // namespace blinkimp
