// Stands in for device/ptx_mma.cuh in the CPU emulation of warps: the same functions, after the PTX ISA's descriptions. See simt.h.
// Used by tests/host/test_attention_simt.py.
#pragma once
#include <simt.h>

#include <ptx.cuh>

namespace blinkimp {

BK_INLINE u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const unsigned char*>(pointer) - simt::machine.shared_memory.data());
}
BK_INLINE u8* shared_bytes(u32 address, u32 num_bytes) { return simt::machine.shared(address, num_bytes); }
template <int kId, int kNumThreads>
BK_INLINE void named_barrier_sync() {
  simt::machine.barrier(kId, kNumThreads);
}

BK_INLINE u32 bf16_bits(f32 value) {  // round to nearest even
  const u32 bits = __builtin_bit_cast(u32, value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
BK_INLINE f32 bf16_value(u32 bits) { return __builtin_bit_cast(f32, (bits & 0xffff) << 16); }
BK_INLINE u32 pack_bf16x2(f32 low, f32 high) { return bf16_bits(low) | bf16_bits(high) << 16; }

template <bool kTransposed>
BK_INLINE void ldmatrix_x4_any(u32 shared_row, u32 (&result)[4]) {
  const std::uint64_t in = shared_row;
  std::uint64_t out[4];
  simt::machine.warp_operation(&in, 1, out, 4, [](const std::uint64_t* inputs, std::uint64_t* outputs) {
    for (u32 matrix = 0; matrix < 4; ++matrix) {
      u32 banks = 0;
      u16 elements[8][8];
      for (u32 row = 0; row < 8; ++row) {
        const u32 address = static_cast<u32>(inputs[(matrix * 8 + row) * 16]);
        if (address % 16 != 0) simt::fail("ldmatrix address modulo 16", address % 16, 0);
        std::memcpy(elements[row], shared_bytes(address, 16), 16);
        simt::machine.num_bank_conflicts += (banks >> (address / 16 % 8)) & 1;
        banks |= 1u << (address / 16 % 8);
      }
      for (u32 lane = 0; lane < 32; ++lane) {
        const u32 g = lane / 4, t = lane % 4 * 2;
        const u32 low = kTransposed ? elements[t][g] : elements[g][t];
        const u32 high = kTransposed ? elements[t + 1][g] : elements[g][t + 1];
        outputs[lane * 16 + matrix] = low | high << 16;
      }
    }
  });
  for (u32 i = 0; i < 4; ++i) result[i] = static_cast<u32>(out[i]);
}
BK_INLINE void ldmatrix_x4(u32 shared_row, u32 (&result)[4]) { ldmatrix_x4_any<false>(shared_row, result); }
BK_INLINE void ldmatrix_x4_transposed(u32 shared_row, u32 (&result)[4]) { ldmatrix_x4_any<true>(shared_row, result); }

BK_INLINE void mma_bf16_16x8x16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  std::uint64_t in[10] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
  for (u32 i = 0; i < 4; ++i) in[6 + i] = __builtin_bit_cast(u32, d[i]);
  simt::machine.warp_operation(in, 10, out, 4, [](const std::uint64_t* inputs, std::uint64_t* outputs) {
    f32 a_matrix[16][16], b_matrix[16][8];
    for (u32 lane = 0; lane < 32; ++lane) {
      const u32 g = lane / 4, t = lane % 4 * 2;
      for (u32 i = 0; i < 8; ++i) {  // two elements in each of four registers
        const u32 bits = static_cast<u32>(inputs[lane * 16 + i / 2] >> (i % 2 * 16));
        a_matrix[g + i / 2 % 2 * 8][t + i % 2 + i / 4 * 8] = bf16_value(bits);
      }
      for (u32 i = 0; i < 4; ++i) {
        const u32 bits = static_cast<u32>(inputs[lane * 16 + 4 + i / 2] >> (i % 2 * 16));
        b_matrix[t + i % 2 + i / 2 * 8][g] = bf16_value(bits);
      }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
      for (u32 i = 0; i < 4; ++i) {
        const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        f32 sum = __builtin_bit_cast(f32, static_cast<u32>(inputs[lane * 16 + 6 + i]));
        for (u32 k = 0; k < 16; ++k) sum += a_matrix[row][k] * b_matrix[k][column];
        outputs[lane * 16 + i] = __builtin_bit_cast(u32, sum);
      }
    }
  });
  for (u32 i = 0; i < 4; ++i) d[i] = __builtin_bit_cast(f32, static_cast<u32>(out[i]));
}

}  // namespace blinkimp

#include <ptx_mma_common.cuh>
