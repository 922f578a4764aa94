// The fused tail of gate and up: row scale, activation = silu(gate) * up, tiled for the down projection. GPU only.
//
// Packed rows stand 8 gate, 8 up, ...: blocks 2i and 2i + 1 meet in one thread, and give 8 columns of the activation.
// Called by device/worker.cuh (the interface of gemm_epilogues.cuh). Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_epilogues.cuh>

namespace blinkimp {

// x * sigmoid(x), to a few units of fp32: far below the bf16 that it becomes.
BK_INLINE f32 silu(f32 x) {
  constexpr f32 kLog2E = 1.44269504f;
  return __fmul_rn(x, reciprocal_approx(__fadd_rn(1.0f, exp2_approx(__fmul_rn(x, -kLog2E)))));
}

struct GateUpEpilogue : ReadsNothing {
  const EngineParams& params;
  const Op& op;
  u32 num_rows;
  static constexpr bool kTakesPieces = true;
  static constexpr bool kMeets = false;

  template <int kColumns>
  BK_INLINE static constexpr u32 step_columns() {
    return kColumns % 32 == 0 ? 32 : 16;
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(const Nothing&, u32 row_begin, u32 first_column, f32 (&d)[kColumns / 2], const Nothing&, const f32* row_scale) const {
    static_assert(kColumns % 16 == 0, "gate and up blocks come in pairs");
    const u32 column_begin = uniform(first_column);
    const u32 row = row_begin + fragment_row(0);  // the second one is 8 further: in the same tile, if it exists
    const u32 tile_rows = kWide ? kRowTile : input_tile_rows(num_rows);
    u8* base = reinterpret_cast<u8*>(params.workspaces[kWsActivation]) + tiled_row_bytes(row, params.dims.intermediate / kSliceColumns, tile_rows) + 2 * lane_column();
    const f32 scales[2] = {row_scale[row % (2 * kRowTile)], row_scale[row % (2 * kRowTile) + 8]};
    const bool exists[2] = {row < num_rows, row + 8 < num_rows};
    if (kWide || __any_sync(0xffffffffu, exists[0])) {  // a narrow step has warps without a row
      scale_fragment(d, scales);
      add_bias(d, op, column_begin);
      u32 packed[2][kColumns / 16];  // [half][pair]
#pragma unroll
      for (u32 i = 0; i < kColumns / 8; i++) {
        const f32* gate = d + i / 2 * 8 + i % 2 * 2;
        const f32* up = gate + 4;
        packed[i % 2][i / 2] = pack_bf16x2(__fmul_rn(silu(gate[0]), up[0]), __fmul_rn(silu(gate[1]), up[1]));
      }
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        if (!exists[half]) continue;
#pragma unroll
        for (u32 pair = 0; pair < kColumns / 16; pair++) {
          const u32 weight_row = column_begin + pair * 16;
          if (weight_row >= op.out_features) break;
          *reinterpret_cast<u32*>(base + half * (8 * kSliceColumns * 2) + tiled_chunk_bytes(row, weight_row / 2, tile_rows)) = packed[half][pair];
        }
      }
    }
  }
};

}  // namespace blinkimp
