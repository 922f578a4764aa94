// The fused tail of O and down: hidden += product (+ bias); leaves hidden * next gain as the next op's input and the sums of squares of 32 columns. GPU only.
//
// A sum of 32 columns is that of its halves, added, because in the narrow shape they are two warpgroups'.
// Called by device/worker.cuh (the interface of gemm_epilogues.cuh). Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_epilogues.cuh>

namespace blinkimp {

struct ProjectEpilogue {
  const EngineParams& params;
  const Op& op;
  WorkerShared& shared;
  u32 num_rows;
  static constexpr u32 kMostRolledSteps = 1;
  static constexpr bool kTakesPieces = true;
  static constexpr bool kMeets = true;
  static constexpr u32 kTailRegisters = 176;  // for products and loads, of a thread's 224
  static constexpr u32 kHalfColumns = kSquaresColumns / 2;
  using Rows = Nothing;

  template <int kColumns>
  struct Loaded {  // the residual
    float2 gains[kColumns / 8];      // [block]
    float2 hidden[2][kColumns / 8];  // [half][block]
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
    const u32 own_column = column_begin + lane_column();
    const f32* gains = reinterpret_cast<const f32*>(op.next_norm) + own_column;
    Loaded<kColumns> loaded;
#pragma unroll
    for (u32 block = 0; block < kColumns / 8; block++) {
      const bool exists = column_begin + block * 8 < params.dims.hidden;
      loaded.gains[block] = exists ? *reinterpret_cast<const float2*>(gains + block * 8) : float2{0.0f, 0.0f};
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = first_row + half * 8;
      const f32* place = hidden_row(row) + own_column;
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        const bool exists = row < num_rows && column_begin + block * 8 < params.dims.hidden;
        loaded.hidden[half][block] = exists ? *reinterpret_cast<const float2*>(place + block * 8) : float2{0.0f, 0.0f};
      }
    }
    return loaded;
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(const Nothing&, u32 row_begin, u32 first_column, f32 (&d)[kColumns / 2], const Loaded<kColumns>& loaded, const f32*) const {
    constexpr u32 kNumParts = kColumns / kHalfColumns;
    static_assert(kColumns == kSquaresColumns || (kColumns == kHalfColumns && !kWide), "a group of the sums of squares, or a warpgroup's half of one");
    const u32 column_begin = uniform(first_column);
    const u32 hidden = params.dims.hidden;
    const u32 tile_rows = kWide ? kRowTile : input_tile_rows(num_rows);
    const u32 first_row = row_begin + fragment_row(0);
    const u32 lane = lane_column();
    f32 sums[2][kNumParts] = {};  // [half][part]
    add_bias(d, op, column_begin);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = first_row + half * 8;
      float2 values[kColumns / 8];
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        const float2 before = loaded.hidden[half][block];
        values[block] = float2{__fadd_rn(before.x, d[block * 4 + half * 2]), __fadd_rn(before.y, d[block * 4 + half * 2 + 1])};
        f32& sum = sums[half][block * 8 / kHalfColumns];
        sum = __fmaf_rn(values[block].y, values[block].y, __fmaf_rn(values[block].x, values[block].x, sum));
      }
      if (row >= num_rows || column_begin >= hidden) continue;  // hidden is a multiple of 64, column_begin of kColumns
      f32* residual = hidden_row(row) + column_begin + lane;
      u8* normed = reinterpret_cast<u8*>(params.workspaces[kWsNormed]) + tiled_row_bytes(row, hidden / kSliceColumns, tile_rows) + 2 * lane;
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        const float2 value = values[block];
        const float2 gains = loaded.gains[block];
        *reinterpret_cast<float2*>(residual + block * 8) = value;
        *reinterpret_cast<u32*>(normed + tiled_chunk_bytes(row, column_begin + block * 8, tile_rows)) = pack_bf16x2(__fmul_rn(value.x, gains.x), __fmul_rn(value.y, gains.y));
      }
    }
#pragma unroll
    for (u32 i = 0; i < 2 * kNumParts; i++) sums[i / kNumParts][i % kNumParts] = quad_sum(sums[i / kNumParts][i % kNumParts]);
    store_squares<kColumns>(first_row, column_begin, sums);
  }

 private:
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
