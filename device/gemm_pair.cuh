// How a pair of CTAs shares the inputs of a GEMM of at most 64 rows: each brings half of every stage into both SMs. GPU only.
//
// Problem: every CTA reads all of the step's inputs, 64 rows x K x 2 bytes, beside its tile's weights. In `down` at 64 rows these are 8 KB of inputs a
// slice to 4 KB of weights, more than L2 gives to an SM (35 B/clk) at HBM's pace. A multicast is one read of L2 for two SMs.
// Rule: where inputs are shared, pairs of CTAs walk pairs of tiles, 2i and 2i + 1 (gemm_shape.cuh). The last pair of tiles may lack the second: its CTA
// only takes part in the copies (drain_inputs). Below kSharedInputRows the weights are the most of the bytes, and nothing is shared.
//   entering   own input ring drained, cursor at stage 0, partner told, partner's word awaited: before the producer waits for the grid, so the
//              handshake is over when the inputs are there. Consumers put their cursor at stage 0 too.
//   a stage    is refilled when the own warpgroups gave it back (inputs_empty) and the partner's did (pair.inputs_empty).
// Hazard: the input ring lies in the scratch, which attention and sampling use. A grid barrier, which the copying CTA has waited for, is between the
// partner's use of it and the copy.
// Called by device/gemm.cuh, device/worker.cuh. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <gemm_shape.cuh>

namespace blinkimp {

// ---- Input producer ----------------------------------------------------------------------------------------------
// The handshake before an op's inputs, if it shares them. Both CTAs of a pair have items, or neither.
BK_INLINE void enter_shared_inputs(const EngineParams& params, const GemmShape& shape, WorkerShared& shared, RingCursor& cursor) {
  if (!shares_inputs(shape) || !has_tiles(params, shape)) return;
  RingCursor ahead = cursor;
  for (u32 i = 0; i < kInputStages; i++) {
    wait_mbarrier(params, &shared.inputs_empty[ahead.stage], ahead.phase, kSiteInputRing);
    ahead.advance(kInputStages);
  }
  while (cursor.stage != 0) {  // a stage's phases end without data, in the compute warpgroups' place too
    mbarrier_arrive(&shared.inputs_full[cursor.stage]);
    for (u32 i = 0; i < 2; i++) mbarrier_arrive(&shared.inputs_empty[cursor.stage]);
    cursor.advance(kInputStages);
  }
  meet_partner(params, &shared.pair.inputs_ready, shared.pair.inputs_ready_parity, kSiteInputRing);
}

// num_bytes of inputs into an empty stage: all of them, or this CTA's half of them for both.
BK_INLINE void copy_inputs(const EngineParams& params, bool is_shared, WorkerShared& shared, u32 stage, u8* place, const u8* source, u32 num_bytes) {
  u64* full = &shared.inputs_full[stage];
  if (kPaired && is_shared) {
    PairShared& pair = shared.pair;
    wait_mbarrier(params, &pair.inputs_empty[stage], pair.inputs_parity >> stage & 1, kSiteInputRing);
    pair.inputs_parity ^= 1u << stage;
    mbarrier_arrive_expect_bytes(full, num_bytes);
    const u32 half = num_bytes / 2;
    bulk_copy_to_cluster(place + pair_rank() * half, source + pair_rank() * half, half, full, 3);
  } else {
    mbarrier_arrive_expect_bytes(full, num_bytes);
    bulk_copy_to_shared(place, source, num_bytes, full);
  }
}

// ---- Compute warpgroups ------------------------------------------------------------------------------------------
// The consumer's side of the handshake: it only counts along.
BK_INLINE void align_inputs(const EngineParams& params, const GemmShape& shape, RingCursor& cursor) {
  if (!shares_inputs(shape) || !has_tiles(params, shape)) return;
  while (cursor.stage != 0) cursor.advance(kInputStages);
}

// An input stage that is given back, to the partner first: when the own ring is drained, the partner has been told of every stage.
// count: 0 (nothing), 1, or 2 for both warpgroups.
BK_INLINE void give_input_stage(WorkerShared& shared, u32 stage, bool is_shared, u32 count) {
  if constexpr (kPaired) mbarrier_arrive_cluster(&shared.pair.inputs_empty[stage], pair_rank() ^ 1, is_shared ? count : 0);
  mbarrier_arrive_count(&shared.inputs_empty[stage], count);
}

// The inputs of a tile that does not exist, the last of this CTA's walk: its partner's copies come here, too. Warpgroup 0 for both, because it alone has
// counted along where tiles are not divided; by one warp, the others only count, up to the barrier at the op's end.
BK_INLINE void drain_inputs(const EngineParams& params, const GemmShape& shape, WorkerShared& shared, RingCursor& cursor) {
  const u32 input_bytes = shape.num_slices * shape.input_rows * 128;
  const bool is_giver = uniform(thread_idx() / 32) == 0;
#pragma unroll 1
  for (u32 offset = 0; offset < input_bytes; offset += kInputStageBytes) {
    if (is_giver) {
      wait_mbarrier_warp(params, &shared.inputs_full[cursor.stage], cursor.phase, kSiteInputRing);
      give_input_stage(shared, cursor.stage, true, is_first_thread() ? 2 : 0);
    }
    cursor.advance(kInputStages);
  }
}

}  // namespace blinkimp
