// The order of rows in packed weights, where it is not the checkpoint's: which rows stand side by side, so that a thread's products belong together.
//
// A thread of a wgmma or mma fragment holds columns 2q and 2q + 1 of every 8. Weight rows are packed so that this is
//   q, k heads   a pair that rotates together: rows i and i + head_dim / 2 become neighbours
//   O, down      with the next 8 columns' two, four columns side by side: 16 bytes of the residual, which are loaded and stored at once
// Read by pack_weights.cu and the epilogues that undo it. Test: pytest tests/null/test_gpu_kernel.py, -m gpu tests/gpu/test_gemm.py
#pragma once
#include <program_abi.h>

#if defined(__CUDACC__)
#define BK_ROW_ORDER __device__ inline
#else
#define BK_ROW_ORDER inline
#endif

namespace blinkimp {

// Where a row of a q or k head goes.
BK_ROW_ORDER u32 packed_rotated_row(u32 row, u32 head_dim) {
  const u32 in_head = row % head_dim;
  const u32 half = head_dim / 2;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

// Where row 4q + 2i + e of 16 rows goes: 8i + 2q + e.
BK_ROW_ORDER u32 packed_grouped_row(u32 row) {
  const u32 in_group = row % 16;
  return row - in_group + in_group / 2 % 2 * 8 + in_group / 4 * 2 + in_group % 2;
}

}  // namespace blinkimp
