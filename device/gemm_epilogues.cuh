// What happens to a product before it leaves the SM: the fused tails of the four GEMM ops. GPU only.
//
// Each is called with the fragment of one warpgroup (64 rows x kTileRows, layout in gemm.cuh), its first row and the weight tile's index.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm.cuh>
#include <step_plan.cuh>

namespace blinkimp {

BK_INLINE f32 quad_sum(f32 value) {  // over the 4 lanes that share a fragment row
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// kOpProject: hidden += product (+ bias); leaves hidden * next gain as the next op's input and the sums of squares of 32 columns.
template <int kTileRows>
struct ProjectEpilogue {
  static_assert(kTileRows == kSquaresColumns, "a tile is one group of the sums of squares");
  const EngineParams& params;
  const Op& op;
  u32 num_rows;

  BK_INLINE void operator()(u32 row_begin, u32 tile_idx, f32 (&d)[kTileRows / 2]) const {
    const u32 hidden = params.dims.hidden;
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const f32* gain = reinterpret_cast<const f32*>(op.next_norm);
    u8* normed = reinterpret_cast<u8*>(params.workspaces[kWsNormed]);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      f32* residual = reinterpret_cast<f32*>(params.workspaces[kWsHidden]) + static_cast<u64>(row) * hidden;
      f32 squares = 0.0f;
#pragma unroll
      for (u32 block = 0; block < kTileRows / 8; block++) {
        const u32 column = tile_idx * kTileRows + fragment_column(block);
        if (row < num_rows && column < hidden) {
          f32 low = d[block * 4 + half * 2];
          f32 high = d[block * 4 + half * 2 + 1];
          if (bias) {
            low += bias[column];
            high += bias[column + 1];
          }
          float2* place = reinterpret_cast<float2*>(residual + column);
          float2 value = *place;
          value.x += low;
          value.y += high;
          *place = value;
          squares += value.x * value.x + value.y * value.y;
          const float2 gains = *reinterpret_cast<const float2*>(gain + column);
          *reinterpret_cast<u32*>(normed + 2 * tiled_offset(row, column, hidden / kSliceColumns)) = pack_bf16x2(value.x * gains.x, value.y * gains.y);
        }
      }
      squares = quad_sum(squares);
      if (row < num_rows && thread_idx() % 4 == 0) reinterpret_cast<f32*>(params.workspaces[kWsSquares])[static_cast<u64>(row) * (hidden / kSquaresColumns) + tile_idx] = squares;
    }
  }
};

// kOpQkv: row scale, bias, per-head norm, rotation; q to its workspace, k and v to the row's KV page.
// The packed rows of a q or k head stand as pairs (i, i + head_dim / 2), so a thread holds both halves of each rotation; q and k keep that
// order in memory (their product does not see it), v has the plain order.
template <int kTileRows, int kHeadDim>
struct QkvEpilogue {
  const EngineParams& params;
  const Op& op;
  const WorkerShared& shared;
  const StepPlan* plan;  // of the step that runs; the director writes
  u32 num_rows;

  BK_INLINE void operator()(u32 row_begin, u32 tile_idx, f32 (&d)[kTileRows / 2]) const {
    const ModelDims& dims = params.dims;
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const float2* rope = reinterpret_cast<const float2*>(op.rope);
    const u32 num_rotated = (dims.num_heads + dims.num_kv_heads) * kHeadDim;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      const bool live = row < num_rows;
      const f32 scale = shared.row_scale[row % (2 * kRowTile)];
      const PlanRow where = live ? plan_rows(params, plan)[row] : PlanRow{0, 0, 0, 0};
      const PlanSeq& seq = plan_seqs(params, plan)[where.seq_idx];
      const u32* page_table = reinterpret_cast<const u32*>(params.page_tables) + static_cast<u64>(seq.request_idx) * params.max_pages_per_request;
      const u32 page = live ? page_table[where.position / kPageTokens] : 0;
      const u64 page_base = (static_cast<u64>(op.layer) * params.num_pages + page) * dims.num_kv_heads;
      f32 head_scale = 1.0f;
      const u32 first_column = tile_idx * kTileRows;
      const bool normed_head = op.q_norm != 0 && first_column < num_rotated;  // then a tile is one head: host/gpu_weights.py sees to it
      if (normed_head) {
        f32 squares = 0.0f;
#pragma unroll
        for (u32 i = 0; i < kTileRows / 8; i++) {
          const u32 column = first_column + fragment_column(i);
          const f32 low = d[i * 4 + half * 2] * scale + (bias ? bias[column] : 0.0f);
          const f32 high = d[i * 4 + half * 2 + 1] * scale + (bias ? bias[column + 1] : 0.0f);
          squares += low * low + high * high;
        }
        head_scale = rsqrtf(quad_sum(squares) / kHeadDim + dims.norm_eps);
      }
#pragma unroll
      for (u32 block = 0; block < kTileRows / 8; block++) {
        const u32 column = first_column + fragment_column(block);
        if (!live || column >= op.out_features) continue;
        f32 low = d[block * 4 + half * 2] * scale;
        f32 high = d[block * 4 + half * 2 + 1] * scale;
        if (bias) {
          low += bias[column];
          high += bias[column + 1];
        }
        const u32 head = column / kHeadDim;
        const u32 in_head = column % kHeadDim;
        if (column < num_rotated) {
          if (normed_head) {
            const float2 gain = *reinterpret_cast<const float2*>(reinterpret_cast<const f32*>(head < dims.num_heads ? op.q_norm : op.k_norm) + in_head);
            low *= head_scale * gain.x;
            high *= head_scale * gain.y;
          }
          const float2 turn = rope[static_cast<u64>(where.position) * (kHeadDim / 2) + in_head / 2];
          const f32 turned = low * turn.x - high * turn.y;
          high = high * turn.x + low * turn.y;
          low = turned;
        }
        u8* destination;
        if (head < dims.num_heads) {
          destination = reinterpret_cast<u8*>(params.workspaces[kWsQuery]) + 2 * (static_cast<u64>(row) * dims.num_heads * kHeadDim + column);
        } else {
          const bool is_value = column >= num_rotated;
          const u32 kv_head = head - dims.num_heads - (is_value ? dims.num_kv_heads : 0);
          const u64 tile = (page_base + kv_head) * 2 + (is_value ? 1 : 0);
          destination = reinterpret_cast<u8*>(params.kv_cache) + 2 * ((tile * kPageTokens + where.position % kPageTokens) * kHeadDim + in_head);
        }
        *reinterpret_cast<u32*>(destination) = pack_bf16x2(low, high);
      }
    }
  }
};

// kOpGateUp: activation = silu(gate) * up, tiled for the down projection. Packed rows stand 8 gate, 8 up, ...: blocks 2i and 2i + 1 meet in one thread.
template <int kTileRows>
struct GateUpEpilogue {
  static_assert(kTileRows % 16 == 0, "gate and up blocks come in pairs");
  const EngineParams& params;
  const Op& op;
  const WorkerShared& shared;
  u32 num_rows;

  BK_INLINE void operator()(u32 row_begin, u32 tile_idx, f32 (&d)[kTileRows / 2]) const {
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const u32 num_slices = params.dims.intermediate / kSliceColumns;
    u8* activation = reinterpret_cast<u8*>(params.workspaces[kWsActivation]);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      const f32 scale = shared.row_scale[row % (2 * kRowTile)];
      if (row >= num_rows) continue;
#pragma unroll
      for (u32 pair = 0; pair < kTileRows / 16; pair++) {
        const u32 weight_row = tile_idx * kTileRows + pair * 16 + (thread_idx() % 4) * 2;
        if (weight_row >= op.out_features) continue;
        f32 values[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
          f32 gate = d[pair * 8 + half * 2 + i] * scale;
          f32 up = d[pair * 8 + 4 + half * 2 + i] * scale;
          if (bias) {
            gate += bias[weight_row + i];
            up += bias[weight_row + 8 + i];
          }
          values[i] = gate / (1.0f + expf(-gate)) * up;
        }
        const u32 column = weight_row / 16 * 8 + (thread_idx() % 4) * 2;
        *reinterpret_cast<u32*>(activation + 2 * tiled_offset(row, column, num_slices)) = pack_bf16x2(values[0], values[1]);
      }
    }
  }
};

}  // namespace blinkimp
