// Where a key or value stands in the KV cache of the Hopper kernel. GPU only (the emulated device has a layout of its own).
//
// Cache: [num_layers][num_pages][num_kv_heads][K, V] tiles. A tile is what wgmma reads after one bulk copy: [head_dim / 64][kPageTokens tokens]
// [64 dimensions] bf16, the 16-byte chunks of a token's 128 bytes exchanged by the 128-byte swizzle (chunk ^= token mod 8). K is then a
// K-major B operand, V an MN-major (transposed) one.
// Called by device/qkv_epilogue.cuh (writes), device/attention*.cuh (read). Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <program_abi.h>
#include <ptx.cuh>

namespace blinkimp {

constexpr u32 kKvBlockDims = 64;                                  // dimensions side by side: 128 bytes, the swizzle's width
constexpr u32 kKvBlockBytes = kPageTokens * kKvBlockDims * 2;     // tokens of a page x kKvBlockDims
constexpr u32 kKvGroupTokens = 8;                                 // tokens after which the swizzle repeats: it stays within them
constexpr u32 kKvGroupBytes = kKvGroupTokens * kKvBlockDims * 2;  // kKvGroupTokens x kKvBlockDims

template <int kHeadDim>
constexpr u32 kKvTileBytes = kPageTokens * kHeadDim * 2;  // K or V of one page and kv head

// Bytes from a tile's first byte to dimension `dim` of `token`, both within the page and head.
// In two parts, for loops over the dimensions of a token: the token's, and that of the 8 dimensions from dim / 8 * 8 on.
BK_INLINE u32 kv_token_bytes(u32 token) { return token * (kKvBlockDims * 2); }
BK_INLINE u32 kv_chunk_bytes(u32 token, u32 dim) { return dim / kKvBlockDims * kKvBlockBytes + ((dim % kKvBlockDims / 8 * 16) ^ (token % kKvGroupTokens * 16)); }
BK_INLINE u32 kv_byte_offset(u32 token, u32 dim) { return kv_token_bytes(token) + kv_chunk_bytes(token, dim) + dim % 8 * 2; }

// Bytes from the cache's first byte to the K tile of (layer, page, kv head); its V tile stands right behind.
template <int kHeadDim>
BK_INLINE u64 kv_tile_offset(u64 num_pages, u32 num_kv_heads, u32 layer, u32 page_id, u32 kv_head) {
  return ((layer * num_pages + page_id) * num_kv_heads + kv_head) * (2 * kKvTileBytes<kHeadDim>);
}

}  // namespace blinkimp
