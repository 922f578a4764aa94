// Matrix products of steps of more than 64 rows: the same sums as gemm.cuh's, bit for bit, in larger tiles. GPU only.
//
// A CTA owns an output tile of 128 (or 64) rows x N <= 256 weight rows over the whole K: `stack` packed weight tiles side by side
// (gemm_wide_tiling.cuh chooses). Each output is one fp32 accumulator, wgmma k16 steps in increasing k.
//   128 rows   each warpgroup has 64 of them and all N weight rows: N / 2 <= 128 accumulators a thread
//   64 rows    both warpgroups have the same rows and half of the weight rows each
// Products of slice i run while slice i + 1 is waited for and issued; a stage goes back to its producer one slice later. The two warpgroups never
// wait for each other, so that one's epilogue can run beside the other's products, as far as the rings are deep.
//
// Rings: those of worker_memory.cuh. A weight unit is kUnitSlices slices of N x 128 bytes in one 16 KB stage, or one slice in two (N > 128), which then
// begin at an even stage. An input stage holds 128 rows of one slice, or 64 rows of two.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <gemm_wide_tiling.cuh>
#include <ptx_wgmma.cuh>

namespace blinkimp {

// How a weight slice of `columns` rows lies in the ring.
BK_INLINE constexpr u32 unit_stages(u32 columns) { return columns * 128 > kWeightStageBytes ? 2 : 1; }
BK_INLINE constexpr u32 unit_slices(u32 columns) { return columns * 128 * 2 <= kWeightStageBytes ? 2 : 1; }
static_assert(kWeightStages % 2 == 0, "units of two stages never wrap in the middle");

// ---- Producers: one elected thread each --------------------------------------------------------------------------
// Passes an empty stage when a unit of two stages would begin at an odd one. Pairs with align_consumer().
BK_INLINE void align_producer(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  if (cursor.stage % 2 == 0) return;
  wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
  mbarrier_arrive(&shared.weights_full[cursor.stage]);
  cursor.advance(kWeightStages);
}

BK_INLINE void produce_weights_wide(const EngineParams& params, const Op& op, u32 num_rows, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const WideTiling tiling = wide_tiling(params, op, num_rows);
  const u32 columns = tiling.stack * tiling.tile_rows;
  const u32 tile_slice_bytes = tiling.tile_rows * 128;
  const u64 tile_bytes = static_cast<u64>(tiling.num_slices) * tile_slice_bytes;
  const u32 num_unit_slices = unit_slices(columns);
  const bool two_stages = unit_stages(columns) == 2;
  const u8* weights = reinterpret_cast<const u8*>(op.weight);
  if (two_stages) align_producer(params, shared, cursor);
  for (u32 item = cta_idx(); item < tiling.num_items; item += params.num_workers) {
    const u32 first_tile = wide_item(tiling, item).weight_item * tiling.stack;
    const u32 num_tiles = min(tiling.stack, tiling.num_tiles - first_tile);
    const u8* tile = weights + first_tile * tile_bytes;
    for (u32 slice = 0; slice < tiling.num_slices; slice += num_unit_slices) {
      const u32 num_slices = min(num_unit_slices, tiling.num_slices - slice);
      u64* full = &shared.weights_full[cursor.stage];
      u8* place = ring + cursor.stage * kWeightStageBytes;
      wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
      if (two_stages) {  // the second stage's barriers go through their phases alone: the bytes are all counted on the first
        wait_mbarrier(params, &shared.weights_empty[cursor.stage + 1], cursor.phase, kSiteWeightRing);
        mbarrier_arrive(full + 1);
      }
      mbarrier_arrive_expect_bytes(full, num_slices * num_tiles * tile_slice_bytes);
      for (u32 i = 0; i < num_slices; i++) {
        const u8* source = tile + (slice + i) * tile_slice_bytes;
        for (u32 stacked = 0; stacked < num_tiles; stacked++) {
          bulk_copy_to_shared(place + (i * tiling.stack + stacked) * tile_slice_bytes, source + stacked * tile_bytes, tile_slice_bytes, full);
        }
      }
      cursor.advance(kWeightStages);
      if (two_stages) cursor.advance(kWeightStages);
    }
  }
}

// Bytes of a row tile's slice that exist, in groups of 8 rows. The others keep old bytes, whose products nobody reads.
BK_INLINE u32 existing_tile_bytes(u32 num_rows, u32 row_begin) {
  if (row_begin >= num_rows) return 0;
  return (min(num_rows - row_begin, kRowTile) + 7) / 8 * 1024;
}

// input: [row / 64][k / 64][64 rows][64 k], swizzled.
BK_INLINE void produce_inputs_wide(const EngineParams& params, const Op& op, const u8* input, u32 num_rows, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const WideTiling tiling = wide_tiling(params, op, num_rows);
  const u64 row_tile_bytes = static_cast<u64>(tiling.num_slices) * kRowTileBytes;
  const bool halved = tiling.tokens == kRowTile;
  for (u32 item = cta_idx(); item < tiling.num_items; item += params.num_workers) {
    const u32 row_begin = wide_item(tiling, item).row_tile * tiling.tokens;
    const u8* tile = input + row_begin / kRowTile * row_tile_bytes;
    const u32 first_bytes = existing_tile_bytes(num_rows, row_begin);
    const u32 next_tile_bytes = existing_tile_bytes(num_rows, row_begin + kRowTile);
    for (u32 slice = 0; slice < tiling.num_slices; slice += halved ? 2 : 1) {
      const u8* first = tile + static_cast<u64>(slice) * kRowTileBytes;
      const u8* second = first + (halved ? kRowTileBytes : row_tile_bytes);
      const u32 second_bytes = halved ? (slice + 1 < tiling.num_slices ? first_bytes : 0) : next_tile_bytes;
      u64* full = &shared.inputs_full[cursor.stage];
      u8* place = ring + cursor.stage * kInputStageBytes;
      wait_mbarrier(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
      mbarrier_arrive_expect_bytes(full, first_bytes + second_bytes);
      bulk_copy_to_shared(place, first, first_bytes, full);
      if (second_bytes) bulk_copy_to_shared(place + kRowTileBytes, second, second_bytes, full);
      cursor.advance(kInputStages);
    }
  }
}

// ---- Consumers: the two compute warpgroups -----------------------------------------------------------------------
BK_INLINE void align_consumer(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  if (cursor.stage % 2 == 0) return;
  // Hazard: without this wait the faster warpgroup could arrive twice in the phase that the slower one has yet to end.
  wait_mbarrier(params, &shared.weights_full[cursor.stage], cursor.phase, kSiteWeightRing);
  if (thread_idx() % 128 == 0) mbarrier_arrive(&shared.weights_empty[cursor.stage]);
  cursor.advance(kWeightStages);
}

// The main loop over K of one item, for one warpgroup: 64 rows x kColumns of the item's kItemColumns weight rows. `d` starts at zero.
template <int kItemColumns, int kColumns>
BK_INLINE void multiply_wide(const EngineParams& params, u32 num_slices, u8* weight_ring, u8* input_ring, WorkerShared& shared, ConsumerCursors& cursors,
                             f32 (&d)[kColumns / 2]) {
  constexpr bool kHalved = kColumns != kItemColumns;
  constexpr u32 kUnitStages = unit_stages(kItemColumns);
  constexpr u32 kUnitSlices = unit_slices(kItemColumns);
  constexpr u32 kInputSlices = kHalved ? 2 : 1;
  const u32 warpgroup = thread_idx() / 128;
  const bool elected = thread_idx() % 128 == 0;
  const u32 weights_base = shared_address(weight_ring) + (kHalved ? warpgroup * (kColumns * 128) : 0);
  const u32 inputs_base = shared_address(input_ring) + (kHalved ? 0 : warpgroup * kRowTileBytes);
  auto release_weights = [&](u32 stage) {
    if (elected) {
      mbarrier_arrive(&shared.weights_empty[stage]);
      if constexpr (kUnitStages == 2) mbarrier_arrive(&shared.weights_empty[stage + 1]);
    }
  };
  u32 used_weights = 0;  // the stage that the products in flight read
  u32 used_inputs = 0;
#pragma unroll 1
  for (u32 slice = 0; slice < num_slices; slice++) {
    const u32 in_unit = slice % kUnitSlices;
    const u32 in_input = slice % kInputSlices;
    if (in_unit == 0) wait_mbarrier(params, &shared.weights_full[cursors.weights.stage], cursors.weights.phase, kSiteWeightRing);
    if (in_input == 0) wait_mbarrier(params, &shared.inputs_full[cursors.inputs.stage], cursors.inputs.phase, kSiteInputRing);
    const u64 a = wgmma_descriptor(inputs_base + cursors.inputs.stage * kInputStageBytes + in_input * kRowTileBytes);
    const u64 b = wgmma_descriptor(weights_base + cursors.weights.stage * kWeightStageBytes + in_unit * (kItemColumns * 128));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_m64_k16<kColumns>(d, a + 2 * k, b + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<1>();  // the slice before is done
    if (slice > 0) {
      if (in_unit == 0) release_weights(used_weights);
      if (in_input == 0 && elected) mbarrier_arrive(&shared.inputs_empty[used_inputs]);
    }
    const bool last = slice + 1 == num_slices;
    used_weights = cursors.weights.stage;
    used_inputs = cursors.inputs.stage;
    if (in_unit == kUnitSlices - 1 || last) {
      cursors.weights.advance(kWeightStages);
      if constexpr (kUnitStages == 2) cursors.weights.advance(kWeightStages);
    }
    if (in_input == kInputSlices - 1 || last) cursors.inputs.advance(kInputStages);
  }
  wgmma_wait<0>();
  release_weights(used_weights);
  if (elected) mbarrier_arrive(&shared.inputs_empty[used_inputs]);
}

// One item for one warpgroup; `epilogue` sees one packed tile at a time: its rows' first, its first packed weight row, its registers.
template <int kTileRows, int kStack, bool kHalved, class Epilogue>
BK_INLINE void run_wide_item(const EngineParams& params, const WideTiling& tiling, const WideItem& item, u8* weight_ring, u8* input_ring, WorkerShared& shared,
                             ConsumerCursors& cursors, const Epilogue& epilogue) {
  constexpr int kColumns = kTileRows * kStack / (kHalved ? 2 : 1);
  f32 d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) d[i] = 0.0f;
  multiply_wide<kTileRows * kStack, kColumns>(params, tiling.num_slices, weight_ring, input_ring, shared, cursors, d);
  const u32 warpgroup = thread_idx() / 128;
  const u32 row_begin = kHalved ? item.row_tile * kRowTile : item.row_tile * 2 * kRowTile + warpgroup * kRowTile;
  const u32 column = item.weight_item * (kTileRows * kStack) + (kHalved ? warpgroup * kColumns : 0);
  epilogue.template finish_wide<kTileRows, kColumns>(row_begin, column, d);
}

template <int kTileRows, int kStack, bool kHalved, class Epilogue>
BK_INLINE void run_wide_items(const EngineParams& params, const WideTiling& tiling, u8* weight_ring, u8* input_ring, WorkerShared& shared, ConsumerCursors& cursors,
                              const Epilogue& epilogue) {
  if constexpr (unit_stages(kTileRows * kStack) == 2) align_consumer(params, shared, cursors.weights);
  for (u32 item = cta_idx(); item < tiling.num_items; item += params.num_workers) {
    run_wide_item<kTileRows, kStack, kHalved>(params, tiling, wide_item(tiling, item), weight_ring, input_ring, shared, cursors, epilogue);
  }
}

// Runs all items of an op for this warpgroup; returns where it stands in the rings.
template <int kTileRows, class Epilogue>
BK_INLINE ConsumerCursors run_gemm_wide(const EngineParams& params, const Op& op, u32 num_rows, u8* weight_ring, u8* input_ring, WorkerShared& shared,
                                        ConsumerCursors cursors, const Epilogue& epilogue) {
  constexpr u32 kMax = max_stack(kTileRows);
  constexpr u32 kMin = min_stack(kTileRows);
  const WideTiling tiling = wide_tiling(params, op, num_rows);
  if (tiling.tokens == kRowTile) {
    run_wide_items<kTileRows, halved_stack(kTileRows), true>(params, tiling, weight_ring, input_ring, shared, cursors, epilogue);
  } else if (tiling.stack == kMax) {
    run_wide_items<kTileRows, kMax, false>(params, tiling, weight_ring, input_ring, shared, cursors, epilogue);
  } else if constexpr (kMax / 2 >= kMin) {
    if (tiling.stack == kMax / 2) {
      run_wide_items<kTileRows, kMax / 2, false>(params, tiling, weight_ring, input_ring, shared, cursors, epilogue);
    } else if constexpr (kMax / 4 >= kMin) {
      run_wide_items<kTileRows, kMax / 4, false>(params, tiling, weight_ring, input_ring, shared, cursors, epilogue);
    }
  }
  return cursors;
}

}  // namespace blinkimp
