// director_check_integrity(): the numbered invariants of the director, checked against the whole of its state.
//
// Called by director_plan when nothing runs (once per kIntegrityIntervalNs), and by every test after every call. Cost: a few reads
// per page and per request, shared out over the lanes. A failure records a fault whose words hold every term (fault.cuh).
// Test: pytest tests/host/test_director_integrity.py
#pragma once
#include <waiting.cuh>

namespace blinkimp {

// In page_owners, set and cleared within one check: seen on the free stack or in the LRU ring, and how many page tables name the page.
constexpr u32 kSpareMark = 0x80000000;
constexpr u32 kTableMark = 0x00010000;
constexpr u32 kTableMarks = 0x3fff0000;
constexpr u32 kFlagMark = 0x80000000;   // in Request.flags, likewise

// All lanes, with the same arguments. True if they agree, else the fault is recorded.
BK_INLINE bool expect_equal(const EngineParams& params, const Lanes& lanes, u32 site, u64 expected, u64 seen) {
  if (expected != seen && lanes.is_first()) record_fault(params, kFaultIntegrity, site, expected, seen);
  return expected == seen;
}

BK_INLINE u64 pack_counts(u32 first, u32 second, u32 third, u32 fourth) {
  return u64{first} | u64{second} << 16 | u64{third} << 32 | u64{fourth} << 48;
}

// One lane. A page table names `page`: P3, and the mark that P2 counts. Returns 1 if wrong.
BK_INLINE u32 mark_table_page(const EngineParams& params, u32 page, u32 request_idx) {
  if (page >= params.num_pages) return 1;
  u32* word = &page_owners(params)[page];
  const u32 owner = *word & ~(kSpareMark | kTableMarks);
  *word += kTableMark;
  return owner != request_idx + 1 && !(owner & kPageShared) ? 1 : 0;
}

// One lane. The free stack (owner 0) or the LRU ring (kPageShared) names `page`.
BK_INLINE u32 mark_spare_page(const EngineParams& params, u32 page, u32 owner) {
  if (page >= params.num_pages) return 1;
  u32* word = &page_owners(params)[page];
  const u32 wrong = (*word & ~(kSpareMark | kTableMarks)) != owner ? 1 : 0;
  *word |= kSpareMark;
  return wrong;
}

// All lanes, request by request: two lanes never count the same page at once. Returns how many references disagree with page_owners.
BK_INLINE u32 mark_page_tables(const EngineParams& params, const Lanes& lanes) {
  u32 num_wrong = 0;
  for (u32 begin = 0; begin < params.num_requests; begin += lanes.count) {
    const u32 own = begin + lanes.id;
    const u32 num_own = own < params.num_requests ? request_at(params, own)->num_pages : 0;
    u32 holder_mask = lanes.sum(num_own > 0 ? 1u << lanes.id : 0);
    for (u32 lane = 0; holder_mask != 0; ++lane, holder_mask >>= 1) {
      if (!(holder_mask & 1)) continue;
      const u32 num_pages = lanes.broadcast(num_own, lane);
      for (u32 i = lanes.id; i < num_pages && i < params.max_pages_per_request; i += lanes.count) {
        num_wrong += mark_table_page(params, request_pages(params, begin + lane)[i], begin + lane);
      }
      lanes.sync();  // hazard: the next request's pages are counted by other lanes
    }
  }
  return num_wrong;
}

// P1, P2, P3.
BK_INLINE bool check_pages(const EngineParams& params, const Lanes& lanes, const DirectorState& state) {
  const u32 num_free = state.pages.num_free;
  const u32 num_cached = state.pages.num_cached;
  u32 num_used = 0;
  for (u32 r = lanes.id; r < params.num_requests; r += lanes.count) num_used += request_at(params, r)->num_pages;
  u32 num_repeated = 0;  // references beyond the first
  for (u32 page = lanes.id; page < params.num_pages; page += lanes.count) {
    const u32 owner = page_owners(params)[page];
    if ((owner & kPageShared) && owner > kPageShared + 1) num_repeated += owner - kPageShared - 1;
  }
  num_used = lanes.sum(num_used) - lanes.sum(num_repeated);
  // Terms: free, used, cached. Before the walk, which a wrong num_free would lead out of the stack.
  if (num_free > params.num_pages || num_free + num_used + num_cached != params.num_pages) {
    if (lanes.is_first()) {
      const u64 terms = u64{num_free} | u64{num_used} << 24 | u64{num_cached} << 48;
      record_fault(params, kFaultIntegrity, kSitePageCount, params.num_pages, terms);
    }
    return false;
  }
  lanes.sync();  // hazard: marks change the words that other lanes still count above
  u32 num_wrong = 0;
  for (u32 i = lanes.id; i < num_free; i += lanes.count) num_wrong += mark_spare_page(params, free_page_stack(params)[i], 0);
  const u64 lru_begin_pos = state.pages.lru_begin_pos;
  const u64 lru_end_pos = state.pages.lru_end_pos;
  u32 num_in_lru = 0;
  for (u64 pos = lru_begin_pos + lanes.id; pos < lru_end_pos && lru_end_pos - lru_begin_pos <= lru_capacity(params); pos += lanes.count) {
    const u32 page = *lru_entry(params, pos) < params.num_pages ? lru_page(params, pos) : kNoPage;
    if (page == kNoPage) continue;
    num_in_lru += 1;
    num_wrong += mark_spare_page(params, page, kPageShared);
  }
  lanes.sync();  // hazard: the walk below looks at words that are marked above
  num_wrong += mark_page_tables(params, lanes);
  lanes.sync();  // hazard: marks of other lanes are counted below
  u32 num_sound = 0;
  u32 num_unnamed = 0;
  for (u32 page = lanes.id; page < params.num_pages; page += lanes.count) {
    u32* word = &page_owners(params)[page];
    const u32 owner = *word & ~(kSpareMark | kTableMarks);
    const u32 num_tables = (*word & kTableMarks) / kTableMark;
    const bool is_spare = (*word & kSpareMark) != 0;
    *word = owner;
    const bool is_shared = (owner & kPageShared) != 0;
    const u32 num_expected = is_shared ? owner - kPageShared : owner != 0 ? 1 : 0;
    if (num_tables == num_expected && is_spare == (num_expected == 0)) num_sound += 1;  // P2
    if (is_shared && prefix_sets(params)[cached_page(params, page)->slot] != page + 1) num_unnamed += 1;  // P4
  }
  return expect_equal(params, lanes, kSitePageOwner, 0, lanes.sum(num_wrong)) &&
         expect_equal(params, lanes, kSitePageTwice, params.num_pages, lanes.sum(num_sound)) &&
         expect_equal(params, lanes, kSitePrefixCache, num_cached, lanes.sum(num_in_lru)) &&
         expect_equal(params, lanes, kSitePrefixCache, 0, lanes.sum(num_unnamed));
}

// R1 to R5, and the running list.
BK_INLINE bool check_requests(const EngineParams& params, const Lanes& lanes, const DirectorState& state) {
  const u32 num_running = state.status.num_running;
  u32 num_strangers = num_running > params.max_batch ? 1 : 0;  // S1
  for (u32 i = lanes.id; i < num_running && num_running <= params.max_batch; i += lanes.count) {
    const u32 request_idx = state.running[i];
    if (request_idx >= params.num_requests || request_at(params, request_idx)->state != kRequestRunning) num_strangers += 1;
    else request_at(params, request_idx)->flags |= kFlagMark;
  }
  if (!expect_equal(params, lanes, kSiteRunningList, 0, lanes.sum(num_strangers))) return false;
  lanes.sync();  // hazard: marks of other lanes are counted below
  u32 num_in_state[4] = {0, 0, 0, 0};
  u32 num_marked = 0;
  u32 num_lost = 0;
  u32 num_short = 0;
  u32 num_bad_links = 0;
  for (u32 r = lanes.id; r < params.num_requests; r += lanes.count) {
    Request* request = request_at(params, r);
    num_marked += request->flags >> 31;
    request->flags &= ~kFlagMark;
    for (u32 s = 0; s < 4; ++s) num_in_state[s] += request->state == s ? 1 : 0;
    const bool holds_tokens = request->state == kRequestWaiting || request->state == kRequestRunning;
    const u64 limit = u64{request->num_prompt_tokens} + request->max_tokens;
    if (holds_tokens && (request->num_computed >= request->num_tokens || request->num_tokens > limit || limit > params.max_context)) {
      num_short += 1;  // R4
    }
    if (request->state == kRequestRunning ? request->num_pages * kPageTokens < request->num_computed : request->num_pages != 0) {
      num_short += 1;  // R5
    }
    if (request->state == kRequestFree) {
      const bool linked = request->next_idx == kNoRequest ||
                          (request->next_idx < params.num_requests && request_at(params, request->next_idx)->state == kRequestFree);
      if (!linked) num_bad_links += 1;
    } else if (!(request->flags & (kFlagDropped | kFlagForgotten))) {  // R1, R3: with a twin, one of the two would not find itself
      if (find_request(params, state.table, request->queue_pair_idx, request->request_id) != r) num_lost += 1;
    }
  }
  for (u32 s = 0; s < 4; ++s) num_in_state[s] = lanes.sum(num_in_state[s]);
  num_marked = lanes.sum(num_marked);
  num_lost = lanes.sum(num_lost);
  num_short = lanes.sum(num_short);
  num_bad_links = lanes.sum(num_bad_links);
  lanes.sync();  // hazard: flags that lost their mark are read by the caller's next step in other lanes
  const u64 counted = pack_counts(num_in_state[0], num_in_state[1], num_in_state[2], num_in_state[3]);
  const u64 kept = pack_counts(state.table.num_free, state.status.num_waiting, num_running, state.status.num_finishing);
  return expect_equal(params, lanes, kSiteRequestCount, kept, counted) &&
         expect_equal(params, lanes, kSiteRunningList, num_running, num_marked) &&
         expect_equal(params, lanes, kSiteRequestLookup, 0, num_lost) && expect_equal(params, lanes, kSitePageNeed, 0, num_short) &&
         expect_equal(params, lanes, kSiteRequestCount, 0, num_bad_links);
}

// Length of a queue of requests in `state_wanted`; one more than any queue can have if it is not whole.
BK_INLINE u32 walk_queue(const EngineParams& params, u32 first_idx, u32 last_idx, u32 queue_pair_idx, u32 state_wanted) {
  u32 num_seen = 0;
  u32 before = kNoRequest;
  for (u32 r = first_idx; r != kNoRequest; r = request_at(params, r)->next_idx) {
    if (r >= params.num_requests || num_seen > params.num_requests) return params.num_requests + 1;
    const Request* request = request_at(params, r);
    if (request->state != state_wanted || request->queue_pair_idx != queue_pair_idx) return params.num_requests + 1;
    if (state_wanted == kRequestWaiting && request->prev_idx != before) return params.num_requests + 1;
    before = r;
    num_seen += 1;
  }
  return num_seen == 0 || before == last_idx ? num_seen : params.num_requests + 1;
}

// W1: the waiting queues of a queue pair together, and each request in the queue of its level.
BK_INLINE u32 walk_waiting(const EngineParams& params, const DirectorState& state, u32 queue_pair_idx) {
  u32 num_seen = 0;
  for (u32 level = 0; level < kNumLevels; ++level) {
    if (!(state.queue_pairs[queue_pair_idx].level_mask >> level & 1)) continue;
    const WaitingQueue& queue = state.waiting[queue_pair_idx][level];
    const u32 num_of_level = walk_queue(params, queue.first_idx, queue.last_idx, queue_pair_idx, kRequestWaiting);
    if (num_of_level == 0 || num_of_level > params.num_requests || level_of(*request_at(params, queue.last_idx)) != level) {
      return params.num_requests + 1;
    }
    num_seen += num_of_level;
  }
  return num_seen;
}

// Queues and credit of every queue pair (one lane each), L1.
BK_INLINE bool check_queue_pairs(const EngineParams& params, const Lanes& lanes, const DirectorState& state) {
  u32 num_wrong = 0;
  u32 num_overdrawn = 0;
  u32 totals[4] = {0, 0, 0, 0};  // waiting, running, finishing, staged
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    const QueuePairState& queue_pair = state.queue_pairs[q];
    u32 num_running = 0;
    for (u32 i = 0; i < state.status.num_running; ++i) {
      num_running += request_at(params, state.running[i])->queue_pair_idx == q ? 1 : 0;
    }
    const u32 first_finishing = queue_pair.num_finishing > 0 ? queue_pair.finishing_first_idx : kNoRequest;  // stale when empty
    const u32 num_waiting = walk_waiting(params, state, q);
    const u32 num_finishing = walk_queue(params, first_finishing, queue_pair.finishing_last_idx, q, kRequestFinishing);
    if (num_waiting != queue_pair.num_waiting || num_running != queue_pair.num_running || num_finishing != queue_pair.num_finishing) {
      num_wrong += 1;
    }
    const u64 num_taken = queue_pair.completion_published_pos + queue_pair.num_staged + queue_pair.num_promised -
                          queue_pair.completion_consumer_pos;
    if (num_taken > queue_pair.num_completions) num_overdrawn += 1;  // C1
    totals[0] += queue_pair.num_waiting;
    totals[1] += queue_pair.num_running;
    totals[2] += queue_pair.num_finishing;
    totals[3] += queue_pair.num_staged;
  }
  u32 num_staged = 0;
  for (u32 i = lanes.id; i < state.num_staged; i += lanes.count) num_staged += state.staged[i].queue_pair_idx != kNoQueuePair ? 1 + staged_tops(state.staged[i]) : 0;
  num_staged = lanes.sum(num_staged);
  for (u32 k = 0; k < 4; ++k) totals[k] = lanes.sum(totals[k]);
  const StatusLines& status = state.status;
  const u64 counted = pack_counts(totals[0], totals[1], totals[2], totals[3]);
  const u64 kept = pack_counts(status.num_waiting, status.num_running, status.num_finishing, num_staged);
  const u64 num_finished = status.finished_eos + status.finished_stop_id + status.finished_length + status.finished_cancelled +
                           status.finished_draining + status.finished_timeout + status.finished_constraint;
  return expect_equal(params, lanes, kSiteQueueCount, 0, lanes.sum(num_wrong)) &&
         expect_equal(params, lanes, kSiteQueueCount, kept, counted) &&
         expect_equal(params, lanes, kSiteCredit, 0, lanes.sum(num_overdrawn)) &&
         expect_equal(params, lanes, kSiteRequestBalance, status.requests_accepted, num_finished + status.num_waiting + status.num_running);
}

// All lanes. May be called between any two director calls.
BK_NOINLINE bool director_check_integrity(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  const bool holds = check_pages(params, lanes, state) && check_requests(params, lanes, state) && check_queue_pairs(params, lanes, state);
  lanes.sync();  // hazard: lanes may still read what the caller changes next
  if (holds && lanes.is_first()) state.status.integrity_checks += 1;
  lanes.sync();  // hazard: the publish copies the counters in other lanes
  return holds;
}

}  // namespace blinkimp
