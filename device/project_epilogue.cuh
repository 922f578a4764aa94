// The fused tail of O and down: hidden += product (+ bias); leaves hidden * next gain as the next op's input and the sums of squares of 32 columns. GPU only.
//
// Weight rows are packed (packed_order.cuh) so that of every 16 columns a thread has four side by side: 16 bytes of the residual in one access. What a tail
// takes is counted in lines of 128 bytes that its loads and stores touch, a clk each, and a warp has 8 rows: half the accesses are half of that.
// A sum of 32 columns is that of its halves, added, because in the narrow shape they are two warpgroups'.
// Called by device/worker.cuh (the interface of gemm_epilogues.cuh). Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_epilogues.cuh>
#include <packed_order.cuh>

namespace blinkimp {

struct ProjectEpilogue {
  const EngineParams& params;
  const Op& op;
  WorkerShared& shared;
  u32 num_rows;
  static constexpr u32 kMostUnrolledSteps = 2;  // of 64 columns: rolled 3 % slower
  static constexpr bool kTakesPieces = true;
  static constexpr bool kMeets = true;
  static constexpr u32 kTailRegisters = 176;  // for products and loads, of a thread's 224
  static constexpr u32 kHalfColumns = kSquaresColumns / 2;
  static constexpr u32 kGroupColumns = 16;  // of which a thread has four side by side
  using Rows = Nothing;

  template <int kColumns>
  struct Loaded {  // the residual
    float4 gains[kColumns / kGroupColumns];      // [group]
    float4 hidden[2][kColumns / kGroupColumns];  // [half][group]
  };

  BK_INLINE f32* hidden_row(u32 row) const { return reinterpret_cast<f32*>(params.workspaces[kWsHidden]) + static_cast<u64>(row) * params.dims.hidden; }

  template <int kColumns>
  BK_INLINE static constexpr u32 step_columns() {
    return kColumns < kSquaresColumns ? kHalfColumns : kSquaresColumns;
  }
  BK_INLINE Nothing rows(u32) const {
    return Nothing{};
  }

  template <int kColumns>
  BK_INLINE Loaded<kColumns> prefetch(const Nothing&, u32 row_begin, u32 first_column) const {
    const u32 column_begin = uniform(first_column);
    const u32 first_row = row_begin + fragment_row(0);
    const u32 own_column = column_begin + lane_columns();
    const f32* gains = reinterpret_cast<const f32*>(op.next_norm) + own_column;
    Loaded<kColumns> loaded;
#pragma unroll
    for (u32 group = 0; group < kColumns / kGroupColumns; group++) {
      const bool exists = column_begin + group * kGroupColumns < params.dims.hidden;
      loaded.gains[group] = exists ? *reinterpret_cast<const float4*>(gains + group * kGroupColumns) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = first_row + half * 8;
      const f32* place = hidden_row(row) + own_column;
#pragma unroll
      for (u32 group = 0; group < kColumns / kGroupColumns; group++) {
        const bool exists = row < num_rows && column_begin + group * kGroupColumns < params.dims.hidden;
        loaded.hidden[half][group] = exists ? *reinterpret_cast<const float4*>(place + group * kGroupColumns) : float4{0.0f, 0.0f, 0.0f, 0.0f};
      }
    }
    return loaded;
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(const Nothing&, u32 row_begin, u32 first_column, f32 (&d)[kColumns / 2], const Loaded<kColumns>& loaded, const f32*) const {
    static_assert(kColumns == kSquaresColumns || (kColumns == kHalfColumns && !kWide), "a group of the sums of squares, or a warpgroup's half of one");
    static_assert(kHalfColumns == kGroupColumns, "a group is half a group of the sums of squares");
    constexpr u32 kNumGroups = kColumns / kGroupColumns;
    const u32 column_begin = uniform(first_column);
    const u32 hidden = params.dims.hidden;
    const u32 tile_rows = kWide ? kRowTile : input_tile_rows(num_rows);
    const u32 first_row = row_begin + fragment_row(0);
    const u32 lane = lane_columns();
    f32 sums[2][kNumGroups] = {};  // [half][group]
    add_grouped_bias<kColumns>(d, column_begin + lane);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = first_row + half * 8;
      float4 values[kNumGroups];
#pragma unroll
      for (u32 group = 0; group < kNumGroups; group++) {
        const f32* products = d + group * 8 + half * 2;
        const float4 before = loaded.hidden[half][group];
        const float4 value = float4{__fadd_rn(before.x, products[0]), __fadd_rn(before.y, products[1]), __fadd_rn(before.z, products[4]), __fadd_rn(before.w, products[5])};
        values[group] = value;
        sums[half][group] = __fmaf_rn(value.w, value.w, __fmaf_rn(value.z, value.z, __fmaf_rn(value.y, value.y, __fmul_rn(value.x, value.x))));
      }
      const bool exists = row < num_rows && column_begin < hidden;  // hidden is a multiple of 64, column_begin of kColumns
      f32* const residual = opaque(hidden_row(row) + column_begin + lane);
      u8* const normed = opaque(reinterpret_cast<u8*>(params.workspaces[kWsNormed]) + tiled_row_bytes(row, hidden / kSliceColumns, tile_rows) + lane % 8 * 2);
#pragma unroll
      for (u32 group = 0; group < kNumGroups; group++) {
        const float4 value = values[group];
        const float4 gains = loaded.gains[group];
        const uint2 packed = uint2{pack_bf16x2(__fmul_rn(value.x, gains.x), __fmul_rn(value.y, gains.y)), pack_bf16x2(__fmul_rn(value.z, gains.z), __fmul_rn(value.w, gains.w))};
        u8* const place = opaque(normed + tiled_chunk_bytes(row, column_begin + group * kGroupColumns + lane / 8 * 8, tile_rows));
        if (exists) {
          *reinterpret_cast<float4*>(residual + group * kGroupColumns) = value;
          *reinterpret_cast<uint2*>(place) = packed;
        }
      }
    }
#pragma unroll
    for (u32 i = 0; i < 2 * kNumGroups; i++) sums[i / kNumGroups][i % kNumGroups] = quad_sum(sums[i / kNumGroups][i % kNumGroups]);
    store_squares<kColumns>(first_row, column_begin, sums);
  }

 private:
  // Where in a group of 16 columns a thread's four are.
  BK_INLINE static u32 lane_columns() { return thread_idx() % 4 * 4; }

  template <int kColumns>
  BK_INLINE void add_grouped_bias(f32 (&d)[kColumns / 2], u32 own_column) const {
    if (op.bias == 0) return;
    const f32* bias = reinterpret_cast<const f32*>(op.bias) + own_column;
#pragma unroll
    for (u32 group = 0; group < kColumns / kGroupColumns; group++) {
      if (own_column + group * kGroupColumns >= op.out_features) break;
      const float4 values = *reinterpret_cast<const float4*>(bias + group * kGroupColumns);
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        f32* products = d + group * 8 + half * 2;
        products[0] = __fadd_rn(products[0], values.x);
        products[1] = __fadd_rn(products[1], values.y);
        products[4] = __fadd_rn(products[4], values.z);
        products[5] = __fadd_rn(products[5], values.w);
      }
    }
  }

  template <int kColumns>
  BK_INLINE void store_squares(u32 first_row, u32 column_begin, const f32 (&sums)[2][kColumns / kHalfColumns]) const {
    const u32 num_parts = params.dims.hidden / kSquaresColumns;
    const u32 part = column_begin / kSquaresColumns;
    f32* parts = reinterpret_cast<f32*>(params.workspaces[kWsSquares]) + part;
    const bool stores = thread_idx() % 4 == 0 && part < num_parts;
    if constexpr (kColumns == kSquaresColumns) {
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        const u32 row = first_row + half * 8;
        if (stores && row < num_rows) parts[static_cast<u64>(row) * num_parts] = __fadd_rn(sums[half][0], sums[half][1]);
      }
    } else {
      const bool is_second = column_begin % kSquaresColumns != 0;
      f32* second = half_sums(shared, 1) + first_row;
      if (is_second && thread_idx() % 4 == 0) {
        for (u32 half = 0; half < 2; half++) second[half * 8] = sums[half][0];
      }
      named_barrier_sync<1, kComputeThreads>();  // the second half is there
      for (u32 half = 0; half < 2; half++) {
        const u32 row = first_row + half * 8;
        if (!is_second && stores && row < num_rows) parts[static_cast<u64>(row) * num_parts] = __fadd_rn(sums[half][0], second[half * 8]);
      }
      named_barrier_sync<1, kComputeThreads>();  // hazard: the next item's second half overtakes a reader
    }
  }
};

}  // namespace blinkimp
