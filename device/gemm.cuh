// Matrix products of a step: out[row, n] = sum over k of input[row, k] * weight[n, k], without split-K. GPU only.
//
// Tokens are wgmma's M (tiles of 64 rows), weight rows its N (kTileRows of them). One CTA owns an output tile over the whole K, so no
// partial sums leave the SM. Even and odd 64-column slices have accumulators of their own and are added once at the end:
//   narrow (<= 64 rows)  both warpgroups work on the one row tile: warpgroup 0 takes the even slices, 1 the odd ones
//   wide   (> 64 rows)   each warpgroup has a row tile of its own and takes all slices into two accumulator sets
// Both give the same bits: an output does not depend on the number of rows in the step.
//
// Weights: [tile][k / 64][kTileRows rows][64 k] bf16, swizzled; packed by host/gpu_weights.py; streamed by the weight producer through a ring of
// 16 KB stages, each of slices_per_stage() slices. Inputs: tiled_offset() of worker_memory.cuh.
// An input stage of 16 KB holds two 8 KB halves: narrow, the slices 2i and 2i + 1; wide, slice i of both row tiles.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <ptx_wgmma.cuh>
#include <worker_memory.cuh>

namespace blinkimp {

// The work of one GEMM op: items = weight tiles x groups of row tiles, the groups of one weight tile next to each other so that its
// weights are in L2 for all of them. CTA c takes items c, c + num_workers, ... Both producers and the consumers iterate the same way.
struct GemmShape {
  u32 num_rows;
  u32 num_slices;
  u32 num_tiles;
  u32 tile_rows;
  u32 num_row_groups;
  bool wide;
};

BK_INLINE GemmShape gemm_shape(const Op& op, u32 num_rows) {
  const bool wide = num_rows > kRowTile;
  return GemmShape{num_rows, op.in_features / kSliceColumns, op.num_tiles, op.tile_rows, wide ? (num_rows + 2 * kRowTile - 1) / (2 * kRowTile) : (num_rows ? 1u : 0u), wide};
}

BK_INLINE constexpr u32 slices_per_stage(u32 tile_rows) {
  const u32 fitting = kWeightStageBytes / (tile_rows * 128);
  return fitting >= 4 ? 4 : (fitting >= 2 ? 2 : 1);
}

// ---- Producers: one elected thread each --------------------------------------------------------------------------
BK_INLINE void produce_weights(const EngineParams& params, const Op& op, const GemmShape& shape, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const u32 slice_bytes = shape.tile_rows * 128;
  const u32 stage_slices = slices_per_stage(shape.tile_rows);
  const u8* weights = reinterpret_cast<const u8*>(op.weight);
  const u32 num_items = shape.num_tiles * shape.num_row_groups;
  for (u32 item = cta_idx(); item < num_items; item += params.num_workers) {
    const u8* tile = weights + static_cast<u64>(item / shape.num_row_groups) * shape.num_slices * slice_bytes;
    for (u32 slice = 0; slice < shape.num_slices; slice += stage_slices) {
      const u32 num_bytes = min(stage_slices, shape.num_slices - slice) * slice_bytes;
      wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
      mbarrier_arrive_expect_bytes(&shared.weights_full[cursor.stage], num_bytes);
      bulk_copy_to_shared(ring + cursor.stage * kWeightStageBytes, tile + static_cast<u64>(slice) * slice_bytes, num_bytes, &shared.weights_full[cursor.stage]);
      cursor.advance(kWeightStages);
    }
  }
}

// Copies only the rows that exist, in groups of 8: the rest of a tile keeps old bytes, whose products nobody reads.
BK_INLINE u32 input_tile_bytes(u32 num_rows, u32 row_begin) {
  if (row_begin >= num_rows) return 0;
  return (min(num_rows - row_begin, kRowTile) + 7) / 8 * 1024;
}

BK_INLINE void produce_inputs(const EngineParams& params, const u8* input, const GemmShape& shape, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const u32 num_items = shape.num_tiles * shape.num_row_groups;
  const u32 num_stages = shape.wide ? shape.num_slices : (shape.num_slices + 1) / 2;
  for (u32 item = cta_idx(); item < num_items; item += params.num_workers) {
    const u32 row_tile = (item % shape.num_row_groups) * 2;  // narrow: 0
    const u8* first_tile = input + static_cast<u64>(row_tile) * shape.num_slices * kRowTileBytes;
    const u32 first_bytes = input_tile_bytes(shape.num_rows, row_tile * kRowTile);
    const u32 second_row_tile_bytes = input_tile_bytes(shape.num_rows, (row_tile + 1) * kRowTile);
    for (u32 i = 0; i < num_stages; i++) {
      const u32 slice = shape.wide ? i : 2 * i;
      const u8* first = first_tile + static_cast<u64>(slice) * kRowTileBytes;
      const u8* second = first + (shape.wide ? static_cast<u64>(shape.num_slices) * kRowTileBytes : kRowTileBytes);
      const u32 second_bytes = shape.wide ? second_row_tile_bytes : (slice + 1 < shape.num_slices ? first_bytes : 0);
      wait_mbarrier(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
      u64* full = &shared.inputs_full[cursor.stage];
      u8* stage = ring + cursor.stage * kInputStageBytes;
      mbarrier_arrive_expect_bytes(full, first_bytes + second_bytes);
      bulk_copy_to_shared(stage, first, first_bytes, full);
      if (second_bytes) bulk_copy_to_shared(stage + kRowTileBytes, second, second_bytes, full);
      cursor.advance(kInputStages);
    }
  }
}

// ---- Consumers: the two compute warpgroups -----------------------------------------------------------------------
// 64 rows x kTileRows x 64 k.
template <int kTileRows>
BK_INLINE void multiply_slice(f32 (&d)[kTileRows / 2], u32 input_address, u32 weight_address) {
  const u64 a = wgmma_descriptor(input_address);
  const u64 b = wgmma_descriptor(weight_address);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_m64_k16<kTileRows>(d, a + 2 * k, b + 2 * k, 1);
  wgmma_commit();
  wgmma_wait<0>();
}

// The main loop over K of one item. `even` and `odd` start at zero; narrow uses `even` alone (of its own slices).
template <int kTileRows, bool kWide>
BK_INLINE void multiply_tile(const EngineParams& params, u32 num_slices, u8* weight_ring, u8* input_ring, WorkerShared& shared, ConsumerCursors& cursors,
                             f32 (&even)[kTileRows / 2], f32 (&odd)[kTileRows / 2]) {
  constexpr u32 kStageSlices = slices_per_stage(kTileRows);
  const u32 warpgroup = thread_idx() / 128;
  const bool elected = thread_idx() % 128 == 0;
  const u32 weights_base = shared_address(weight_ring);
  const u32 inputs_base = shared_address(input_ring);
  auto slice_step = [&](u32 slice, f32(&d)[kTileRows / 2], bool second_of_pair) {
    const u32 in_stage = slice % kStageSlices;
    const bool last = slice + 1 == num_slices;
    if (in_stage == 0) wait_mbarrier(params, &shared.weights_full[cursors.weights.stage], cursors.weights.phase, kSiteWeightRing);
    if (kWide || !second_of_pair) wait_mbarrier(params, &shared.inputs_full[cursors.inputs.stage], cursors.inputs.phase, kSiteInputRing);
    const u32 weight_address = weights_base + cursors.weights.stage * kWeightStageBytes + in_stage * (kTileRows * 128);
    const u32 half = kWide ? warpgroup : (second_of_pair ? 1u : 0u);
    if (kWide || half == warpgroup) multiply_slice<kTileRows>(d, inputs_base + cursors.inputs.stage * kInputStageBytes + half * kRowTileBytes, weight_address);
    if (kWide || second_of_pair || last) {
      if (elected) mbarrier_arrive(&shared.inputs_empty[cursors.inputs.stage]);
      cursors.inputs.advance(kInputStages);
    }
    if (in_stage == kStageSlices - 1 || last) {
      if (elected) mbarrier_arrive(&shared.weights_empty[cursors.weights.stage]);
      cursors.weights.advance(kWeightStages);
    }
  };
  for (u32 slice = 0; slice < num_slices; slice += 2) {
    slice_step(slice, even, false);
    if (slice + 1 < num_slices) {
      if constexpr (kWide) slice_step(slice + 1, odd, true);
      else slice_step(slice + 1, even, true);
    }
  }
}

// Where a fragment register lies: thread t of a warpgroup holds, for h in {0, 1} and block j, columns 8j + 2(t mod 4) + {0, 1} of row
// 16(t / 32) + (t mod 32) / 4 + 8h in d[4j + 2h] and d[4j + 2h + 1].
BK_INLINE u32 fragment_row(u32 half) { return (thread_idx() % 128) / 32 * 16 + (thread_idx() % 32) / 4 + 8 * half; }
BK_INLINE u32 fragment_column(u32 block) { return 8 * block + (thread_idx() % 4) * 2; }

// 1 / rms of the group's rows from the sums of squares that the previous op left, into shared.row_scale. All 256 compute threads: a warp takes
// four rows at a time, so that their loads are in flight together.
BK_INLINE void load_row_scales(const EngineParams& params, u32 row_begin, u32 num_rows, WorkerShared& shared) {
  constexpr u32 kRowsAtOnce = 4;
  const u32 hidden = opaque(params.dims.hidden);
  const u32 num_parts = hidden / kSquaresColumns;
  const u32 thread = thread_idx();
  const f32* squares = reinterpret_cast<const f32*>(params.workspaces[kWsSquares]) + thread % 32;
  for (u32 row = thread / 32 * kRowsAtOnce; row < 2 * kRowTile && row_begin + row < num_rows; row += kComputeThreads / 32 * kRowsAtOnce) {
    f32 sums[kRowsAtOnce] = {};
    for (u32 part = 0; part + thread % 32 < num_parts; part += 32) {
#pragma unroll
      for (u32 i = 0; i < kRowsAtOnce; i++) {
        if (row_begin + row + i < num_rows) sums[i] += squares[static_cast<u64>(row_begin + row + i) * num_parts + part];
      }
    }
#pragma unroll
    for (u32 i = 0; i < kRowsAtOnce; i++) {
      for (u32 distance = 16; distance; distance /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      if (thread % 32 == i) shared.row_scale[row + i] = rsqrtf(sums[i] / static_cast<f32>(hidden) + params.dims.norm_eps);
    }
  }
  named_barrier_sync<1, kComputeThreads>();  // the scales are read by other threads
}

// Runs all items of an op for this CTA. Epilogue: void operator()(row_begin, tile_idx, d) for one warpgroup's 64 x kTileRows fragment.
// kScaled: the op normalises its input, so shared.row_scale must hold the group's scales before its epilogue.
template <int kTileRows, bool kScaled, class Epilogue>
BK_INLINE void run_gemm(const EngineParams& params, const GemmShape& shape, u8* shared_memory, WorkerShared& shared, const Epilogue& epilogue) {
  ConsumerCursors cursors = shared.compute.cursors;
  u8* input_ring = shared_memory + kScratchOffset;
  f32* reduce = reinterpret_cast<f32*>(input_ring + kInputStages * kInputStageBytes);
  const u32 warpgroup = thread_idx() / 128;
  const u32 thread_in_group = thread_idx() % 128;
  const u32 num_items = shape.num_tiles * shape.num_row_groups;
  for (u32 item = cta_idx(); item < num_items; item += params.num_workers) {
    const u32 row_begin = (item % shape.num_row_groups) * 2 * kRowTile;
    const u32 tile_idx = item / shape.num_row_groups;
    if constexpr (kScaled) load_row_scales(params, row_begin, shape.num_rows, shared);
    f32 even[kTileRows / 2];
    f32 odd[kTileRows / 2];
#pragma unroll
    for (int i = 0; i < kTileRows / 2; i++) even[i] = odd[i] = 0.0f;
    u32 fragment_row_begin = row_begin;
    if (shape.wide) {
      multiply_tile<kTileRows, true>(params, shape.num_slices, shared_memory, input_ring, shared, cursors, even, odd);
#pragma unroll
      for (int i = 0; i < kTileRows / 2; i++) even[i] += odd[i];
      fragment_row_begin += warpgroup * kRowTile;
    } else {
      multiply_tile<kTileRows, false>(params, shape.num_slices, shared_memory, input_ring, shared, cursors, even, odd);
      if (warpgroup == 1) {
#pragma unroll
        for (int i = 0; i < kTileRows / 2; i++) reduce[i * 128 + thread_in_group] = even[i];
      }
      named_barrier_sync<1, kComputeThreads>();  // the odd sums are complete before warpgroup 0 adds them
      if (warpgroup == 0) {
#pragma unroll
        for (int i = 0; i < kTileRows / 2; i++) even[i] += reduce[i * 128 + thread_in_group];
      }
    }
    if (shape.wide || warpgroup == 0) epilogue(fragment_row_begin, tile_idx, even);
    named_barrier_sync<1, kComputeThreads>();  // `reduce` and `row_scale` are overwritten by the next item
  }
  // Equal in all threads, and read again after the grid barrier. Without an item nothing moved, and slower warps may still be reading.
  if (is_first_thread() && cta_idx() < num_items) shared.compute.cursors = cursors;
}

}  // namespace blinkimp
