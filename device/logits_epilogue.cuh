// The tail of the LM head: a warpgroup's fragment of products -> logits of the sampled rows. GPU only.
//
// Called by device/worker.cuh with the fragment (64 rows x kTileRows, layout in gemm.cuh), its first row and the weight tile's index.
// Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm.cuh>

namespace blinkimp {

// kOpLmHead: logits of the sampled rows.
template <int kTileRows>
struct LogitsEpilogue {
  const EngineParams& params;
  const Op& op;
  u32 num_rows;

  BK_INLINE void operator()(u32 row_begin, u32 tile_idx, f32 (&d)[kTileRows / 2]) const {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      if (row >= num_rows) continue;
      const f32 scale = reinterpret_cast<const f32*>(params.workspaces[kWsSampledScale])[row];
      f32* logits = reinterpret_cast<f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(row) * params.dims.vocab;
#pragma unroll
      for (u32 block = 0; block < kTileRows / 8; block++) {
        const u32 column = tile_idx * kTileRows + fragment_column(block);
        const f32 low = d[block * 4 + half * 2] * scale;
        const f32 high = d[block * 4 + half * 2 + 1] * scale;
        if (column < op.out_features) logits[column] = low;  // an odd vocabulary leaves rows unaligned: no paired store
        if (column + 1 < op.out_features) logits[column + 1] = high;
      }
    }
  }
};

}  // namespace blinkimp
