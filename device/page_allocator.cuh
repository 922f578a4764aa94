// KV pages: a stack of free pages, and for every page its owner.
//
// Called by scheduler.cuh (take) and request_life.cuh, director.cuh (give back). Exhaustion is a returned result: try_take_pages()
// is the only way to a page and looks at num_free first.
// Test: pytest tests/host/test_director_pages.py
//
// Invariants (checked by director_check_integrity, cited by tests):
//   P1  num_free + pages in page tables + cached == num_pages. (No prefix cache yet: cached is 0.)
//   P2  every page is on the free stack once or in one page table once, never both.
//   P3  page_owners[page] is 0 on the free stack, request_idx + 1 in that request's page table.
#pragma once
#include <request_table.cuh>

namespace blinkimp {

struct PageAllocator {  // part of DirectorState; writer: lane 0
  u32 num_free;         // free_pages[0, num_free) are free, the last one goes first
  u32 reserved0;
};

BK_INLINE u32 pages_for_tokens(u32 num_tokens) { return (num_tokens + kPageTokens - 1) / kPageTokens; }

BK_INLINE u32* free_page_stack(const EngineParams& params) { return reinterpret_cast<u32*>(params.free_pages); }
BK_INLINE u32* page_owners(const EngineParams& params) { return reinterpret_cast<u32*>(params.page_owners); }

// All lanes.
BK_INLINE void init_page_allocator(const EngineParams& params, const Lanes& lanes, PageAllocator& pages) {
  // Page 0 lies on top, so that a young engine's page numbers ascend.
  for (u32 i = lanes.id; i < params.num_pages; i += lanes.count) {
    free_page_stack(params)[i] = params.num_pages - 1 - i;
    page_owners(params)[i] = 0;
  }
  if (lanes.is_first()) pages.num_free = params.num_pages;
}

// The copies below are shared out over `lanes` and do not sync: the caller passes the stack's height as all lanes read it, syncs,
// and lets lane 0 store the new height. `Lanes{0, 1}` does the whole of it in one lane.

// Pages [first, first + num_taken) of the request's table come from the stack's top; needs num_taken <= num_free.
BK_INLINE void move_pages_to_request(const EngineParams& params, const Lanes& lanes, u32 num_free, u32 request_idx, u32 first,
                                     u32 num_taken) {
  for (u32 i = lanes.id; i < num_taken; i += lanes.count) {
    const u32 page = free_page_stack(params)[num_free - 1 - i];
    request_pages(params, request_idx)[first + i] = page;
    page_owners(params)[page] = request_idx + 1;
  }
}

BK_INLINE void move_pages_to_stack(const EngineParams& params, const Lanes& lanes, u32 num_free, u32 request_idx, u32 num_given) {
  for (u32 i = lanes.id; i < num_given; i += lanes.count) {
    // The request's last page goes down first, so that a page order survives a release and the next take.
    const u32 page = request_pages(params, request_idx)[num_given - 1 - i];
    free_page_stack(params)[num_free + i] = page;
    page_owners(params)[page] = 0;
  }
}

// Lane 0. False, and nothing taken, when fewer than num_taken pages are free.
BK_INLINE bool try_take_pages(const EngineParams& params, PageAllocator& pages, u32 request_idx, u32 num_taken) {
  if (pages.num_free < num_taken) return false;
  Request* request = request_at(params, request_idx);
  move_pages_to_request(params, Lanes{0, 1}, pages.num_free, request_idx, request->num_pages, num_taken);
  request->num_pages += num_taken;
  pages.num_free -= num_taken;
  return true;
}

// Lane 0. All pages of a request.
BK_INLINE void release_pages(const EngineParams& params, PageAllocator& pages, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  move_pages_to_stack(params, Lanes{0, 1}, pages.num_free, request_idx, request->num_pages);
  pages.num_free += request->num_pages;
  request->num_pages = 0;
}

}  // namespace blinkimp
