// The two shapes of a worker's rings: 4 stages of inputs and 10 of weights, or, where inputs are what comes late, 8 and 6. GPU only.
//
// Problem: a stage of inputs takes 1.3 us from L2, so four of them in flight bring 50 GB/s. Where a slice has as many bytes of inputs as of weights, at 33 to
// 256 rows, that takes longer than HBM needs for the weights (PERFORMANCE.md).
// Rule: a GEMM whose items have no more weight rows than tokens is deep. Its inputs stand in the scratch and in weight stages [0, 4); its weights go round in
// stages [4, 10). All other ops, and attention above all, have the whole weight ring.
//   inputs     each shape has barriers and cursors of its own: at an op's beginning the ring is drained, for the grid has passed a barrier since
//   becoming   deep: the weight cursor moves on to stage 4, if it stands before; the producer ends the phases of the stages between (pass_stage). Not deep: it goes
//              on where it stands. If it went round an odd number of times meanwhile, the first stages' phases are one behind in parity: the producer ends one
//              of each. The consumers only count along.
//   low stages are filled again once the grid has passed the barrier at the end of the last deep op: its inputs stood there.
// Used by device/gemm.cuh, gemm_wide.cuh, attention_producer.cuh, worker.cuh. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <worker_memory.cuh>

// Compile-time switch, until it is measured.
#ifndef BK_DEEP_INPUTS
#define BK_DEEP_INPUTS 0
#endif

namespace blinkimp {

// tokens, columns: input rows and weight rows of an item. A narrow op's input tile may have fewer than 64 rows: never deep.
BK_INLINE constexpr bool is_deep(u32 tokens, u32 columns) { return BK_DEEP_INPUTS && tokens >= kRowTile && columns <= tokens; }

BK_INLINE constexpr u32 first_weight_stage(bool deep) { return deep ? kDeepFirstStage : 0; }
BK_INLINE constexpr u32 num_input_stages(bool deep) { return deep ? kDeepInputStages : kInputStages; }
BK_INLINE constexpr u32 first_input_barrier(bool deep) { return deep ? kInputStages : 0; }

// ---- Weight producer ---------------------------------------------------------------------------------------------
// Ends a stage's phases without data, in the compute warpgroups' place too; they only count along.
BK_INLINE void pass_stage(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
  mbarrier_arrive(&shared.weights_full[cursor.stage]);
  for (u32 i = 0; i < 2; i++) mbarrier_arrive(&shared.weights_empty[cursor.stage]);
  cursor.advance(kWeightStages);
}

// At each op that uses the ring, with or without an item.
BK_INLINE void shape_weight_ring(const EngineParams& params, bool deep, WorkerShared& shared, RingCursor& cursor) {
  if constexpr (!BK_DEEP_INPUTS) return;
  ProducerState& state = shared.producers[kWeightProducer];
  if (deep == static_cast<bool>(state.is_deep)) return;
  state.is_deep = deep;
  if (deep) {
    while (cursor.stage < kDeepFirstStage) pass_stage(params, shared, cursor);
    state.deep_phase = cursor.phase;
    return;
  }
  if (cursor.phase != state.deep_phase) {
    for (RingCursor low{0, cursor.phase}; low.stage < kDeepFirstStage;) pass_stage(params, shared, low);
  }
  state.low_is_taken = 1;
  state.low_is_free_at = state.num_barriers;
}

// Until bytes may be written to the stage at the cursor: everybody gave it back, and no inputs stand there.
BK_INLINE void wait_weight_stage(const EngineParams& params, WorkerShared& shared, const RingCursor& cursor) {
  wait_mbarrier(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
  if constexpr (BK_DEEP_INPUTS) {
    ProducerState& state = shared.producers[kWeightProducer];
    if (cursor.stage < kDeepFirstStage && state.low_is_taken) {
      wait_grid(params, state.low_is_free_at);
      state.low_is_taken = 0;
    }
  }
}

// ---- Compute warpgroups ------------------------------------------------------------------------------------------
// A GEMM's cursors, with or without an item.
BK_INLINE ConsumerCursors enter_ring(const WorkerShared& shared, bool deep) {
  const RingCursors& rings = shared.compute.cursors;
  ConsumerCursors cursors{rings.weights, rings.inputs[deep]};
  if (deep && cursors.weights.stage < kDeepFirstStage) cursors.weights.stage = kDeepFirstStage;
  return cursors;
}

// Equal in all threads; taken over when the op ends.
BK_INLINE void leave_ring(WorkerShared& shared, bool deep, const ConsumerCursors& cursors, const RingCursor& scales) {
  if (!is_first_thread()) return;
  shared.next_cursors.weights = cursors.weights;
  shared.next_cursors.inputs[deep] = cursors.inputs;
  shared.next_scales = scales;
}

}  // namespace blinkimp
