// Pairs of CTAs (clusters of two) in PTX: multicast copies, arrivals on the partner's mbarriers, cluster barriers. GPU only (sm_90a).
//
// Called by device/gemm_wide_pair.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <ptx_sm90.cuh>

namespace blinkimp {

// Global -> the same shared address of every CTA in cta_mask; completes num_bytes on the mbarrier at the same address of each.
BK_INLINE void bulk_copy_to_cluster(void* destination, const void* source, u32 num_bytes, u64* barrier, u32 cta_mask) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(destination)),
               "l"(source), "r"(num_bytes), "r"(shared_address(barrier)), "h"(static_cast<u16>(cta_mask))
               : "memory");
}

// Arrives `count` times (0: not at all) on the mbarrier at this address in CTA `rank` of the cluster, without a branch. Orders the completion of this
// thread's wgmma reads (awaited before) against copies that the other CTA starts after its wait; no plain stores: release at cluster scope would be
// a fence of the whole GPU's memory (MEMBAR.ALL.GPU) in every slice. mapa without the predicate: a register that is written only sometimes lives through
// the loop around, and was spilled in every main loop.
BK_INLINE void mbarrier_arrive_cluster(u64* barrier, u32 rank, u32 count) {
  asm volatile(
      "{.reg .pred p; .reg .b32 remote; setp.ne.u32 p, %2, 0; mapa.shared::cluster.u32 remote, %0, %1;"
      " @p mbarrier.arrive.shared::cluster.b64 _, [remote], %2;}" ::"r"(shared_address(barrier)),
      "r"(rank), "r"(count)
      : "memory");
}

// All threads of the cluster's CTAs that have not exited. Not .aligned: warps may come in parts.
BK_INLINE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

}  // namespace blinkimp
