// The producers of GEMMs of more than 64 rows: one elected thread copies weights, another one inputs. GPU only.
//
// Both walk the items of gemm_wide_tiling.cuh as the compute warpgroups do (gemm_wide.cuh). A weight unit is unit_slices() slices of N x 128 bytes in one 16 KB stage, or one slice
// in two (N > 128), which then begin at an even stage. An input stage holds 128 rows of one slice, or 64 rows of two. Items of few weight rows: gemm_pairs.cuh.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py; without a GPU: pytest tests/host/test_gemm_wide_simt.py
#pragma once
#include <gemm_pace.cuh>
#include <gemm_pairs.cuh>

namespace blinkimp {

// By which a unit of so many packed tiles, slices and stages is known.
BK_INLINE constexpr u32 unit_shape(u32 num_tiles, u32 num_slices, u32 num_stages) { return num_tiles * 16 + num_slices * 4 + num_stages; }

// Weights leave L2 first in steps of at most so many rows, gate-up's in steps of twice as many: few row tiles read them, at the same time. At 256 rows QKV's, O's and down's, which two
// row tiles read, make a step 1.6 % faster if they do not, and gate-up's half a percent slower.
constexpr u32 kStreamedRows = 128;
BK_INLINE bool is_streamed(u32 op_kind, u32 num_rows) { return num_rows <= (op_kind == kOpGateUp ? 2 * kStreamedRows : kStreamedRows); }

// ---- Weights -----------------------------------------------------------------------------------------------------
// Ends a stage's phases without data, in the compute warpgroups' place too; they only count along (align_consumer).
BK_INLINE void pass_stage(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  wait_mbarrier<true>(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
  mbarrier_arrive(&shared.weights_full[cursor.stage]);
  for (u32 i = 0; i < 2; i++) mbarrier_arrive(&shared.weights_empty[cursor.stage]);
  cursor.advance(kWeightStages);
}

// An op whose units take num_unit_stages begins at a multiple of them: the weight producer's side.
BK_INLINE void align_producer(const EngineParams& params, u32 num_unit_stages, WorkerShared& shared, RingCursor& cursor) {
  while (cursor.stage % num_unit_stages != 0) pass_stage(params, shared, cursor);
}

// An item's weights: where the producer is, and what a copy of it brings.
struct WeightWalk {
  const u8* source;  // of the next slice of the first packed tile
  u32 num_left;      // slices
  u32 slice_bytes;   // of a packed tile
  u32 tile_bytes;
  bool lends;        // the stage behind the next unit's is the input producer's (gemm_pairs.cuh)
  bool alternates;   // so is that behind every other unit
  RingCursor cursor;
  u32 paces_left;    // of this item (gemm_pace.cuh)
  BK_INLINE void leave_lent_stage() {
    if (lends) cursor.advance(kWeightStages);
    lends ^= alternates;
  }
};

// Whole units of kTiles packed tiles x kSlices slices in kStages stages, to [slice][tile] of the stage. What one thread executes for a unit is a chain, and has to fit into the time of the unit's
// products: counted at run time copies took 600 clk, here they take half of it (PERFORMANCE.md, eighteenth state).
// kLends: behind some of them is a lent stage.
template <u32 kTiles, u32 kSlices, u32 kStages, bool kIsStreamed, bool kLends>
BK_INLINE void produce_whole_units(const EngineParams& params, u8* ring, WorkerShared& shared, WeightWalk& walk) {
  const u32 slice_bytes = walk.slice_bytes;
  const u32 tile_bytes = walk.tile_bytes;
#pragma unroll 1
  for (; walk.num_left >= kSlices; walk.num_left -= kSlices) {
    const u32 stage = walk.cursor.stage;
    u64* full = &shared.weights_full[stage];
#pragma unroll
    for (u32 i = 0; i < kStages; i++) wait_mbarrier<true>(params, &shared.weights_empty[stage + i], walk.cursor.phase, kSiteWeightRing);
    if constexpr (kStages == 2 && !kIsStreamed) {
      if (walk.paces_left && walk.num_left % kPaceSlices == 0) {
        keep_pace(params, shared);
        walk.paces_left--;
      }
    }
    if constexpr (kStages == 2) mbarrier_arrive(full + 1);  // the bytes are all counted on the first stage
    mbarrier_arrive_expect_bytes(full, kTiles * kSlices * slice_bytes);
#pragma unroll
    for (u32 i = 0; i < kTiles * kSlices; i++) {
      const u8* source = walk.source + i % kTiles * tile_bytes + i / kTiles * slice_bytes;
      u8* place = ring + stage * kWeightStageBytes + i * slice_bytes;
      if constexpr (kIsStreamed) bulk_copy_streamed(place, source, slice_bytes, full);
      else bulk_copy_to_shared(place, source, slice_bytes, full);
    }
    walk.source += kSlices * slice_bytes;
    for (u32 i = 0; i < kStages; i++) walk.cursor.advance(kWeightStages);
    if constexpr (kLends) walk.leave_lent_stage();
  }
}

// The last pair of an item has one slice, but its two stages: the second one goes through its phases empty.
BK_INLINE bool lacks_slice(u32 columns, const WeightWalk& walk) { return columns > kPairColumns && walk.lends; }

// Units of any shape, and the last one of an item, whole or not.
BK_INLINE void produce_any_units(const EngineParams& params, const WideTiling& tiling, u32 num_tiles, u8* ring, WorkerShared& shared, WeightWalk& walk) {
  const u32 columns = tiling.stack * tiling.tile_rows;
#pragma unroll 1
  while (walk.num_left > 0 || lacks_slice(columns, walk)) {
    const u32 num_slices = min(unit_slices(columns), walk.num_left);
    u64* full = &shared.weights_full[walk.cursor.stage];
#pragma unroll 1
    for (u32 i = 0; i < unit_stages(columns); i++) wait_mbarrier<true>(params, &shared.weights_empty[walk.cursor.stage + i], walk.cursor.phase, kSiteWeightRing);
    if (unit_stages(columns) == 2) mbarrier_arrive(full + 1);
    mbarrier_arrive_expect_bytes(full, num_slices * num_tiles * walk.slice_bytes);
#pragma unroll 1
    for (u32 slice = 0; slice < num_slices; slice++) {
      u8* place = ring + walk.cursor.stage * kWeightStageBytes + slice * tiling.stack * walk.slice_bytes;
#pragma unroll 1
      for (u32 tile = 0; tile < num_tiles; tile++) bulk_copy_to_shared(place + tile * walk.slice_bytes, walk.source + tile * walk.tile_bytes, walk.slice_bytes, full);
      walk.source += walk.slice_bytes;
    }
    for (u32 i = 0; i < unit_stages(columns); i++) walk.cursor.advance(kWeightStages);
    walk.leave_lent_stage();
    walk.num_left -= num_slices;
  }
}

// Of the op that the producer has entered (entered_op), here and below: looked up again for each item.
BK_INLINE void produce_weights_wide(const EngineParams& params, u32 num_rows, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const WideTiling chosen = wide_tiling(params, entered_op(shared, kWeightProducer), num_rows);
  ProducerState& state = shared.producers[kWeightProducer];
  state.tokens = chosen.tokens;
  state.stack = chosen.stack;
  const GemmWalk walk = gemm_walk(params, chosen);
  align_producer(params, unit_stages(chosen.stack * chosen.tile_rows), shared, cursor);  // without an item too, as the consumers do
  u32 item = walk.first;
#pragma unroll 1
  for (; item < walk.end; item += walk.stride) {
    // Worked out anew for each item, because a producer has few registers.
    const Op& item_op = entered_op(shared, kWeightProducer);
    const u32 stack = state.stack;
    const WideTiling tiling = wide_tiling_of(item_op, num_rows, state.tokens, stack);
    const u32 slice_bytes = tiling.tile_rows * 128;
    const u32 first_tile = gemm_item(tiling, item).weight_item * stack;
    const u32 num_tiles = min(stack, tiling.num_tiles - first_tile);
    const u32 columns = stack * tiling.tile_rows;
    const bool lone = tiling.tokens == kRowTile;
    WeightWalk units{reinterpret_cast<const u8*>(item_op.weight) + static_cast<u64>(first_tile * tiling.num_slices) * slice_bytes,
                     tiling.num_slices, slice_bytes, tiling.num_slices * slice_bytes, columns == kPairColumns, has_pairs(columns, lone) && (lone || columns > kPairColumns), cursor, num_paces(item_op, num_rows)};
    // The shapes of the rule's items have code of their own, but for one: units of 128 x 64 items are left to the loop of any shape, with which down at 256 rows took 5 % less and
    // whole steps as long. Why was not found (PERFORMANCE.md, nineteenth state).
    const u32 shape = unit_shape(num_tiles, unit_slices(columns), unit_stages(columns));
    if (is_streamed(item_op.kind, num_rows)) {
      if (shape == unit_shape(2, 2, 1)) produce_whole_units<2, 2, 1, true, true>(params, ring, shared, units);
      else if (shape == unit_shape(2, 1, 2)) produce_whole_units<2, 1, 2, true, false>(params, ring, shared, units);
      else if (shape == unit_shape(4, 1, 2)) produce_whole_units<4, 1, 2, true, false>(params, ring, shared, units);
      else if (shape == unit_shape(1, 1, 1)) produce_whole_units<1, 1, 1, true, true>(params, ring, shared, units);
      else if (shape == unit_shape(4, 1, 1)) produce_whole_units<4, 1, 1, true, true>(params, ring, shared, units);
      else if (shape == unit_shape(2, 1, 1) && !units.alternates) produce_whole_units<2, 1, 1, true, false>(params, ring, shared, units);
    } else {
      if (shape == unit_shape(8, 1, 2)) produce_whole_units<8, 1, 2, false, false>(params, ring, shared, units);
      else if (shape == unit_shape(4, 1, 2)) produce_whole_units<4, 1, 2, false, false>(params, ring, shared, units);
      else if (shape == unit_shape(4, 1, 1)) produce_whole_units<4, 1, 1, false, true>(params, ring, shared, units);
      else if (shape == unit_shape(2, 1, 2)) produce_whole_units<2, 1, 2, false, false>(params, ring, shared, units);
      else if (shape == unit_shape(1, 1, 1)) produce_whole_units<1, 1, 1, false, true>(params, ring, shared, units);
      else if (shape == unit_shape(2, 1, 1)) produce_whole_units<2, 1, 1, false, true>(params, ring, shared, units);
    }
    produce_any_units(params, tiling, num_tiles, ring, shared, units);
    make_up_paces(params, shared, units.paces_left);
    cursor = units.cursor;
  }
  const u32 end_of_rounds = (walk.end + walk.stride - 1) / walk.stride * walk.stride;
  if (item < end_of_rounds) make_up_paces(params, shared, num_paces(entered_op(shared, kWeightProducer), num_rows));  // the last round had no item for this CTA
}

// ---- Inputs ------------------------------------------------------------------------------------------------------
// input: [row / 64][k / 64][64 rows][64 k], swizzled. Rows that do not exist keep old bytes, whose products nobody reads.
BK_INLINE void produce_inputs_wide(const EngineParams& params, const u8* input, u32 num_rows, u32 num_barriers, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  InputGate gate{params, num_barriers, false};
  const WideTiling chosen = wide_tiling(params, entered_op(shared, kInputProducer), num_rows);
  const u32 tokens = chosen.tokens;
  const u32 stack = chosen.stack;
  const GemmWalk walk = gemm_walk(params, chosen);
  RingCursor lent{0, 0};
#pragma unroll 1
  for (u32 item = walk.first; item < walk.end; item += walk.stride) {
    const WideTiling tiling = wide_tiling_of(entered_op(shared, kInputProducer), num_rows, tokens, stack);  // anew, as above
    const bool lone = tokens == kRowTile;
    const u32 row_begin = gemm_item(tiling, item).row_tile * tokens;
    const u32 second_offset = lone ? kRowTileBytes : tiling.num_slices * kRowTileBytes;
    const u8* source = input + static_cast<u64>(row_begin / kRowTile) * tiling.num_slices * kRowTileBytes;
    const u32 first_bytes = input_tile_bytes(num_rows, row_begin);
    const u32 next_tile_bytes = input_tile_bytes(num_rows, row_begin + kRowTile);
    const u32 columns = stack * tiling.tile_rows;
    if (has_pairs(columns, lone)) {
      if (item == walk.first) {
        gate.pass();
        lent = RingCursor{shared.compute.cursors.weights.stage, shared.compute.cursors.weights.phase ^ 1};  // before the op before ended, it was another
      }
      if (pair_stages(columns) == 1) produce_pair_inputs<1>(params, source, tiling.num_slices, lone, first_bytes, next_tile_bytes, ring, shared, cursor, lent);
      else produce_pair_inputs<2>(params, source, tiling.num_slices, lone, first_bytes, next_tile_bytes, ring, shared, cursor, lent);
      continue;
    }
#pragma unroll 1
    for (u32 num_left = tiling.num_slices; num_left > 0;) {
      const u32 num_slices = lone ? min(num_left, 2u) : 1;
      const u32 second_bytes = lone ? (num_slices == 2 ? first_bytes : 0) : next_tile_bytes;
      u64* full = &shared.inputs_full[cursor.stage];
      u8* place = ring + cursor.stage * kInputStageBytes;
      wait_mbarrier<true>(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
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

}  // namespace blinkimp
