// The tail of the LM head: a warpgroup's fragment of products -> logits of the sampled rows, and the best of each row's tile. GPU only.
//
// The best ones spare the sample op a pass over the vocabulary: a row of 128,256 logits has 1,146 tiles of 112.
// Called by device/worker.cuh with the fragment (64 rows x kTileRows, layout in gemm.cuh), its first row and the weight tile's index.
// Test: pytest -m gpu tests/gpu/test_gemm.py tests/gpu/test_sampling_gpu.py
#pragma once
#include <gemm.cuh>
#include <sampling_window.cuh>

namespace blinkimp {

BK_INLINE u32 num_logit_tiles(u32 vocab, u32 tile_rows) { return (vocab + tile_rows - 1) / tile_rows; }

// The larger of the 4 lanes' values that share a fragment row.
BK_INLINE u64 quad_max(u64 value) {
#pragma unroll
  for (u32 distance = 1; distance < 4; distance *= 2) {
    const u64 other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

template <int kTileRows>
struct LogitsEpilogue {
  const EngineParams& params;
  const Op& op;
  u32 num_rows;

  BK_INLINE void operator()(u32 row_begin, u32 tile_idx, f32 (&d)[kTileRows / 2]) const {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      const bool is_live = row < num_rows;
      const f32 scale = is_live ? reinterpret_cast<const f32*>(params.workspaces[kWsSampledScale])[row] : 0.0f;
      f32* logits = reinterpret_cast<f32*>(params.workspaces[kWsLogits]) + static_cast<u64>(row) * params.dims.vocab;
      u32 best_key = 0;
      u32 best_column = 0;
      const auto put = [&](u32 column, f32 logit) {
        if (!is_live || column >= op.out_features) return;
        logits[column] = logit;  // one by one: an odd vocabulary leaves rows unaligned
        const u32 key = order_key(orderable_logit(logit));
        if (key > best_key) {  // columns rise, so the first of equals stays
          best_key = key;
          best_column = column;
        }
      };
#pragma unroll
      for (u32 block = 0; block < kTileRows / 8; block++) {
        const u32 column = tile_idx * kTileRows + fragment_column(block);
        put(column, d[block * 4 + half * 2] * scale);
        put(column + 1, d[block * 4 + half * 2 + 1] * scale);
      }
      const u64 best = quad_max((static_cast<u64>(best_key) << 32) | (0xffffffffu - best_column));  // sampling::best_code()
      if (is_live && thread_idx() % 4 == 0) {
        reinterpret_cast<u64*>(params.workspaces[kWsLogitBest])[static_cast<u64>(row) * num_logit_tiles(params.dims.vocab, kTileRows) + tile_idx] = best;
      }
    }
  }
};

}  // namespace blinkimp
