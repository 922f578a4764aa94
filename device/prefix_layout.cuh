// Where the prefix cache keeps what: EngineParams.prefix_cache. Data and the smallest accessors.
//
//   CachedPage  [num_pages]                                what a page of the cache holds; valid while page_owners has kPageShared
//   PrefixLink  [num_requests, max_pages_per_request]      of each request: hash chain of its full pages
//   u32         [num_prefix_sets, kPrefixWays]             lookup by hash: page + 1, 0 = empty
//   u32         [lru_capacity]                             ring: pages in the order in which they lost their last reference
//
// Written and read by the director's lanes only. host/memory_plan.py sizes it (prefix_cache_bytes_of).
// Test: pytest tests/host/test_prefix_cache.py
#pragma once
#include <request_table.cuh>

namespace blinkimp {

constexpr u32 kPrefixWays = 8;               // pages of one set: 32 bytes, one access
constexpr u32 kMinPrefixSets = 16;
constexpr u32 kLruPagesPerPage = 3;          // lru_capacity / num_pages: see page_allocator.cuh
constexpr u32 kPageShared = 0x40000000;      // in page_owners: the page is in the cache, the low half counts the page tables it is in
constexpr u32 kNoPage = 0xffffffff;
constexpr u64 kNotInLru = 0xffffffff'ffffffff;
constexpr u64 kRootIdentity = 1;             // parent of a first page. 0 = not in the cache

struct CachedPage {
  u64 hash;        // of the whole prefix that ends with this page, and the salt
  u64 identity;    // a serial number, never used again: names this page and, through its parent, all tokens before it
  u64 parent;      // identity of the page before it
  u64 salt;
  u64 lru_pos;     // its position in the ring, or kNotInLru
  u32 slot;        // which word of the sets names it
  u32 reserved0;
  u64 reserved1[2];
  u32 tokens[kPageTokens];  // its own, for F1
};
ABI_SIZE(CachedPage, 320);

struct PrefixLink {  // of one full page of one request
  u64 hash;
  u64 identity;  // of the cached page with the same prefix: its own or a twin. 0 = none
};
ABI_SIZE(PrefixLink, 16);

BK_INLINE u32 num_prefix_sets(const EngineParams& params) {
  u32 num_sets = kMinPrefixSets;
  while (num_sets < params.num_pages) num_sets *= 2;
  return num_sets;
}

BK_INLINE u64 lru_capacity(const EngineParams& params) { return u64{kLruPagesPerPage} * params.num_pages; }

BK_INLINE CachedPage* cached_page(const EngineParams& params, u32 page) { return reinterpret_cast<CachedPage*>(params.prefix_cache) + page; }

// [max_pages_per_request]
BK_INLINE PrefixLink* prefix_links(const EngineParams& params, u32 request_idx) {
  return reinterpret_cast<PrefixLink*>(cached_page(params, params.num_pages)) + u64{request_idx} * params.max_pages_per_request;
}

BK_INLINE u32* prefix_sets(const EngineParams& params) { return reinterpret_cast<u32*>(prefix_links(params, params.num_requests)); }

BK_INLINE u32* lru_ring(const EngineParams& params) { return prefix_sets(params) + u64{num_prefix_sets(params)} * kPrefixWays; }

BK_INLINE u64 prefix_cache_bytes(const EngineParams& params) {
  return reinterpret_cast<u64>(lru_ring(params)) + lru_capacity(params) * sizeof(u32) - params.prefix_cache;
}

}  // namespace blinkimp
