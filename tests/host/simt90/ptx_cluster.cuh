// Stands in for device/ptx_cluster.cuh in the CPU emulation of Hopper CTAs.
// Used by tests/host/simt90. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <grid.h>

namespace blinkimp {

BK_INLINE void bulk_copy_to_cluster(void* destination, const void* source, u32 num_bytes, u64* barrier, u32 cta_mask) {
  if (shared_address(destination) % 16 || num_bytes % 16 || reinterpret_cast<u64>(source) % 16) simt::fail("bulk copy's alignment", num_bytes, 0);
  const u8* bytes = static_cast<const u8*>(source);
  for (u32 rank = 0; rank < 2; ++rank) {
    if (!(cta_mask >> rank & 1)) continue;
    simt90::Copy copy{static_cast<u8*>(destination), {bytes, bytes + num_bytes}, barrier};
    (simt90::cta_idx % 2 == rank ? simt90::copies : simt90::partner_slot(rank).copies).push_back(std::move(copy));
  }
}

BK_INLINE void mbarrier_arrive_cluster(u64* barrier, u32 rank, u32 count) {
  if (count) simt90::arrive(simt90::partner_slot(rank).barriers.at(barrier), count);
}

BK_INLINE void cluster_sync() {
  simt90::Cluster& cluster = simt90::clusters[simt90::cta_idx / 2];
  const u64 before = cluster.barrier.generation;
  ++cluster.barrier.num_arrived;
  simt90::complete_cluster(cluster);
  if (cluster.barrier.generation == before) simt::machine.wait(cluster.barrier);
}

}  // namespace blinkimp
