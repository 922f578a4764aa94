// The pace of a long prompt's GEMMs: every few slices, weight producers wait for those of all other CTAs. GPU only.
//
// CTAs that run at the same time share weights and inputs (gemm_item() of gemm_wide_tiling.cuh), and what several SMs ask L2 for at the same time comes at up to twice the rate and for
// two thirds of the joules. By themselves CTAs drift apart within an op: copies alone take 22 % longer then, whole steps 1 % (PERFORMANCE.md, twenty-second state).
// I1 All CTAs keep equally many paces in an op: num_slices / kPaceSlices in each of its rounds of items. What a CTA leaves out, because a round has no item for it or its units come by a loop
//    that keeps none, it makes up for at the end of the item or op: so nobody waits for what never comes.
// The ring hides the wait: five slices are on their way or in products. Nothing is passed on, so all is relaxed; a release would wait for the copies on their way.
// Called by device/gemm_wide_producers.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py; without a GPU: pytest tests/host/test_gemm_wide_simt.py
#pragma once
#include <gemm_wide_tiling.cuh>

namespace blinkimp {

constexpr u32 kPaceSlices = 4;
// Fewer rows have too few items for CTAs to drift apart. Tests have less.
#ifndef BK_PACED_ROWS
#define BK_PACED_ROWS 1024
#endif

// Paces of an item. QKV keeps none: with paces it took 2 % longer in bursts, and as long on and on.
BK_INLINE u32 num_paces(const Op& op, u32 num_rows) { return num_rows >= BK_PACED_ROWS && op.kind != kOpQkv ? op.in_features / kSliceColumns / kPaceSlices : 0; }

// Paces that this CTA leaves out.
BK_INLINE void make_up_paces(const EngineParams& params, WorkerShared& shared, u32 count) {
  if (count == 0) return;
  red_add_relaxed_gpu(grid_word(params, kGridWordPaces), count);
  shared.num_paces += count;
}

// Until all CTAs have kept as many paces as this one; or nearly all, while one is ahead that made up for several at once: only time depends on it.
BK_INLINE void keep_pace(const EngineParams& params, WorkerShared& shared) {
  u32* paces = grid_word(params, kGridWordPaces);
  red_add_relaxed_gpu(paces, u32{1});
  const u32 wanted = ++shared.num_paces * params.num_workers;
  u64 start_ns = 0;
  u32 seen;
  for (u32 tries = 1; static_cast<i32>((seen = ld_relaxed_gpu(paces)) - wanted) < 0; tries++) {  // both count modulo 2^32
    if (tries % kTriesPerLook) continue;
    const u64 now_ns = device_clock_ns();
    if (!start_ns) start_ns = now_ns;
    if (now_ns - start_ns > params.spin_budget_ns) fail_wait<true>(params, kSitePace, wanted, seen);
  }
}

}  // namespace blinkimp
