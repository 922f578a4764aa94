// Matrix products of a step of at most 64 rows: out[row, n] = sum over k of input[row, k] * weight[n, k], without split-K. GPU only.
//
// Tokens are wgmma's M (a tile of 64 rows), weight rows its N. One CTA owns an output tile over the whole K, and an output is one chain of
// accumulations in the order of k, whatever the tile's shape: its bits do not depend on the number of rows in the step. A tile of more than 64 weight
// rows is divided: warpgroup 0 has the first, 1 the last. A smaller one is warpgroup 0's: two would read the same inputs from shared memory, and are
// slower (GEMM_WIDE.md). Steps of more rows: gemm_wide.cuh.
//
// Weights: [tile][k / 64][kTileRows rows][64 k] bf16, swizzled; packed by host/gpu_weights.py; streamed by the weight producer through a ring of
// 16 KB stages, each of slices_per_stage() slices. Inputs: tiled_offset() of activation_layout.cuh; an input stage of 16 KB holds as many
// slices as fit.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <fragment.cuh>
#include <gemm_shape.cuh>
#include <ptx_wgmma.cuh>
#include <row_scales.cuh>

namespace blinkimp {

BK_INLINE constexpr u32 slices_per_stage(u32 tile_rows) {
  const u32 fitting = kWeightStageBytes / (tile_rows * 128);
  return fitting >= 4 ? 4 : (fitting >= 2 ? 2 : 1);
}

// ---- Producers: one elected thread each --------------------------------------------------------------------------
// Weight stages that are on their way at a time, of the ten that the ring has: 36 to 48 KB keep HBM busy. More would queue up, and the release at an op's end, which
// waits for all that its SM has asked for, would wait for them (PERFORMANCE.md, fifteenth state). Right behind attention there may be one more: a page's bytes count on its first stage.
constexpr u32 kWeightsOnTheWay = 3;

BK_INLINE void produce_weights(const EngineParams& params, const Op& op, const GemmShape& shape, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  const u32 slice_bytes = shape.tile_rows * 128;
  const u32 stage_slices = slices_per_stage(shape.tile_rows);
  const u8* weights = reinterpret_cast<const u8*>(op.weight);
  const GemmWalk walk = tile_walk(params, shape);
  for (u32 item = walk.first; item < walk.end; item += walk.stride) {
    const u8* tile = weights + static_cast<u64>(item) * shape.num_slices * slice_bytes;
    for (u32 slice = 0; slice < shape.num_slices; slice += stage_slices) {
      const u32 num_bytes = min(stage_slices, shape.num_slices - slice) * slice_bytes;
      wait_mbarrier<true>(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
      wait_landed(params, shared, cursor, kWeightsOnTheWay);
      mbarrier_arrive_expect_bytes(&shared.weights_full[cursor.stage], num_bytes);
      bulk_copy_streamed(ring + cursor.stage * kWeightStageBytes, tile + static_cast<u64>(slice) * slice_bytes, num_bytes, &shared.weights_full[cursor.stage]);
      cursor.advance(kWeightStages);
    }
  }
}

// The grid barrier behind which an op's input is written. The input producer passes it right before its first copy: everybody waits for what it works out behind it.
struct InputGate {
  const EngineParams& params;
  u32 num_barriers;
  bool is_open;

  BK_INLINE void pass() {
    if (is_open) return;
    wait_grid<true>(params, num_barriers);
    fence_proxy_async();  // the inputs were written by ordinary stores of other SMs; bulk copies read them
    is_open = true;
  }
};

// One row tile, several slices in a copy. Rows of the tile that do not exist keep old bytes, whose products nobody reads.
BK_INLINE void produce_inputs(const EngineParams& params, const u8* input, const GemmShape& shape, u32 num_barriers, u8* ring, WorkerShared& shared, RingCursor& cursor) {
  InputGate gate{params, num_barriers, false};
  const u32 slice_bytes = shape.input_rows * 128;
  const u32 input_bytes = shape.num_slices * slice_bytes;
  const GemmWalk walk = tile_walk(params, shape);
  for (u32 item = walk.first; item < walk.end; item += walk.stride) {
    for (u32 offset = 0; offset < input_bytes; offset += kInputStageBytes) {
      const u32 num_bytes = min(kInputStageBytes, input_bytes - offset);
      wait_mbarrier<true>(params, &shared.inputs_empty[cursor.stage], cursor.phase, kSiteInputRing);
      mbarrier_arrive_expect_bytes(&shared.inputs_full[cursor.stage], num_bytes);
      gate.pass();
      bulk_copy_to_shared(ring + cursor.stage * kInputStageBytes, input + offset, num_bytes, &shared.inputs_full[cursor.stage]);
      cursor.advance(kInputStages);
    }
  }
}

// Bytes of a row tile that exist, in groups of 8 rows.
BK_INLINE u32 input_tile_bytes(u32 num_rows, u32 row_begin) {
  if (row_begin >= num_rows) return 0;
  return (min(num_rows - row_begin, kRowTile) + 7) / 8 * 1024;
}

// ---- Consumers: the two compute warpgroups -----------------------------------------------------------------------
// The main loops over K of one item for one warpgroup: 64 rows x kColumns of the tile's weight rows, from the tile's row_offset on.
// Stages are given back once the products that read them are done.
// Two rules make the loops fast. All that addresses are made of is uniform(): wgmma takes its descriptors from uniform registers, and moving them
// there from a thread's own registers costs more than a product of few columns. Between wgmma_fence() and wgmma_commit() there is no branch.
constexpr u32 kNone = 0xffffffff;

struct MainLoop {
  WorkerShared& shared;
  RingCursor weights;
  RingCursor inputs;
  u64 a_base;
  u64 b_base;
  u32 num_arrivals;  // of this thread where a stage is given back: 1 of one thread of the warpgroup, 2 where it alone reads

  BK_INLINE void wait_weights() const { wait_mbarrier_warp(&shared.weights_full[weights.stage], weights.phase, kSiteWeightRing); }
  BK_INLINE void wait_inputs() const { wait_mbarrier_warp(&shared.inputs_full[inputs.stage], inputs.phase, kSiteInputRing); }
  // One look at what the next products need, while the last ones run: all lanes together. wait() is for what was not there.
  BK_INLINE bool sees(bool needs_weights, bool needs_inputs) const {
    const bool has_weights = mbarrier_test_wait(&shared.weights_full[weights.stage], weights.phase) || !needs_weights;
    const bool has_inputs = mbarrier_test_wait(&shared.inputs_full[inputs.stage], inputs.phase) || !needs_inputs;
    return __all_sync(0xffffffffu, has_weights && has_inputs);
  }
  BK_INLINE void wait(bool needs_weights, bool needs_inputs) const {
    if (needs_weights) wait_weights();
    if (needs_inputs) wait_inputs();
  }
  BK_INLINE u64 a_of(u32 offset) const { return a_base + uniform((inputs.stage * kInputStageBytes + offset) >> 4); }
  BK_INLINE u64 b_of(u32 offset) const { return b_base + uniform((weights.stage * kWeightStageBytes + offset) >> 4); }
  BK_INLINE void give_weights(u32 stage, bool used) const { mbarrier_arrive_count(&shared.weights_empty[used ? stage : 0], used ? num_arrivals : 0); }
  BK_INLINE void give_inputs(u32 stage, bool used) const { mbarrier_arrive_count(&shared.inputs_empty[used ? stage : 0], used ? num_arrivals : 0); }
  BK_INLINE void advance_weights() { weights.advance(kWeightStages); }
  BK_INLINE void advance_inputs() { inputs.advance(kInputStages); }
};

template <int kColumns>
BK_INLINE void multiply_slice(f32 (&d)[kColumns / 2], u64 a, u64 b) {
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_m64_k16<kColumns>(d, a + 2 * k, b + 2 * k, 1);
}

// Narrow: groups of kGroup slices, which lie in one weight stage and in one input stage. A group's stages are given back when the next one's products are on their
// way: given back before, a group would wait for its last product (2 to 3 % of a step of 16 to 64 rows).
// multiply(inputs, weights): the products of one slice, whose operands' descriptors these are.
template <int kTileRows, int kGroup, class Multiply>
BK_INLINE void multiply_narrow(MainLoop& loop, u32 num_slices, u32 input_rows, const Multiply& multiply) {
  constexpr u32 kStageSlices = slices_per_stage(kTileRows);
  static_assert(kStageSlices % kGroup == 0, "groups fill a weight stage");
  constexpr u32 kSliceBytes = kTileRows * 128;
  const u32 input_bytes = input_rows * 128;
  const u32 stage_inputs = kInputStageBytes / input_bytes;  // slices in an input stage: 2, 4, 8 or 16
  u32 used_weights = kNone;  // stages whose last reader is the group in flight
  u32 used_inputs = kNone;
  u32 in_stage = 0;         // slices of the current input stage that are used up
  u32 in_weight_stage = 0;  // and of the weight stage
  bool is_there = false;    // the next group's operands were seen
  u64 a = loop.a_of(0);
  u64 b = loop.b_of(0);
  // Ahead of a group of several slices; right in front of one slice's products: kept from one turn to the next, its addresses would be moved to uniform registers for each product anew.
  const auto find_operands = [&] {
    a = loop.a_of(in_stage * input_bytes);
    b = loop.b_of(in_weight_stage * kSliceBytes);
  };
#pragma unroll 1
  for (u32 slice = 0; slice + kGroup <= num_slices; slice += kGroup) {
    if constexpr (kGroup == 1) find_operands();
    if (!is_there) loop.wait(in_weight_stage == 0, in_stage == 0);
    wgmma_fence();
#pragma unroll
    for (u32 j = 0; j < kGroup; j++) multiply(a + j * (input_bytes >> 4), b + j * (kSliceBytes >> 4));
    wgmma_commit();
    // While they run: all that the next group's products wait for otherwise: looks, shuffles and additions one after the other.
    const u32 done_weights = used_weights;
    const u32 done_inputs = used_inputs;
    used_weights = used_inputs = kNone;
    in_weight_stage += kGroup;
    in_stage += kGroup;
    if (in_weight_stage == kStageSlices) {
      used_weights = loop.weights.stage;
      loop.advance_weights();
      in_weight_stage = 0;
    }
    if (in_stage == stage_inputs) {
      used_inputs = loop.inputs.stage;
      loop.advance_inputs();
      in_stage = 0;
    }
    is_there = loop.sees(in_weight_stage == 0, in_stage == 0);
    if constexpr (kGroup > 1) find_operands();
    wgmma_wait<1>();  // the group before is done
    loop.give_weights(done_weights, done_weights != kNone);
    loop.give_inputs(done_inputs, done_inputs != kNone);
  }
  wgmma_wait<0>();
  loop.give_weights(used_weights, used_weights != kNone);
  loop.give_inputs(used_inputs, used_inputs != kNone);
#pragma unroll 1
  for (u32 slice = num_slices / kGroup * kGroup; slice < num_slices; slice++) {  // a last group that is not full
    if (in_weight_stage == 0) loop.wait_weights();
    if (in_stage == 0) loop.wait_inputs();
    const u64 a = loop.a_of(in_stage * input_bytes);
    const u64 b = loop.b_of(in_weight_stage * kSliceBytes);
    wgmma_fence();
    multiply(a, b);
    wgmma_commit();
    wgmma_wait<0>();
    in_weight_stage++;
    if (++in_stage == stage_inputs) {
      loop.give_inputs(loop.inputs.stage, true);
      loop.advance_inputs();
      in_stage = 0;
    }
  }
  if (in_weight_stage != 0) {  // a last stage that is not full
    loop.give_weights(loop.weights.stage, true);
    loop.advance_weights();
  }
  if (in_stage != 0) {
    loop.give_inputs(loop.inputs.stage, true);
    loop.advance_inputs();
  }
}

template <int kTileRows, int kColumns>
BK_INLINE void multiply_tile(const GemmShape& shape, u32 row_offset, u8* shared_memory, WorkerShared& shared,
                             ConsumerCursors& cursors, f32 (&d)[kColumns / 2]) {
  constexpr u32 kStageSlices = slices_per_stage(kTileRows);
  const u32 base = uniform(shared_address(shared_memory));
  const u32 input_rows = uniform(shape.input_rows);
  // With 8 rows the row groups of wgmma's A operand are all the same one.
  const u64 a_base = wgmma_descriptor(base + kScratchOffset, input_rows == 8 ? 0 : 1024);
  const u64 b_base = wgmma_descriptor(base + kRingOffset + row_offset * 128, 1024);
  MainLoop loop{shared, RingCursor{uniform(cursors.weights.stage), uniform(cursors.weights.phase)},
                RingCursor{uniform(cursors.inputs.stage), uniform(cursors.inputs.phase)}, a_base, b_base, thread_idx() % 128 == 0 ? (kColumns == kTileRows ? 2u : 1u) : 0u};
  const auto multiply = [&](u64 inputs, u64 tile) { multiply_slice<kColumns>(d, inputs, tile); };
  if (kStageSlices > 2 && input_rows < kRowTile) multiply_narrow<kTileRows, kStageSlices>(loop, uniform(shape.num_slices), input_rows, multiply);
  else multiply_narrow<kTileRows, kStageSlices < 2 ? kStageSlices : 2>(loop, uniform(shape.num_slices), input_rows, multiply);  // 64 rows: an input stage has two slices
  cursors = ConsumerCursors{loop.weights, loop.inputs};
}

// One item for one warpgroup. Epilogue: the interface of gemm_epilogues.cuh.
template <int kTileRows, int kColumns, bool kScaled, class Epilogue>
BK_INLINE void run_item(const GemmShape& shape, u32 row_begin, u32 tile_idx, u32 row_offset, u8* shared_memory, WorkerShared& shared,
                        ConsumerCursors& cursors, ScaleReader& scales, const Epilogue& epilogue) {
  f32 d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) d[i] = 0.0f;
  FragmentTail<kColumns, false, Epilogue> tail(epilogue, row_begin, tile_idx * kTileRows + row_offset);
  multiply_tile<kTileRows, kColumns>(shape, row_offset, shared_memory, shared, cursors, d);
  const f32* row_scale = nullptr;
  if constexpr (kScaled) row_scale = scales.wait(shared);
  tail.finish(d, row_scale);
}

// Past an item's stages: for a warpgroup that has nothing of it.
BK_INLINE void pass_stages(const GemmShape& shape, u32 stage_slices, ConsumerCursors& cursors) {
  const u32 num_slices = uniform(shape.num_slices);
  cursors.weights.advance_by((num_slices + stage_slices - 1) / stage_slices, kWeightStages);
  cursors.inputs.advance_by((num_slices * uniform(shape.input_rows) * 128 + kInputStageBytes - 1) / kInputStageBytes, kInputStages);
}

// Where an op leaves the rings, with or without an item. Equal in all threads; taken over when the op ends.
BK_INLINE void leave_rings(WorkerShared& shared, const ConsumerCursors& cursors) {
  if (is_first_thread()) shared.next_cursors = cursors;
}

// Runs all items of an op for this CTA.
// kColumns: weight rows of a warpgroup. All: warpgroup 1 counts along. Fewer: warpgroup 0 has the tile's first, 1 its last ones. Where they overlap both store the same bits. So both run one copy
// of the code: what a step executes should fit into the instruction caches, or a cold epilogue takes ten times as long. kScaled: the op normalises its input.
template <int kTileRows, int kColumns, bool kScaled, class Epilogue>
BK_INLINE void run_gemm(const EngineParams& params, const GemmShape& shape, u8* shared_memory, WorkerShared& shared, const Epilogue& epilogue) {
  ConsumerCursors cursors = shared.compute.cursors;
  ScaleReader scales{kScaled ? shared.compute.scales : RingCursor{}, kNoRow};
  const u32 warpgroup = uniform(thread_idx() / 128);
  const GemmWalk walk = tile_walk(params, shape);
  const u32 end = uniform(walk.end);
  if (walk.first >= end) note_idle(shared);
  for (u32 item = uniform(walk.first); item < end; item += walk.stride) {
    if constexpr (kScaled) scales.enter(shared, 0);
    if (kColumns == kTileRows && warpgroup != 0) {
      pass_stages(shape, slices_per_stage(kTileRows), cursors);
      if constexpr (kScaled) scales.wait(shared);
      continue;
    }
    run_item<kTileRows, kColumns, kScaled>(shape, 0, item, warpgroup * (kTileRows - kColumns), shared_memory, shared, cursors, scales, epilogue);
  }
  if constexpr (kScaled) scales.leave(shared);
  leave_rings(shared, cursors);
}

}  // namespace blinkimp
