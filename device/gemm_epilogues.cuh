// What happens to a product before it leaves the SM: the interface of the GEMM ops' fused tails, and what they have in common. GPU only.
//
// An epilogue sees the fragment of one warpgroup: 64 rows from `row_begin` x packed weight rows from `column_begin`, in steps (fragment.cuh).
//   step_columns<kColumns>()     columns that finish() takes at a time, of a fragment of kColumns
//   rows(row)                    before the main loop: what depends on the rows alone
//   prefetch<kStep>(rows, ...)   what finish() will read: sent before the main loop, as far as kTailRegisters allow, else a step or more ahead
//   finish<kStep, kWide>(...)    with a step's products in d
//   kMostUnrolledSteps           of so many steps each has a copy of the code
//   kTakesPieces                 16 columns may be a warp's own (gemm_swapped.cuh), not a part of what a warpgroup has
//   kMeets                       finish() has a barrier of all compute threads
// Bits: finish computes each output by itself, in an order that does not depend on kColumns. Sums of products are spelled out (__fmaf_rn or not),
// because an epilogue is compiled once for each shape of tile, and the compiler's choice could differ between them.
// Speed: in a wide item the tensor cores rest meanwhile, and code that is not in the caches is ten times slower: loops over columns are rolled. A block of 8 columns begins at the same column in all threads: what
// depends on that alone is computed once a warp, in uniform registers. Only a row's base and the swizzle are a thread's own. Results are computed whether
// their row exists or not, and stored afterwards: a branch between two would leave each chain of latencies by itself.
// Epilogues: qkv_epilogue.cuh, project_epilogue.cuh, gate_up_epilogue.cuh, logits_epilogue.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm.cuh>

namespace blinkimp {

// Where in a block of 8 columns a thread's two are. To be called once a function: it reads the thread's number anew.
BK_INLINE u32 lane_column() { return thread_idx() % 4 * 2; }

BK_INLINE f32 quad_sum(f32 value) {  // over the 4 lanes that share a fragment row
  value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// d = d * its row's scale. scales: [half].
template <int kRegisters>
BK_INLINE void scale_fragment(f32 (&d)[kRegisters], const f32 (&scales)[2]) {
#pragma unroll
  for (u32 i = 0; i < kRegisters; i++) d[i] = __fmul_rn(d[i], scales[i / 2 % 2]);
}

// d = d + the op's bias, if it has one.
template <int kRegisters>
BK_INLINE void add_bias(f32 (&d)[kRegisters], const Op& op, u32 column_begin) {
  if (op.bias == 0) return;
  const f32* bias = reinterpret_cast<const f32*>(op.bias) + column_begin + lane_column();
#pragma unroll
  for (u32 block = 0; block < kRegisters / 4; block++) {
    if (column_begin + block * 8 >= op.out_features) break;
    const float2 values = *reinterpret_cast<const float2*>(bias + block * 8);
#pragma unroll
    for (u32 i = 0; i < 4; i++) d[block * 4 + i] = __fadd_rn(d[block * 4 + i], i % 2 ? values.y : values.x);
  }
}

}  // namespace blinkimp
