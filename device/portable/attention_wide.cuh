// Attention of a prefill chunk: a CTA takes 128 packed rows of one kv head through all their keys. GPU only.
//
// Each of the 8 warps owns 16 rows: scores, softmax and outputs stay in its registers, K and V are shared by the CTA. While a page is
// worked on the next one is on its way. At the end of each split the split's outputs are folded into the row's total, as the combine phase
// of narrow items does.
// Shared memory: [ K, V of even pages ] [ K, V of odd pages ] [ 128 query rows ].
// Called by device/portable/attention.cuh. Test: pytest -m gpu tests/gpu/test_attention.py
#pragma once
#include <portable/attention_pages.cuh>

namespace blinkimp {

template <int kHeadDim>
constexpr u32 kWideSharedBytes = 4 * kTileBytes<kHeadDim> + kWideRows * kHeadDim * 2;

// scores = 16 query rows x 32 keys
template <int kHeadDim>
BK_INLINE void wide_scores(u32 shared_query, u32 shared_keys, f32 (&scores)[kBlockTiles][4]) {
  const u32 thread = opaque(threadIdx.x);
  const u32 lane = thread % 32u;
  const u32 query_place = shared_query + swizzled_chunk<kHeadDim>((thread / 32u) * 16u + lane % 16u, lane / 16u);
  const u32 key_place = shared_keys + swizzled_chunk<kHeadDim>(lane % 8u + (lane / 16u) * 8u, lane / 8u % 2u);
#pragma unroll
  for (u32 tile = 0; tile < kBlockTiles; ++tile) scores[tile][0] = scores[tile][1] = scores[tile][2] = scores[tile][3] = 0.0f;
#pragma unroll
  for (u32 step = 0; step < kHeadDim / 16; ++step) {
    u32 query[4];
    ldmatrix_x4(query_place ^ (step * 32), query);
#pragma unroll
    for (u32 pair = 0; pair < kBlockTiles / 2; ++pair) {
      u32 keys[4];
      ldmatrix_x4((key_place ^ (step * 32)) + pair * (16 * kHeadDim * 2), keys);
      mma_bf16_16x8x16(scores[pair * 2], query, keys[0], keys[1]);
      mma_bf16_16x8x16(scores[pair * 2 + 1], query, keys[2], keys[3]);
    }
  }
}

// outputs += 16 rows of weights x 32 values
template <int kHeadDim>
BK_INLINE void wide_outputs(u32 shared_values, const u32 (&weights)[kBlockTiles][2], f32 (&outputs)[kHeadDim / 8][4]) {
  const u32 lane = opaque(threadIdx.x) % 32u;
  const u32 value_place = shared_values + swizzled_chunk<kHeadDim>(lane % 16u, lane / 16u);
#pragma unroll
  for (u32 step = 0; step < kBlockKeys / 16; ++step) {
    u32 fragment[4];
    weight_fragment(weights, step, fragment);
#pragma unroll
    for (u32 pair = 0; pair < kHeadDim / 16; ++pair) {
      u32 values[4];
      ldmatrix_x4_transposed((value_place ^ (pair * 32)) + step * (16 * kHeadDim * 2), values);
      mma_bf16_16x8x16(outputs[pair * 2], fragment, values[0], values[1]);
      mma_bf16_16x8x16(outputs[pair * 2 + 1], fragment, values[2], values[3]);
    }
  }
}

// Row g (half 0) or g + 8 of this lane's fragments, within the tile.
BK_INLINE u32 wide_row(u32 half) {
  const u32 thread = opaque(threadIdx.x);
  return thread / 32u * 16u + thread % 32u / 4u + half * 8u;
}

BK_INLINE WideItem make_wide_item(const AttentionArgs& args, const FoundItem& found) {
  const PlanSeq& seq = args.seqs[found.seq_idx];
  const u32 num_packed = seq.num_rows * args.group;
  const u32 num_tiles = (num_packed + kWideRows - 1) / kWideRows;
  WideItem item;
  item.seq_idx = found.seq_idx;
  item.kv_head = found.item % args.num_kv_heads;
  item.tile_begin = (num_tiles - 1 - found.item / args.num_kv_heads) * kWideRows;  // the longest first
  item.tile_last = (item.tile_begin + kWideRows < num_packed ? item.tile_begin + kWideRows : num_packed) - 1;
  item.page_begin = first_visible_key(seq.position_begin + item.tile_begin / args.group, args.window) / kPageTokens;
  item.page_end = (seq.position_begin + item.tile_last / args.group) / kPageTokens + 1;
  return item;
}

// Starts the copy of the item's 128 query rows; rows past the share become zeros.
template <int kHeadDim>
BK_INLINE void issue_queries(const AttentionArgs& args, const WideItem& item, u32 shared_query) {
  constexpr u32 kChunks = kHeadDim / 8;
  const u32 row_begin = args.seqs[item.seq_idx].row_begin;
#pragma unroll 1
  for (u32 idx = opaque(threadIdx.x); idx < kWideRows * kChunks; idx += kAttentionThreads) {
    const u32 packed = item.tile_begin + idx / kChunks;
    const bool valid = packed <= item.tile_last;
    const u64 row = row_begin + (valid ? packed / args.group : 0);
    const u32 head = item.kv_head * args.group + (valid ? packed % args.group : 0);
    const u16* source = args.query + (row * args.num_heads + head) * kHeadDim + idx % kChunks * 8;
    cp_async_16(shared_query + swizzled_chunk<kHeadDim>(idx / kChunks, idx % kChunks), source, valid);
  }
}

// Starts the copies of a page's K and V tiles, to the half of the ring that the page's parity names.
template <int kHeadDim>
BK_INLINE void issue_wide_page(const AttentionArgs& args, const WideItem& item, u32 page, u32 page_id, u32 shared) {
  const PlanSeq& seq = args.seqs[item.seq_idx];
  const u32 num_valid = seq.position_begin + seq.num_rows - page * kPageTokens;
  const u32 place = shared + page % 2u * (2 * kTileBytes<kHeadDim>);
  issue_tile<kHeadDim>(args, page_id, item.kv_head, 0, num_valid, place);
  issue_tile<kHeadDim>(args, page_id, item.kv_head, 1, num_valid, place + kTileBytes<kHeadDim>);
}

template <int kHeadDim, int kBarrierId, class Store>
BK_INLINE void run_wide_item(AttentionShared& attention, const FoundItem& found, u32 shared, const Store& store) {
  constexpr u32 kOutputTiles = kHeadDim / 8;
  const AttentionArgs& args = attention.args;
  const WideItem& item = attention.item;
  const u32 shared_query = shared + 4 * kTileBytes<kHeadDim>;

  named_barrier_sync<kBarrierId, kAttentionThreads>();  // hazard: another warp still reads the previous item and its shared memory
  if (threadIdx.x == 0) attention.item = make_wide_item(args, found);
  named_barrier_sync<kBarrierId, kAttentionThreads>();  // hazard: the item is read before thread 0 wrote it
  u32 page = item.page_begin;
  issue_queries<kHeadDim>(args, item, shared_query);
  const u32* page_table = page_table_of(args, args.seqs[item.seq_idx].request_idx);
  issue_wide_page<kHeadDim>(args, item, page, page_table[page], shared);
  cp_async_commit();
  u32 next_page_id = page_table[page + 1 < item.page_end ? page + 1 : page];  // a page ahead, so that its latency hides

  // The positions between which this warp's 16 packed rows lie. A warp without rows stands at 0 and leaves out almost all blocks.
  u32 first_position = 0;
  u32 last_position = 0;
  {
    const u32 warp_begin = item.tile_begin + opaque(threadIdx.x) / 32u * 16u;
    const u32 warp_last = warp_begin + 15u < item.tile_last ? warp_begin + 15u : item.tile_last;
    if (warp_begin <= item.tile_last) {
      const u32 position_begin = args.seqs[item.seq_idx].position_begin;
      first_position = position_begin + warp_begin / args.group;
      last_position = position_begin + warp_last / args.group;
    }
  }

  FoldTotal totals[2] = {{minus_infinite_score(), 0.0f}, {minus_infinite_score(), 0.0f}};
  f32 total_outputs[kOutputTiles][4];
  f32 outputs[kOutputTiles][4];
#pragma unroll
  for (u32 tile = 0; tile < kOutputTiles; ++tile) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) total_outputs[tile][i] = outputs[tile][i] = 0.0f;
  }
  SoftmaxState state;
  state.reset();

#pragma unroll 1
  for (; page < item.page_end; ++page) {
    cp_async_wait<0>();
    named_barrier_sync<kBarrierId, kAttentionThreads>();  // hazards: tiles of other threads' copies; refill under a slow reader
    if (page + 1 < item.page_end) {
      issue_wide_page<kHeadDim>(args, item, page + 1, next_page_id, shared);
      cp_async_commit();
      const u32 ahead = page + 2 < item.page_end ? page + 2 : page;
      next_page_id = page_table_of(args, args.seqs[item.seq_idx].request_idx)[ahead];
    }
#pragma unroll 1
    for (u32 block = 0; block < kBlocksPerPage; ++block) {
      const u32 key_begin = page * kPageTokens + block * kBlockKeys;
      const u32 key_last = key_begin + kBlockKeys - 1;
      // A block that none of the warp's rows sees changes nothing (I2): leave it out.
      if (key_begin > last_position || key_last < first_visible_key(first_position, args.window)) continue;
      const u32 shared_keys = shared + page % 2u * (2 * kTileBytes<kHeadDim>) + block * (kBlockKeys * kHeadDim * 2);
      f32 scores[kBlockTiles][4];
      wide_scores<kHeadDim>(shared_query, shared_keys, scores);
      if (key_last > first_position || key_begin < first_visible_key(last_position, args.window)) {
        u32 positions[2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {  // rows past the share repeat its last one
          const u32 packed = item.tile_begin + wide_row(half);
          positions[half] = args.seqs[item.seq_idx].position_begin + (packed < item.tile_last ? packed : item.tile_last) / args.group;
        }
        mask_scores(scores, key_begin, positions, args.window);
      }
      u32 weights[kBlockTiles][2];
      f32 factors[2];
      softmax_block(scores, args.scale, state, weights, factors);
      rescale_outputs(outputs, factors);
      wide_outputs<kHeadDim>(shared_keys + kTileBytes<kHeadDim>, weights, outputs);
    }
    if ((page + 1) % kSplitPages == 0 || page + 1 == item.page_end) {  // the end of a split
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const FoldFactors factors = fold_split(totals[half], state.maximum[half], quad_total(state.sum[half]), args.scale);
#pragma unroll
        for (u32 tile = 0; tile < kOutputTiles; ++tile) {
#pragma unroll
          for (u32 i = half * 2; i < half * 2 + 2; ++i) {
            total_outputs[tile][i] = fold_value(total_outputs[tile][i], outputs[tile][i], factors);
            outputs[tile][i] = 0.0f;
          }
        }
      }
      state.reset();
    }
  }

#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 packed = item.tile_begin + wide_row(half);
    if (packed > item.tile_last) continue;
    const u32 row = args.seqs[item.seq_idx].row_begin + packed / args.group;
    const u32 column = (item.kv_head * args.group + packed % args.group) * kHeadDim + opaque(threadIdx.x) % 4u * 2u;
    const f32 inverse_sum = __frcp_rn(totals[half].sum);
#pragma unroll
    for (u32 tile = 0; tile < kOutputTiles; ++tile) {
      store(row, column + tile * 8u,
            pack_bf16x2(finish_value(total_outputs[tile][half * 2], inverse_sum), finish_value(total_outputs[tile][half * 2 + 1], inverse_sum)));
    }
  }
}

}  // namespace blinkimp
