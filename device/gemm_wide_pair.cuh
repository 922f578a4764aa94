// Pairs of worker CTAs that take the same weight rows for different tokens: each brings half of every weight slice into both SMs. GPU only.
//
// Problem: at 65 to 256 rows a wide GEMM is bound by what the L2 cache gives to the SMs, (tokens + N) x K x 2 bytes an item. Weights that one read
// brings to two SMs (multicast) make it (tokens + N / 2).
// Rule: CTAs 2p and 2p + 1 form a cluster. In a paired op both walk the same pairs of items: same weight rows, row tiles 2i and 2i + 1. Their
// weight rings stand at the same stage all the time, because a multicast writes the same address in both.
//   entering   An op whose predecessor in the step was not a paired one begins with a handshake of the weight producers: own ring drained, cursor
//              at stage 0, partner told, partner's word awaited. Consumers put their cursor at stage 0 too. Between paired ops nothing is needed.
//   a stage    is refilled when the own warpgroups gave it back (weights_empty, as always) and the partner's did (stage_empty).
// Hazards: the last arrivals at a CTA come from its partner, so the cluster leaves the kernel together. The last worker's partner is the director,
// who takes no part: with an odd number of workers the last one has no items of a paired op.
// Used by device/gemm_wide.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <ptx_cluster.cuh>
#include <worker_memory.cuh>

// Compile-time switch: whether the kernel is launched in clusters of two.
#ifndef BK_PAIRED
#define BK_PAIRED 0
#endif

namespace blinkimp {

constexpr bool kPaired = BK_PAIRED != 0;

// By one thread, before fence_mbarrier_init() and cluster_sync().
BK_INLINE void init_pair(PairShared& pair) {
  for (u32 i = 0; i < kWeightStages; i++) mbarrier_init(&pair.stage_empty[i], 2);  // the partner's two warpgroups
  mbarrier_init(&pair.ready, 1);
  pair.stage_parity = (1u << kWeightStages) - 1;  // the first wait passes
  pair.ready_parity = 0;
}

BK_INLINE u32 pair_rank() { return cta_idx() % 2; }
BK_INLINE bool has_partner(const EngineParams& params) { return kPaired && cta_idx() / 2 < params.num_workers / 2; }

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

// A unit of two stages begins at an even one.
BK_INLINE void align_producer(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  if (cursor.stage % 2 == 0) return;
  if constexpr (kPaired) {
    // Hazard: a CTA that passed a stage alone could be a lap later in it with data for a partner that has yet to pass it. The first wait is for
    // the own warpgroups' last words to the partner: ours come after them.
    wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
    wait_partner_stage(params, shared.pair, cursor.stage);
    for (u32 i = 0; i < 2; i++) mbarrier_arrive_cluster_if(&shared.pair.stage_empty[cursor.stage], pair_rank() ^ 1, true);
  }
  pass_stage(params, shared, cursor);
}

// The handshake: own ring drained, cursor at stage 0, and the partner's as well.
BK_INLINE void enter_paired(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  RingCursor ahead = cursor;
  for (u32 i = 0; i < kWeightStages; i++) {
    wait_mbarrier(params, &shared.weights_empty[ahead.stage], ahead.phase, kSiteWeightRing);
    ahead.advance(kWeightStages);
  }
  while (cursor.stage != 0) pass_stage(params, shared, cursor);
  mbarrier_arrive_cluster_if(&shared.pair.ready, pair_rank() ^ 1, true);
  wait_mbarrier(params, &shared.pair.ready, shared.pair.ready_parity, kSiteWeightRing);
  shared.pair.ready_parity ^= 1;
}

// ---- Compute warpgroups ------------------------------------------------------------------------------------------
BK_INLINE void align_consumer(u32 alignment, RingCursor& cursor) {
  while (cursor.stage % alignment != 0) cursor.advance(kWeightStages);
}

}  // namespace blinkimp
