// The activations between ops: the workspaces of the GPU interpreter and the tiled layout that GEMMs read. GPU only.
//
// Written by the epilogues (gemm_epilogues.cuh), attention and the embed op; read through the input ring (gemm.cuh).
// host/gpu_memory.py allocates by the same list. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

constexpr u32 kSliceColumns = 64;  // k per slice: 128 bytes of bf16, the swizzle's width
constexpr u32 kRowTile = 64;       // wgmma's M

// Workspaces of the GPU interpreter (EngineParams.workspaces); rows padded to 128. host/gpu_memory.py allocates by the same list.
enum Workspace : u32 {
  kWsHidden = 0,         // f32 [rows, hidden]
  kWsNormed = 1,         // bf16 tiled input, hidden columns: hidden * gain of the next norm
  kWsQuery = 2,          // bf16 [rows, num_heads * head_dim], pairs of the rotation adjacent
  kWsAttention = 3,      // bf16 tiled input, num_heads * head_dim columns
  kWsActivation = 4,     // bf16 tiled input, intermediate columns
  kWsSquares = 5,        // f32 [rows, hidden / 32]: sums of squares of 32 hidden columns
  kWsLogits = 6,         // f32 [max_batch, vocab]
  kWsSampledInput = 7,    // bf16 tiled input, hidden columns, sampled rows only
  kWsSampledSquares = 8,  // f32 [max_batch, hidden / 32]: the sampled rows of kWsSquares
  kWsAttentionPart = 9,  // attention's partial results
  kWsLogitBest = 10,     // u64 [max_batch, ceil(vocab / 56)]: the best logit of every 56 columns (logits_epilogue.cuh)
  kWsRowScales = 11,     // u64 [rows]: a step's row scales, from CTA to CTA (row_scales.cuh)
};
constexpr u32 kSquaresColumns = 32;

// Rows of a tile of a tiled input: as few as hold a step of at most 64 rows, so that one bulk copy brings several slices.
BK_INLINE u32 input_tile_rows(u32 num_rows) { return num_rows <= 8 ? 8 : (num_rows <= 16 ? 16 : (num_rows <= 32 ? 32 : 64)); }

// Element offset of (row, column) in a tiled input of num_slices slices: [row / tile_rows][column / 64][tile_rows rows][64 columns], the 16-byte
// chunks of a row exchanged by the 128-byte swizzle (chunk ^= row mod 8), so that a bulk copy brings what wgmma reads.
BK_INLINE u64 tiled_offset(u32 row, u32 column, u32 num_slices, u32 tile_rows) {
  u32 within = (row % tile_rows) * kSliceColumns + ((((column % kSliceColumns) / 8) ^ (row % 8)) * 8) + column % 8;
  return (static_cast<u64>(row / tile_rows) * num_slices + column / kSliceColumns) * (tile_rows * kSliceColumns) + within;
}

// The same in bytes and in two parts, for loops over the columns of a row: 2 * tiled_offset() = the row's + that of its 8 columns from `column`, a
// multiple of 8, + 2 * (column mod 8). Of the second part only the exchange depends on the row, and that on row mod 8.
BK_INLINE u64 tiled_row_bytes(u32 row, u32 num_slices, u32 tile_rows) {
  return (static_cast<u64>(row / tile_rows) * num_slices * tile_rows + row % tile_rows) * (kSliceColumns * 2);
}
BK_INLINE u32 tiled_chunk_bytes(u32 row, u32 column, u32 tile_rows) {
  return column / kSliceColumns * (tile_rows * kSliceColumns * 2) + ((column % kSliceColumns / 8 * 16) ^ (row % 8 * 16));
}

}  // namespace blinkimp
