// Matrix products of steps of more than 64 rows: the same sums as gemm.cuh's, bit for bit, in larger tiles. GPU only.
//
// A CTA owns an output tile of 128 (or 64) rows x N <= 256 weight rows over the whole K: `stack` packed weight tiles side by side
// (gemm_wide_tiling.cuh chooses). Each output is one fp32 accumulator, wgmma k16 steps in increasing k.
//   128 rows            each warpgroup has 64 of them and all N weight rows: N / 2 <= 128 accumulators a thread
//   64 rows ("halved")  both warpgroups have the same rows and one packed tile each
// Products of slice i run while slice i + 1 is waited for and issued; a stage goes back to its producer one slice later. The two warpgroups never
// wait for each other, so that one's epilogue can run beside the other's products, as far as the rings are deep.
//
// Rings: those of worker_memory.cuh. A weight unit is unit_slices() slices of N x 128 bytes in one 16 KB stage, or one slice in two (N > 128), which
// then begin at an even stage; halved, a warpgroup's slices stand together. An input stage holds 128 rows of one slice, or 64 rows of two.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <gemm.cuh>
#include <gemm_wide_tiling.cuh>

namespace blinkimp {

// How a weight slice of `columns` rows lies in the ring.
BK_INLINE constexpr u32 unit_stages(u32 columns) { return columns * 128 > kWeightStageBytes ? 2 : 1; }
BK_INLINE constexpr u32 unit_slices(u32 columns) { return columns * 128 * 2 <= kWeightStageBytes ? 2 : 1; }
static_assert(kWeightStages % 2 == 0, "units of two stages never wrap in the middle");

// ---- Producers: one elected thread each --------------------------------------------------------------------------
// Ends a stage's phases without data, in the compute warpgroups' place too; they only count along (align_consumer).
BK_INLINE void pass_stage(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
  mbarrier_arrive(&shared.weights_full[cursor.stage]);
  for (u32 i = 0; i < 2; i++) mbarrier_arrive(&shared.weights_empty[cursor.stage]);
  cursor.advance(kWeightStages);
}

// An op whose units take num_unit_stages begins at a multiple of them: the weight producer's side.
BK_INLINE void align_producer(const EngineParams& params, u32 num_unit_stages, WorkerShared& shared, RingCursor& cursor) {
  while (cursor.stage % num_unit_stages != 0) pass_stage(params, shared, cursor);
}

// num_tiles copies of copy_bytes, so far apart in memory and in the ring. One thread issues a slice's, of O and down eight, within the time of its products: at 80 clk each, of which most is
// the way of addresses into uniform registers, it was late by 15 to 20 %. Four at a time go that way side by side.
template <bool kIsStreamed>
BK_INLINE void copy_tiles(const u8* source, u32 tile_bytes, u8* place, u32 tile_step, u32 copy_bytes, u32 num_tiles, u64* full) {
  constexpr u32 kAtOnce = 4;
  const auto copy = [&](u32 i) {
    if constexpr (kIsStreamed) bulk_copy_streamed(place + i * tile_step, source + i * tile_bytes, copy_bytes, full);
    else bulk_copy_to_shared(place + i * tile_step, source + i * tile_bytes, copy_bytes, full);
  };
#pragma unroll 1
  for (; num_tiles >= kAtOnce; num_tiles -= kAtOnce) {
#pragma unroll
    for (u32 i = 0; i < kAtOnce; i++) copy(i);
    source += kAtOnce * tile_bytes;
    place += kAtOnce * tile_step;
  }
#pragma unroll 1
  for (; num_tiles > 0; num_tiles--, source += tile_bytes, place += tile_step) copy(0);
}

// One unit of an item: packed tiles [0, num_tiles), num_slices slices of each from `source` on.
BK_INLINE void copy_weight_unit(const WideTiling& tiling, const u8* source, u32 num_tiles, u32 num_slices, u8* place, u64* full) {
  const u32 slice_bytes = tiling.tile_rows * 128;
  const bool halved = tiling.tokens == kRowTile;  // then a tile's slices stand together, else a slice's tiles
  const u32 num_copies = halved ? 1 : num_slices;
  const u32 copy_bytes = halved ? num_slices * slice_bytes : slice_bytes;
  const u32 tile_step = halved ? unit_slices(tiling.stack * tiling.tile_rows) * slice_bytes : slice_bytes;
  const u32 tile_bytes = tiling.num_slices * slice_bytes;
#pragma unroll 1
  for (u32 i = 0; i < num_copies; i++) {
    const u8* from = source + i * slice_bytes;
    u8* to = place + i * tiling.stack * slice_bytes;
    if (tiling.num_row_tiles <= 2) copy_tiles<true>(from, tile_bytes, to, tile_step, copy_bytes, num_tiles, full);
    else copy_tiles<false>(from, tile_bytes, to, tile_step, copy_bytes, num_tiles, full);
  }
}

BK_INLINE void produce_weights_wide(const EngineParams& params, const Op& op, u32 num_rows, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const WideTiling chosen = wide_tiling(params, op, num_rows);
  const u32 tokens = chosen.tokens;
  const u32 stack = chosen.stack;
  const GemmWalk walk = gemm_walk(params, chosen);
  align_producer(params, unit_stages(stack * op.tile_rows), shared, cursor);  // without an item too, as the consumers do
#pragma unroll 1
  for (u32 item = walk.first; item < walk.end; item += walk.stride) {
    // Worked out anew for each item, because a producer has few registers.
    const Op& item_op = *opaque(&op);
    const WideTiling tiling = wide_tiling_of(item_op, num_rows, tokens, stack);
    const u32 slice_bytes = tiling.tile_rows * 128;
    const u32 num_unit_slices = unit_slices(stack * tiling.tile_rows);
    const u32 num_unit_stages = unit_stages(stack * tiling.tile_rows);
    const u32 first_tile = gemm_item(tiling, item).weight_item * stack;
    const u32 num_tiles = min(stack, tiling.num_tiles - first_tile);
    const u8* source = reinterpret_cast<const u8*>(item_op.weight) + static_cast<u64>(first_tile * tiling.num_slices) * slice_bytes;
#pragma unroll 1
    for (u32 num_left = tiling.num_slices; num_left > 0;) {
      const u32 num_slices = min(num_unit_slices, num_left);
      u64* full = &shared.weights_full[cursor.stage];
#pragma unroll 1
      for (u32 i = 0; i < num_unit_stages; i++) wait_mbarrier(params, &shared.weights_empty[cursor.stage + i], cursor.phase, kSiteWeightRing);
      if (num_unit_stages == 2) mbarrier_arrive(full + 1);  // the bytes are all counted on the first stage
      mbarrier_arrive_expect_bytes(full, num_slices * num_tiles * slice_bytes);
      copy_weight_unit(tiling, source, num_tiles, num_slices, ring + cursor.stage * kWeightStageBytes, full);
      for (u32 i = 0; i < num_unit_stages; i++) cursor.advance(kWeightStages);
      source += num_slices * slice_bytes;
      num_left -= num_slices;
    }
  }
}

// input: [row / 64][k / 64][64 rows][64 k], swizzled. Rows that do not exist keep old bytes, whose products nobody reads.
BK_INLINE void produce_inputs_wide(const EngineParams& params, const Op& op, const u8* input, u32 num_rows, u32 num_barriers, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  InputGate gate{params, num_barriers, false};
  const WideTiling chosen = wide_tiling(params, op, num_rows);
  const u32 tokens = chosen.tokens;
  const u32 stack = chosen.stack;
  const GemmWalk walk = gemm_walk(params, chosen);
#pragma unroll 1
  for (u32 item = walk.first; item < walk.end; item += walk.stride) {
    const WideTiling tiling = wide_tiling_of(*opaque(&op), num_rows, tokens, stack);  // anew, as above
    const bool halved = tokens == kRowTile;
    const u32 row_begin = gemm_item(tiling, item).row_tile * tokens;
    const u32 second_offset = halved ? kRowTileBytes : tiling.num_slices * kRowTileBytes;
    const u8* source = input + static_cast<u64>(row_begin / kRowTile) * tiling.num_slices * kRowTileBytes;
    const u32 first_bytes = input_tile_bytes(num_rows, row_begin);
    const u32 next_tile_bytes = input_tile_bytes(num_rows, row_begin + kRowTile);
#pragma unroll 1
    for (u32 num_left = tiling.num_slices; num_left > 0;) {
      const u32 num_slices = halved ? min(num_left, 2u) : 1;
      const u32 second_bytes = halved ? (num_slices == 2 ? first_bytes : 0) : next_tile_bytes;
      u64* full = &shared.inputs_full[cursor.stage];
      u8* place = ring + cursor.stage * kInputStageBytes;
      wait_mbarrier(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
      mbarrier_arrive_expect_bytes(full, first_bytes + second_bytes);
      gate.pass();
      if (first_bytes) bulk_copy_to_shared(place, source, first_bytes, full);
      if (second_bytes) bulk_copy_to_shared(place + kRowTileBytes, source + second_offset, second_bytes, full);
      cursor.advance(kInputStages);
      source += num_slices * kRowTileBytes;
      num_left -= num_slices;
    }
  }
}

// ---- Consumers: the two compute warpgroups -----------------------------------------------------------------------
// The compute warpgroups' side of align_producer(): they only count along.
BK_INLINE void align_consumer(u32 num_unit_stages, RingCursor& cursor) {
  while (cursor.stage % num_unit_stages != 0) cursor.advance(kWeightStages);
}

BK_INLINE void give_unit(const MainLoop& loop, u32 stage, u32 num_stages, bool used) {
  for (u32 i = 0; i < num_stages; i++) loop.give_weights(stage + i, used);
}

// The main loop over K of one item, for one warpgroup: 64 rows x kColumns of the item's kItemColumns weight rows. `d` starts at zero.
// Its two rules are gemm.cuh's: addresses are uniform(), and no branch between wgmma_fence() and wgmma_commit().
template <int kItemColumns, int kColumns>
BK_INLINE void multiply_item(MainLoop& loop, u32 num_slices, f32 (&d)[kColumns / 2]) {
  constexpr bool kHalved = kColumns != kItemColumns;
  constexpr u32 kUnitStages = unit_stages(kItemColumns);
  constexpr u32 kUnitSlices = unit_slices(kItemColumns);
  constexpr u32 kInputSlices = kHalved ? 2 : 1;
  // Few columns: the products take less time than bytes need to come, so stages are given back at once. Many: a slice later, and the tensor cores run through.
  constexpr bool kWaitsAtOnce = kColumns <= 64;
  u32 slice = 0;
  if constexpr (kHalved && kUnitSlices == 2) {  // a stage of weights and one of inputs hold two slices: both at once
#pragma unroll 1
    for (; slice + 2 <= num_slices; slice += 2) {
      loop.wait_weights();
      loop.wait_inputs();
      const u64 a = loop.a_of(0);
      const u64 b = loop.b_of(0);
      wgmma_fence();
      multiply_slice<kColumns>(d, a, b);
      multiply_slice<kColumns>(d, a + (kRowTileBytes >> 4), b + (kColumns * 128 >> 4));
      wgmma_commit();
      wgmma_wait<0>();
      give_unit(loop, loop.weights.stage, kUnitStages, true);
      loop.give_inputs(loop.inputs.stage, true);
      loop.advance_weights();
      loop.advance_inputs();
    }
    if (slice == num_slices) return;
  }
  u32 used_weights = kNone;  // stages whose last reader is the slice in flight
  u32 used_inputs = kNone;
  u32 in_unit = 0;
  u32 in_input = 0;
#pragma unroll 1
  for (; slice < num_slices; slice++) {
    if (in_unit == 0) loop.wait_weights();
    if (in_input == 0) loop.wait_inputs();
    const u64 a = loop.a_of(in_input * kRowTileBytes);
    const u64 b = loop.b_of(in_unit * (kColumns * 128));
    wgmma_fence();
    multiply_slice<kColumns>(d, a, b);
    wgmma_commit();
    const auto give_used = [&]() {
      give_unit(loop, used_weights, kUnitStages, used_weights != kNone);
      loop.give_inputs(used_inputs, used_inputs != kNone);
      used_weights = used_inputs = kNone;
    };
    if constexpr (!kWaitsAtOnce) {
      wgmma_wait<1>();  // the slice before is done
      give_used();
    }
    const bool last = slice + 1 == num_slices;
    if (++in_unit == kUnitSlices || last) {
      used_weights = loop.weights.stage;
      in_unit = 0;
      for (u32 i = 0; i < kUnitStages; i++) loop.advance_weights();
    }
    if (++in_input == kInputSlices || last) {
      used_inputs = loop.inputs.stage;
      in_input = 0;
      loop.advance_inputs();
    }
    if constexpr (kWaitsAtOnce) {
      wgmma_wait<0>();
      give_used();
    }
  }
  wgmma_wait<0>();
  give_unit(loop, used_weights, kUnitStages, used_weights != kNone);
  loop.give_inputs(used_inputs, used_inputs != kNone);
}

// One item for one warpgroup.
template <int kTileRows, int kStack, bool kHalved, bool kScaled, class Epilogue>
BK_INLINE void run_wide_item(const WideTiling& tiling, const GemmItem& item, MainLoop& loop, WorkerShared& shared,
                             ScaleReader& scales, const Epilogue& epilogue) {
  constexpr int kParts = kHalved ? 1 : kStack;
  constexpr int kColumns = kTileRows * kParts;
  const u32 warpgroup = uniform(thread_idx() / 128);
  const u32 row_begin = kHalved ? item.row_tile * kRowTile : (item.row_tile * 2 + warpgroup) * kRowTile;
  const u32 column = (item.weight_item * kStack + (kHalved ? warpgroup : 0)) * kTileRows;
  FragmentTail<kColumns, true, Epilogue> tail(epilogue, row_begin, column);
  f32 d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) d[i] = 0.0f;
  multiply_item<kTileRows * kStack, kColumns>(loop, uniform(tiling.num_slices), d);
  const f32* row_scale = nullptr;
  if constexpr (kScaled) row_scale = scales.wait(shared);
  tail.finish(d, row_scale);
}

template <int kTileRows, int kStack, bool kHalved, bool kScaled, class Epilogue>
BK_INLINE void run_wide_items(const EngineParams& params, const Op& op, u32 num_rows, u8* shared_memory, WorkerShared& shared,
                              ConsumerCursors& cursors, ScaleReader& scales, const Epilogue& epilogue) {
  RingCursor weights{uniform(cursors.weights.stage), uniform(cursors.weights.phase)};
  align_consumer(unit_stages(kTileRows * kStack), weights);
  const u32 warpgroup = uniform(thread_idx() / 128);
  // Halved: all rows are the same, the weight rows a warpgroup's own; else the other way round.
  const u32 input_offset = kHalved ? 0 : warpgroup * kRowTileBytes;
  const u32 weight_offset = kHalved ? warpgroup * (unit_slices(kTileRows * kStack) * kTileRows * 128) : 0;
  MainLoop loop{shared, weights, RingCursor{uniform(cursors.inputs.stage), uniform(cursors.inputs.phase)},
                wgmma_descriptor(uniform(shared_address(shared_memory)) + kScratchOffset + input_offset, 1024), wgmma_descriptor(uniform(shared_address(shared_memory)) + kRingOffset + weight_offset, 1024),
                thread_idx() % 128 == 0 ? 1u : 0u};
  // Anew for each item: with the tokens and the stack known that costs less than registers through an item.
  const auto tiling_now = [&] { return wide_tiling_of(op, num_rows, kHalved ? kRowTile : 2 * kRowTile, kStack); };
  WideTiling tiling = tiling_now();
  u32 idx = uniform(cta_idx());
  bool has_item = idx < uniform(tiling.num_items);
  if (!has_item) note_idle(shared);
#pragma unroll 1
  while (has_item) {
    const GemmItem item = gemm_item(tiling, idx);
    if constexpr (kScaled) scales.enter(shared, item.row_tile);
    run_wide_item<kTileRows, kStack, kHalved, kScaled>(tiling, item, loop, shared, scales, epilogue);
    idx += params.num_workers;
    tiling = tiling_now();
    has_item = idx < uniform(tiling.num_items);
  }
  cursors = ConsumerCursors{loop.weights, loop.inputs};
}

// Runs all items of an op for this CTA. kScaled: the op normalises its input (produce_row_scales_wide).
template <int kTileRows, bool kScaled, class Epilogue>
BK_INLINE void run_gemm_wide(const EngineParams& params, const Op& op, u32 num_rows, u8* shared_memory, WorkerShared& shared, const Epilogue& epilogue) {
  constexpr u32 kMax = max_stack(kTileRows);
  constexpr u32 kMin = min_stack(kTileRows);
  const WideTiling tiling = wide_tiling(params, op, num_rows);
  ConsumerCursors cursors = shared.compute.cursors;
  ScaleReader scales{kScaled ? shared.compute.scales : RingCursor{}, kNoRow};
  const u32 stack = uniform(tiling.stack);
  if (uniform(tiling.tokens) == kRowTile) {
    run_wide_items<kTileRows, kHalvedStack, true, kScaled>(params, op, num_rows, shared_memory, shared, cursors, scales, epilogue);
  } else if (stack == kMax) {
    run_wide_items<kTileRows, kMax, false, kScaled>(params, op, num_rows, shared_memory, shared, cursors, scales, epilogue);
  } else if constexpr (kMax / 2 >= kMin) {
    if (stack == kMax / 2) {
      run_wide_items<kTileRows, kMax / 2, false, kScaled>(params, op, num_rows, shared_memory, shared, cursors, scales, epilogue);
    } else if constexpr (kMax / 4 >= kMin) {
      run_wide_items<kTileRows, kMax / 4, false, kScaled>(params, op, num_rows, shared_memory, shared, cursors, scales, epilogue);
    }
  }
  if constexpr (kScaled) scales.leave(shared);
  leave_rings(shared, cursors);
}

}  // namespace blinkimp
