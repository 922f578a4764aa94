// Paged causal attention of a step on Hopper: both products by wgmma, keys and values streamed through the weight ring. GPU only.
//
//   attention_planner.cuh    who computes what, once a step                    (a warp of the producers)
//   attention_producer.cuh   pages into the ring, ahead of the op              (the weight producer)
//   attention.cuh            the two compute warpgroups: runs of pages          (here and attention_plain.cuh; runs: attention_runs.cuh, pieces: attention_tile.cuh)
//   attention_narrow.cuh     decode rows of a group of at most 8 heads: the same with wgmma's operands exchanged
//   attention_merge.cuh      units that several warpgroups share
// One loop serves prefill chunks and decode rows of large groups: 64 packed rows of a kv head's group (a decode row fills 1..16 of them) x a page of keys. Scores
// of the next page and outputs of this one are issued together; the softmax runs beside the outputs and beside the other warpgroup's products; in
// wide items named barriers keep them taking turns. Most pages of a prompt need nothing special and have a loop of their own (attention_plain.cuh).
// Scratch: kAttentionScratchBytes<head_dim>, aligned to 1024 bytes, free of readers and writers at the call; the ring's cursor is
// given and returned. store.chunk(row, column, uint4) writes 8 outputs of a plan row, store.pair(row, column, u32) two;
// column = head * head_dim + dimension.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_attention_sm90.py; without a GPU: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_narrow.cuh>
#include <attention_plain.cuh>
#include <attention_planner.cuh>

namespace blinkimp {

// ---- A run -------------------------------------------------------------------------------------------------------
// keys: the ring's place of the run's first page, afterwards of the one behind its last. others: see next_page().
template <int kHeadDim, class Store>
BK_INLINE void compute_run(const EngineParams& params, const AttentionRun& run, u8* shared_memory, WorkerShared& shared, RingCursor& keys, u32& others, const Store& store) {
  const f32 scale = params.dims.attention_scale * 1.4426950408889634f;  // exponentials are powers of 2
  const u32 memory = shared_address(shared_memory);
  constexpr u32 kValuesOffset = kPageStages<kHeadDim> == 2 ? 0 : kKvTileBytes<kHeadDim>;
  const bool has_rows = uniform(thread_idx() % kWarpgroupThreads / 32u * 16u < run.num_packed);  // of this warp: if not, its products are never read

  f32 outputs[kHeadDim / 2];
  f32 totals[kHeadDim / 2];
  f32 scores[kScoreWords];
  u32 weights[kWeightWords];
#pragma unroll
  for (u32 i = 0; i < kHeadDim / 2; ++i) outputs[i] = totals[i] = 0.0f;
#pragma unroll
  for (u32 i = 0; i < kScoreWords; ++i) scores[i] = 0.0f;
#pragma unroll
  for (u32 i = 0; i < kWeightWords; ++i) weights[i] = 0;
  FoldTotal total[2] = {{minus_infinite_score(), 0.0f}, {minus_infinite_score(), 0.0f}};
  SoftmaxState softmax;
  softmax.reset();

  const bool takes_turns = uniform(run.kind) == kRunWide;
  u32 num_arrivals = is_elected() ? (takes_turns ? 1 : 2) : 0;  // a narrow page has one reader
  const auto wait_page = [&](const RingCursor& at, u32 page, bool is_plain) {
    wait_stage(params, shared, at);
    if (!is_plain && uniform(page == run.patch_page)) {
      patch_page<kHeadDim>(run, shared_memory + kScratchOffset, shared_memory + kRingOffset + at.stage * kWeightStageBytes,
                           shared_memory + kRingOffset + values_of<kHeadDim>(at).stage * kWeightStageBytes + kValuesOffset);
    }
  };
  const auto release_stage = [&](u32 stage) { mbarrier_arrive_count(&shared.weights_empty[stage], num_arrivals); };
  // Scores of a page to exponentials. Of its mask nothing is looked up where is_plain says that there is none: it stands in shared memory, which takes its time.
  const auto weigh = [&](u32 page, bool is_plain, f32 (&factors)[2]) {
    if (!has_rows) return;
    if (!is_plain && uniform(page >= run.mask_from || page < run.mask_until)) mask_page(run, page, scores);
    softmax_block(scores, scale, softmax, factors);
  };
  // The outputs of a split of maxima and sums `done`, whose last page is `page`, into the total.
  const auto end_split = [&](u32 page, const SoftmaxState& done) {
    if (!has_rows) return;
    const f32 sums[2] = {quad_total(done.sum[0]), quad_total(done.sum[1])};
    if (uniform(run.first_split != 0)) {
      const u32 item_idx = run.item_begin + run.first_split + page / kSplitPages - run.page_begin / kSplitPages;
      store_part<kHeadDim>(params, item_idx, outputs, done.maximum, sums);
    } else {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const FoldFactors factors = fold_split(total[half], done.maximum[half], sums[half], scale);
#pragma unroll
        for (u32 tile = 0; tile < kHeadDim / 8; ++tile) {
#pragma unroll
          for (u32 i = tile * 4 + half * 2; i < tile * 4 + half * 2 + 2; ++i) totals[i] = fold_value(totals[i], outputs[i], factors);
        }
      }
    }
  };
  const auto is_in_turn = [&](u32 page) { return uniform(page >= run.order_begin && page < run.order_end) != 0; };
  f32 factors[2] = {1.0f, 1.0f};

  u32 page = uniform(run.page_begin);
  const u32 last_page = uniform(run.page_end - 1);
  wait_page(keys, page, false);
  wgmma_fence();
  issue_scores<kHeadDim>(scores, uniform(memory + run.query_offset) + kScratchOffset, uniform(memory + keys.stage * kWeightStageBytes) + kRingOffset);
  wgmma_commit();
  wgmma_wait<0>();
  if (kPageStages<kHeadDim> == 2) release_stage(keys.stage);
  weigh(page, false, factors);
  // Plain pages of a tile without empty rows have a loop of their own, from a split's first on.
  const u32 plain_begin = (run.plain_begin + kSplitPages - 1) / kSplitPages * kSplitPages;
  const bool has_plain = takes_turns && run.num_packed == kTileRows && plain_begin < run.plain_begin + run.num_plain;
  u32 stop = uniform(has_plain ? plain_begin : last_page);
#pragma unroll 1
  for (;;) {
#pragma unroll 1
    for (; page != stop; page++) {
      if (has_rows) pack_weights(scores, weights);  // not before: the products on their way read them. Rows that nobody reads stay zeros: zeros cost less power
      const bool is_plain = uniform(page - run.plain_begin < run.num_plain) != 0;
      const bool in_turn = is_plain ? takes_turns : is_in_turn(page);
      const u32 values_stage = values_of<kHeadDim>(keys).stage;
      next_page<kHeadDim>(keys, others);
      wait_page(keys, page + 1, is_plain);
      if (in_turn) barrier_sync(kTurnBarrier + compute_warpgroup(), 2 * kWarpgroupThreads);
      // Scores of the next page, then outputs of this one, during which the scores become exponentials.
      wgmma_fence();
      issue_scores<kHeadDim>(scores, uniform(memory + run.query_offset) + kScratchOffset, uniform(memory + keys.stage * kWeightStageBytes) + kRingOffset);
      wgmma_commit();
      issue_outputs<kHeadDim>(outputs, weights, uniform(memory + values_stage * kWeightStageBytes) + kRingOffset + kValuesOffset, page % kSplitPages != 0);
      wgmma_commit();
      if (in_turn) barrier_arrive(kTurnBarrier + 1 - compute_warpgroup(), 2 * kWarpgroupThreads);
      wgmma_wait<1>();
      if (kPageStages<kHeadDim> == 2) release_stage(keys.stage);
      const bool ends_split = (page + 1) % kSplitPages == 0;
      const SoftmaxState done = softmax;
      if (ends_split) softmax.reset();
      weigh(page + 1, is_plain, factors);
      wgmma_wait<0>();
      release_stage(values_stage);
      if (ends_split) end_split(page, done);
      else if (has_rows) rescale_outputs(outputs, factors);
    }
    if (uniform(page + 1 == run.page_end)) break;
    compute_plain_pages<kHeadDim>(params, run, memory, shared, keys, page, uniform(run.plain_begin + run.num_plain), has_rows, outputs, totals, scores, weights, total, softmax);
    // Known again, instead of kept beside those pages.
    others = 0;
    num_arrivals = is_elected() ? 1 : 0;
    stop = uniform(run.page_end - 1);
  }
  if (has_rows) pack_weights(scores, weights);
  const bool in_turn = is_in_turn(page);
  const u32 values_stage = values_of<kHeadDim>(keys).stage;
  next_page<kHeadDim>(keys, others);
  if (in_turn) barrier_sync(kTurnBarrier + compute_warpgroup(), 2 * kWarpgroupThreads);
  wgmma_fence();
  issue_outputs<kHeadDim>(outputs, weights, uniform(memory + values_stage * kWeightStageBytes) + kRingOffset + kValuesOffset, page % kSplitPages != 0);
  wgmma_commit();
  if (in_turn) barrier_arrive(kTurnBarrier + 1 - compute_warpgroup(), 2 * kWarpgroupThreads);
  wgmma_wait<0>();
  release_stage(values_stage);
  end_split(page, softmax);

  const u32 num_run_splits = run.kind == kRunNarrow ? splits_between(run.page_begin, run.page_end) : 0;
  if (uniform(run.kind == kRunWide || num_run_splits == run.num_splits)) {
    if (has_rows) store_rows<kHeadDim>(run, totals, total, store);
    return;
  }
  if (uniform(run.first_split == 0)) {
    const f32 maximum[2] = {total[0].maximum, total[1].maximum};
    const f32 sums[2] = {total[0].sum, total[1].sum};
    store_part<kHeadDim>(params, run.item_begin, totals, maximum, sums);
  }
  leave_unit<kHeadDim>(params, run, shared_memory, num_run_splits, store);
}

// The warp of a warpgroup that finds its runs: the last, which has no rows of a tile of few.
BK_INLINE bool is_scout_warp() { return thread_idx() % kWarpgroupThreads >= kWarpgroupThreads - 32; }
BK_INLINE bool is_scout() { return thread_idx() % kWarpgroupThreads == kWarpgroupThreads - 32; }

// All compute threads, before attend(). Needs the plan, but nothing that the step computes: call it before the wait for the QKV op.
// step: counts as the planning warp's steps do. op, plan: must stay where they are until the op's end.
template <int kHeadDim>
BK_INLINE void prepare_attention(const EngineParams& params, const Op& op, const StepPlan* plan, u32 step, u8* shared_memory, AttentionShared& attention) {
  static_assert(kAttentionScratchBytes<kHeadDim> <= kScratchBytes, "the query tiles");
  wait_schedule(params, attention, step);
  AttentionState& state = attention_state<kHeadDim>(shared_memory);
  // A decode row fills few of a query tile's 64 rows. The others are zeros: products with those cost less power, and power is what bounds the clock.
#pragma unroll 1
  for (u32 offset = thread_idx() * 16; offset < 2 * kQueryTileBytes<kHeadDim>; offset += kComputeThreads * 16) *reinterpret_cast<uint4*>(shared_memory + kScratchOffset + offset) = uint4{0, 0, 0, 0};
  if (is_first_thread()) {
    state.op = &op;
    state.plan = plan;
  }
  named_barrier_sync<1, kComputeThreads>();  // op and plan are written
  if (is_scout()) {
    const u32 warpgroup = compute_warpgroup();
    state.walks[warpgroup] = schedule_of(attention, op.window).narrow[warpgroup];
    state.wide_walks[warpgroup] = WideWalk{0, 0, 0};
    next_run<kHeadDim>(params, attention, state, 0, warpgroup);
  }
}

// All compute threads, after prepare_attention(); the op's inputs are visible to them. keys: the ring's place; returns where it is after the
// op, equal in all threads.
template <int kHeadDim, class Store>
BK_INLINE RingCursor attend(const EngineParams& params, u8* shared_memory, WorkerShared& shared, AttentionShared& attention, RingCursor keys, const Store& store) {
  static_assert(kPageStages<kHeadDim> * kWeightStageBytes == 2 * kKvTileBytes<kHeadDim>, "a page fills whole stages");
  AttentionState& state = attention_state<kHeadDim>(shared_memory);
  keys = RingCursor{uniform(keys.stage), uniform(keys.phase)};
  // The ring holds a page of warpgroup 0, then one of warpgroup 1, and so on while both have some.
  const u32 warpgroup = uniform(compute_warpgroup());  // up to the loop, which has no register for it
  u32 others = uniform(schedule_of(attention, state.op->window).narrow[1 - warpgroup].num_pages);
  if (warpgroup == 1 && others) {
    advance_by(keys, kPageStages<kHeadDim>);
    others--;
  }
  // Turns go on from item to item: given anew for each, a warpgroup 1 that is ahead would give the same turn twice.
  if (warpgroup == 1) barrier_arrive(kTurnBarrier, 2 * kWarpgroupThreads);  // warpgroup 0 has the first
  // The loop over pages leaves a register for the address of the run alone: what else says where a run is, is computed where it is used.
  const auto own_runs = [&] { return state.runs[uniform(compute_warpgroup())]; };
  const AttentionRun* current = own_runs();
  const auto other_slot = [&]() -> u32 { return shared_address(current) == shared_address(own_runs()) ? 1 : 0; };
  bool is_first = true;
#pragma unroll 1
  for (;; current = own_runs() + other_slot()) {
    warpgroup_sync();  // the run is written, and a narrow one's queries if it is not the first; hazard: a slow warp still reads the other slot
    const AttentionRun& run = *current;
    const u32 kind = uniform(run.kind);
    if (kind != kRunNarrow) {
      advance_by(keys, others * kPageStages<kHeadDim>);  // the other warpgroup's last pages
      others = 0;
    }
    if (kind == kRunEnd) break;
    // Both warpgroups are done with the narrow pages: one that had fewer is up to six pages ahead, and would take an older phase of its stage for the
    // one it wants (I1 of attention_producer.cuh).
    if (uniform(run.joins)) named_barrier_sync<1, kComputeThreads>();
    if (is_first || kind == kRunWide) {
      // Wide: the scout finds the next run while the other warps bring this one's queries; nobody reads the other slot any more.
      const u32 num_issuers = kind == kRunWide ? kWarpgroupThreads - 32 : kWarpgroupThreads;
      if (uniform(thread_idx() % kWarpgroupThreads < num_issuers)) {
        issue_queries<kHeadDim>(params, run, shared_memory + kScratchOffset, thread_idx() % kWarpgroupThreads, num_issuers);
      } else {
        const u32 next_slot = other_slot();
        if (is_scout()) next_run<kHeadDim>(params, attention, state, next_slot, compute_warpgroup());
        __syncwarp();
      }
      land_queries();
      warpgroup_sync();  // the query tile is whole
    }
    is_first = false;
    if (kind == kRunNarrow && uniform(is_scout_warp())) {  // nobody reads the other slot any more
      const u32 next_slot = other_slot();
      if (is_scout()) next_run<kHeadDim>(params, attention, state, next_slot, compute_warpgroup());
      __syncwarp();  // the run is written
      const AttentionRun& next = own_runs()[next_slot];
      if (uniform(next.kind) == kRunNarrow) issue_queries<kHeadDim>(params, next, shared_memory + kScratchOffset, thread_idx() % 32, 32);
    }
    skip_pages<kHeadDim>(params, shared, keys, uniform(run.skip_before));
    if (kind == kRunNarrow && uniform(run.group) <= kSwappedHeads) compute_narrow_run<kHeadDim>(params, run, shared_memory, shared, keys, others, store);
    else if (uniform(run.num_packed)) compute_run<kHeadDim>(params, run, shared_memory, shared, keys, others, store);
    skip_pages<kHeadDim>(params, shared, keys, uniform(run.skip_after));
    land_queries();
  }
  if (uniform(compute_warpgroup()) == 0) barrier_sync(kTurnBarrier, 2 * kWarpgroupThreads);  // takes the turn that warpgroup 1 left over
  return keys;
}

}  // namespace blinkimp
