// Which slot of token_counts a request with penalties counts in while it runs.
//
// There are as many slots as places in the batch. A slot is taken at admission and free again when its request leaves the running list, so
// nobody has to give one back: whoever is admitted looks which ones the others have.
// Called by admission.cuh. Test: pytest tests/host/test_director_sampling.py
#pragma once
#include <director_state.cuh>
#include <logit_edits.cuh>

namespace blinkimp {

// All lanes, before the request joins the running list. Request.count_slot: slot + 1, or 0 without penalties.
BK_INLINE void assign_count_slot(const EngineParams& params, const Lanes& lanes, const DirectorState& state, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  if (!uses_penalties(request->sampling)) return;
  for (u32 word = 0; word < kMaxBatch / 32; ++word) {
    u32 taken_mask = 0;
    for (u32 i = lanes.id; i < state.status.num_running; i += lanes.count) {
      const u32 slot = request_at(params, state.running[i])->count_slot - 1;  // none: wraps, and is of no word
      if (slot / 32 == word) taken_mask |= 1u << slot % 32;
    }
    taken_mask = lanes.sum(taken_mask);  // no slot is taken twice, so the sum is the union
    if (taken_mask == 0xffffffff) continue;
    u32 bit = 0;
    while (taken_mask >> bit & 1) bit += 1;
    if (lanes.is_first()) request->count_slot = word * 32 + bit + 1;
    return;
  }
}

}  // namespace blinkimp
