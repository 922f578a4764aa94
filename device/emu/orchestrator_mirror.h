// What the device knows of the director's tables when the host schedules, and what it must be told before the next step.
//
// The director writes its tables in host memory as it always does and says nothing of it: before a step is launched, what the step will read
// is compared with what was sent before. Called by orchestrator.h. Test: pytest tests/host/test_cpu_orchestrator.py
//
// Invariants (asserted by tests: tokens are the same as with the director on the device):
//   N1  when a step is launched, all that its workers read of plan, page tables, requests, tokens, biases and constraints is as in the
//       director's tables. They read an entry of a request for its sampling, of its pages those up to its last row, of its tokens only those
//       before its first sample since it was admitted (penalties.cuh), and a constraint for as long as it runs.
//   N2  what the workers themselves advance is never overwritten: constraint_state of a request that lives, counts, KV pages.
#pragma once
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <new>
#include <vector>

#include <constraint.cuh>
#include <logit_edits.cuh>
#include <request_table.cuh>
#include <step_update.cuh>

namespace blinkimp {

// Zeroed memory that the system hands out page by page as it is touched.
struct FreeMemory {
  void operator()(void* address) const { free(address); }
};
template <class T>
using LazyArray = std::unique_ptr<T[], FreeMemory>;

template <class T>
LazyArray<T> lazy_array(u64 num_items) {
  T* items = static_cast<T*>(calloc(num_items > 0 ? num_items : 1, sizeof(T)));
  if (items == nullptr) throw std::bad_alloc();
  return LazyArray<T>(items);
}

class DeviceMirror {
 public:
  // params: the host's. The device's tables are zeroed, as the host's are.
  explicit DeviceMirror(const EngineParams& params)
      : params_(params),
        admissions_(params.num_requests),
        pages_(lazy_array<u32>(u64{params.num_requests} * params.max_pages_per_request)),
        constraints_(lazy_array<u8>(params.constraints != 0 ? num_slots() * params.constraint_slot_bytes : 0)),
        loaded_bytes_(num_slots()) {}

  // All pieces that the device needs for this step, into link.batch(); where that is full, link.flush() sends it on its way and gives a new one.
  // False: the link is lost.
  template <class Link>
  bool send_step(Link& link, const StepPlan* plan) {
    bool goes_on = send(link, kUpdatePlan, 0, plan, sizeof(StepPlan)) &&
                   send_of_plan(link, plan, plan_seqs(params_, plan), plan->num_seqs) &&
                   send_of_plan(link, plan, plan_rows(params_, plan), plan->num_rows) &&
                   send_of_plan(link, plan, plan_sampled_rows(params_, plan), plan->num_sample_rows);
    has_tops_ = false;
    for (u32 i = 0; goes_on && i < plan->num_seqs; ++i) {
      const PlanSeq& seq = plan_seqs(params_, plan)[i];
      has_tops_ |= seq.sample_row != kNoRow && request_at(params_, seq.request_idx)->sampling.num_top_logprobs > 0;
      goes_on = send_pages(link, seq) && send_request(link, seq.request_idx);
    }
    return goes_on;
  }

  // Whether a row of the step that was sent last brings top logprobs.
  bool has_tops() const { return has_tops_; }

 private:
  struct Admission {      // of a request's entry, when it was last sent
    u64 serial = 0;       // 0: never
    u32 num_preemptions = 0;
    u32 count_slot = 0;
  };

  u64 num_slots() const { return u64{params_.num_queue_pairs} * params_.num_constraint_slots; }

  template <class Link>
  bool send(Link& link, u32 table, u64 table_offset, const void* source, u64 num_bytes) {
    const u8* bytes = static_cast<const u8*>(source);
    for (u64 sent = 0; sent < num_bytes;) {
      UpdateBatch* batch = &link.batch();
      if (batch->num_pieces == kMaxPieces || batch->num_words + kPieceWords > kBatchWords) {
        if (!link.flush()) return false;
        batch = &link.batch();
      }
      const u64 left_bytes = num_bytes - sent;
      const u32 piece_bytes = left_bytes < kPieceWords * sizeof(u32) ? static_cast<u32>(left_bytes) : kPieceWords * u32{sizeof(u32)};
      const u32 num_words = (piece_bytes + 3) / 4;
      batch->pieces[batch->num_pieces++] = UpdatePiece{table_offset + sent, table, num_words, batch->num_words, 0};
      batch->words[batch->num_words + num_words - 1] = 0;  // the last bytes of a word that is not whole
      memcpy(&batch->words[batch->num_words], bytes + sent, piece_bytes);
      batch->num_words += num_words;
      sent += piece_bytes;
    }
    return true;
  }

  // The first num_items of an array behind the plan's header.
  template <class Link, class Item>
  bool send_of_plan(Link& link, const StepPlan* plan, const Item* items, u32 num_items) {
    const u64 offset = reinterpret_cast<const u8*>(items) - reinterpret_cast<const u8*>(plan);
    return send(link, kUpdatePlan, offset, items, num_items * sizeof(Item));
  }

  // The page table's entries that are not as they were, as one run.
  template <class Link>
  bool send_pages(Link& link, const PlanSeq& seq) {
    const u64 first = u64{seq.request_idx} * params_.max_pages_per_request;
    const u32* pages = request_pages(params_, seq.request_idx);
    u32* known = &pages_[first];
    u32 end = (seq.position_begin + seq.num_rows + kPageTokens - 1) / kPageTokens;
    if (memcmp(pages, known, end * sizeof(u32)) == 0) return true;
    u32 begin = 0;
    while (pages[begin] == known[begin]) ++begin;
    while (pages[end - 1] == known[end - 1]) --end;
    memcpy(known + begin, pages + begin, (end - begin) * sizeof(u32));
    return send(link, kUpdatePageTables, (first + begin) * sizeof(u32), pages + begin, (end - begin) * sizeof(u32));
  }

  template <class Link>
  bool send_request(Link& link, u32 request_idx) {
    const Request& request = *request_at(params_, request_idx);
    Admission& known = admissions_[request_idx];
    const bool is_new = known.serial != request.serial;
    if (!is_new && known.num_preemptions == request.num_preemptions && known.count_slot == request.count_slot) return true;
    known = Admission{request.serial, request.num_preemptions, request.count_slot};
    const u64 entry = u64{request_idx} * sizeof(Request);
    // N2: of a request that was preempted, only the slot of its counts is another one.
    if (is_new && !send(link, kUpdateRequests, entry, &request, sizeof(Request))) return false;
    if (!is_new && !send(link, kUpdateRequests, entry + offsetof(Request, count_slot), &request.count_slot, sizeof(u32))) return false;
    if (uses_penalties(request.sampling)) {
      const u64 offset = u64{request_idx} * params_.max_context * sizeof(u32);
      if (!send(link, kUpdateTokens, offset, request_tokens(params_, request_idx), request.num_tokens * sizeof(u32))) return false;
    }
    if (is_new && request.sampling.num_logit_bias > 0) {
      const u64 offset = u64{request_idx} * kMaxLogitBias * sizeof(LogitBias);
      const void* biases = reinterpret_cast<const LogitBias*>(params_.logit_biases) + u64{request_idx} * kMaxLogitBias;
      if (!send(link, kUpdateLogitBiases, offset, biases, request.sampling.num_logit_bias * sizeof(LogitBias))) return false;
    }
    return request.constraint == 0 || send_constraint(link, request.queue_pair_idx, request.constraint - 1);
  }

  // A slot is looked at when a request that uses it is admitted: an ingress that changes it under one that runs harms that one alone.
  template <class Link>
  bool send_constraint(Link& link, u32 queue_pair_idx, u32 slot) {
    const u64 slot_idx = constraint_index(params_, queue_pair_idx, slot);
    const u64 loaded_bytes = *constraint_loaded_bytes(params_, queue_pair_idx, slot);
    const u64 num_bytes = loaded_bytes <= params_.constraint_slot_bytes ? loaded_bytes : 0;
    const u8* source = constraint_slot(params_, queue_pair_idx, slot);
    u8* known = &constraints_[slot_idx * params_.constraint_slot_bytes];
    if (loaded_bytes == loaded_bytes_[slot_idx] && memcmp(source, known, num_bytes) == 0) return true;
    memcpy(known, source, num_bytes);
    loaded_bytes_[slot_idx] = loaded_bytes;
    const u64 count_offset = num_slots() * params_.constraint_slot_bytes + slot_idx * sizeof(u64);
    return send(link, kUpdateConstraints, slot_idx * params_.constraint_slot_bytes, known, num_bytes) &&
           send(link, kUpdateConstraints, count_offset, &loaded_bytes_[slot_idx], sizeof(u64));
  }

  const EngineParams& params_;
  std::vector<Admission> admissions_;  // [num_requests]
  LazyArray<u32> pages_;               // [num_requests, max_pages_per_request]
  LazyArray<u8> constraints_;          // [num_slots, constraint_slot_bytes]
  std::vector<u64> loaded_bytes_;      // [num_slots]
  bool has_tops_ = false;
};

}  // namespace blinkimp
