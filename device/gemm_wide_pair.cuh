// Pairs of worker CTAs that take the same weight rows for different tokens: each brings half of every weight slice into both SMs. GPU only.
//
// Problem: at 65 to 256 rows a wide GEMM is bound by what the L2 cache gives to the SMs, (tokens + N) x K x 2 bytes an item. Weights that one read
// brings to two SMs (multicast) make it (tokens + N / 2).
// Rule: CTAs 2p and 2p + 1 form a cluster. In a paired op both walk the same pairs of items: same weight rows, row tiles 2i and 2i + 1. Their
// weight rings stand at the same stage all the time, because a multicast writes the same address in both.
//   entering   An op whose predecessor in the step was not a paired one begins with a handshake of the weight producers: own ring drained, cursor
//              at stage 0, partner told, partner's word awaited. Consumers put their cursor at stage 0 too. Between paired ops nothing is needed,
//              unless the next one must begin at an even stage and stands at an odd one: then the same again.
//   a stage    is refilled when the own warpgroups gave it back (weights_empty, as always) and the partner's did (stage_empty).
// Used by device/gemm_wide.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <cta_pair.cuh>

namespace blinkimp {

// ---- Weight producer ---------------------------------------------------------------------------------------------
BK_INLINE void wait_partner_stage(const EngineParams& params, PairShared& pair, u32 stage) {
  wait_mbarrier(params, &pair.stage_empty[stage], pair.stage_parity >> stage & 1, kSiteWeightRing);
  pair.stage_parity ^= 1u << stage;
}

// Ends a stage's phases without data, in the compute warpgroups' place too; they only count along (align_consumer).
BK_INLINE void pass_stage(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
  mbarrier_arrive(&shared.weights_full[cursor.stage]);
  for (u32 i = 0; i < 2; i++) mbarrier_arrive(&shared.weights_empty[cursor.stage]);
  cursor.advance(kWeightStages);
}

// The handshake: own ring drained, cursor at stage 0, and the partner's as well.
BK_INLINE void enter_paired(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  RingCursor ahead = cursor;
  for (u32 i = 0; i < kWeightStages; i++) {
    wait_mbarrier(params, &shared.weights_empty[ahead.stage], ahead.phase, kSiteWeightRing);
    ahead.advance(kWeightStages);
  }
  while (cursor.stage != 0) pass_stage(params, shared, cursor);
  meet_partner(params, &shared.pair.ready, shared.pair.ready_parity, kSiteWeightRing);
}

// ---- Both ends of the ring ---------------------------------------------------------------------------------------
// The multiple of stages at which an op begins. two_stages: its units take two.
BK_INLINE u32 first_stage_alignment(const EngineParams& params, bool follows, bool two_stages, u32 stage) {
  if (has_partner(params) && (!follows || (two_stages && stage % 2 != 0))) return kWeightStages;
  return two_stages ? 2 : 1;
}

// The weight producer's side.
BK_INLINE void align_producer(const EngineParams& params, bool follows, bool two_stages, WorkerShared& shared, RingCursor& cursor) {
  const u32 alignment = first_stage_alignment(params, follows, two_stages, cursor.stage);
  if (alignment == kWeightStages) enter_paired(params, shared, cursor);
  while (cursor.stage % alignment != 0) pass_stage(params, shared, cursor);
}

// The compute warpgroups' side: they only count along.
BK_INLINE void align_consumer(const EngineParams& params, bool follows, bool two_stages, RingCursor& cursor) {
  const u32 alignment = first_stage_alignment(params, follows, two_stages, cursor.stage);
  while (cursor.stage % alignment != 0) cursor.advance(kWeightStages);
}

}  // namespace blinkimp
