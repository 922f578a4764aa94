// KV tiles on their way to shared memory: the swizzle, and the copy of one tile. GPU only.
//
// Rows of head_dim bf16 stand one after the other; the 16-byte chunk c of row r stands at chunk c ^ (r mod 8), so that the 8 rows that
// ldmatrix reads at one chunk lie in 8 different bank groups. Tiles start at multiples of 256 bytes, so the address of chunk c + 2i of a row is
// that of its chunk c (c < 2) with 32 * i exclusive-or'ed in: one instruction, and no table of addresses in registers.
// Called by device/portable/attention_wide.cuh, attention_narrow.cuh. Test: pytest tests/host/test_attention_simt.py
#pragma once
#include <portable/attention_schedule.cuh>

namespace blinkimp {

constexpr u32 kAttentionThreads = 256;

template <int kHeadDim>
constexpr u32 kTileBytes = kPageTokens * kHeadDim * 2;

// Byte offset of a 16-byte chunk (8 elements) of a row.
template <int kHeadDim>
BK_INLINE u32 swizzled_chunk(u32 row, u32 chunk) {
  static_assert(kHeadDim == 64 || kHeadDim == 128, "the swizzle needs at least 8 chunks a row, the register budget at most 16");
  return row * (kHeadDim * 2) + ((chunk ^ (row % 8u)) * 16u);
}

// Starts the copy of a K (is_value 0) or V (1) tile; all compute threads call it together, the caller commits the group. Keys from
// num_valid on were never written: they become zeros, because 0 * NaN is NaN.
template <int kHeadDim>
BK_INLINE void issue_tile(const AttentionArgs& args, u32 page_id, u32 kv_head, u32 is_value, u32 num_valid, u32 shared_tile) {
  constexpr u32 kChunks = kHeadDim / 8;
  const u64 tile_idx = (static_cast<u64>(page_id) * args.num_kv_heads + kv_head) * 2 + is_value;
  const u16* tile = args.kv + tile_idx * (kPageTokens * kHeadDim);
  const u32 thread = opaque(threadIdx.x);
#pragma unroll
  for (u32 i = 0; i < kPageTokens * kChunks / kAttentionThreads; ++i) {
    const u32 idx = i * kAttentionThreads + thread;
    cp_async_16(shared_tile + swizzled_chunk<kHeadDim>(idx / kChunks, idx % kChunks), tile + idx * 8, idx / kChunks < num_valid);
  }
}

BK_INLINE const u32* page_table_of(const AttentionArgs& args, u32 request_idx) {
  return args.page_tables + static_cast<u64>(request_idx) * args.max_pages_per_request;
}

}  // namespace blinkimp
