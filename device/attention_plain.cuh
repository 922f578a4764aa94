// The ring's places of attention's pages, and the loop over those of a prompt's pages that need nothing special. GPU only.
//
// Called by device/attention.cuh. Test: pytest -m gpu tests/gpu/test_attention_sm90.py; without a GPU: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_merge.cuh>

namespace blinkimp {

// ---- Pages -------------------------------------------------------------------------------------------------------
template <int kHeadDim>
BK_INLINE RingCursor values_of(RingCursor keys) {
  if constexpr (kPageStages<kHeadDim> == 2) keys.advance(kWeightStages);
  return keys;
}

BK_INLINE void advance_by(RingCursor& cursor, u32 num_stages) {
  cursor.stage += num_stages;
  cursor.phase ^= cursor.stage / kWeightStages & 1u;
  cursor.stage %= kWeightStages;
}

// Past a page; `others`: pages of the other warpgroup still to come, one between each two of ours.
template <int kHeadDim>
BK_INLINE void next_page(RingCursor& keys, u32& others) {
  keys.stage += others ? 2 * kPageStages<kHeadDim> : kPageStages<kHeadDim>;
  others -= others ? 1 : 0;
  if (keys.stage >= kWeightStages) {
    keys.stage -= kWeightStages;
    keys.phase ^= 1;
  }
}

// wait_mbarrier_warp() without its call, which would push values of the loop over pages out of their registers.
BK_INLINE void wait_stage(const EngineParams& params, WorkerShared& shared, const RingCursor& cursor) {
  u64* barrier = &shared.weights_full[cursor.stage];
  if (!__all_sync(0xffffffffu, mbarrier_try_wait(barrier, cursor.phase))) poll_mbarrier_warp(params, barrier, cursor.phase, kSiteWeightRing);
}

// Wide: pages that only the other warpgroup computes. The first warp alone waits: a slow one might find its stage two laps on, and wait for ever.
template <int kHeadDim>
BK_INLINE void skip_pages(const EngineParams& params, WorkerShared& shared, RingCursor& keys, u32 num_pages) {
  for (u32 i = 0; i < num_pages * kPageStages<kHeadDim>; ++i) {
    if (uniform(thread_idx() % kWarpgroupThreads < 32)) wait_stage(params, shared, keys);  // an arrival before the stage's turn would count for the turn before
    mbarrier_arrive_if(&shared.weights_empty[keys.stage], is_elected());
    keys.advance(kWeightStages);
  }
}

// ---- Plain pages -------------------------------------------------------------------------------------------------
// Pages [page, end) of a wide run, all plain and of 64 rows that exist; page: a split's first. What a warpgroup does between two products of its own sets the
// pace, so as little as can be stands there: the outputs are folded, or in the rare case rescaled, while the tensor cores multiply the next scores, and a split's
// factors are computed beside the products. The turn is passed on before the outputs: the other warpgroup's scores come right behind them.
// On entry and return scores are the exponentials of `page`, and nothing is on its way.
template <int kHeadDim>
BK_INLINE void compute_plain_pages(const EngineParams& params, const AttentionRun& run, u32 memory, WorkerShared& shared, RingCursor& keys, u32& page, u32 end, bool has_rows,
                                   f32 (&outputs)[kHeadDim / 2], f32 (&totals)[kHeadDim / 2], f32 (&scores)[kScoreWords], u32 (&weights)[kWeightWords], FoldTotal (&total)[2], SoftmaxState& softmax) {
  constexpr u32 kValuesOffset = kPageStages<kHeadDim> == 2 ? 0 : kKvTileBytes<kHeadDim>;
  const f32 scale = params.dims.attention_scale * 1.4426950408889634f;
  f32 factors[2] = {1.0f, 1.0f};
  FoldFactors fold[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};
  // The outputs of the page before `page` are whole: into the total, or to the scale of this page.
  const auto settle_outputs = [&](u32 at) {
    if (at % kSplitPages == 0) {
#pragma unroll
      for (u32 i = 0; i < kHeadDim / 2; ++i) totals[i] = fold_value(totals[i], outputs[i], fold[i / 2 % 2]);
    } else {
      rescale_outputs(outputs, factors);
    }
  };
  const auto find_next_page = [&] {
#pragma unroll
    for (u32 i = 0; i < kPageStages<kHeadDim>; ++i) keys.advance(kWeightStages);
    wait_stage(params, shared, keys);
  };
  // Of the values of the page before the one whose keys stand at `stage`. Computed twice: there is no register to keep it in.
  const auto stage_before = [](u32 stage) { return stage == 0 ? kWeightStages - 1 : stage - 1; };
  find_next_page();
#pragma unroll 1
  do {
    const u32 query_place = uniform(memory + run.query_offset) + kScratchOffset;
    const u32 key_place = uniform(memory + keys.stage * kWeightStageBytes) + kRingOffset;
    const u32 value_place = uniform(memory + stage_before(keys.stage) * kWeightStageBytes) + kRingOffset + kValuesOffset;
    pack_weights(scores, weights);  // not before: the products on their way read them
    barrier_sync(kTurnBarrier + compute_warpgroup(), 2 * kWarpgroupThreads);
    wgmma_fence();
    issue_scores<kHeadDim>(scores, query_place, key_place);
    wgmma_commit();
    settle_outputs(page);
    barrier_arrive(kTurnBarrier + 1 - compute_warpgroup(), 2 * kWarpgroupThreads);
    wgmma_fence();
    issue_outputs<kHeadDim>(outputs, weights, value_place, page % kSplitPages != 0);
    wgmma_commit();
    page++;
    const u32 key_stage = keys.stage;
    if (page != end) find_next_page();  // while the products take their time
    if (page % kSplitPages == 0) {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) fold[half] = fold_split(total[half], softmax.maximum[half], quad_total(softmax.sum[half]), scale);
      softmax.reset();
    }
    wgmma_wait<1>();
    if (kPageStages<kHeadDim> == 2) mbarrier_arrive_if(&shared.weights_empty[key_stage], is_elected());
    if (has_rows) softmax_block(scores, scale, softmax, factors);  // has_rows: always. A branch keeps the wait for the outputs behind it
    wgmma_wait<0>();
    mbarrier_arrive_if(&shared.weights_empty[stage_before(opaque(key_stage))], is_elected());
  } while (page != end);
  settle_outputs(end);
}

}  // namespace blinkimp
