// Matrix products of steps of more than 64 rows: the same sums as gemm.cuh's, bit for bit, in larger tiles. GPU only.
//
// A CTA owns an output tile of 128 (or 64) rows x N <= 256 weight rows over the whole K: `stack` packed weight tiles side by side
// (gemm_wide_tiling.cuh chooses). Each output is one fp32 accumulator, wgmma k16 steps in increasing k.
//   128 rows           each warpgroup has 64 of them and all N weight rows: N / 2 <= 128 accumulators a thread
//   64 rows ("lone")   warpgroup 0 has all of the item: two would both read the same rows from shared memory (GEMM_WIDE.md). 1 goes through the tail ahead
// Products of slice i run while slice i + 1 is waited for and issued; a stage goes back to its producer one slice later. The two warpgroups never
// wait for each other, so that one's epilogue can run beside the other's products, as far as the rings are deep.
//
// Rings: those of worker_memory.cuh. A weight unit is unit_slices() slices of N x 128 bytes in one 16 KB stage, or one slice in two (N > 128), which
// then begin at an even stage. An input stage holds 128 rows of one slice, or 64 rows of two. Items of few weight rows: gemm_pairs.cuh.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <gemm_pairs.cuh>
#include <gemm_wide_tiling.cuh>

namespace blinkimp {

// How a weight slice of `columns` rows lies in the ring.
BK_INLINE constexpr u32 unit_stages(u32 columns) { return columns * 128 > kWeightStageBytes ? 2 : 1; }
BK_INLINE constexpr u32 unit_slices(u32 columns) { return columns * 128 * 2 <= kWeightStageBytes ? 2 : 1; }
static_assert(kWeightStages % 2 == 0, "units of two stages never wrap in the middle");
// By which a unit of so many packed tiles, slices and stages is known.
BK_INLINE constexpr u32 unit_shape(u32 num_tiles, u32 num_slices, u32 num_stages) { return num_tiles * 16 + num_slices * 4 + num_stages; }

// Weights leave L2 first in steps of at most so many rows, gate-up's in steps of twice as many: few row tiles read them, at the same time. At 256 rows QKV's, O's and down's, which two
// row tiles read, make a step 1.6 % faster if they do not, and gate-up's half a percent slower.
constexpr u32 kStreamedRows = 128;
BK_INLINE bool is_streamed(u32 op_kind, u32 num_rows) { return num_rows <= (op_kind == kOpGateUp ? 2 * kStreamedRows : kStreamedRows); }

// ---- Producers: one elected thread each --------------------------------------------------------------------------
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
#pragma unroll 1
  for (u32 item = walk.first; item < walk.end; item += walk.stride) {
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
                     tiling.num_slices, slice_bytes, tiling.num_slices * slice_bytes, columns == kPairColumns, has_pairs(columns, lone) && (lone || columns > kPairColumns), cursor};
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
    cursor = units.cursor;
  }
}

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

// ---- Consumers: the two compute warpgroups -----------------------------------------------------------------------
// The compute warpgroups' side of align_producer(): they only count along.
BK_INLINE void align_consumer(u32 num_unit_stages, RingCursor& cursor) {
  while (cursor.stage % num_unit_stages != 0) cursor.advance(kWeightStages);
}

// The main loops over K of one item, for one warpgroup: 64 rows x the item's kColumns weight rows. `d` starts at zero.
// Their two rules are gemm.cuh's: addresses are uniform(), and no branch between wgmma_fence() and wgmma_commit(). Those of few weight rows: gemm_pairs.cuh.
//
// 128 rows, and more than 128 weight rows: a slice's products take so long that the next one's operands are waited for while they run. So there is no look ahead, and little else: at the
// board's power an instruction of a warp costs 200 pJ, eight warps' 120 a slice were 5 % of its joules (PERFORMANCE.md, twenty-first state).
template <int kColumns>
BK_INLINE void multiply_slices(MainLoop& loop, u32 num_slices, f32 (&d)[kColumns / 2]) {
  static_assert(unit_stages(kColumns) == 2, "one slice a unit, in two stages");
  // Of the slice that is so many before the next one. Its stages follow from the cursors: kept in registers they would be two more, and spilled.
  const auto give = [&](u32 num_slices_back, bool used) {
    const u32 by = 2 * num_slices_back;
    const u32 weights = loop.weights.stage + (loop.weights.stage < by ? kWeightStages : 0) - by;
    const u32 inputs = (loop.inputs.stage + kInputStages - num_slices_back) % kInputStages;
    const u32 num_arrivals = used ? loop.num_arrivals : 0;
    for (u32 i = 0; i < 2; i++) mbarrier_arrive_count(&loop.shared.weights_empty[weights + i], num_arrivals);
    mbarrier_arrive_count(&loop.shared.inputs_empty[inputs], num_arrivals);
  };
#pragma unroll 1
  for (u32 slice = 0; slice < num_slices; slice++) {
    const u64 a = loop.a_base + uniform(loop.inputs.stage * (kInputStageBytes >> 4));
    const u64 b = loop.b_base + uniform(loop.weights.stage * (kWeightStageBytes >> 4));
    loop.wait(true, true);
    wgmma_fence();
    multiply_slice<kColumns>(d, a, b);
    wgmma_commit();
    for (u32 i = 0; i < 2; i++) loop.advance_weights();
    loop.advance_inputs();
    wgmma_wait<1>();  // the slice before is done: the tensor cores run through
    give(2, slice != 0);
  }
  wgmma_wait<0>();
  give(1, true);
}

// 64 rows: warpgroup 0 alone, and an input stage has two slices.
template <int kColumns>
BK_INLINE void multiply_lone_slices(MainLoop& loop, u32 num_slices, f32 (&d)[kColumns / 2]) {
  constexpr u32 kInputSlices = 2;
  static_assert(unit_stages(kColumns) == 1 && !has_pairs(kColumns, true), "one slice a unit, in a stage");
  bool is_there = false;  // the next operands were seen
  u64 a = loop.a_of(0);
  u64 b = loop.b_of(0);
  u32 used_weights = kNone;  // stages whose last reader is the slice in flight
  u32 used_inputs = kNone;
  u32 in_input = 0;
#pragma unroll 1
  for (u32 slice = 0; slice < num_slices; slice++) {
    if (!is_there) loop.wait(true, in_input == 0);
    wgmma_fence();
    multiply_slice<kColumns>(d, a, b);
    wgmma_commit();
    // While they run: all that the next products wait for otherwise (gemm.cuh).
    const bool last = slice + 1 == num_slices;
    const u32 before_weights = used_weights;
    const u32 before_inputs = used_inputs;
    used_weights = loop.weights.stage;
    used_inputs = kNone;
    loop.advance_weights();
    if (++in_input == kInputSlices || last) {
      used_inputs = loop.inputs.stage;
      in_input = 0;
      loop.advance_inputs();
    }
    is_there = loop.sees(true, in_input == 0);
    a = loop.a_of(in_input * kRowTileBytes);
    b = loop.b_of(0);
    wgmma_wait<1>();  // the slice before is done: the tensor cores run through
    loop.give_weights(before_weights, before_weights != kNone);
    loop.give_inputs(before_inputs, before_inputs != kNone);
  }
  wgmma_wait<0>();
  loop.give_weights(used_weights, used_weights != kNone);
  loop.give_inputs(used_inputs, used_inputs != kNone);
}

constexpr u32 kNobodysRow = 1u << 28;  // past every step's last, and the first of a tile

// One item for one warpgroup. rehearses: the tail alone, of rows that nobody has.
template <int kTileRows, int kStack, bool kLone, bool kScaled, class Epilogue>
BK_INLINE void run_wide_item(const WideTiling& tiling, const GemmItem& item, bool rehearses, MainLoop& loop, WorkerShared& shared,
                             ScaleReader& scales, const Epilogue& epilogue) {
  constexpr int kColumns = kTileRows * kStack;
  const u32 row_begin = rehearses ? kNobodysRow : kLone ? item.row_tile * kRowTile : (item.row_tile * 2 + uniform(thread_idx() / 128)) * kRowTile;
  FragmentTail<kColumns, true, Epilogue> tail(epilogue, row_begin, item.weight_item * kColumns);
  f32 d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) d[i] = 0.0f;
  const f32* row_scale = shared.row_scale[0];  // of nobody's rows: whatever stands there, for nothing is stored
  if (!rehearses) {
    if constexpr (has_pairs(kColumns, kLone) && kColumns > kPairColumns) multiply_pairs_of_stages<kColumns>(loop, uniform(tiling.num_slices), d);
    else if constexpr (has_pairs(kColumns, kLone)) multiply_pairs<kLone>(loop, uniform(tiling.num_slices), d);
    else if constexpr (kLone) multiply_lone_slices<kColumns>(loop, uniform(tiling.num_slices), d);
    else multiply_slices<kColumns>(loop, uniform(tiling.num_slices), d);
    if constexpr (kScaled) row_scale = scales.wait(shared);
  }
  tail.finish(d, row_scale);
}

template <int kTileRows, int kStack, bool kLone, bool kScaled, class Epilogue>
BK_INLINE void run_wide_items(const EngineParams& params, const Op& op, u32 num_rows, u8* shared_memory, WorkerShared& shared,
                              ConsumerCursors& cursors, ScaleReader& scales, const Epilogue& epilogue) {
  RingCursor weights{uniform(cursors.weights.stage), uniform(cursors.weights.phase)};
  align_consumer(unit_stages(kTileRows * kStack), weights);
  const u32 warpgroup = uniform(thread_idx() / 128);
  const u32 input_offset = kLone || has_pairs(kTileRows * kStack, kLone) ? 0 : warpgroup * kRowTileBytes;
  MainLoop loop{shared, weights, RingCursor{uniform(cursors.inputs.stage), uniform(cursors.inputs.phase)},
                wgmma_descriptor(uniform(shared_address(shared_memory)) + kScratchOffset + input_offset, 1024), wgmma_descriptor(uniform(shared_address(shared_memory)) + kRingOffset, 1024),
                thread_idx() % 128 == 0 ? (kLone ? 2u : 1u) : 0u};
  // Anew for each item: with the tokens and the stack known that costs less than registers through an item.
  const auto tiling_now = [&] { return wide_tiling_of(op, opaque(num_rows), kLone ? kRowTile : 2 * kRowTile, kStack); };
  WideTiling tiling = tiling_now();
  u32 idx = uniform(cta_idx());
  bool has_item = idx < uniform(tiling.num_items);
  if (!has_item) note_idle(shared);
#pragma unroll 1
  while (has_item) {
    const GemmItem item = gemm_item(tiling, idx);
    if constexpr (kScaled) scales.enter(shared, item.row_tile);
    // A warpgroup that has nothing of the item goes through its tail first: the other one finds the code in the instruction caches (PERFORMANCE.md, fifteenth state).
    const bool passes = kLone && warpgroup != 0;
    run_wide_item<kTileRows, kStack, kLone, kScaled>(tiling, item, passes, loop, shared, scales, epilogue);
    if constexpr (kLone && kScaled) {
      if (passes) scales.wait(shared);
    }
    idx += params.num_workers;
    tiling = tiling_now();
    has_item = idx < uniform(tiling.num_items);
  }
  cursors = ConsumerCursors{loop.weights, loop.inputs};  // a warpgroup that had nothing of the items has not counted: leave_rings() takes warpgroup 0's
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
    if constexpr (has_lone_items(kTileRows)) run_wide_items<kTileRows, kLoneStack, true, kScaled>(params, op, num_rows, shared_memory, shared, cursors, scales, epilogue);
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
