// What a step costs by its rows, and which rows of a prompt it does better without.
//
// The workers take rows in tiles, and tiles in rounds: a step of 1,028 rows takes 1.4 times as long as one of 1,024, and 4 rows more cost a decode step next to
// nothing (SCHEDULING.md). So the last chunk of a step leaves to the next one what would only begin a tile, where that makes both together shorter. The host knows the
// costs (host/step_costs.py); where there are none, as on the emulated device, a row costs what a row costs.
// Called by admission.cuh. Test: pytest tests/host/test_director_plan.py tests/host/test_director_stateful.py
#pragma once
#include <director_state.cuh>

namespace blinkimp {

BK_INLINE u32 step_cost(const EngineParams& params, u32 num_rows) {
  const u32 i = 2 * num_rows <= params.cost_rows ? 0 : (num_rows + params.cost_rows - 1) / params.cost_rows;
  return params.step_costs[i < kMaxStepCosts ? i : kMaxStepCosts - 1];
}

// Rows that the next step takes over from a step of num_rows. It has them and one of each of this step's sequences, the one that is cut left out.
BK_INLINE u32 rows_to_defer(const EngineParams& params, u32 num_rows, u32 num_seqs) {
  if (params.cost_rows == 0 || num_rows < params.cost_rows) return 0;
  const u32 num_left = num_rows % params.cost_rows;
  if (num_left == 0) return 0;
  const u32 cost_apart = step_cost(params, num_rows - num_left) + step_cost(params, num_seqs - 1 + num_left);
  return cost_apart < step_cost(params, num_rows) ? num_left : 0;
}

}  // namespace blinkimp
