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
#include <gemm_wide_producers.cuh>

namespace blinkimp {

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
