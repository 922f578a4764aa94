// Items with no more weight rows than tokens (O and down at 65 to 512 rows, QKV at 129 to 256): units of two slices, and inputs in the ring of weights, too. GPU only.
//
// Such an item needs as many bytes of inputs as of weights, or up to twice as many, and what bounds it is how many of them are on their way: 64 KB of an input ring
// are four slices of 128 rows, of which the products hold one or two, where the weight ring is ten or twenty deep. So the weight ring lends stages to inputs:
//   128 rows   warpgroup 0's are in the input ring, warpgroup 1's in the weight ring, in the stage behind the unit's weights; those take one stage, if the
//              item has 64 weight rows, else a stage a slice
//   64 rows    (of 64 weight rows) those of an item's units 0, 2, .. are in the weight ring, likewise, those of units 1, 3, .. in the input ring
// The weight producer leaves a lent stage out, the input producer fills it. That one knows the ring's place from the compute threads: behind the barrier of the
// op before, ComputeState says where they begin.
// I1 No wait is for a phase two ahead, which a parity would show as over: who passes a stage knows that those behind it were used up a lap before, because
//    the compute warpgroups give stages back in the ring's order.
// Called by device/gemm_wide.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py; without a GPU: pytest tests/host/test_gemm_wide_simt.py
#pragma once
#include <gemm.cuh>

namespace blinkimp {

constexpr u32 kPairColumns = 64;       // weight rows of which two slices fill a stage
constexpr u32 kMostPairColumns = 128;  // and one does
constexpr u32 kPairSlices = 2;         // of a unit: they fill a stage of 64 rows of inputs
static_assert(kPairSlices * kPairColumns * 128 == kWeightStageBytes && kPairSlices * kRowTileBytes == kInputStageBytes && kInputStageBytes == kWeightStageBytes, "whole stages");

// Whether an item of so many weight rows is cut into such units. lone: it has 64 rows.
BK_INLINE constexpr bool has_pairs(u32 columns, bool lone) { return columns >= kPairColumns && columns <= (lone ? kPairColumns : kMostPairColumns); }
// Weight stages of a unit, an item's last one too, which may have a slice less.
BK_INLINE constexpr u32 pair_stages(u32 columns) { return columns == kPairColumns ? 1 : kPairSlices; }

// Whether unit `idx` of an item has inputs in the weight ring.
BK_INLINE bool borrows_stage(bool lone, u32 idx) { return !lone || idx % 2 == 0; }

// Stages of both rings by one number: weight stages come behind input stages, in memory and with their barriers.
BK_INLINE RingCursor lent_place(RingCursor weights) { return RingCursor{kInputStages + weights.stage, weights.phase}; }

// ---- The input producer ------------------------------------------------------------------------------------------
// Up to two slices of 64 rows, of which tile_bytes exist, to a stage.
BK_INLINE void fill_inputs(const EngineParams& params, const u8* source, u32 tile_bytes, u32 num_slices, u8* memory, WorkerShared& shared, RingCursor at) {
  u64* full = full_barrier(shared, at.stage);
  u8* place = memory + at.stage * kInputStageBytes;
  wait_mbarrier<true>(params, empty_barrier(shared, at.stage), at.phase, kSiteInputRing);
  mbarrier_arrive_expect_bytes(full, num_slices * tile_bytes);
  if (tile_bytes == kRowTileBytes) {
    bulk_copy_to_shared(place, source, num_slices * kRowTileBytes, full);
  } else if (tile_bytes) {
    bulk_copy_to_shared(place, source, tile_bytes, full);
    if (num_slices == kPairSlices) bulk_copy_to_shared(place + kRowTileBytes, source + kRowTileBytes, tile_bytes, full);
  }
}

// Inputs of one item: first_bytes of its 64 rows, second_bytes of the 64 behind them if it has those. lent: the place in the weight ring.
template <u32 kUnitStages>
BK_INLINE void produce_pair_inputs(const EngineParams& params, const u8* source, u32 num_item_slices, bool lone, u32 first_bytes, u32 second_bytes, u8* memory, WorkerShared& shared,
                                   RingCursor& inputs, RingCursor& lent) {
#pragma unroll 1
  for (u32 slice = 0; slice < num_item_slices; slice += kPairSlices) {
    const u32 num_slices = min(kPairSlices, num_item_slices - slice);
    const bool borrows = borrows_stage(lone, slice / kPairSlices);
    for (u32 i = 0; i < kUnitStages; i++) lent.advance(kWeightStages);  // the unit's weights
    if (!lone || !borrows) {
      fill_inputs(params, source, first_bytes, num_slices, memory, shared, inputs);
      inputs.advance(kInputStages);
    }
    if (borrows) {
      fill_inputs(params, lone ? source : source + num_item_slices * kRowTileBytes, lone ? first_bytes : second_bytes, num_slices, memory, shared, lent_place(lent));
      lent.advance(kWeightStages);
    }
    source += kPairSlices * kRowTileBytes;
  }
}

// ---- The compute warpgroups --------------------------------------------------------------------------------------
// The main loops over K of one item, for one warpgroup: 64 rows x the item's weight rows. `d` starts at zero. Their rules are gemm.cuh's. Nor is there a branch around what moves
// cursors on: behind one, addresses are no longer uniform(), and down at 256 rows takes 20 % longer. Two loops, because what a warp executes for a unit of
// 64 x 64 sets the pace, 484 clk where its products take 255: one loop for all units has its instructions in another order, and steps of 128 rows take 0.9 % longer (PERFORMANCE.md, twenty-first state).
// 64 weight rows: a unit's weights are one stage.
template <bool kLone>
BK_INLINE void multiply_pairs(MainLoop& loop, u32 num_slices, f32 (&d)[kPairColumns / 2]) {
  constexpr u32 kSliceBytes = kPairColumns * 128;
  bool borrows = kLone || uniform(thread_idx() / 128) != 0;  // this warpgroup, in this unit
  const auto find_inputs = [&] {
    RingCursor behind = loop.weights;
    behind.advance(kWeightStages);
    return borrows ? lent_place(behind) : loop.inputs;
  };
  const auto next_unit = [&] {
    loop.advance_weights();
    if (!kLone || borrows) loop.advance_weights();
    if (!kLone || !borrows) loop.advance_inputs();
    if (kLone) borrows = !borrows;
  };
  const auto sees = [&](const RingCursor& inputs) {
    const bool has_weights = mbarrier_test_wait(&loop.shared.weights_full[loop.weights.stage], loop.weights.phase);
    const bool has_inputs = mbarrier_test_wait(full_barrier(loop.shared, inputs.stage), inputs.phase);
    return __all_sync(0xffffffffu, has_weights && has_inputs) != 0;
  };
  const auto wait = [&](const RingCursor& inputs) {
    loop.wait_weights();
    wait_mbarrier_warp(full_barrier(loop.shared, inputs.stage), inputs.phase, kSiteInputRing);
  };
  const u32 num_readers = loop.num_arrivals != 0 ? 2 : 0;  // of inputs: this warpgroup alone
  const auto give = [&](u32 weights, u32 inputs, bool used) {
    loop.give_weights(weights, used);
    mbarrier_arrive_count(empty_barrier(loop.shared, used ? inputs : 0), used ? num_readers : 0);
  };
  const auto a_of = [&](const RingCursor& inputs) { return loop.a_base + uniform(inputs.stage * kInputStageBytes >> 4); };

  RingCursor inputs = find_inputs();  // of both rings
  u64 a = a_of(inputs);
  u64 b = loop.b_of(0);
  bool is_there = false;  // the next operands were seen
  u32 used_weights = kNone;
  u32 used_inputs = kNone;
#pragma unroll 1
  for (u32 slice = 0; slice + kPairSlices <= num_slices; slice += kPairSlices) {
    if (!is_there) wait(inputs);
    wgmma_fence();
    multiply_slice<kPairColumns>(d, a, b);
    multiply_slice<kPairColumns>(d, a + (kRowTileBytes >> 4), b + (kSliceBytes >> 4));
    wgmma_commit();
    const u32 before_weights = used_weights;
    const u32 before_inputs = used_inputs;
    used_weights = loop.weights.stage;
    used_inputs = inputs.stage;
    next_unit();
    inputs = find_inputs();
    is_there = sees(inputs);
    a = a_of(inputs);
    b = loop.b_of(0);
    if constexpr (kLone) {
      wgmma_wait<1>();  // the unit before is done
      give(before_weights, before_inputs, before_weights != kNone);
    } else {
      wgmma_wait<0>();  // given back at once, which is faster (PERFORMANCE.md, ninth state)
      give(used_weights, used_inputs, true);
    }
  }
  if constexpr (kLone) {
    wgmma_wait<0>();
    give(used_weights, used_inputs, used_weights != kNone);
  }
  if (num_slices % kPairSlices) {  // a last unit of one slice
    if (!is_there) wait(inputs);
    wgmma_fence();
    multiply_slice<kPairColumns>(d, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    give(loop.weights.stage, inputs.stage, true);
    next_unit();
  }
}

// 65 to 128 weight rows, and 128 rows: a unit's weights are two stages, those of an item's last unit too, which may have one slice.
template <int kColumns>
BK_INLINE void multiply_pairs_of_stages(MainLoop& loop, u32 num_slices, f32 (&d)[kColumns / 2]) {
  const bool borrows = uniform(thread_idx() / 128) != 0;  // this warpgroup
  const u32 num_readers = loop.num_arrivals != 0 ? 2 : 0;  // of inputs: this warpgroup alone
  struct Unit {
    RingCursor first;   // weights
    RingCursor second;
    RingCursor inputs;  // of both rings
  };
  const auto find = [&] {
    Unit unit{loop.weights, loop.weights, loop.inputs};
    unit.second.advance(kWeightStages);
    RingCursor behind = unit.second;
    behind.advance(kWeightStages);
    if (borrows) unit.inputs = lent_place(behind);
    return unit;
  };
  const auto next_unit = [&] {
    for (u32 i = 0; i < kPairSlices + 1; i++) loop.advance_weights();
    loop.advance_inputs();
  };
  const auto sees = [&](const Unit& unit) {
    const bool has_first = mbarrier_test_wait(&loop.shared.weights_full[unit.first.stage], unit.first.phase);
    const bool has_second = mbarrier_test_wait(&loop.shared.weights_full[unit.second.stage], unit.second.phase);
    const bool has_inputs = mbarrier_test_wait(full_barrier(loop.shared, unit.inputs.stage), unit.inputs.phase);
    return __all_sync(0xffffffffu, has_first && has_second && has_inputs) != 0;
  };
  const auto wait = [&](const Unit& unit) {
    wait_mbarrier_warp(&loop.shared.weights_full[unit.first.stage], unit.first.phase, kSiteWeightRing);
    wait_mbarrier_warp(&loop.shared.weights_full[unit.second.stage], unit.second.phase, kSiteWeightRing);
    wait_mbarrier_warp(full_barrier(loop.shared, unit.inputs.stage), unit.inputs.phase, kSiteInputRing);
  };
  const auto give = [&](const Unit& unit) {
    loop.give_weights(unit.first.stage, true);
    loop.give_weights(unit.second.stage, true);
    mbarrier_arrive_count(empty_barrier(loop.shared, unit.inputs.stage), num_readers);
  };
  const auto a_of = [&](const Unit& unit) { return loop.a_base + uniform(unit.inputs.stage * kInputStageBytes >> 4); };
  const auto b_of = [&](const RingCursor& weights) { return loop.b_base + uniform(weights.stage * kWeightStageBytes >> 4); };

  Unit unit = find();
  u64 a = a_of(unit);
  u64 first_b = b_of(unit.first);
  u64 second_b = b_of(unit.second);
  bool is_there = false;  // the next operands were seen
#pragma unroll 1
  for (u32 slice = 0; slice + kPairSlices <= num_slices; slice += kPairSlices) {
    if (!is_there) wait(unit);
    wgmma_fence();
    multiply_slice<kColumns>(d, a, first_b);
    multiply_slice<kColumns>(d, a + (kRowTileBytes >> 4), second_b);
    wgmma_commit();
    const Unit used = unit;
    next_unit();
    unit = find();
    is_there = sees(unit);
    a = a_of(unit);
    first_b = b_of(unit.first);
    second_b = b_of(unit.second);
    wgmma_wait<0>();
    give(used);  // at once, as above
  }
  if (num_slices % kPairSlices) {
    if (!is_there) wait(unit);
    wgmma_fence();
    multiply_slice<kColumns>(d, a, first_b);
    wgmma_commit();
    wgmma_wait<0>();
    give(unit);
    next_unit();
  }
}

}  // namespace blinkimp
