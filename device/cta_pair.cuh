// Pairs of worker CTAs: clusters of two on neighbouring SMs, that bring each other what both read. GPU only.
//
// CTAs 2p and 2p + 1 are a pair. The last worker's partner may be the director, who takes no part: with an odd number of workers the last one has no
// items of a paired op. What a pair shares: weights in wide ops (gemm_wide_pair.cuh), inputs in narrow ones (gemm_pair.cuh).
// Hazard: the last arrivals at a CTA's mbarriers come from its partner, so the cluster leaves the kernel together (persistent_kernel.cu).
// Test: pytest tests/host/test_worker_sm90_simt.py; pytest -m gpu tests/gpu/test_gemm_wide.py
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
  mbarrier_init(&pair.ready, 2);  // both producers: so none can be two handshakes ahead of the other
  for (u32 i = 0; i < kInputStages; i++) mbarrier_init(&pair.inputs_empty[i], 2);
  mbarrier_init(&pair.inputs_ready, 2);
  pair.stage_parity = (1u << kWeightStages) - 1;  // the first wait passes
  pair.ready_parity = 0;
  pair.inputs_parity = (1u << kInputStages) - 1;
  pair.inputs_ready_parity = 0;
}

BK_INLINE u32 pair_rank() { return cta_idx() % 2; }
BK_INLINE bool has_partner(const EngineParams& params) { return kPaired && cta_idx() / 2 < params.num_workers / 2; }

// One producer's word to the partner's, and the partner's awaited.
BK_INLINE void meet_partner(const EngineParams& params, u64* ready, u32& parity, u32 site) {
  mbarrier_arrive(ready);
  mbarrier_arrive_cluster(ready, pair_rank() ^ 1, 1);
  wait_mbarrier(params, ready, parity, site);
  parity ^= 1;
}

}  // namespace blinkimp
