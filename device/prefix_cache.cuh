// Prefix cache: a new request takes the KV pages of the tokens that it shares with an earlier one, instead of computing them again.
//
// Called by admission.cuh and scheduler.cuh: look-up at admission, registration of full pages as soon as the rows that fill them are planned. PREFIX_CACHE.md
// says why that is sound. Eviction and references are page_allocator.cuh's.
// Test: pytest tests/host/test_prefix_cache.py tests/host/test_director_stateful.py
//
// Invariants (asserted by tests; F3 and P1 to P4 by director_check_integrity):
//   F1  a request is given a page only if the page's tokens, its salt and the identity of the page before it are equal: hashes only say where
//       to look, so no collision ever gives wrong KV.
//   F2  a page is found only by steps that run after, or are, the one that fills it: within a step K and V of all rows stand before any row
//       attends, and a sequence whose pages its own step fills says so (PlanSeq.prefix_is_fresh). A plan that fills a page of the cache is never
//       given up (PageAllocator.plan_fills_cache).
//   F3  a page that was found is held (page_owners counts it) until the request that found it stops running.
//   F4  at least the last token of a request is computed by itself: its logits are not in the cache.
#pragma once
#include <page_allocator.cuh>

namespace blinkimp {

// So many tokens a lane asks for before it waits for the first. All 64 of a page, in every copy of this code, would double the kernel's size.
#if BK_GPU
#define BK_LOADS_IN_FLIGHT _Pragma("unroll 8")
#else
#define BK_LOADS_IN_FLIGHT
#endif

struct PrefixMatch {   // uniform over the lanes
  u32 num_pages;
  u32 num_unreferenced;  // of them, held by nobody: taking them makes fewer pages available
};

BK_INLINE bool uses_prefix_cache(const PageAllocator& pages, const Request& request) {
  return pages.prefix_enabled && !(request.body_flags & kRequestNoPrefixCache);
}

// ---- Hash chain --------------------------------------------------------------------------------------------------
BK_INLINE u64 mix_hash(u64 value) {
  value = (value ^ (value >> 33)) * 0xff51afd7ed558ccdull;
  value = (value ^ (value >> 29)) * 0xc4ceb9fe1a85ec53ull;
  return value ^ (value >> 32);
}

// One lane. The loads do not wait for each other. The key is the engine's random number: nobody outside can aim at one set.
BK_INLINE u64 hash_page_tokens(const u32* tokens, u64 key) {
  u64 sum = 0;
  BK_LOADS_IN_FLIGHT
  for (u32 i = 0; i < kPageTokens; i += 2) {
    const u32 even = tokens[i] + static_cast<u32>(key) + i * 0x9e3779b9u;
    const u32 odd = tokens[i + 1] + static_cast<u32>(key >> 32) + i * 0x85ebca6bu;
    sum += u64{even} * odd;
  }
  return sum;
}

BK_INLINE u64 extend_hash(u64 prefix_hash, u64 page_hash) { return mix_hash(prefix_hash * 0x9e3779b97f4a7c15ull + page_hash); }

// All lanes: the chain of all full pages of a request that waits. Pages hashed in an earlier try or life are not hashed again.
BK_INLINE void hash_request(const EngineParams& params, const Lanes& lanes, u64 key, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  const u32 first = request->num_hashed_pages;
  const u32 end = request->num_tokens / kPageTokens;
  if (first >= end) return;
  PrefixLink* links = prefix_links(params, request_idx);
  u64 chain = first == 0 ? mix_hash(key ^ request->cache_salt) : links[first - 1].hash;
  for (u32 begin = first; begin < end; begin += lanes.count) {
    const u32 k = begin + lanes.id;
    const u64 page_hash = k < end ? hash_page_tokens(request_tokens(params, request_idx) + k * kPageTokens, key) : 0;
    const u32 num_hashed = end - begin < lanes.count ? end - begin : lanes.count;
    u64 own_chain = 0;
    for (u32 lane = 0; lane < num_hashed; ++lane) {
      const u32 low = lanes.broadcast(static_cast<u32>(page_hash), lane);
      const u32 high = lanes.broadcast(static_cast<u32>(page_hash >> 32), lane);
      chain = extend_hash(chain, u64{high} << 32 | low);
      if (lane == lanes.id) own_chain = chain;
    }
    if (k < end) links[k] = PrefixLink{own_chain, 0};
  }
  lanes.sync();  // hazard: all lanes read num_hashed_pages above; the links are read by other lanes
  if (lanes.is_first()) request->num_hashed_pages = end;
  lanes.sync();  // hazard: the caller asks for it
}

// ---- Look up -----------------------------------------------------------------------------------------------------
struct SetProbe {
  u32 page;       // with the same hash, the one that entered the cache last; or kNoPage
  u32 free_mask;  // empty words
};

// One lane.
BK_INLINE SetProbe probe_set(const EngineParams& params, const PageAllocator& pages, u64 hash) {
  const u32* words = prefix_sets(params) + (static_cast<u32>(hash) & pages.prefix_set_mask) * kPrefixWays;
  u32 named[kPrefixWays];
  for (u32 way = 0; way < kPrefixWays; ++way) named[way] = words[way];
  SetProbe probe{kNoPage, 0};
  u64 latest = 0;
  for (u32 way = 0; way < kPrefixWays; ++way) {
    if (named[way] == 0) {
      probe.free_mask |= 1u << way;
      continue;
    }
    const CachedPage* cached = cached_page(params, named[way] - 1);
    if (cached->hash == hash && cached->identity > latest) {
      latest = cached->identity;
      probe.page = named[way] - 1;
    }
  }
  return probe;
}

// One lane. F1, but for the parent.
BK_INLINE bool holds_tokens(const CachedPage& cached, const u32* tokens, u64 salt) {
  u32 difference = 0;
  BK_LOADS_IN_FLIGHT
  for (u32 i = 0; i < kPageTokens; ++i) difference |= cached.tokens[i] ^ tokens[i];
  return difference == 0 && cached.salt == salt;
}

BK_INLINE u64 parent_identity(const PrefixLink* links, u32 page_idx) { return page_idx == 0 ? kRootIdentity : links[page_idx - 1].identity; }

// All lanes. The cached pages that a waiting request can start from stand in its page table afterwards, not yet held; its chain is hashed.
BK_INLINE PrefixMatch find_prefix(const EngineParams& params, const Lanes& lanes, const PageAllocator& pages, u32 request_idx) {
  const Request* request = request_at(params, request_idx);
  PrefixLink* links = prefix_links(params, request_idx);
  const u32 limit = (request->num_tokens - 1) / kPageTokens;  // F4
  PrefixMatch match{0, 0};
  for (u32 begin = 0; begin < limit; begin += lanes.count) {
    const u32 k = begin + lanes.id;
    u32 page = kNoPage;
    bool fits = false;
    if (k < limit) {
      page = probe_set(params, pages, links[k].hash).page;
      const u32* tokens = request_tokens(params, request_idx) + k * kPageTokens;
      fits = page != kNoPage && holds_tokens(*cached_page(params, page), tokens, request->cache_salt);
      links[k].identity = fits ? cached_page(params, page)->identity : 0;
    }
    lanes.sync();  // hazard: each lane reads the identity that the lane below found
    fits = fits && cached_page(params, page)->parent == parent_identity(links, k);
    const u32 num_from_first_miss = lanes.max(fits ? 0 : lanes.count - lanes.id);
    const u32 num_found = lanes.count - num_from_first_miss;
    const bool is_found = lanes.id < num_found;
    if (is_found) request_pages(params, request_idx)[k] = page;
    match.num_pages += num_found;
    match.num_unreferenced += lanes.sum(is_found && page_owners(params)[page] == kPageShared ? 1 : 0);
    lanes.sync();  // hazard: a caller that gives up asks again, and writes the identities that are read above
    if (num_found < lanes.count) break;
  }
  return match;
}

// All lanes: the pages that find_prefix() found are held by the request (F3).
BK_INLINE void take_prefix(const EngineParams& params, const Lanes& lanes, PageAllocator& pages, u32 request_idx, const PrefixMatch& match) {
  for (u32 k = lanes.id; k < match.num_pages; k += lanes.count) {
    const u32 page = request_pages(params, request_idx)[k];
    u32* word = &page_owners(params)[page];
    if (*word == kPageShared) cached_page(params, page)->lru_pos = kNotInLru;
    *word += 1;
  }
  lanes.sync();  // hazard: pages that are evicted next must be seen to be held
  if (lanes.is_first()) {
    Request* request = request_at(params, request_idx);
    request->num_pages = match.num_pages;
    request->num_linked_pages = match.num_pages;
    request->num_computed = match.num_pages * kPageTokens;
    pages.num_cached -= match.num_unreferenced;
  }
  lanes.sync();  // hazard: the other lanes count available pages
}

// ---- Register ----------------------------------------------------------------------------------------------------
// All lanes, each with a page of its own: page_idx of request_idx, whose hash stands in its links and whose rows are all planned; or with
// kNoRequest. `is_chunk`: the pages of one request, in order; else each of another request, no two of them with one hash. A page whose
// twin is in the cache already stays out of it, and what follows it continues the twin. A page that finds its set full stays out too, and
// so does all that follows it.
BK_INLINE void register_pages(const EngineParams& params, const Lanes& lanes, PageAllocator& pages, u32 request_idx, u32 page_idx,
                              bool is_chunk) {
  const bool has_page = request_idx != kNoRequest;
  PrefixLink* links = has_page ? prefix_links(params, request_idx) : nullptr;
  const u32* tokens = has_page ? request_tokens(params, request_idx) + page_idx * kPageTokens : nullptr;
  const u64 salt = has_page ? request_at(params, request_idx)->cache_salt : 0;
  const u64 hash = has_page ? links[page_idx].hash : 0;
  const u64 first_identity = pages.next_identity;
  const u64 own_identity = first_identity + lanes.id;
  SetProbe probe{kNoPage, 0};
  u64 twin_identity = 0;
  if (has_page) {
    probe = probe_set(params, pages, hash);
    if (probe.page != kNoPage && holds_tokens(*cached_page(params, probe.page), tokens, salt)) {
      twin_identity = cached_page(params, probe.page)->identity;
    }
    links[page_idx].identity = twin_identity;
  }
  lanes.sync();  // hazard: each lane reads the identity of the lane below
  u64 parent = has_page ? parent_identity(links, page_idx) : 0;
  bool is_twin = twin_identity != 0 && parent != 0 && cached_page(params, probe.page)->parent == parent;
  bool is_broken = has_page && parent == 0;
  if (is_chunk) {
    // Twins come first: no page of the cache can continue one that is new.
    const u32 first_new = lanes.count - lanes.max(has_page && !is_twin ? lanes.count - lanes.id : 0);
    is_broken = lanes.any(lanes.id == first_new && is_broken);
    if (lanes.id > first_new) {
      is_twin = false;
      parent = own_identity - 1;
    }
  }
  bool enters = has_page && !is_twin && !is_broken;
  // Lanes that meet in one set take its empty words in turn.
  const u32 set = static_cast<u32>(hash) & pages.prefix_set_mask;
  u32 num_before = 0;
  for (u32 lane = 0; lane < lanes.count; ++lane) {
    const u32 other_set = lanes.broadcast(enters ? set : 0xffffffffu, lane);
    if (lane < lanes.id && other_set == set) num_before += 1;
  }
  u32 free_mask = probe.free_mask;
  for (; num_before > 0; --num_before) free_mask &= free_mask - 1;
  const u32 num_from_first_full = lanes.max(enters && free_mask == 0 ? lanes.count - lanes.id : 0);
  if (is_chunk ? lanes.id >= lanes.count - num_from_first_full : free_mask == 0) enters = false;
  lanes.sync();  // hazard: identities and sets change below that other lanes have read above
  if (enters) {
    u32 way = 0;
    while (!(free_mask >> way & 1)) way += 1;
    const u32 page = request_pages(params, request_idx)[page_idx];
    CachedPage* cached = cached_page(params, page);
    cached->hash = hash;
    cached->identity = own_identity;
    cached->parent = parent;
    cached->salt = salt;
    cached->lru_pos = kNotInLru;
    cached->slot = set * kPrefixWays + way;
    BK_LOADS_IN_FLIGHT
    for (u32 i = 0; i < kPageTokens; ++i) cached->tokens[i] = tokens[i];
    prefix_sets(params)[cached->slot] = page + 1;
    page_owners(params)[page] = kPageShared | 1;
  }
  if (has_page && !is_twin) links[page_idx].identity = enters ? own_identity : 0;
  if (lanes.is_first()) pages.next_identity = first_identity + lanes.count;
  lanes.sync();  // hazard: the next ones look for what was registered here
}

// All lanes: pages [first, end) of a request, which a chunk of this plan fills (F2).
BK_INLINE void register_chunk(const EngineParams& params, const Lanes& lanes, PageAllocator& pages, u32 request_idx, u32 first, u32 end) {
  for (u32 begin = first; begin < end; begin += lanes.count) {
    const u32 page_idx = begin + lanes.id;
    register_pages(params, lanes, pages, page_idx < end ? request_idx : kNoRequest, page_idx, true);
  }
  if (lanes.is_first() && first < end) {
    request_at(params, request_idx)->num_linked_pages = end;
    pages.plan_fills_cache = 1;
  }
}

// All lanes, each with a request of its own that decodes, or kNoRequest: its last full page, which the step before filled.
BK_INLINE void register_decoded(const EngineParams& params, const Lanes& lanes, PageAllocator& pages, u64 key, u32 request_idx) {
  u32 page_idx = 0;
  u64 hash = 0;
  if (request_idx != kNoRequest) {
    Request* request = request_at(params, request_idx);
    page_idx = request->num_linked_pages;
    PrefixLink* links = prefix_links(params, request_idx);
    const u64 prefix_hash = page_idx == 0 ? mix_hash(key ^ request->cache_salt) : links[page_idx - 1].hash;
    hash = extend_hash(prefix_hash, hash_page_tokens(request_tokens(params, request_idx) + page_idx * kPageTokens, key));
    links[page_idx].hash = hash;
    request->num_linked_pages = page_idx + 1;
    if (request->num_hashed_pages <= page_idx) request->num_hashed_pages = page_idx + 1;
  }
  // Requests that say the same at the same time: one after the other, so that the second finds the first's.
  bool is_left = request_idx != kNoRequest;
  while (lanes.any(is_left)) {
    bool is_next = is_left;
    const u32 own = is_left ? static_cast<u32>(hash) | 1 : 0;
    for (u32 lane = 0; lane < lanes.count; ++lane) {
      if (lanes.broadcast(own, lane) == own && lane < lanes.id) is_next = false;
    }
    register_pages(params, lanes, pages, is_next ? request_idx : kNoRequest, page_idx, false);
    is_left = is_left && !is_next;
  }
}

}  // namespace blinkimp
