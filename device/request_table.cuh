// The request table: num_requests entries of 512 bytes in device memory, a free list, and the lookup by request id.
//
// Called by the director only (intake.cuh, request_life.cuh); workers read an entry's SamplingParams at byte 0.
// Test: pytest tests/host/test_director_requests.py
//
// Invariants (checked by director_check_integrity, cited by tests):
//   R1  every entry is in exactly one state; free entries are on the free list, live ones are found by find_request().
//   R2  num_free + waiting + running + finishing == num_requests.
//   R3  two live entries never have the same (queue pair, request id).
//   R4  num_computed < num_tokens <= num_prompt_tokens + max_tokens <= max_context while it waits or runs.
//   R5  only running entries hold pages: num_pages * kPageTokens >= num_computed, and 0 pages in every other state.
#pragma once
#include <lanes.cuh>

namespace blinkimp {

constexpr u32 kNumRequestBuckets = 2048;  // of the lookup; chains hold num_requests / 2048 entries on average

enum RequestState : u32 {
  kRequestFree = 0,
  kRequestWaiting = 1,    // in its queue pair's waiting queue, no pages
  kRequestRunning = 2,    // in the running list, holds pages
  kRequestFinishing = 3,  // finished, no pages; its FINISH waits for completion credit
};

enum RequestFlags : u32 {
  kFlagIgnoreEos = 1,
  kFlagStopAsked = 2,     // finish it at the next commit, for finish_reason
  kFlagDropped = 4,       // its ingress is gone: free it at the next commit, publish nothing
  kFlagFinished = 8,      // commit staged its FINISH; what is left is to free it
  kFlagStalled = 16,      // left out of this step for lack of completion credit
  kFlagForgotten = 32,    // finished and out of the lookup, but a row of a step that was planned before: freed after that one
};

struct Request {
  SamplingParams sampling;       // byte 0: the sampling op reads it
  u32 stop_ids[kMaxStopIds];     // the first num_stop_ids are valid
  u64 request_id;                // from here on: one 128-byte line with all that a step needs
  u32 state;                     // RequestState
  u32 flags;                     // RequestFlags
  u32 queue_pair_idx;
  u32 num_stop_ids;
  u32 num_prompt_tokens;
  u32 max_tokens;                // output tokens at most
  u32 num_tokens;                // prompt + output so far; once the next step is planned, with what the step that runs will sample
  u32 num_computed;              // KV entries in its pages
  u32 num_pages;
  u32 last_token;                // tokens[num_tokens - 1], the input of its next decode row; kTokenPending | sample_row: not sampled yet
  u32 finish_reason;             // FinishReason, valid with kFlagStopAsked, kFlagFinished or kRequestFinishing
  u32 step_rows;                 // rows in the step that is being planned or runs
  u32 num_stalled_plans;         // plans in a row that left it out for lack of credit
  u32 reserved1[17];
  u32 next_idx;                  // free list, waiting queue or finishing queue; kNoRequest ends it
  u32 prev_idx;                  // waiting queue
  u32 bucket_next_idx;           // chain of the lookup
  u32 num_preemptions;
  u64 accepted_ns;
  u64 timeout_ns;                // of the submission
  u64 cache_salt;
  i32 priority;
  u32 num_prior_outputs;
  u32 constraint;                // slot + 1, or 0
  u32 constraint_state;          // before its next output. Intake writes the first, then the sampling op
  u32 body_flags;                // RequestBodyFlags
  u32 num_hashed_pages;          // full pages whose hash stands in prefix_links (prefix_cache.cuh)
  u32 num_cached_tokens;         // prompt tokens that the prefix cache had when it was first admitted
  u32 running_level;             // effective priority level at its admission: lower is preempted later
  u32 count_slot;                // slot of token_counts + 1, while it runs with penalties (count_slots.cuh); else 0, or what it had
  u32 num_linked_pages;          // full pages that were found or registered since its admission
  u64 serial;                    // differs for each accepted request
  u64 reserved3[21];
};
ABI_SIZE(Request, 512);
ABI_AT(Request, sampling, 0);
ABI_AT(Request, request_id, 128);
ABI_AT(Request, next_idx, 256);
static_assert(sizeof(Request) == kRequestBytes, "program_abi.h sizes the table");

struct RequestTable {  // part of DirectorState; writer: lane 0
  u32 free_first_idx;
  u32 num_free;
  u64 hash_key;                            // engine_id: an ingress cannot choose ids that all meet in one chain
  u32 bucket_first_idx[kNumRequestBuckets];  // kNoRequest = empty
};

BK_INLINE Request* request_at(const EngineParams& params, u32 request_idx) {
  return reinterpret_cast<Request*>(params.requests) + request_idx;
}

// u32 [max_context], director writes, workers read through the plan only
BK_INLINE u32* request_tokens(const EngineParams& params, u32 request_idx) {
  return reinterpret_cast<u32*>(params.tokens) + u64{request_idx} * params.max_context;
}

// u32 [max_pages_per_request] page numbers, director writes, workers read
BK_INLINE u32* request_pages(const EngineParams& params, u32 request_idx) {
  return reinterpret_cast<u32*>(params.page_tables) + u64{request_idx} * params.max_pages_per_request;
}

BK_INLINE bool is_decode(const Request& request) { return request.num_tokens - request.num_computed == 1; }

BK_INLINE u32 request_bucket(const RequestTable& table, u32 queue_pair_idx, u64 request_id) {
  u64 mixed = (request_id ^ table.hash_key) + (u64{queue_pair_idx} << 32);
  mixed = (mixed ^ (mixed >> 33)) * 0xff51afd7ed558ccdull;
  mixed = (mixed ^ (mixed >> 29)) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<u32>(mixed >> 40) % kNumRequestBuckets;
}

// All lanes. Zeroed memory -> every entry free, lookup empty.
BK_INLINE void init_request_table(const EngineParams& params, const Lanes& lanes, RequestTable& table, u64 hash_key) {
  for (u32 bucket = lanes.id; bucket < kNumRequestBuckets; bucket += lanes.count) table.bucket_first_idx[bucket] = kNoRequest;
  for (u32 request_idx = lanes.id; request_idx < params.num_requests; request_idx += lanes.count) {
    Request* request = request_at(params, request_idx);
    request->state = kRequestFree;
    request->next_idx = request_idx + 1 < params.num_requests ? request_idx + 1 : kNoRequest;
  }
  if (lanes.is_first()) {
    table.free_first_idx = params.num_requests > 0 ? 0 : kNoRequest;
    table.num_free = params.num_requests;
    table.hash_key = hash_key;
  }
}

// Lane 0, as are all below. kNoRequest: no such live request.
BK_INLINE u32 find_request(const EngineParams& params, const RequestTable& table, u32 queue_pair_idx, u64 request_id) {
  u32 request_idx = table.bucket_first_idx[request_bucket(table, queue_pair_idx, request_id)];
  while (request_idx != kNoRequest) {
    const Request* request = request_at(params, request_idx);
    if (request->request_id == request_id && request->queue_pair_idx == queue_pair_idx) return request_idx;
    request_idx = request->bucket_next_idx;
  }
  return kNoRequest;
}

// Takes the entry that free_first_idx names: intake.cuh copies a body into it before it knows whether the request is good.
BK_INLINE void claim_free_request(const EngineParams& params, RequestTable& table, u32 queue_pair_idx, u64 request_id) {
  const u32 request_idx = table.free_first_idx;
  Request* request = request_at(params, request_idx);
  table.free_first_idx = request->next_idx;
  table.num_free -= 1;
  u32* bucket = &table.bucket_first_idx[request_bucket(table, queue_pair_idx, request_id)];
  request->bucket_next_idx = *bucket;
  *bucket = request_idx;
}

// From now on find_request() does not find it: the ingress of a new epoch may use the id again.
BK_INLINE void forget_request(const EngineParams& params, RequestTable& table, u32 request_idx) {
  const Request* request = request_at(params, request_idx);
  u32* link = &table.bucket_first_idx[request_bucket(table, request->queue_pair_idx, request->request_id)];
  while (*link != request_idx && *link != kNoRequest) link = &request_at(params, *link)->bucket_next_idx;
  if (*link == request_idx) *link = request->bucket_next_idx;
}

// The entry must be forgotten already and hold no pages (R5).
BK_INLINE void free_request(const EngineParams& params, RequestTable& table, u32 request_idx) {
  Request* request = request_at(params, request_idx);
  request->state = kRequestFree;
  request->flags = 0;
  request->step_rows = 0;
  request->next_idx = table.free_first_idx;
  table.free_first_idx = request_idx;
  table.num_free += 1;
}

}  // namespace blinkimp
