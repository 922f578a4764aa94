// Packs rows of a weight matrix into the tiles that the weight producer streams (device/gemm.cuh). Run once, while loading.
//
// Launched by host/gpu_weights.py: one thread per 16-byte chunk (8 columns) of the source rows.
// Test: pytest -m gpu tests/gpu/test_gemm.py
#include <packed_order.cuh>

namespace blinkimp {

// num_rotated_rows: the first rows, those of q and k heads. is_grouped: O and down.
__device__ u32 packed_row(u32 row, u32 num_rotated_rows, u32 head_dim, u32 is_grouped) {
  if (is_grouped) return packed_grouped_row(row);
  return row < num_rotated_rows ? packed_rotated_row(row, head_dim) : row;
}

// source: bf16 [num_rows, in_features], rows [row_begin, row_begin + num_rows) of the matrix
// packed: bf16 [tile][in_features / 64][tile_rows][64], chunks swizzled by row mod 8
extern "C" __global__ void pack_weights(const uint4* source, uint4* packed, u32 row_begin, u32 num_rows, u32 in_features, u32 tile_rows,
                                        u32 num_rotated_rows, u32 head_dim, u32 is_grouped) {
  const u32 chunks_per_row = in_features / 8;
  const u64 idx = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (idx >= static_cast<u64>(num_rows) * chunks_per_row) return;
  const u32 chunk = static_cast<u32>(idx % chunks_per_row);
  const u32 row = packed_row(row_begin + static_cast<u32>(idx / chunks_per_row), num_rotated_rows, head_dim, is_grouped);
  const u32 in_tile = row % tile_rows;
  const u64 slice = static_cast<u64>(row / tile_rows) * (in_features / 64) + chunk / 8;
  packed[(slice * tile_rows + in_tile) * 8 + ((chunk % 8) ^ (in_tile % 8))] = source[idx];
}

}  // namespace blinkimp
