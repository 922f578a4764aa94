// Packs rows of a weight matrix into the tiles that the weight producer streams (device/gemm.cuh). Run once, while loading.
//
// Launched by host/gpu_weights.py: one thread per 16-byte chunk (8 columns) of the source rows.
// Test: pytest -m gpu tests/gpu/test_gemm.py
#include <program_abi.h>

namespace blinkimp {

// Where a row of a q or k head goes: rows i and i + head_dim / 2, which rotate together, become neighbours 2i and 2i + 1.
__device__ u32 packed_row(u32 row, u32 num_rotated_rows, u32 head_dim) {
  if (row >= num_rotated_rows) return row;
  const u32 in_head = row % head_dim;
  const u32 half = head_dim / 2;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

// source: bf16 [num_rows, in_features], rows [row_begin, row_begin + num_rows) of the matrix
// packed: bf16 [tile][in_features / 64][tile_rows][64], chunks swizzled by row mod 8
extern "C" __global__ void pack_weights(const uint4* source, uint4* packed, u32 row_begin, u32 num_rows, u32 in_features, u32 tile_rows,
                                        u32 num_rotated_rows, u32 head_dim) {
  const u32 chunks_per_row = in_features / 8;
  const u64 idx = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (idx >= static_cast<u64>(num_rows) * chunks_per_row) return;
  const u32 chunk = static_cast<u32>(idx % chunks_per_row);
  const u32 row = packed_row(row_begin + static_cast<u32>(idx / chunks_per_row), num_rotated_rows, head_dim);
  const u32 in_tile = row % tile_rows;
  const u64 slice = static_cast<u64>(row / tile_rows) * (in_features / 64) + chunk / 8;
  packed[(slice * tile_rows + in_tile) * 8 + ((chunk % 8) ^ (in_tile % 8))] = source[idx];
}

}  // namespace blinkimp
