// What a step costs by its rows, and which rows of a prompt it does better without.
//
// The workers take rows in tiles, and tiles in rounds: a step of 1,028 rows takes 1.4 times as long as one of 1,024, and 4 rows more cost a decode step next to
// nothing (SCHEDULING.md). So the last chunk of a step leaves some rows to the next one, where that makes both together shorter: mostly what would only begin a
// tile, now and then a whole one that begins a round. The host knows the costs (host/step_costs.py); where there are none, as on the emulated device, a row costs
// what a row costs.
// Called by admission.cuh. Test: pytest tests/host/test_director_plan.py tests/host/test_director_stateful.py
#pragma once
#include <director_state.cuh>

namespace blinkimp {

BK_INLINE u32 step_cost(const EngineParams& params, u32 num_rows) {
  const u32 i = 2 * num_rows <= params.cost_rows ? 0 : (num_rows + params.cost_rows - 1) / params.cost_rows;
  return params.step_costs[i < kMaxStepCosts ? i : kMaxStepCosts - 1];
}

// All lanes. Rows, fewer than `most`, that the next step takes over from a step of num_rows. It has them and one of each of this step's sequences, the one that
// is cut left out. This step keeps whole tiles; of equals as many as can be.
BK_INLINE u32 rows_to_defer(const EngineParams& params, const Lanes& lanes, u32 num_rows, u32 num_seqs, u32 most) {
  constexpr u32 kRowBits = 14;
  static_assert(kMaxStepTokens < 1u << kRowBits, "a cost, which has 17 bits, and rows in a word");
  u32 best = step_cost(params, num_rows) << kRowBits;
  for (u32 num_kept = (1 + lanes.id) * params.cost_rows; num_kept < num_rows; num_kept += lanes.count * params.cost_rows) {
    const u32 num_left = num_rows - num_kept;
    if (num_left >= most) continue;
    const u32 cost = step_cost(params, num_kept) + step_cost(params, num_seqs - 1 + num_left);
    const u32 found = cost << kRowBits | num_left;
    best = found < best ? found : best;
  }
  return ~lanes.max(~best) & ((1u << kRowBits) - 1);
}

}  // namespace blinkimp
