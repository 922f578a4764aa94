// KV pages: a stack of free pages, for every page who holds it, and the pages that only the prefix cache keeps, oldest first.
//
// Called by admission.cuh, scheduler.cuh (take) and request_life.cuh, commit.cuh (give back); prefix_cache.cuh puts pages into the cache and finds
// them there. Exhaustion is a returned result: whoever takes pages looks at num_available_pages() first.
// Test: pytest tests/host/test_director_pages.py tests/host/test_prefix_cache.py
//
// Invariants (checked by director_check_integrity, cited by tests):
//   P1  num_free + pages in page tables + num_cached == num_pages.
//   P2  a page is on the free stack once, or in one page table once, or in the cache: then in as many tables as it counts, and with
//       none in the LRU ring once.
//   P3  page_owners[page] is 0 on the free stack, request_idx + 1 in that request's page table alone, kPageShared | tables in the cache.
//   P4  a page of the cache stands in the word of the sets that it names (CachedPage.slot), and in no other.
//
// The LRU ring: a page that loses its last reference is appended; one that is found again stays there as a stale entry, whose position the
// page does not name any more. keep_lru_room() closes the gaps, all lanes together, once stale entries outnumber the pages: so each call
// that follows may append every page once without looking.
#pragma once
#include <prefix_layout.cuh>

namespace blinkimp {

struct PageAllocator {  // part of DirectorState; writer: lane 0
  u32 num_free;         // free_pages[0, num_free) are free, the last one goes first
  u32 num_cached;       // pages of the cache that no request holds
  u64 lru_begin_pos;    // the ring's entries are [lru_begin_pos, lru_end_pos), index is position % lru_capacity
  u64 lru_end_pos;
  u64 next_identity;    // of the page that enters the cache next
  u32 prefix_set_mask;
  u32 prefix_enabled;
  u32 plan_fills_cache; // the plan made last fills pages of the cache: it must run
  u32 reserved0;
};

BK_INLINE u32 pages_for_tokens(u32 num_tokens) { return (num_tokens + kPageTokens - 1) / kPageTokens; }

BK_INLINE u32* free_page_stack(const EngineParams& params) { return reinterpret_cast<u32*>(params.free_pages); }
BK_INLINE u32* page_owners(const EngineParams& params) { return reinterpret_cast<u32*>(params.page_owners); }

// Pages that can be had without taking any from a request.
BK_INLINE u32 num_available_pages(const PageAllocator& pages) { return pages.num_free + pages.num_cached; }

BK_INLINE u32* lru_entry(const EngineParams& params, u64 pos) { return lru_ring(params) + pos % lru_capacity(params); }

// All lanes.
BK_INLINE void init_page_allocator(const EngineParams& params, const Lanes& lanes, PageAllocator& pages) {
  // Page 0 lies on top, so that a young engine's page numbers ascend.
  for (u32 i = lanes.id; i < params.num_pages; i += lanes.count) {
    free_page_stack(params)[i] = params.num_pages - 1 - i;
    page_owners(params)[i] = 0;
  }
  const bool has_cache = params.prefix_cache_enabled && params.prefix_cache != 0;
  const u32 num_words = has_cache ? num_prefix_sets(params) * kPrefixWays : 0;
  for (u32 i = lanes.id; i < num_words; i += lanes.count) prefix_sets(params)[i] = 0;
  if (lanes.is_first()) {
    pages.num_free = params.num_pages;
    pages.num_cached = 0;
    pages.lru_begin_pos = pages.lru_end_pos = 0;
    pages.next_identity = kRootIdentity + 1;
    pages.prefix_set_mask = has_cache ? num_prefix_sets(params) - 1 : 0;
    pages.prefix_enabled = has_cache ? 1 : 0;
    pages.plan_fills_cache = 0;
  }
}

// ---- The LRU ring ------------------------------------------------------------------------------------------------
// The page at `pos`, or kNoPage if it was found again since.
BK_INLINE u32 lru_page(const EngineParams& params, u64 pos) {
  const u32 page = *lru_entry(params, pos);
  return cached_page(params, page)->lru_pos == pos ? page : kNoPage;
}

BK_INLINE void append_lru(const EngineParams& params, u64 pos, u32 page) {
  *lru_entry(params, pos) = page;
  cached_page(params, page)->lru_pos = pos;
}

// All lanes, at the start of each director call that gives pages back: room for every page once.
BK_INLINE void keep_lru_room(const EngineParams& params, const Lanes& lanes, PageAllocator& pages) {
  const u64 begin = pages.lru_begin_pos;
  const u64 end = pages.lru_end_pos;
  if (end - begin + params.num_pages <= lru_capacity(params)) return;
  u64 write_pos = begin;
  for (u64 read_pos = begin; read_pos < end; read_pos += lanes.count) {
    const u64 pos = read_pos + lanes.id;
    const u32 page = pos < end ? lru_page(params, pos) : kNoPage;
    const u32 rank = lanes.exclusive_sum(page != kNoPage ? 1 : 0);
    lanes.sync();  // hazard: entries move down over places that other lanes read above
    if (page != kNoPage) append_lru(params, write_pos + rank, page);
    write_pos += lanes.sum(page != kNoPage ? 1 : 0);
  }
  lanes.sync();  // hazard: all lanes read the positions above
  if (lanes.is_first()) pages.lru_end_pos = write_pos;
  lanes.sync();  // hazard: the caller appends at the new end
}

// One lane: the page leaves the cache, for the free stack.
BK_INLINE void forget_page(const EngineParams& params, u32 page, u32 stack_idx) {
  CachedPage* cached = cached_page(params, page);
  prefix_sets(params)[cached->slot] = 0;
  cached->lru_pos = kNotInLru;
  page_owners(params)[page] = 0;
  free_page_stack(params)[stack_idx] = page;
}

// All lanes. The num_wanted oldest pages of the cache become free; needs num_wanted <= num_cached.
BK_INLINE void evict_pages(const EngineParams& params, const Lanes& lanes, PageAllocator& pages, u32 num_wanted) {
  if (num_wanted == 0) return;
  const u64 end = pages.lru_end_pos;
  const u32 num_free = pages.num_free;
  u64 begin = pages.lru_begin_pos;
  u32 num_evicted = 0;
  while (num_evicted < num_wanted && begin < end) {
    const u64 pos = begin + lanes.id;
    const u32 page = pos < end ? lru_page(params, pos) : kNoPage;
    const u32 rank = num_evicted + lanes.exclusive_sum(page != kNoPage ? 1 : 0);
    const bool goes = page != kNoPage && rank < num_wanted;
    lanes.sync();  // hazard: a page that was found again stands in the ring twice; lru_page() of its old place reads what goes below
    if (goes) forget_page(params, page, num_free + rank);
    lanes.sync();  // hazard: the same, of an old place that the next turn looks at
    num_evicted += lanes.sum(goes ? 1 : 0);
    const u32 num_from_first_kept = lanes.max(page != kNoPage && !goes ? lanes.count - lanes.id : 0);
    const u64 num_left = end - begin;
    const u32 num_seen = lanes.count - num_from_first_kept;
    begin += num_seen < num_left ? num_seen : num_left;
  }
  lanes.sync();  // hazard: all lanes read the words above; the free stack is read by every lane below
  if (lanes.is_first()) {
    pages.lru_begin_pos = begin;
    pages.num_free = num_free + num_evicted;
    pages.num_cached -= num_evicted;
  }
  lanes.sync();  // hazard: the caller takes pages from the stack
}

// Lane 0. The oldest page of the cache becomes free. False: there is none.
BK_INLINE bool try_evict_page(const EngineParams& params, PageAllocator& pages) {
  while (pages.num_cached > 0 && pages.lru_begin_pos < pages.lru_end_pos) {
    const u32 page = lru_page(params, pages.lru_begin_pos++);
    if (page == kNoPage) continue;
    forget_page(params, page, pages.num_free++);
    pages.num_cached -= 1;
    return true;
  }
  return false;
}

// ---- Take and give back ------------------------------------------------------------------------------------------
// The copy is shared out over `lanes` and does not sync: the caller passes the stack's height as all lanes read it, syncs, and lets
// lane 0 store the new height. `Lanes{0, 1}` does the whole of it in one lane.

// Pages [first, first + num_taken) of the request's table come from the stack's top; needs num_taken <= num_free.
BK_INLINE void move_pages_to_request(const EngineParams& params, const Lanes& lanes, u32 num_free, u32 request_idx, u32 first,
                                     u32 num_taken) {
  for (u32 i = lanes.id; i < num_taken; i += lanes.count) {
    const u32 page = free_page_stack(params)[num_free - 1 - i];
    request_pages(params, request_idx)[first + i] = page;
    page_owners(params)[page] = request_idx + 1;
  }
}

// One lane: a request lets go of `page`. True: it is free, and for the caller to put on the stack. Else *is_unreferenced says whether
// nobody holds it any more: then it is for the caller to put into the LRU ring.
BK_INLINE bool drop_reference(const EngineParams& params, u32 page, bool* is_unreferenced) {
  u32* word = &page_owners(params)[page];
  const bool is_private = !(*word & kPageShared);
  *word = is_private ? 0 : *word - 1;
  *is_unreferenced = !is_private && *word == kPageShared;
  return is_private;
}

// All lanes. All pages of a request go to the free stack, or to the cache that knows them.
BK_INLINE void release_pages(const EngineParams& params, const Lanes& lanes, PageAllocator& pages, u32 request_idx) {
  const u32 num_given = request_at(params, request_idx)->num_pages;
  const u64 lru_end_pos = pages.lru_end_pos;
  const u32 num_free_before = pages.num_free;
  u32 num_freed = 0;
  u32 num_cached = 0;
  for (u32 begin = 0; begin < num_given; begin += lanes.count) {
    // The last page goes first: on the stack a page order survives a release and the next take, and in the ring a prefix is older than
    // what continues it, so that a page is evicted after all that can only be found through it.
    const u32 i = begin + lanes.id;
    const u32 page = i < num_given ? request_pages(params, request_idx)[num_given - 1 - i] : kNoPage;
    bool is_cached = false;
    const bool is_free = page != kNoPage && drop_reference(params, page, &is_cached);
    const u32 free_rank = num_freed + lanes.exclusive_sum(is_free ? 1 : 0);
    const u32 cached_rank = num_cached + lanes.exclusive_sum(is_cached ? 1 : 0);
    if (is_free) free_page_stack(params)[num_free_before + free_rank] = page;
    if (is_cached) append_lru(params, lru_end_pos + cached_rank, page);
    num_freed += lanes.sum(is_free ? 1 : 0);
    num_cached += lanes.sum(is_cached ? 1 : 0);
  }
  lanes.sync();  // hazard: all lanes read the words that lane 0 changes
  if (lanes.is_first()) {
    pages.num_free = num_free_before + num_freed;
    pages.lru_end_pos = lru_end_pos + num_cached;
    pages.num_cached += num_cached;
    request_at(params, request_idx)->num_pages = 0;
  }
  lanes.sync();  // hazard: the next one's pages go on top
}

// Lane 0, where the other lanes are not at hand. The same.
BK_INLINE void release_pages(const EngineParams& params, PageAllocator& pages, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  for (u32 i = request->num_pages; i-- > 0;) {
    const u32 page = request_pages(params, request_idx)[i];
    bool is_cached = false;
    if (drop_reference(params, page, &is_cached)) free_page_stack(params)[pages.num_free++] = page;
    if (is_cached) {
      append_lru(params, pages.lru_end_pos++, page);
      pages.num_cached += 1;
    }
  }
  request->num_pages = 0;
}

// Lane 0. False, and nothing taken, when no page is to be had.
BK_INLINE bool try_take_page(const EngineParams& params, PageAllocator& pages, u32 request_idx) {
  if (pages.num_free == 0 && !try_evict_page(params, pages)) return false;
  Request* request = request_at(params, request_idx);
  move_pages_to_request(params, Lanes{0, 1}, pages.num_free, request_idx, request->num_pages, 1);
  request->num_pages += 1;
  pages.num_free -= 1;
  return true;
}

}  // namespace blinkimp
