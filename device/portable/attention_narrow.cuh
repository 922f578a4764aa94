// Attention of one row against one split of its keys (decode): the 8 warps of a CTA share each page. GPU only.
//
// The group's heads are the 16 rows of the tile. Of a page, warp w computes the scores of keys 8w .. 8w + 7 and leaves them in shared
// memory; then every warp takes all scores through the same softmax and multiplies with its own columns of V. One barrier per tile.
// Query rows, K and V tiles come through one ring that runs ahead over item boundaries, so HBM does not idle between items.
// Shared memory: [ 5 tiles (hd 64: 8) ] [ scores: 16 rows x 64 keys ].
// Called by device/portable/attention.cuh. Test: pytest -m gpu tests/gpu/test_attention.py
#pragma once
#include <portable/attention_pages.cuh>

namespace blinkimp {

template <int kHeadDim>
constexpr u32 kNarrowStages = kHeadDim == 128 ? 5 : 8;
constexpr u32 kScoreRowFloats = kPageTokens + 8;  // 8 more: rows g .. g + 3 of a half-warp's 8-byte accesses lie in different banks

template <int kHeadDim>
constexpr u32 kNarrowSharedBytes = kNarrowStages<kHeadDim> * kTileBytes<kHeadDim> + kNarrowRows * kScoreRowFloats * 4;

struct NarrowItem {
  u32 request_idx;
  u32 row;         // of the plan
  u32 position;
  u32 kv_head;
  u32 head_begin;  // first of the tile's heads, within the group
  u32 page_begin;
  u32 page_end;
  u32 slot;        // of the partial result, or kNoRow: the row has one split and is finished here
};

BK_INLINE bool find_narrow_item(const AttentionArgs& args, ItemCursor<AttentionPhase::kNarrow>& cursor, u32 item_idx, NarrowItem* item) {
  FoundItem found;
  if (!cursor.find(args, item_idx, &found)) return false;
  const PlanSeq& seq = args.seqs[found.seq_idx];
  const u32 num_head_tiles = (args.group + kNarrowRows - 1) / kNarrowRows;
  const u32 first_key = first_visible_key(seq.position_begin, args.window);
  const u32 split_begin = first_key / kSplitTokens;
  const u32 split_end = seq.position_begin / kSplitTokens + 1;
  const u32 split_idx = found.item / (num_head_tiles * args.num_kv_heads);
  const u32 page_begin = (split_begin + split_idx) * kSplitPages;
  const u32 page_end = seq.position_begin / kPageTokens + 1;
  item->request_idx = seq.request_idx;
  item->row = seq.row_begin;
  item->position = seq.position_begin;
  item->kv_head = found.item % args.num_kv_heads;
  item->head_begin = found.item / args.num_kv_heads % num_head_tiles * kNarrowRows;
  item->page_begin = page_begin > first_key / kPageTokens ? page_begin : first_key / kPageTokens;
  item->page_end = page_begin + kSplitPages < page_end ? page_begin + kSplitPages : page_end;
  item->slot = split_end - split_begin > 1 ? found.slot_begin + split_idx : kNoRow;
  return true;
}

// The loads of all of a CTA's items, one after the other: query rows, K, V, K, V, ..., query rows, ...
template <int kHeadDim>
struct NarrowStream {
  ItemCursor<AttentionPhase::kNarrow> cursor;
  u32 item_idx;
  NarrowItem item;
  bool live;
  u32 next;     // 0: the query rows, 1: K of `page`, 2: its V
  u32 page;
  u32 page_id;  // of `page`, read a page ahead so that its latency hides

  BK_INLINE void next_item(const AttentionArgs& args) {
    live = find_narrow_item(args, cursor, item_idx, &item);
    item_idx += args.num_ctas;
    next = 0;
    if (live) {
      page = item.page_begin;
      page_id = page_table_of(args, item.request_idx)[page];
    }
  }

  // Starts the next copy, if there is one, and commits it as one group.
  BK_INLINE void issue(const AttentionArgs& args, u32 shared_tile) {
    if (live && next == 0) {
      constexpr u32 kChunks = kHeadDim / 8;
      static_assert(kNarrowRows * kChunks <= kAttentionThreads, "one chunk a thread");
      const u32 thread = opaque(threadIdx.x);
      if (thread < kNarrowRows * kChunks) {
        const u32 head = item.head_begin + thread / kChunks;
        const bool valid = head < args.group;
        const u64 query_head = static_cast<u64>(item.row) * args.num_heads + item.kv_head * args.group + (valid ? head : 0);
        cp_async_16(shared_tile + swizzled_chunk<kHeadDim>(thread / kChunks, thread % kChunks),
                    args.query + query_head * kHeadDim + thread % kChunks * 8, valid);
      }
      next = 1;
    } else if (live) {
      issue_tile<kHeadDim>(args, page_id, item.kv_head, next - 1, item.position + 1 - page * kPageTokens, shared_tile);
      next ^= 3;
      if (next == 1 && ++page < item.page_end) page_id = page_table_of(args, item.request_idx)[page];
      if (page == item.page_end) next_item(args);
    }
    cp_async_commit();
  }
};

// Scores of all 16 rows against this warp's 8 keys, to shared memory.
template <int kHeadDim>
BK_INLINE void narrow_scores(const u32 (&query)[kHeadDim / 16][4], u32 thread, u32 shared_keys, f32* shared_scores) {
  const u32 lane = thread % 32u;
  const u32 first_key = thread / 32u * 8u;
  f32 scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (u32 pair = 0; pair < kHeadDim / 32; ++pair) {
    u32 keys[4];
    ldmatrix_x4(shared_keys + swizzled_chunk<kHeadDim>(first_key + lane % 8u, pair * 4 + lane / 8u), keys);
    mma_bf16_16x8x16(scores, query[pair * 2], keys[0], keys[1]);
    mma_bf16_16x8x16(scores, query[pair * 2 + 1], keys[2], keys[3]);
  }
  f32* place = shared_scores + lane / 4u * kScoreRowFloats + first_key + lane % 4u * 2u;
  *reinterpret_cast<float2*>(place) = make_float2(scores[0], scores[1]);
  *reinterpret_cast<float2*>(place + 8 * kScoreRowFloats) = make_float2(scores[2], scores[3]);
}

BK_INLINE void read_scores(const f32* shared_scores, u32 thread, u32 first_key, f32 (&scores)[kBlockTiles][4]) {
  const f32* place = shared_scores + thread % 32u / 4u * kScoreRowFloats + first_key + thread % 4u * 2u;
#pragma unroll
  for (u32 tile = 0; tile < kBlockTiles; ++tile) {
    const float2 upper = *reinterpret_cast<const float2*>(place + tile * 8);
    const float2 lower = *reinterpret_cast<const float2*>(place + tile * 8 + 8 * kScoreRowFloats);
    scores[tile][0] = upper.x;
    scores[tile][1] = upper.y;
    scores[tile][2] = lower.x;
    scores[tile][3] = lower.y;
  }
}

// outputs += weights x this warp's head_dim / 8 columns of 32 values
template <int kHeadDim>
BK_INLINE void narrow_outputs(u32 thread, u32 shared_values, const u32 (&weights)[kBlockTiles][2], f32 (&outputs)[kHeadDim / 64][4]) {
  const u32 lane = thread % 32u;
  const u32 warp = thread / 32u;
  u32 fragments[2][4];
  weight_fragment(weights, 0, fragments[0]);
  weight_fragment(weights, 1, fragments[1]);
  u32 values[4];
  if constexpr (kHeadDim == 128) {  // two n-tiles, 16 keys a load
#pragma unroll
    for (u32 step = 0; step < 2; ++step) {
      ldmatrix_x4_transposed(shared_values + swizzled_chunk<kHeadDim>(step * 16 + lane % 16u, warp * 2 + lane / 16u), values);
      mma_bf16_16x8x16(outputs[0], fragments[step], values[0], values[1]);
      mma_bf16_16x8x16(outputs[1], fragments[step], values[2], values[3]);
    }
  } else {  // one n-tile, 32 keys a load
    ldmatrix_x4_transposed(shared_values + swizzled_chunk<kHeadDim>(lane, warp), values);
    mma_bf16_16x8x16(outputs[0], fragments[0], values[0], values[1]);
    mma_bf16_16x8x16(outputs[0], fragments[1], values[2], values[3]);
  }
}

// Items first_item, first_item + num_ctas, ... `shared` and `shared_scores` lie behind a barrier: nobody uses that memory any more.
template <int kHeadDim, int kBarrierId, class Store>
BK_INLINE void run_narrow_items(const AttentionArgs& args, u32 first_item, u32 shared, f32* shared_scores, const Store& store) {
  constexpr u32 kStages = kNarrowStages<kHeadDim>;
  constexpr u32 kWarpTiles = kHeadDim / 64;
  const u32 thread = opaque(threadIdx.x);
  const u32 lane = thread % 32u;
  const u32 warp = thread / 32u;

  NarrowStream<kHeadDim> stream;
  stream.cursor = {};
  stream.item_idx = first_item;
  stream.next_item(args);
  if (!stream.live) return;
#pragma unroll 1
  for (u32 stage = 0; stage < kStages - 1; ++stage) stream.issue(args, shared + stage * kTileBytes<kHeadDim>);
  u32 stage = 0;
  const auto next_tile = [&]() -> u32 {
    cp_async_wait<static_cast<int>(kStages - 2)>();
    named_barrier_sync<kBarrierId, kAttentionThreads>();  // hazards: tiles of other threads' copies; refill under a slow reader; scores
    stream.issue(args, shared + (stage == 0 ? kStages - 1 : stage - 1) * kTileBytes<kHeadDim>);
    const u32 tile = shared + stage * kTileBytes<kHeadDim>;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    return tile;
  };

  ItemCursor<AttentionPhase::kNarrow> cursor;
  NarrowItem item;
  for (u32 item_idx = first_item; find_narrow_item(args, cursor, item_idx, &item); item_idx += args.num_ctas) {
    u32 query[kHeadDim / 16][4];
    const u32 shared_query = next_tile();
#pragma unroll
    for (u32 step = 0; step < kHeadDim / 16; ++step) {
      ldmatrix_x4(shared_query + swizzled_chunk<kHeadDim>(lane % 16u, step * 2 + lane / 16u), query[step]);
    }
    SoftmaxState state;
    state.reset();
    f32 outputs[kWarpTiles][4];
#pragma unroll
    for (u32 tile = 0; tile < kWarpTiles; ++tile) outputs[tile][0] = outputs[tile][1] = outputs[tile][2] = outputs[tile][3] = 0.0f;

    for (u32 page = item.page_begin; page < item.page_end; ++page) {
      narrow_scores<kHeadDim>(query, thread, next_tile(), shared_scores);
      const u32 shared_values = next_tile();
#pragma unroll
      for (u32 block = 0; block < kBlocksPerPage; ++block) {
        const u32 key_begin = page * kPageTokens + block * kBlockKeys;
        f32 scores[kBlockTiles][4];
        read_scores(shared_scores, thread, block * kBlockKeys, scores);
        if (key_begin + kBlockKeys - 1 > item.position || key_begin < first_visible_key(item.position, args.window)) {
          const u32 positions[2] = {item.position, item.position};
          mask_scores(scores, key_begin, positions, args.window);
        }
        u32 weights[kBlockTiles][2];
        f32 factors[2];
        softmax_block(scores, args.scale, state, weights, factors);
        rescale_outputs(outputs, factors);
        narrow_outputs<kHeadDim>(thread, shared_values + block * (kBlockKeys * kHeadDim * 2), weights, outputs);
      }
    }

#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const f32 sum = quad_total(state.sum[half]);
      const u32 group_head = item.head_begin + lane / 4u + half * 8u;
      if (group_head >= args.group) continue;
      const u32 head = item.kv_head * args.group + group_head;
      const u32 column = warp * (kHeadDim / 8) + lane % 4u * 2u;
      if (item.slot == kNoRow) {  // the fold of a single split, in registers
        FoldTotal total{minus_infinite_score(), 0.0f};
        const FoldFactors factors = fold_split(total, state.maximum[half], sum, args.scale);
        const f32 inverse_sum = __frcp_rn(total.sum);
#pragma unroll
        for (u32 tile = 0; tile < kWarpTiles; ++tile) {
          const f32 low = finish_value(fold_value(0.0f, outputs[tile][half * 2], factors), inverse_sum);
          const f32 high = finish_value(fold_value(0.0f, outputs[tile][half * 2 + 1], factors), inverse_sum);
          store(item.row, head * kHeadDim + column + tile * 8, pack_bf16x2(low, high));
        }
      } else {
        const u64 part = static_cast<u64>(item.slot) * args.num_heads + head;
#pragma unroll
        for (u32 tile = 0; tile < kWarpTiles; ++tile) {
          *reinterpret_cast<float2*>(args.part_outputs + part * kHeadDim + column + tile * 8) =
              make_float2(outputs[tile][half * 2], outputs[tile][half * 2 + 1]);
        }
        if (warp == 0 && lane % 4u == 0) args.part_softmax[part] = make_float2(state.maximum[half], sum);
      }
    }
  }
}

}  // namespace blinkimp
