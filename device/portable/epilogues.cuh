// What happens to a product before it leaves the SM: the fused tails of the four GEMM ops, from the output tile in shared memory.
//
// The same arithmetic as device/gemm_epilogues.cuh. Sums and contracted products are spelled out, so that a row's bits do not depend on which
// instance of the code (number of rows in the step) computed it. All 256 threads call an epilogue together.
// Called by device/portable/worker.cuh. Test: pytest -m gpu tests/gpu/test_portable_gpu.py
#pragma once
#include <fixed_math.cuh>
#include <packed_order.cuh>
#include <portable/gemm.cuh>
#include <portable/workspaces.cuh>
#include <step_plan.cuh>

namespace blinkimp {

BK_INLINE f32 warp_sum(f32 value) {
  for (u32 distance = 16; distance != 0; distance /= 2) value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// A product with its bias. Scaled ops: times 1 / rms of the row first.
BK_INLINE f32 scaled_product(f32 product, f32 row_scale, const f32* bias, u32 column) {
  return bias != nullptr ? __fmaf_rn(product, row_scale, bias[column]) : __fmul_rn(product, row_scale);
}

// ---- kOpProject ----------------------------------------------------------------------------------------------------
// hidden += product (+ bias); leaves hidden * next gain as the next op's input, and the sums of squares of groups of kNormGroup columns.
template <u32 TILE_ROWS>
struct ProjectEpilogue {
  static_assert(TILE_ROWS == kNormGroup, "a tile is one group of the sums of squares");
  const EngineParams& params;
  const Op& op;

  BK_INLINE void operator()(const OutputTile& tile) const {
    constexpr u32 kPairs = TILE_ROWS / 2;  // the threads of one row: half a warp, so the whole warp takes part in the shuffles
    const u32 hidden = opaque(params.dims.hidden);
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const f32* gain = reinterpret_cast<const f32*>(op.next_norm);
    const u32 thread = opaque(threadIdx.x);
    const u32 pair = thread % kPairs * 2;
    const u32 num_units = tile.num_rows * tile.num_tiles;
#pragma unroll 1
    for (u32 first = thread / 32u * 2u; first < num_units; first += kComputeThreads / kPairs) {
      const u32 unit = first + thread % 32u / kPairs;
      const bool live = unit < num_units;
      const u32 in_tile = live ? unit % tile.num_tiles : 0;
      const u32 row_in_tile = live ? unit / tile.num_tiles : 0;
      const u32 row = tile.row_begin + row_in_tile;
      const u32 column = (tile.tile_begin + in_tile) * TILE_ROWS + pair;
      f32 squares = 0.0f;
      if (live && column < hidden) {
        const float2 product = *reinterpret_cast<const float2*>(tile.values + row_in_tile * tile.stride + in_tile * TILE_ROWS + packed_grouped_row(pair));
        float2* place = reinterpret_cast<float2*>(reinterpret_cast<f32*>(params.workspaces[kWsHidden]) + static_cast<u64>(row) * hidden + column);
        float2 value = *place;
        value.x = __fadd_rn(value.x, bias != nullptr ? __fadd_rn(product.x, bias[column]) : product.x);
        value.y = __fadd_rn(value.y, bias != nullptr ? __fadd_rn(product.y, bias[column + 1]) : product.y);
        *place = value;
        squares = __fmaf_rn(value.y, value.y, __fmul_rn(value.x, value.x));
        const float2 gains = *reinterpret_cast<const float2*>(gain + column);
        *reinterpret_cast<u32*>(reinterpret_cast<u16*>(params.workspaces[kWsNormed]) + static_cast<u64>(row) * hidden + column) =
            pack_bf16x2(__fmul_rn(value.x, gains.x), __fmul_rn(value.y, gains.y));
      }
      for (u32 distance = kPairs / 2; distance != 0; distance /= 2) squares = __fadd_rn(squares, __shfl_xor_sync(0xffffffffu, squares, distance));
      if (live && pair == 0) {
        reinterpret_cast<f32*>(params.workspaces[kWsSquares])[static_cast<u64>(row) * (hidden / kNormGroup) + tile.tile_begin + in_tile] = squares;
      }
    }
  }
};

// ---- kOpQkv --------------------------------------------------------------------------------------------------------
// Row scale, bias, per-head norm, rotation; q to its workspace, k and v to the row's KV page. One warp a row of a tile, a lane holds pairs.
// The packed rows of a q or k head stand as pairs (i, i + head_dim / 2), which rotate together; q and k keep that order in memory (their
// product does not see it), v has the plain order.
template <u32 TILE_ROWS, u32 HEAD_DIM>
struct QkvEpilogue {
  const EngineParams& params;
  const Op& op;
  const StepPlan* plan;  // of the step that runs; the director writes
  const f32* row_scale;  // [kMaxItemRows], of the item's rows

  BK_INLINE void operator()(const OutputTile& tile) const {
    const u32 thread = opaque(threadIdx.x);
#pragma unroll 1
    for (u32 unit = thread / 32u; unit < tile.num_rows * tile.num_tiles; unit += kComputeWarps) run_unit(tile, unit, thread % 32u);
  }

 private:
  static constexpr u32 kLanePairs = (TILE_ROWS / 2 + 31) / 32;

  BK_INLINE void run_unit(const OutputTile& tile, u32 unit, u32 lane) const {
    const ModelDims& dims = params.dims;
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const u32 num_rotated = (dims.num_heads + dims.num_kv_heads) * HEAD_DIM;
    const u32 in_tile = unit % tile.num_tiles;
    const u32 row_in_tile = unit / tile.num_tiles;
    const u32 row = tile.row_begin + row_in_tile;
    const u32 first_column = (tile.tile_begin + in_tile) * TILE_ROWS;
    const f32* products = tile.values + row_in_tile * tile.stride + in_tile * TILE_ROWS;
    const f32 scale = row_scale[row_in_tile];
    const PlanRow where = plan_rows(params, plan)[row];
    const u32 page = page_of(where);

    f32 low[kLanePairs];
    f32 high[kLanePairs];
    f32 squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < kLanePairs; ++i) {
      const u32 in_row = (i * 32 + lane) * 2;
      low[i] = high[i] = 0.0f;
      if (in_row >= TILE_ROWS || first_column + in_row >= op.out_features) continue;
      low[i] = scaled_product(products[in_row], scale, bias, first_column + in_row);
      high[i] = scaled_product(products[in_row + 1], scale, bias, first_column + in_row + 1);
      squares = __fmaf_rn(low[i], low[i], __fmaf_rn(high[i], high[i], squares));
    }
    const bool normed_head = op.q_norm != 0 && first_column < num_rotated;  // then a tile is one head: host/gpu_weights.py sees to it
    f32 head_scale = 1.0f;
    if (normed_head) head_scale = rsqrtf(__fadd_rn(__fmul_rn(warp_sum(squares), 1.0f / HEAD_DIM), dims.norm_eps));
#pragma unroll
    for (u32 i = 0; i < kLanePairs; ++i) {
      const u32 in_row = (i * 32 + lane) * 2;
      const u32 column = first_column + in_row;
      if (in_row >= TILE_ROWS || column >= op.out_features) continue;
      const u32 head = column / HEAD_DIM;
      const u32 in_head = column % HEAD_DIM;
      if (normed_head) {
        const float2 gain = *reinterpret_cast<const float2*>(reinterpret_cast<const f32*>(head < dims.num_heads ? op.q_norm : op.k_norm) + in_head);
        low[i] = __fmul_rn(low[i], __fmul_rn(head_scale, gain.x));
        high[i] = __fmul_rn(high[i], __fmul_rn(head_scale, gain.y));
      }
      if (column < num_rotated) {
        const float2 turn = reinterpret_cast<const float2*>(op.rope)[static_cast<u64>(where.position) * (HEAD_DIM / 2) + in_head / 2];
        const f32 turned = __fmaf_rn(low[i], turn.x, -__fmul_rn(high[i], turn.y));
        high[i] = __fmaf_rn(high[i], turn.x, __fmul_rn(low[i], turn.y));
        low[i] = turned;
      }
      *reinterpret_cast<u32*>(place_of(row, column, where.position, page)) = pack_bf16x2(low[i], high[i]);
    }
  }

  BK_INLINE u32 page_of(const PlanRow& where) const {
    const u32 request_idx = plan_seqs(params, plan)[where.seq_idx].request_idx;
    return reinterpret_cast<const u32*>(params.page_tables)[static_cast<u64>(request_idx) * params.max_pages_per_request + where.position / kPageTokens];
  }

  // Where columns `column` and `column + 1` of a row go: q's workspace, or a K or V tile of its page.
  BK_INLINE u16* place_of(u32 row, u32 column, u32 position, u32 page) const {
    const ModelDims& dims = params.dims;
    const u32 head = column / HEAD_DIM;
    if (head < dims.num_heads) return reinterpret_cast<u16*>(params.workspaces[kWsQuery]) + static_cast<u64>(row) * dims.num_heads * HEAD_DIM + column;
    const u32 is_value = head >= dims.num_heads + dims.num_kv_heads ? 1 : 0;
    const u32 kv_head = head - dims.num_heads - is_value * dims.num_kv_heads;
    const u64 kv_tile = ((static_cast<u64>(op.layer) * params.num_pages + page) * dims.num_kv_heads + kv_head) * 2 + is_value;
    return reinterpret_cast<u16*>(params.kv_cache) + (kv_tile * kPageTokens + position % kPageTokens) * HEAD_DIM + column % HEAD_DIM;
  }
};

// ---- kOpGateUp -----------------------------------------------------------------------------------------------------
// activation = silu(gate) * up. Weight rows stand 8 gate, 8 up, ...: columns 16 i + j and 16 i + 8 + j of a tile meet.
template <u32 TILE_ROWS>
struct GateUpEpilogue {
  static_assert(TILE_ROWS % 16 == 0, "gate and up blocks come in pairs");
  const EngineParams& params;
  const Op& op;
  const f32* row_scale;  // [kMaxItemRows], of the item's rows

  BK_INLINE void operator()(const OutputTile& tile) const {
    constexpr u32 kPairs = TILE_ROWS / 4;  // pairs of outputs of a row of a tile
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const u32 intermediate = opaque(params.dims.intermediate);
    u16* activation = reinterpret_cast<u16*>(params.workspaces[kWsActivation]);
#pragma unroll 1
    for (u32 idx = opaque(threadIdx.x); idx < tile.num_rows * tile.num_tiles * kPairs; idx += kComputeThreads) {
      const u32 pair = idx % kPairs * 2;
      const u32 in_tile = idx / kPairs % tile.num_tiles;
      const u32 row_in_tile = idx / kPairs / tile.num_tiles;
      const u32 in_row = pair / 8 * 16 + pair % 8;  // of the gate; up stands 8 on
      const u32 weight_row = (tile.tile_begin + in_tile) * TILE_ROWS + in_row;
      if (weight_row >= op.out_features) continue;
      const f32* products = tile.values + row_in_tile * tile.stride + in_tile * TILE_ROWS + in_row;
      f32 values[2];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        const f32 gate = scaled_product(products[i], row_scale[row_in_tile], bias, weight_row + i);
        const f32 up = scaled_product(products[i + 8], row_scale[row_in_tile], bias, weight_row + 8 + i);
        values[i] = __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate))), up);
      }
      const u32 column = weight_row / 16 * 8 + pair % 8;
      *reinterpret_cast<u32*>(activation + static_cast<u64>(tile.row_begin + row_in_tile) * intermediate + column) = pack_bf16x2(values[0], values[1]);
    }
  }
};

// ---- kOpLmHead -----------------------------------------------------------------------------------------------------
// Logits of the sampled rows, and the best of each row's tile: they spare the sample op a pass over the vocabulary (sample_op.cuh). One warp a
// row of a tile.
template <u32 TILE_ROWS>
struct LogitsEpilogue {
  const EngineParams& params;
  const Op& op;
  const f32* row_scale;  // [kMaxItemRows], of the item's rows

  BK_INLINE void operator()(const OutputTile& tile) const {
    f32* logits = reinterpret_cast<f32*>(params.workspaces[kWsLogits]);
    u64* tile_best = reinterpret_cast<u64*>(params.workspaces[kWsLogitBest]);
    const u32 thread = opaque(threadIdx.x);
    const u32 lane = thread % 32u;
#pragma unroll 1
    for (u32 unit = thread / 32u; unit < tile.num_rows * tile.num_tiles; unit += kComputeWarps) {
      const u32 tile_idx = tile.tile_begin + unit % tile.num_tiles;
      const u32 row_in_tile = unit / tile.num_tiles;
      const f32* products = tile.values + row_in_tile * tile.stride + unit % tile.num_tiles * TILE_ROWS;
      const u64 row = tile.row_begin + row_in_tile;
      u64 best = 0;
      for (u32 in_row = lane; in_row < TILE_ROWS; in_row += 32) {
        const u32 column = tile_idx * TILE_ROWS + in_row;
        if (column >= op.out_features) break;
        const f32 logit = __fmul_rn(products[in_row], row_scale[row_in_tile]);
        logits[row * params.dims.vocab + column] = logit;
        const u64 code = (static_cast<u64>(order_key(orderable_logit(logit))) << 32) | (0xffffffffu - column);  // best_code() of sampling_window.cuh
        best = code > best ? code : best;
      }
#pragma unroll
      for (u32 distance = 16; distance != 0; distance /= 2) {
        const u64 other = __shfl_xor_sync(0xffffffffu, best, distance);
        best = other > best ? other : best;
      }
      if (lane == 0) tile_best[row * op.num_tiles + tile_idx] = best;
    }
  }
};

}  // namespace blinkimp
