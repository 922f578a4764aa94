// What happens to a product before it leaves the SM: the fused tails of the GEMM ops but the LM head's. GPU only.
//
// An epilogue sees the fragment of one warpgroup: 64 rows from `row_begin` x kColumns packed weight rows from `column_begin` (layout in gemm.cuh).
//   prefetch  before the main loop (wide: before the packed tile before): what finish() will read, where there are registers for it
//   finish    with the products in d
// Bits: finish computes each output by itself, in an order that does not depend on kColumns.
// Called by device/gemm.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm.cuh>
#include <kv_layout.cuh>
#include <step_plan.cuh>

namespace blinkimp {

struct NothingPrefetched {};

BK_INLINE f32 quad_sum(f32 value) {  // over the 4 lanes that share a fragment row
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// kOpProject: hidden += product (+ bias); leaves hidden * next gain as the next op's input and the sums of squares of 32 columns: those of its halves, added,
// because in the narrow shape they are two warpgroups'.
struct ProjectEpilogue {
  const EngineParams& params;
  const Op& op;
  WorkerShared& shared;
  u32 num_rows;
  static constexpr bool kPrefetchesRows = false;

  template <int kColumns>
  struct Residual {
    float2 hidden[2][kColumns / 8];  // [half][block]
    float2 gains[kColumns / 8];      // [block]
  };

  BK_INLINE f32* hidden_row(u32 row) const { return reinterpret_cast<f32*>(params.workspaces[kWsHidden]) + static_cast<u64>(row) * params.dims.hidden; }

  template <int kColumns, bool kWide>
  BK_INLINE auto prefetch(u32 row_begin, u32 column_begin) const {
    Residual<kColumns> loaded;
#pragma unroll
    for (u32 block = 0; block < kColumns / 8; block++) {
      const u32 column = column_begin + fragment_column(block);
      const bool exists = column < params.dims.hidden;
      loaded.gains[block] = exists ? *reinterpret_cast<const float2*>(reinterpret_cast<const f32*>(op.next_norm) + column) : float2{0.0f, 0.0f};
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        const u32 row = row_begin + fragment_row(half);
        loaded.hidden[half][block] = exists && row < num_rows ? *reinterpret_cast<const float2*>(hidden_row(row) + column) : float2{0.0f, 0.0f};
      }
    }
    return loaded;
  }

  template <int kColumns, bool kWide, class Prefetched>
  BK_INLINE void finish(u32 row_begin, u32 column_begin, f32 (&d)[kColumns / 2], const Prefetched& loaded, const f32*) const {
    constexpr u32 kHalfColumns = kSquaresColumns / 2;
    constexpr u32 kPartBlocks = kHalfColumns / 8;
    static_assert(kWide ? kColumns % kSquaresColumns == 0 : kColumns == kHalfColumns, "whole groups of the sums of squares, or half of one");
    f32 sums[2][kColumns / kHalfColumns];  // [half][part]
    const u32 hidden = params.dims.hidden;
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    u8* normed = reinterpret_cast<u8*>(params.workspaces[kWsNormed]);
    const u32 tile_rows = kWide ? kRowTile : input_tile_rows(num_rows);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      f32* residual = hidden_row(row);
#pragma unroll
      for (u32 part = 0; part < kColumns / kHalfColumns; part++) {
        f32 squares = 0.0f;
#pragma unroll
        for (u32 block = part * kPartBlocks; block < (part + 1) * kPartBlocks; block++) {
          const u32 column = column_begin + fragment_column(block);
          if (row < num_rows && column < hidden) {
            float2 value = loaded.hidden[half][block];
            const float2 gains = loaded.gains[block];
            f32 low = d[block * 4 + half * 2];
            f32 high = d[block * 4 + half * 2 + 1];
            if (bias) {
              low += bias[column];
              high += bias[column + 1];
            }
            value.x += low;
            value.y += high;
            *reinterpret_cast<float2*>(residual + column) = value;
            squares += value.x * value.x + value.y * value.y;
            *reinterpret_cast<u32*>(normed + 2 * tiled_offset(row, column, hidden / kSliceColumns, tile_rows)) = pack_bf16x2(value.x * gains.x, value.y * gains.y);
          }
        }
        sums[half][part] = quad_sum(squares);
      }
    }
    f32* parts = reinterpret_cast<f32*>(params.workspaces[kWsSquares]);
    const u32 num_parts = hidden / kSquaresColumns;
    const u32 first_part = column_begin / kSquaresColumns;
    if constexpr (kWide) {
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        const u32 row = row_begin + fragment_row(half);
        if (row >= num_rows || thread_idx() % 4 != 0) continue;
#pragma unroll
        for (u32 part = 0; part < kColumns / kSquaresColumns; part++) {
          if (first_part + part < num_parts) parts[static_cast<u64>(row) * num_parts + first_part + part] = sums[half][2 * part] + sums[half][2 * part + 1];
        }
      }
    } else {
      const bool is_second = column_begin % kSquaresColumns != 0;
      if (is_second && thread_idx() % 4 == 0) {
        for (u32 half = 0; half < 2; half++) half_sums(shared, 1)[fragment_row(half)] = sums[half][0];
      }
      named_barrier_sync<1, kComputeThreads>();  // the second half is there
      if (!is_second && thread_idx() % 4 == 0) {
        for (u32 half = 0; half < 2; half++) {
          const u32 row = row_begin + fragment_row(half);
          if (row < num_rows && first_part < num_parts) parts[static_cast<u64>(row) * num_parts + first_part] = sums[half][0] + half_sums(shared, 1)[fragment_row(half)];
        }
      }
      named_barrier_sync<1, kComputeThreads>();  // hazard: the next item's second half overtakes a reader
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
  WorkerShared& shared;
  const StepPlan* plan;  // of the step that runs; the director writes
  u32 num_rows;

  struct Place {     // of a row
    u32 position;
    u64 page_base;   // its page's first tile, in tiles of one K or V
  };

  // Where the pair of columns from `column` of a row goes, and how it turns. No destination: the row or the column does not exist.
  struct Cell {
    u8* destination;
    float2 turn;  // cos, sin
  };

  // Wide: the rows' places alone, for all packed tiles of an item; the turns of a packed tile are loaded together in finish().
  static constexpr bool kPrefetchesRows = true;
  struct Places {
    Place place[2];  // [half]
  };

  template <int kColumns>
  struct Cells {
    Cell cells[2][kColumns / 8];  // [half][block]
  };

  BK_INLINE u32 num_rotated() const { return (params.dims.num_heads + params.dims.num_kv_heads) * kHeadDim; }

  BK_INLINE Place place_of(u32 row) const {
    if (row >= num_rows) return Place{0, 0};
    const PlanRow where = plan_rows(params, plan)[row];
    const PlanSeq& seq = plan_seqs(params, plan)[where.seq_idx];
    const u32* page_table = reinterpret_cast<const u32*>(params.page_tables) + static_cast<u64>(seq.request_idx) * params.max_pages_per_request;
    return Place{where.position, (static_cast<u64>(op.layer) * params.num_pages + page_table[where.position / kPageTokens]) * params.dims.num_kv_heads};
  }

  BK_INLINE float2 turn_of(const Place& place, u32 row, u32 column) const {
    if (row >= num_rows || column >= num_rotated()) return float2{1.0f, 0.0f};
    return reinterpret_cast<const float2*>(op.rope)[static_cast<u64>(place.position) * (kHeadDim / 2) + column % kHeadDim / 2];
  }

  BK_INLINE u8* destination_of(const Place& place, u32 row, u32 column) const {
    const ModelDims& dims = params.dims;
    if (row >= num_rows || column >= op.out_features) return nullptr;
    const u32 head = column / kHeadDim;
    const u32 in_head = column % kHeadDim;
    const bool is_value = column >= num_rotated();
    if (head < dims.num_heads) return reinterpret_cast<u8*>(params.workspaces[kWsQuery]) + 2 * (static_cast<u64>(row) * dims.num_heads * kHeadDim + column);
    const u32 kv_head = head - dims.num_heads - (is_value ? dims.num_kv_heads : 0);
    const u64 tile = (place.page_base + kv_head) * 2 + (is_value ? 1 : 0);
    return reinterpret_cast<u8*>(params.kv_cache) + tile * kKvTileBytes<kHeadDim> + kv_byte_offset(place.position % kPageTokens, in_head);
  }

  template <int kColumns, bool kWide>
  BK_INLINE auto prefetch(u32 row_begin, u32 column_begin) const {
    if constexpr (kWide) {
      Places loaded;
      for (u32 half = 0; half < 2; half++) loaded.place[half] = place_of(row_begin + fragment_row(half));
      return loaded;
    } else {
      Cells<kColumns> loaded;
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        const u32 row = row_begin + fragment_row(half);
        const Place place = place_of(row);
#pragma unroll
        for (u32 block = 0; block < kColumns / 8; block++) {
          const u32 column = column_begin + fragment_column(block);
          loaded.cells[half][block] = Cell{destination_of(place, row, column), turn_of(place, row, column)};
        }
      }
      return loaded;
    }
  }

  // Sum of squares of a head's columns [first, first + kHalf) of the fragment, after scale and bias.
  template <int kHalfBlocks, int kRegisters>
  BK_INLINE f32 squares_of(const f32 (&d)[kRegisters], u32 half, u32 first_block, u32 column_begin, f32 scale) const {
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    f32 squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < kHalfBlocks; i++) {
      const u32 block = first_block + i;
      const u32 column = column_begin + fragment_column(block);
      const f32 low = d[block * 4 + half * 2] * scale + (bias ? bias[column] : 0.0f);
      const f32 high = d[block * 4 + half * 2 + 1] * scale + (bias ? bias[column + 1] : 0.0f);
      squares += low * low + high * high;
    }
    return quad_sum(squares);
  }

  // 1 / rms of the head that the tile is (host/gpu_weights.py sees to it that it is one), for both fragment rows. A head's halves are summed
  // apart and then added, because in the narrow shape they are two warpgroups'.
  template <int kColumns, bool kWide>
  BK_INLINE void head_scales(const f32 (&d)[kColumns / 2], u32 column_begin, const f32 (&scales)[2], f32 (&head_scale)[2]) const {
    constexpr int kHalfBlocks = kWide ? kColumns / 16 : kColumns / 8;
    f32 sums[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      sums[half] = squares_of<kHalfBlocks>(d, half, 0, column_begin, scales[half]);
      if constexpr (kWide) sums[half] += squares_of<kHalfBlocks>(d, half, kHalfBlocks, column_begin, scales[half]);
    }
    if constexpr (!kWide) {
      const u32 warpgroup = thread_idx() / 128;
      if (thread_idx() % 4 == 0) {
        for (u32 half = 0; half < 2; half++) half_sums(shared, warpgroup)[fragment_row(half)] = sums[half];
      }
      named_barrier_sync<1, kComputeThreads>();  // both halves are there
      for (u32 half = 0; half < 2; half++) sums[half] = half_sums(shared, 0)[fragment_row(half)] + half_sums(shared, 1)[fragment_row(half)];
      named_barrier_sync<1, kComputeThreads>();  // hazard: the next item's halves overtake a reader
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) head_scale[half] = rsqrtf(sums[half] / kHeadDim + params.dims.norm_eps);
  }

  template <int kColumns, bool kWide, class Prefetched>
  BK_INLINE void finish(u32 row_begin, u32 column_begin, f32 (&d)[kColumns / 2], const Prefetched& loaded, const f32* row_scale) const {
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const f32* gains = reinterpret_cast<const f32*>(column_begin < params.dims.num_heads * kHeadDim ? op.q_norm : op.k_norm);
    const bool normed_head = op.q_norm != 0 && column_begin < num_rotated();
    f32 scales[2], head_scale[2] = {1.0f, 1.0f};
    for (u32 half = 0; half < 2; half++) scales[half] = row_scale[(row_begin + fragment_row(half)) % (2 * kRowTile)];
    if (normed_head) head_scales<kColumns, kWide>(d, column_begin, scales, head_scale);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      float2 turns[kColumns / 8];
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        if constexpr (kWide) turns[block] = turn_of(loaded.place[half], row, column_begin + fragment_column(block));
        else turns[block] = loaded.cells[half][block].turn;
      }
#pragma unroll
      for (u32 block = 0; block < kColumns / 8; block++) {
        const u32 column = column_begin + fragment_column(block);
        u8* destination;
        if constexpr (kWide) destination = destination_of(loaded.place[half], row, column);
        else destination = loaded.cells[half][block].destination;
        if (destination == nullptr) continue;
        f32 low = d[block * 4 + half * 2] * scales[half];
        f32 high = d[block * 4 + half * 2 + 1] * scales[half];
        if (bias) {
          low += bias[column];
          high += bias[column + 1];
        }
        if (normed_head) {
          const float2 gain = *reinterpret_cast<const float2*>(gains + column % kHeadDim);
          low *= head_scale[half] * gain.x;
          high *= head_scale[half] * gain.y;
        }
        if (column < num_rotated()) {
          const f32 turned = low * turns[block].x - high * turns[block].y;
          high = high * turns[block].x + low * turns[block].y;
          low = turned;
        }
        *reinterpret_cast<u32*>(destination) = pack_bf16x2(low, high);
      }
    }
  }
};

// kOpGateUp: activation = silu(gate) * up, tiled for the down projection. Packed rows stand 8 gate, 8 up, ...: blocks 2i and 2i + 1 meet in one thread.
struct GateUpEpilogue {
  const EngineParams& params;
  const Op& op;
  u32 num_rows;
  static constexpr bool kPrefetchesRows = false;

  template <int kColumns, bool kWide>
  BK_INLINE NothingPrefetched prefetch(u32, u32) const {
    return NothingPrefetched{};
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(u32 row_begin, u32 column_begin, f32 (&d)[kColumns / 2], const NothingPrefetched&, const f32* row_scale) const {
    static_assert(kColumns % 16 == 0, "gate and up blocks come in pairs");
    const f32* bias = reinterpret_cast<const f32*>(op.bias);
    const u32 num_slices = params.dims.intermediate / kSliceColumns;
    const u32 tile_rows = kWide ? kRowTile : input_tile_rows(num_rows);
    u8* activation = reinterpret_cast<u8*>(params.workspaces[kWsActivation]);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 row = row_begin + fragment_row(half);
      const f32 scale = row_scale[row % (2 * kRowTile)];
      if (row >= num_rows) continue;
#pragma unroll
      for (u32 pair = 0; pair < kColumns / 16; pair++) {
        const u32 weight_row = column_begin + pair * 16 + (thread_idx() % 4) * 2;
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
        *reinterpret_cast<u32*>(activation + 2 * tiled_offset(row, column, num_slices, tile_rows)) = pack_bf16x2(values[0], values[1]);
      }
    }
  }
};

}  // namespace blinkimp
