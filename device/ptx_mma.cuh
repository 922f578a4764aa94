// Warp-level tensor cores in PTX: ldmatrix, mma.sync m16n8k16 (bf16 -> f32), asynchronous copies of 4 and 16 bytes, 2^x. GPU only.
//
// Fragments of a lane, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   A [16 rows, 16 k]   a[0] = (g, 2t..2t+1)   a[1] = (g + 8, 2t..)   a[2] = (g, 2t + 8..)   a[3] = (g + 8, 2t + 8..)
//   B [16 k, 8 columns] b0 = (2t..2t+1, g)     b1 = (2t + 8.., g)
//   D [16 rows, 8 columns]  d[0..1] = (g, 2t..2t+1)   d[2..3] = (g + 8, 2t..2t+1)
// Called by device/attention_*.cuh. Test: pytest -m gpu tests/gpu/test_attention.py; without a GPU tests/host/test_attention_simt.py,
// which replaces this file by tests/host/simt/ptx_mma.cuh: keep the two in step.
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

// Copies 16 bytes from global (through L2) to shared memory, or fills them with zeros when not `valid`; `source` is not read then.
BK_INLINE void cp_async_16(u32 shared_destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
}
// One word, 4-byte aligned.
BK_INLINE void cp_async_4(u32 shared_destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_destination), "l"(source) : "memory");
}
BK_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups are under way; a barrier then makes the data of all threads visible.
template <int kPending>
BK_INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8i .. 8i + 7 give the row addresses of matrix i, result i holds (row g, columns 2t, 2t + 1).
BK_INLINE void ldmatrix_x4(u32 shared_row, u32 (&result)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_row)
               : "memory");
}

// The same, each matrix transposed: result i holds (rows 2t, 2t + 1, column g).
BK_INLINE void ldmatrix_x4_transposed(u32 shared_row, u32 (&result)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_row)
               : "memory");
}

// d += a * b
BK_INLINE void mma_bf16_16x8x16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The value, of unknown origin to the compiler. opaque(threadIdx.x) at the head of an op keeps what is computed from it inside the op: else
// it is hoisted out of the worker's loop over ops and holds registers in all the others.
BK_INLINE u32 opaque(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 1 / x to 1 ulp; 1 / inf = 0.
BK_INLINE f32 reciprocal_approx(f32 x) {
  f32 result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2^x to 2 ulp; 2^-inf = 0, 2^0 = 1 exactly.
BK_INLINE f32 exp2_approx(f32 x) {
  f32 result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace blinkimp
