// Matrix products of a step: out[row, n] = sum over k of input[row, k] * weight[n, k], without split-K. GPU only.
//
// Tokens are wgmma's M (tiles of 64 rows), weight rows its N. One CTA owns an output tile over the whole K, and an output is one chain of
// accumulations in the order of k, whatever the tile's shape: its bits do not depend on the number of rows in the step.
//   narrow (<= 64 rows)  both warpgroups work on the one row tile: warpgroup 0 has the tile's first weight rows, 1 the others
//   wide   (> 64 rows)   each warpgroup has a row tile of its own and all weight rows
//
// Weights: [tile][k / 64][kTileRows rows][64 k] bf16, swizzled; packed by host/gpu_weights.py; streamed by the weight producer through a ring of
// 16 KB stages, each of slices_per_stage() slices. Inputs: tiled_offset() of activation_layout.cuh; an input stage of 16 KB holds as many
// slices as fit (narrow), or one slice of both row tiles (wide).
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <ptx_wgmma.cuh>
#include <row_scales.cuh>

namespace blinkimp {

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

// One row tile, several slices in a copy. Rows of the tile that do not exist keep old bytes, whose products nobody reads.
BK_INLINE void produce_narrow_inputs(const EngineParams& params, const u8* input, const GemmShape& shape, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const u32 slice_bytes = shape.input_rows * 128;
  const u32 input_bytes = shape.num_slices * slice_bytes;
  for (u32 item = cta_idx(); item < shape.num_tiles; item += params.num_workers) {
    for (u32 offset = 0; offset < input_bytes; offset += kInputStageBytes) {
      const u32 num_bytes = min(kInputStageBytes, input_bytes - offset);
      wait_mbarrier(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
      u64* full = &shared.inputs_full[cursor.stage];
      mbarrier_arrive_expect_bytes(full, num_bytes);
      bulk_copy_to_shared(ring + cursor.stage * kInputStageBytes, input + offset, num_bytes, full);
      cursor.advance(kInputStages);
    }
  }
}

// Bytes of a row tile that exist, in groups of 8 rows.
BK_INLINE u32 input_tile_bytes(u32 num_rows, u32 row_begin) {
  if (row_begin >= num_rows) return 0;
  return (min(num_rows - row_begin, kRowTile) + 7) / 8 * 1024;
}

BK_INLINE void produce_wide_inputs(const EngineParams& params, const u8* input, const GemmShape& shape, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const u32 num_items = shape.num_tiles * shape.num_row_groups;
  for (u32 item = cta_idx(); item < num_items; item += params.num_workers) {
    const u32 row_tile = (item % shape.num_row_groups) * 2;
    const u8* first = input + static_cast<u64>(row_tile) * shape.num_slices * kRowTileBytes;
    const u8* second = first + static_cast<u64>(shape.num_slices) * kRowTileBytes;
    const u32 first_bytes = input_tile_bytes(shape.num_rows, row_tile * kRowTile);
    const u32 second_bytes = input_tile_bytes(shape.num_rows, (row_tile + 1) * kRowTile);
    for (u32 slice = 0; slice < shape.num_slices; slice++) {
      wait_mbarrier(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
      u64* full = &shared.inputs_full[cursor.stage];
      u8* stage = ring + cursor.stage * kInputStageBytes;
      mbarrier_arrive_expect_bytes(full, first_bytes + second_bytes);
      bulk_copy_to_shared(stage, first + static_cast<u64>(slice) * kRowTileBytes, first_bytes, full);
      if (second_bytes) bulk_copy_to_shared(stage + kRowTileBytes, second + static_cast<u64>(slice) * kRowTileBytes, second_bytes, full);
      cursor.advance(kInputStages);
    }
  }
}

// ---- Consumers: the two compute warpgroups -----------------------------------------------------------------------
// The main loop over K of one item for one warpgroup: 64 rows x kColumns of the tile's weight rows, from the tile's row_offset on.
// Products of a slice run while the next one's are issued; a stage is given back once the products that read it are done.
// All that addresses are made of is uniform(): wgmma takes its descriptors from uniform registers, and moving them there from a thread's own
// registers costs more than a product of few columns.
template <int kTileRows, int kColumns, bool kWide>
BK_INLINE void multiply_tile(const EngineParams& params, const GemmShape& shape, u32 row_offset, u8* shared_memory, WorkerShared& shared,
                             ConsumerCursors& cursors, f32 (&d)[kColumns / 2]) {
  constexpr u32 kStageSlices = slices_per_stage(kTileRows);
  constexpr u32 kSliceBytes = kTileRows * 128;
  constexpr u32 kNone = 0xffffffff;
  const bool elected = thread_idx() % 128 == 0;
  const u32 num_slices = uniform(shape.num_slices);
  const u32 input_slice_bytes = kWide ? kInputStageBytes : uniform(shape.input_rows) * 128;
  RingCursor weights{uniform(cursors.weights.stage), uniform(cursors.weights.phase)};
  RingCursor inputs{uniform(cursors.inputs.stage), uniform(cursors.inputs.phase)};
  const u32 base = uniform(shared_address(shared_memory));
  // With 8 rows the row groups of wgmma's A operand are all the same one.
  const u64 a_base = wgmma_descriptor(base + kScratchOffset + (kWide ? uniform(thread_idx() / 128) * kRowTileBytes : 0), input_slice_bytes == 1024 ? 0 : 1024);
  const u64 b_base = wgmma_descriptor(base + kRingOffset + row_offset * 128, 1024);
  u32 used_weights = kNone;  // stages whose last reader is the slice in flight
  u32 used_inputs = kNone;
  u32 in_weight_stage = 0;
  u32 input_offset = 0;
#pragma unroll 1
  for (u32 slice = 0; slice < num_slices; slice++) {
    const bool last = slice + 1 == num_slices;
    if (in_weight_stage == 0) wait_mbarrier_warp(params, &shared.weights_full[weights.stage], weights.phase, kSiteWeightRing);
    if (input_offset == 0) wait_mbarrier_warp(params, &shared.inputs_full[inputs.stage], inputs.phase, kSiteInputRing);
    const u64 a = a_base + ((inputs.stage * kInputStageBytes + input_offset) >> 4);
    const u64 b = b_base + ((weights.stage * kWeightStageBytes + in_weight_stage * kSliceBytes) >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_m64_k16<kColumns>(d, a + 2 * k, b + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (elected && used_weights != kNone) mbarrier_arrive(&shared.weights_empty[used_weights]);
    if (elected && used_inputs != kNone) mbarrier_arrive(&shared.inputs_empty[used_inputs]);
    used_weights = used_inputs = kNone;
    input_offset += input_slice_bytes;
    if (input_offset == kInputStageBytes || last) {
      used_inputs = inputs.stage;
      input_offset = 0;
      inputs.advance(kInputStages);
    }
    if (++in_weight_stage == kStageSlices || last) {
      used_weights = weights.stage;
      in_weight_stage = 0;
      weights.advance(kWeightStages);
    }
  }
  wgmma_wait<0>();
  if (elected) {
    mbarrier_arrive(&shared.weights_empty[used_weights]);
    mbarrier_arrive(&shared.inputs_empty[used_inputs]);
  }
  cursors = ConsumerCursors{weights, inputs};
}

// Where a fragment register lies: thread t of a warpgroup holds, for h in {0, 1} and block j, columns 8j + 2(t mod 4) + {0, 1} of row
// 16(t / 32) + (t mod 32) / 4 + 8h in d[4j + 2h] and d[4j + 2h + 1].
BK_INLINE u32 fragment_row(u32 half) { return (thread_idx() % 128) / 32 * 16 + (thread_idx() % 32) / 4 + 8 * half; }
BK_INLINE u32 fragment_column(u32 block) { return 8 * block + (thread_idx() % 4) * 2; }

// One item for one warpgroup. Epilogue: prefetch<kColumns>(row, column) -> what it wants to have loaded before the products end;
// finish<kColumns>(row, column, d, prefetched, scales): the warpgroup's 64 rows from `row`, kColumns packed weight rows from `column`.
template <int kTileRows, int kColumns, bool kWide, bool kScaled, class Epilogue>
BK_INLINE void run_item(const EngineParams& params, const GemmShape& shape, u32 row_begin, u32 tile_idx, u32 row_offset, u8* shared_memory, WorkerShared& shared,
                        ConsumerCursors& cursors, ScaleReader& scales, const Epilogue& epilogue) {
  f32 d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) d[i] = 0.0f;
  const u32 column = tile_idx * kTileRows + row_offset;
  const auto prefetched = epilogue.template prefetch<kColumns, kWide>(row_begin, column);
  multiply_tile<kTileRows, kColumns, kWide>(params, shape, row_offset, shared_memory, shared, cursors, d);
  const f32* row_scale = nullptr;
  if constexpr (kScaled) row_scale = scales.wait(params, shared);
  epilogue.template finish<kColumns, kWide>(row_begin, column, d, prefetched, row_scale);
}

// Runs all items of an op for this CTA.
// kFirstColumns: the weight rows of a tile that are warpgroup 0's in the narrow shape. kScaled: the op normalises its input.
template <int kTileRows, int kFirstColumns, bool kScaled, class Epilogue>
BK_INLINE void run_gemm(const EngineParams& params, const GemmShape& shape, u8* shared_memory, WorkerShared& shared, const Epilogue& epilogue) {
  ConsumerCursors cursors = shared.compute.cursors;
  ScaleReader scales{shared.compute.scales, kNoRow};
  const u32 warpgroup = uniform(thread_idx() / 128);
  const u32 num_row_groups = uniform(shape.num_row_groups);
  const u32 num_items = uniform(shape.num_tiles) * num_row_groups;
  const bool wide = uniform(shape.wide);
  for (u32 item = uniform(cta_idx()); item < num_items; item += params.num_workers) {
    const u32 group = item % num_row_groups;
    const u32 tile_idx = item / num_row_groups;
    if constexpr (kScaled) scales.enter(shared, group);
    if (wide) {
      run_item<kTileRows, kTileRows, true, kScaled>(params, shape, (group * 2 + warpgroup) * kRowTile, tile_idx, 0, shared_memory, shared, cursors, scales, epilogue);
    } else if (warpgroup == 0) {
      run_item<kTileRows, kFirstColumns, false, kScaled>(params, shape, 0, tile_idx, 0, shared_memory, shared, cursors, scales, epilogue);
    } else {
      run_item<kTileRows, kTileRows - kFirstColumns, false, kScaled>(params, shape, 0, tile_idx, kFirstColumns, shared_memory, shared, cursors, scales, epilogue);
    }
  }
  if constexpr (kScaled) scales.leave(shared);
  // Equal in all threads; taken over when the op ends. Without an item nothing moved.
  if (is_first_thread()) {
    shared.next_cursors = cursors;
    shared.next_scales = scales.cursor;
  }
}

}  // namespace blinkimp
