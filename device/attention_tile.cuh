// The pieces of attention's loop over pages: query and KV tiles in shared memory, the two products, masks, the way out. GPU only.
//
// All of it is called by the 128 threads of a compute warpgroup. Called by device/attention.cuh.
// Test: pytest -m gpu tests/gpu/test_attention_sm90.py; without a GPU: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_runs.cuh>
#include <fragment.cuh>
#include <ptx_wgmma.cuh>
#include <ptx_wgmma_attention.cuh>

namespace blinkimp {

// Named barriers: 1 is all compute threads'; these are a warpgroup's own, and its turn at the tensor cores.
constexpr u32 kWarpgroupBarrier = 2;
constexpr u32 kTurnBarrier = 4;

BK_INLINE u32 compute_warpgroup() { return thread_idx() / kWarpgroupThreads; }
BK_INLINE bool is_elected() { return thread_idx() % kWarpgroupThreads == 0; }
BK_INLINE void warpgroup_sync() { barrier_sync(kWarpgroupBarrier + compute_warpgroup(), kWarpgroupThreads); }

// Starts the copies of the run's query rows into the warpgroup's tile of the scratch, by `count` threads, each with its `id`; rows past them
// keep old bytes. With a decode row that ends its context here come its new key and value: later, they would cost the last page another trip
// to L2.
template <int kHeadDim>
BK_INLINE void issue_queries(const EngineParams& params, const AttentionRun& run, u8* scratch, u32 id, u32 count) {
  constexpr u32 kChunks = kHeadDim / 8;
  const u32 group = run.group;
  const u16* query = reinterpret_cast<const u16*>(params.workspaces[kWsQuery]);
#pragma unroll 2
  for (u32 idx = id; idx < run.num_packed * kChunks; idx += count) {
    const u32 packed = run.packed_begin + idx / kChunks;
    const u32 token = divide_by_group(packed, run.group_reciprocal);
    const u64 row = run.row_begin + token;
    const u32 head = run.kv_head * group + packed - token * group;
    cp_async_16(shared_address(scratch + run.query_offset + kv_byte_offset(idx / kChunks, idx % kChunks * 8)), query + (row * params.dims.num_heads + head) * kHeadDim + idx % kChunks * 8, true);
  }
  if (run.kind == kRunNarrow && run.patch_page != kNoPatchPage && id < 2 * kChunks) {
    const u8* source = reinterpret_cast<const u8*>(run.patch_source) + (id < kChunks ? 0 : kKvTileBytes<kHeadDim>);
    cp_async_16(shared_address(scratch + run.new_row_offset + id * 16), source + kv_byte_offset((run.key_end - 1) % kPageTokens, id % kChunks * 8), true);
  }
  cp_async_commit();
}

// Until this thread's copies are there, and visible to wgmma; a barrier then makes those of all threads visible.
BK_INLINE void land_queries() {
  cp_async_wait<0>();
  fence_proxy_async_shared();  // written by ordinary copies, read by wgmma
}

// The page that the context ends in, in shared memory: puts in the new key and value of a decode row (the page was fetched before they were
// written) and zeroes the values past the context: their weights are zeros, but 0 * infinity would not be.
template <int kHeadDim>
BK_INLINE void patch_page(const AttentionRun& run, const u8* scratch, u8* keys, u8* values) {
  constexpr u32 kChunks = kHeadDim / 8;
  const u32 thread = thread_idx() % kWarpgroupThreads;
  if (run.kind == kRunNarrow && thread < 2 * kChunks) {
    const u32 offset = kv_byte_offset((run.key_end - 1) % kPageTokens, thread % kChunks * 8);
    *reinterpret_cast<uint4*>((thread < kChunks ? keys : values) + offset) = *reinterpret_cast<const uint4*>(scratch + run.new_row_offset + thread * 16);
  }
  for (u32 idx = (run.key_end - 1) % kPageTokens * kChunks + kChunks + thread; idx < kPageTokens * kChunks; idx += kWarpgroupThreads) {
    *reinterpret_cast<uint4*>(values + kv_byte_offset(idx / kChunks, idx % kChunks * 8)) = uint4{0, 0, 0, 0};
  }
  fence_proxy_async_shared();  // written by ordinary stores, read by wgmma
  warpgroup_sync();     // the rows are whole before any warp's wgmma reads them
}

// scores = 64 query rows x 64 keys. Addresses: uniform().
template <int kHeadDim>
BK_INLINE void issue_scores(f32 (&scores)[kScoreWords], u32 queries, u32 keys) {
  const u64 a = wgmma_tile_descriptor(queries, kKvBlockBytes);
  const u64 b = wgmma_tile_descriptor(keys, kKvBlockBytes);
  static_assert(kTileRows == kPageTokens, "blocks of 64 dimensions are equally far apart in both tiles");
#pragma unroll
  for (u32 step = 0; step < kHeadDim / 16; ++step) {
    const u32 offset = step / 4 * (kKvBlockBytes >> 4) + step % 4 * 2;
    wgmma_m64_k16<static_cast<int>(kPageTokens)>(scores, a + offset, b + offset, step != 0);
  }
}

// outputs (+)= 64 rows of weights x 64 values. Address: uniform().
template <int kHeadDim>
BK_INLINE void issue_outputs(f32 (&outputs)[kHeadDim / 2], const u32 (&weights)[kWeightWords], u32 values, bool accumulate) {
  const u64 b = wgmma_tile_descriptor(values, kKvBlockBytes);
#pragma unroll
  for (u32 step = 0; step < kPageTokens / 16; ++step) {
    wgmma_values_k16<kHeadDim>(outputs, weights + step * 4, b + step * (16 * kKvBlockDims * 2 >> 4), step != 0 || accumulate);
  }
}

// Masks the block's scores for this thread's two rows; rows past the run repeat its last one.
BK_INLINE void mask_page(const AttentionRun& run, u32 page, f32 (&scores)[kScoreWords]) {
  const u32 thread = opaque(thread_idx()) % kWarpgroupThreads;
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 row = min(thread / 32u * 16u + thread % 32u / 4u + half * 8u, run.num_packed - 1);
    const u32 position = run.position_begin + divide_by_group(run.packed_begin + row, run.group_reciprocal);
    const i32 first_key = static_cast<i32>(page * kPageTokens);
    mask_scores(scores, half, static_cast<i32>(first_visible_key(position, run.window)) - first_key, static_cast<i32>(position) + 1 - first_key);
  }
}

// 4 x 4 words of the lanes of a quad, transposed: in, words[j] is this lane's pair of columns of tile j; out, words are the four pairs of tile
// (lane mod 4): 16 bytes side by side.
BK_INLINE void gather_chunk(u32 (&words)[4]) {
  const u32 lane = thread_idx() % 4u;
  const bool odd = lane & 1u;
  const bool high = lane & 2u;
#pragma unroll
  for (u32 i = 0; i < 4; i += 2) {
    const u32 received = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
    if (odd) words[i] = received;
    else words[i + 1] = received;
  }
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    const u32 received = __shfl_xor_sync(0xffffffffu, high ? words[i] : words[i + 2], 2);
    if (high) words[i] = received;
    else words[i + 2] = received;
  }
}

// totals: used up.
template <int kHeadDim, class Store>
BK_INLINE void store_rows(const AttentionRun& run, f32 (&totals)[kHeadDim / 2], const FoldTotal (&total)[2], const Store& store) {
  const u32 thread = thread_idx() % kWarpgroupThreads;
  f32 inverse_sums[2];
  u32 out_rows[2];
  u32 columns[2];
  bool exists[2];
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 row = thread / 32u * 16u + thread % 32u / 4u + half * 8u;
    const u32 packed = run.packed_begin + row;
    inverse_sums[half] = __frcp_rn(total[half].sum);
    const u32 token = divide_by_group(packed, run.group_reciprocal);
    out_rows[half] = run.row_begin + token;
    columns[half] = (run.kv_head * run.group + packed - token * run.group) * kHeadDim + thread % 4u * 8u;
    exists[half] = row < run.num_packed;
  }
#pragma unroll 1
  for (u32 tile = 0; tile < kHeadDim / 8; tile += 4) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      u32 words[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 place = i * 4 + half * 2;
        words[i] = pack_bf16x2(finish_value(totals[place], inverse_sums[half]), finish_value(totals[place + 1], inverse_sums[half]));
      }
      gather_chunk(words);
      if (exists[half]) store.chunk(out_rows[half], columns[half] + tile * 8u, uint4{words[0], words[1], words[2], words[3]});
    }
    move_down<16>(totals);
  }
}

}  // namespace blinkimp
