// The fused tail of QKV: row scale, bias, per-head norm, rotation; q to its workspace, k and v to the row's KV page. GPU only.
//
// The packed rows of a q or k head stand as pairs (i, i + head_dim / 2), so a thread holds both halves of each rotation; q and k keep that
// order in memory (their product does not see it), v has the plain order. A block of 8 columns lies within one head.
// Called by device/worker.cuh (the interface of gemm_epilogues.cuh). Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_epilogues.cuh>
#include <kv_layout.cuh>
#include <step_plan.cuh>

namespace blinkimp {

template <int kTileRows, int kHeadDim>
struct QkvEpilogue {
  const EngineParams& params;
  const Op& op;
  WorkerShared& shared;
  const StepPlan* plan;  // of the step that runs; the director writes
  u32 num_rows;

  // Where a row's columns go and how they turn: this thread's part of it. A row that does not exist turns as the first one: loads need no condition.
  struct Place {
    u8* cache;          // the token's place in the K tile of its page's first head
    u32 turns;          // bytes from op.rope to cos, sin (a float2) of the position's first pair
    u32 row_and_token;  // what is left fits into a register: row * 8 + its token's number in the page mod 8; kNoRow, if it does not exist
  };

  // A packed tile at a time, a head where heads are normalised.
  static constexpr u32 kMostUnrolledSteps = 1;
  static constexpr bool kTakesPieces = kTileRows != kHeadDim;  // else a tile may be a head that is normalised
  static constexpr bool kMeets = false;
  static constexpr u32 kTailRegisters = 128;  // for products and loads, of a thread's 224: with two steps ahead of 192 columns the kernel spills
  struct Rows {
    Place places[2];  // [half]
  };
  template <int kColumns>
  struct Loaded {
    float2 turns[2][kColumns / 8];  // [half][block]
  };
  template <int kColumns>
  BK_INLINE static constexpr u32 step_columns() {
    return kColumns < kTileRows ? kColumns : kTileRows;
  }

  BK_INLINE u32 num_rotated() const { return (params.dims.num_heads + params.dims.num_kv_heads) * kHeadDim; }

  BK_INLINE Place place_of(u32 row, u32 lane) const {
    const ModelDims& dims = params.dims;
    const bool exists = row < num_rows;
    const PlanRow where = plan_rows(params, plan)[exists ? row : 0];
    const u32 request_idx = plan_seqs(params, plan)[where.seq_idx].request_idx;
    const u32* page_table = reinterpret_cast<const u32*>(params.page_tables) + static_cast<u64>(request_idx) * params.max_pages_per_request;
    const u32 page_id = page_table[where.position / kPageTokens];
    const u32 token = where.position % kPageTokens;
    return Place{
        reinterpret_cast<u8*>(params.kv_cache) + kv_tile_offset<kHeadDim>(params.num_pages, dims.num_kv_heads, op.layer, page_id, 0) + kv_token_bytes(token) + 2 * lane,
        (where.position * kHeadDim + lane) * static_cast<u32>(sizeof(float2) / 2), exists ? row * 8 + token % 8 : kNoRow};
  }

  // Where a block of 8 columns goes, the same for all rows: computed once a warp, in uniform registers.
  struct Target {
    u32 offset;  // bytes from the row's query, or from Place.cache to the first chunk of the token
    u32 chunk;   // within 64 dimensions; in the cache it is swizzled
    bool is_query;
    bool exists;
  };

  BK_INLINE Target target_of(u32 block_column) const {
    const ModelDims& dims = params.dims;
    const u32 head = block_column / kHeadDim;
    const bool is_query = head < dims.num_heads;
    const bool is_value = block_column >= num_rotated();
    const u32 tile = is_value ? (head - dims.num_heads - dims.num_kv_heads) * 2 + 1 : (head - dims.num_heads) * 2;
    const u32 in_cache = tile * kKvTileBytes<kHeadDim> + block_column % kHeadDim / kKvBlockDims * kKvBlockBytes;
    return Target{is_query ? 2 * block_column : in_cache, block_column % kKvBlockDims / 8, is_query, block_column < op.out_features};
  }

  // Selected, not branched to: a branch ends what can be in flight together.
  BK_INLINE u8* destination_of(const Place& place, const Target& target, u32 lane) const {
    u8* query = reinterpret_cast<u8*>(params.workspaces[kWsQuery]) + 2 * (static_cast<u64>(place.row_and_token / 8) * params.dims.num_heads * kHeadDim + lane);
    const u32 swizzled = (target.chunk ^ place.row_and_token % 8) * 16;
    return (target.is_query ? query : place.cache) + (target.offset + (target.is_query ? 0 : swizzled));
  }

  BK_INLINE Rows rows(u32 row_begin) const {
    const u32 first_row = row_begin + fragment_row(0);
    const u32 lane = lane_column();
    Rows found;
#pragma unroll
    for (u32 half = 0; half < 2; half++) found.places[half] = place_of(first_row + half * 8, lane);
    return found;
  }

  template <int kColumns>
  BK_INLINE Loaded<kColumns> prefetch(const Rows& rows, u32, u32 first_column) const {
    const u32 column_begin = uniform(first_column);
    Loaded<kColumns> loaded;
#pragma unroll
    for (u32 i = 0; i < kColumns / 4; i++) {  // a value's too, though it is not turned
      loaded.turns[i % 2][i / 2] = *reinterpret_cast<const float2*>(op.rope + rows.places[i % 2].turns + (column_begin + i / 2 * 8) % kHeadDim * (sizeof(float2) / 2));
    }
    return loaded;
  }

  template <int kColumns, bool kWide>
  BK_INLINE void finish(const Rows& rows, u32 row_begin, u32 first_column, f32 (&d)[kColumns / 2], const Loaded<kColumns>& loaded, const f32* row_scale) const {
    u32 column = uniform(first_column);
    const u32 row = (row_begin + fragment_row(0)) % (2 * kRowTile);
    const f32 scales[2] = {row_scale[row], row_scale[row + 8]};
    scale_fragment(d, scales);
    add_bias(d, op, column);
    if (op.q_norm != 0 && column < num_rotated()) norm_head<kColumns>(d, column);
    Loaded<kColumns> turns = loaded;
#pragma unroll (kWide ? kColumns / 8 : 1)
    for (u32 block = 0; block < kColumns / 8; block++, column += 8) {
      store_block(d, rows.places, turns.turns, column);
      move_down<4>(d);
      move_down<1>(turns.turns[0]);
      move_down<1>(turns.turns[1]);
    }
  }

 private:
  // The first block of what is left.
  template <int kRegisters, int kBlocks>
  BK_INLINE void store_block(const f32 (&d)[kRegisters], const Place (&places)[2], const float2 (&turns)[2][kBlocks], u32 block_column) const {
    const bool is_turned = block_column < num_rotated();
    const Target target = target_of(block_column);
    const u32 lane = lane_column();
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const f32 low = d[half * 2];
      const f32 high = d[half * 2 + 1];
      const float2 turn = turns[half][0];
      const f32 turned_low = __fmaf_rn(low, turn.x, -__fmul_rn(high, turn.y));
      const f32 turned_high = __fmaf_rn(high, turn.x, __fmul_rn(low, turn.y));
      const u32 packed = pack_bf16x2(is_turned ? turned_low : low, is_turned ? turned_high : high);
      u8* const destination = opaque(destination_of(places[half], target, lane));  // worked out whether it exists or not (gemm_epilogues.cuh)
      if (target.exists && places[half].row_and_token != kNoRow) *reinterpret_cast<u32*>(destination) = packed;
    }
  }

  // The head that the tile is (host/gpu_weights.py sees to it that it is one), over its rms, times its gain. A head's halves are summed apart and
  // then added, because in the narrow shape they are two warpgroups'.
  template <int kColumns>
  BK_INLINE void norm_head(f32 (&d)[kColumns / 2], u32 column_begin) const {
    constexpr bool kWhole = kColumns == kTileRows;
    constexpr u32 kHalfBlocks = kWhole ? kColumns / 16 : kColumns / 8;
    f32 sums[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      sums[half] = squares_of<kHalfBlocks>(d, half, 0);
      if constexpr (kWhole) sums[half] = __fadd_rn(sums[half], squares_of<kHalfBlocks>(d, half, kHalfBlocks));
    }
    if constexpr (!kWhole) {
      const u32 thread = thread_idx();
      const u32 row = fragment_row(0);
      if (thread % 4 == 0) {
        for (u32 half = 0; half < 2; half++) half_sums(shared, thread / 128)[row + half * 8] = sums[half];
      }
      named_barrier_sync<1, kComputeThreads>();  // both halves are there
      for (u32 half = 0; half < 2; half++) sums[half] = __fadd_rn(half_sums(shared, 0)[row + half * 8], half_sums(shared, 1)[row + half * 8]);
      named_barrier_sync<1, kComputeThreads>();  // hazard: the next item's halves overtake a reader
    }
    const f32* gains = reinterpret_cast<const f32*>(column_begin < params.dims.num_heads * kHeadDim ? op.q_norm : op.k_norm) + lane_column();
    f32 scales[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) scales[half] = rsqrtf(__fmaf_rn(sums[half], 1.0f / kHeadDim, params.dims.norm_eps));
#pragma unroll
    for (u32 block = 0; block < kColumns / 8; block++) {
      const float2 gain = *reinterpret_cast<const float2*>(gains + (column_begin + block * 8) % kHeadDim);
#pragma unroll
      for (u32 i = 0; i < 4; i++) d[block * 4 + i] = __fmul_rn(d[block * 4 + i], __fmul_rn(scales[i / 2], i % 2 ? gain.y : gain.x));
    }
  }

  // Sum of squares of kHalfBlocks blocks of a row, over the lanes that share it.
  template <u32 kHalfBlocks, int kRegisters>
  BK_INLINE f32 squares_of(const f32 (&d)[kRegisters], u32 half, u32 first_block) const {
    f32 squares = 0.0f;
#pragma unroll
    for (u32 block = first_block; block < first_block + kHalfBlocks; block++) {
      squares = __fmaf_rn(d[block * 4 + half * 2], d[block * 4 + half * 2], squares);
      squares = __fmaf_rn(d[block * 4 + half * 2 + 1], d[block * 4 + half * 2 + 1], squares);
    }
    return quad_sum(squares);
  }
};

}  // namespace blinkimp
