// The scale warps (10 and 11): row scales of every op that normalises its input; the first of them plans attention, too. GPU only.
//
// They run the program as the other producers do, an op at a time, and within a GEMM op its items: the scales of each item's row tile go
// (row_scales.cuh) into a buffer that the compute warpgroups give back; of a wide step each CTA sums up a share of the rows, and takes the others'. Nothing but the
// ring's place lives in registers from op to op or from item to item: eight rows' loads take them all, and so does the planning. With more kept, two rows'
// loads were on their way at once, one after the other.
// Called by device/persistent_kernel.cu. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <attention_planner.cuh>
#include <gemm_wide_tiling.cuh>
#include <producer_program.cuh>
#include <row_scales.cuh>

namespace blinkimp {

BK_INLINE u32 scale_warp() { return thread_idx() / 32 - (kComputeThreads / 32 + 2); }
BK_INLINE bool is_first_lane() { return thread_idx() % 32 == 0; }
BK_INLINE ScaleState& scale_state() { return worker_shared(worker_memory()).scale_states[scale_warp()]; }

// The rows that an item of a scaled GEMM op has scales of: all of a narrow step, which is one row tile.
BK_INLINE WideTiling scale_tiling(const EngineParams& params, const Op& op, u32 num_rows) {
  return is_wide(num_rows) ? wide_tiling(params, op, num_rows) : wide_tiling_of(op, num_rows, kRowTile, 1);
}

// Sums of squares of the rows that an op works on.
BK_INLINE const f32* row_squares(const EngineParams& params, const Op& op, const StepPlan& plan) {
  return reinterpret_cast<const f32*>(params.workspaces[op.kind == kOpLmHead && !samples_every_row(plan) ? kWsSampledSquares : kWsSquares]);
}

// Of an op's scales on their way from CTA to CTA. Never 0, which a word has that nobody wrote.
BK_INLINE u32 scale_tag(const ProducerState& state) { return state.num_barriers + 1; }

// This CTA's share of an op's rows, after the grid barrier that completes the sums of squares: of a wide step for all CTAs, of a narrow one into the next buffer.
BK_INLINE void sum_own_rows(const EngineParams& params, WorkerShared& shared, const RingCursor& cursor) {
  const ProducerState& state = scale_state().program;
  const StepPlan& plan = *producer_plan(params, state);
  const Op& op = producer_op(params, state);
  const u32 num_rows = rows_of(op.kind, plan);
  wait_mbarrier(params, &shared.scales_empty[cursor.stage], cursor.phase, kSiteScales);
  sum_row_scales(params, row_squares(params, op, plan), row_share(params, num_rows), scale_warp(), [&](u32 row, f32 scale) {
    const ProducerState& program = scale_state().program;
    if (is_wide(rows_of(producer_op(params, program).kind, *producer_plan(params, program)))) {
      st_relaxed_gpu(row_scale_words(params) + row, static_cast<u64>(scale_tag(program)) << 32 | __float_as_uint(scale));  // reader: take_row_scales()
    } else {
      shared.row_scale[cursor.stage][row] = scale;
    }
  });
}

// One op: the scales of each item's row tile, once for items in a row that share it.
BK_INLINE void produce_row_scales(const EngineParams& params, WorkerShared& shared, RingCursor& cursor) {
  if (is_first_lane()) {
    ScaleState& state = scale_state();
    const StepPlan& plan = *producer_plan(params, state.program);
    const Op& op = producer_op(params, state.program);
    const WideTiling tiling = scale_tiling(params, op, rows_of(op.kind, plan));
    state.item = cta_idx();
    state.tokens = tiling.tokens;
    state.stack = tiling.stack;
    state.row_tile = kNoRow;
    wait_grid(params, state.program.num_barriers + phases_in_step(op.kind, plan) - 1);
  }
  __syncwarp();  // the grid was acquired by one lane, which wrote the state
  sum_own_rows(params, shared, cursor);
#pragma unroll 1
  for (;;) {
    const ScaleState& state = scale_state();
    const StepPlan& plan = *producer_plan(params, state.program);
    const Op& op = producer_op(params, state.program);
    const u32 num_rows = rows_of(op.kind, plan);
    const WideTiling tiling = wide_tiling_of(op, num_rows, state.tokens, state.stack);
    if (state.item >= tiling.num_items) break;
    const u32 row_tile = gemm_item(tiling, state.item).row_tile;
    if (row_tile != state.row_tile) {
      if (is_wide(num_rows)) {
        const u32 row_begin = row_tile * tiling.tokens;
        wait_mbarrier(params, &shared.scales_empty[cursor.stage], cursor.phase, kSiteScales);
        take_row_scales(params, scale_tag(state.program), row_begin, min(num_rows - row_begin, tiling.tokens), scale_warp(), shared.row_scale[cursor.stage] + row_begin % (2 * kRowTile));
      }
      __syncwarp();  // all lanes' scales are written, nobody reads the state
      if (is_first_lane()) {
        mbarrier_arrive(&shared.scales_full[cursor.stage]);
        scale_state().row_tile = row_tile;
      }
      cursor.advance(kScaleBuffers);
    }
    __syncwarp();  // hazard: a slow lane still reads the state
    if (is_first_lane()) scale_state().item += params.num_workers;
    __syncwarp();  // nobody reads the old state
  }
}

// A whole warp, one of kScaleWarps.
BK_INLINE void scale_producer(const EngineParams& params) {
  WorkerShared& shared = worker_shared(worker_memory());
  AttentionShared& attention = attention_shared(worker_memory());
  const auto state_of = [&]() -> ProducerState& { return scale_state().program; };  // looked up where it is used, as the plan is
  RingCursor cursor{0, 1};
  if (scale_warp() == 0) find_windows(params, attention);
  if (is_first_lane()) state_of() = ProducerState{};
  for (;;) {
    if (is_first_lane()) begin_producer_step(params, state_of());
    __syncwarp();  // the plan was acquired by one lane, which wrote the state
    if (producer_plan(params, state_of())->flags & kPlanExit) return;
    if (scale_warp() == 0) plan_attention(params, producer_plan(params, state_of()), attention);
#pragma unroll 1
    while (state_of().op_idx < params.num_ops) {
      if (is_scaled(producer_op(params, state_of()).kind)) produce_row_scales(params, shared, cursor);
      __syncwarp();  // hazard: a slow lane still reads the state
      if (is_first_lane()) {
        state_of().num_barriers += phases_in_step(producer_op(params, state_of()).kind, *producer_plan(params, state_of()));
        state_of().op_idx++;
      }
      __syncwarp();  // nobody reads the old state
    }
    __syncwarp();  // no lane reads the plan or the state any more
    if (is_first_lane()) {
      mbarrier_arrive(&shared.producers_done);
      state_of().step++;
    }
  }
}

}  // namespace blinkimp
