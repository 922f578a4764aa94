// What the director knows, in device memory: EngineParams.director_state. Data and the smallest accessors.
//
// Written and read by the director's lanes only, except the fault latch at its start (fault.cuh). Words that say "lane 0" have one
// writing lane; the rest are written by the lane that works on the queue pair or the sequence, with a sync before another reads.
// Test: pytest tests/host/test_director_intake.py
//
// Who holds a completion position of a queue pair (half-open intervals of u64 positions, in ring order):
//   [.., consumer)                              the ingress read them; their entries are free
//   [consumer, published)                       in the ring, for the ingress to read
//   [published, + num_staged)                   written to `staged`, published by the next director_publish
//   [published + num_staged, + num_promised)    promised to the steps that are planned or run: TOKEN and FINISH of each request
//   [.., consumer + num_completions)            credit: free to be promised or staged
// Invariant C1: published + num_staged + num_promised - consumer <= num_completions. Nothing unread is ever overwritten.
#pragma once
#include <fault.cuh>
#include <ingress_port.cuh>
#include <page_allocator.cuh>
#include <step_plan.cuh>
#include <trace.cuh>

namespace blinkimp {

// Bound of EngineParams.max_batch: the running list and the staged completions are sized by it.
#if BK_GPU
constexpr u32 kMaxBatch = 256;       // kMaxSeqs of attention_schedule.cuh
#else
constexpr u32 kMaxBatch = 512;
#endif
constexpr u32 kMaxStagedByPoll = 512;
constexpr u32 kMaxStaged = kMaxStagedByPoll + 2 * kMaxBatch;  // between two publishes: a commit always finds room for TOKEN and FINISH of a full batch
constexpr u32 kStepCredit = 2;       // completions that one request may need in one step: TOKEN and FINISH. TOP: step_credit()
constexpr u32 kNoQueuePair = 0xffffffff;
constexpr u32 kNumLevels = 16;       // of priority, for those that wait (waiting.cuh)
constexpr u64 kIntegrityIntervalNs = 1'000'000'000;  // between two checks of an idle director

enum QueuePairEvent : u32 {
  kEventNone = 0,
  kEventAttach = 1,  // ingress.epoch is odd and higher than what was answered
  kEventDetach = 2,  // ingress.epoch is even and higher than what was answered
  kEventStale = 3,   // the heartbeat stands still
};

// The step after the one in flight.
enum NextPlan : u32 {
  kNextNone = 0,
  kNextReady = 1,    // planned ahead; more requests may still be admitted to it
  kNextStarted = 2,  // the workers have it: the step before it is not committed yet
};

struct StepDraft {  // of one plan, uniform over the lanes
  u32 num_seqs;
  u32 num_rows;
  u32 num_sample_rows;
  u32 max_kv_tokens;
  u32 kv_tokens_before;  // max_kv_tokens without the last chunk
};

struct QueuePairState {
  u64 region;                    // QueuePair
  u64 submissions;               // SubmissionEntry [num_submissions]
  u64 completions;               // CompletionEntry [num_completions]
  u64 arena;                     // u8 [arena_bytes]
  u64 arena_bytes;               // geometry is copied at init: an ingress that scribbles over the header moves no pointer of ours
  u32 num_submissions;
  u32 num_completions;
  u64 epoch;                     // last answered: odd = attached
  u64 asked_epoch;               // ingress.epoch as the last poll saw it
  u64 heartbeat;                 // last value seen
  u64 heartbeat_changed_ns;      // when it was first seen
  u64 submission_consumer_pos;
  u64 arena_consumer_pos;
  u64 completion_published_pos;
  u64 completion_consumer_pos;   // highest sane value seen
  u32 num_staged;
  u32 num_promised;
  u32 consumer_is_sane;          // 0: ingress.completion_consumer_pos lies beyond what was published; no credit until it is right
  u32 event;                     // QueuePairEvent of this poll
  u32 has_entry;                 // `entry` is a committed submission that was copied and is not taken yet
  u32 positions_changed;         // submission or arena position to be stored for the ingress
  u64 served_tokens;             // its share of the engine so far, as waiting.cuh counts it
  u32 finishing_first_idx;       // finishing queue: linked through next_idx
  u32 finishing_last_idx;
  u32 num_waiting;
  u32 num_running;
  u32 num_finishing;
  u32 num_promised_now;          // of num_promised: to the step in flight, while the next one is planned too. Else 0
  u32 most_top_logprobs;         // that one of its live requests asked for, and maybe more
  u32 level_mask;                // levels whose waiting queue is not empty
  u64 seen_ns;                   // when the next submission's commit word was first seen to be there; 0 = it was not
  SubmissionEntry entry;
};
ABI_SIZE(QueuePairState, 248);

// A completion on its way to a ring. The commit word's low byte is still 0: lap parity is put in by the publish. In a TOKEN's word the bits
// from kStagedTopShift on say which TOPs follow it; the publish writes those from where the sampling op left them, and clears the bits.
constexpr u32 kStagedTopShift = 16;      // 5 bits: how many
constexpr u32 kStagedTopStepShift = 21;  // 1 bit: of an odd step
constexpr u32 kStagedTopRowShift = 22;   // 10 bits: sampled row

struct StagedCompletion {
  CompletionEntry entry;
  u32 queue_pair_idx;  // kNoQueuePair: its ingress left, drop it
  u32 position;        // low half of its position in the ring, set by the publish
};
ABI_SIZE(StagedCompletion, 40);

struct WaitingQueue {  // doubly linked through next_idx, prev_idx; valid while its level's bit is set
  u32 first_idx;
  u32 last_idx;
};

struct Limits {  // of the schedule: as launched, or as ControlLine says (limits.cuh)
  u32 max_running;
  u32 step_tokens;
  u32 prefill_chunk_tokens;
  u32 reserved0;
  u64 aging_ns;  // 0 = never
};

struct DirectorState {
  FaultLatch fault;              // first: fault.cuh
  u64 now_ns;                    // device clock at the start of the call that runs
  u64 plan_ns;                   // when the step in flight was handed to the workers
  u64 next_start_ns;             // kNextStarted: when that was
  u64 arrived_ns;                // when the workers of the last step were done; 0 once the engine was idle since
  u64 integrity_ns;              // last check
  u64 quiet_since_ns;            // since when there is nothing to do, as far as parking is concerned; 0 = there is
  u64 stop_seen_ns;              // when kCommandStop was first seen, 0 = not
  u32 command;                   // EngineCommand, as last seen
  u32 is_parked;                 // the device has left, with everything in order: the next launch goes on
  u32 is_stopped;                // nothing is left to do after kCommandStop
  u32 step_in_flight;            // between a plan with rows and its commit
  u32 next_plan;                 // NextPlan: not kNextNone only while a step is in flight, or from its commit to the next director_plan
  u32 next_waits;                // kNextReady: worth a commit first, which makes room for requests that wait
  u32 is_advanced;               // the requests of the step in flight count what it computes and samples already
  StepDraft next_draft;          // of the next plan; without one, of the step in flight
  u32 num_deferred;              // running requests with kFlagStopAsked or kFlagDropped: their end waits for the commit
  u32 num_staged;
  u32 next_admit_idx;            // queue pair whose turn it is at admission
  u32 next_take_idx;             // queue pair whose turn it is at the intake
  u32 num_stalled;               // requests that the last plan left out for lack of credit
  u64 served_floor;              // served_tokens of the queue pair whose turn it was last (waiting.cuh)
  u64 earliest_deadline_ns;      // no request's deadline is earlier
  Limits limits;
  TraceWriter trace;
  PageAllocator pages;
  StatusLines status;            // num_running, num_waiting, num_finishing and all counters live here; publish copies it
  StepCounts step_counts;        // stored to the engine page as they change
  RequestTable table;
  QueuePairState queue_pairs[kMaxQueuePairs];  // the first num_queue_pairs are open
  WaitingQueue waiting[kMaxQueuePairs][kNumLevels];  // by queue pair and level, 0 first
  u32 running[kMaxBatch];        // request_idx in admission order; kNoRequest = preempted a moment ago (within one call only)
  u32 scratch[kMaxBatch];        // of one call
  StagedCompletion staged[kMaxStaged];         // the first num_staged are valid
};
static_assert(sizeof(DirectorState) <= kDirectorStateBytes, "program_abi.h sizes the state");

BK_INLINE DirectorState& director_state(const EngineParams& params) { return *reinterpret_cast<DirectorState*>(params.director_state); }
BK_INLINE EnginePage& engine_page(const EngineParams& params) { return *reinterpret_cast<EnginePage*>(params.engine_page); }
BK_INLINE QueuePair& queue_pair_region(const QueuePairState& queue_pair) { return *reinterpret_cast<QueuePair*>(queue_pair.region); }

// Requests' pages belong to workers that run, or to a plan that will.
BK_INLINE bool pages_are_planned(const DirectorState& state) { return state.step_in_flight || state.next_plan != kNextNone; }

BK_INLINE bool is_attached(const QueuePairState& queue_pair) { return (queue_pair.epoch & 1) != 0; }

BK_INLINE u32 num_live(const QueuePairState& queue_pair) {
  return queue_pair.num_waiting + queue_pair.num_running + queue_pair.num_finishing;
}

// Completions that a request of the queue pair may need in one step.
BK_INLINE u32 step_credit(const QueuePairState& queue_pair) { return kStepCredit + queue_pair.most_top_logprobs; }

BK_INLINE u32 staged_tops(const StagedCompletion& staged) {
  return (staged.entry.commit >> kCommitKindShift & 0xff) == kCompletionToken ? staged.entry.commit >> kStagedTopShift & 0x1f : 0;
}

// Completions that may still be promised or staged (C1).
BK_INLINE u32 completion_credit(const QueuePairState& queue_pair) {
  const u64 num_taken = queue_pair.completion_published_pos + queue_pair.num_staged + queue_pair.num_promised -
                        queue_pair.completion_consumer_pos;
  if (!is_attached(queue_pair) || !queue_pair.consumer_is_sane || num_taken >= queue_pair.num_completions) return 0;
  return static_cast<u32>(queue_pair.num_completions - num_taken);
}

// Lane 0. The caller has checked credit, or stages what was promised.
BK_INLINE void stage_completion(DirectorState& state, u32 queue_pair_idx, u32 kind, u32 reason, u32 token, u64 request_id, u32 index,
                                u64 device_ns) {
  StagedCompletion* staged = &state.staged[state.num_staged];
  staged->entry.commit = (kind << kCommitKindShift) | (reason << kCommitReasonShift);
  staged->entry.token = token;
  staged->entry.request_id = request_id;
  staged->entry.index = index;
  staged->entry.logprob = 0.0f;
  staged->entry.device_ns = device_ns;
  staged->queue_pair_idx = queue_pair_idx;
  state.num_staged += 1;
  state.queue_pairs[queue_pair_idx].num_staged += 1;
}

// Room for one more completion outside a commit.
BK_INLINE bool can_stage(const DirectorState& state, u32 queue_pair_idx) {
  return state.num_staged < kMaxStagedByPoll && completion_credit(state.queue_pairs[queue_pair_idx]) > 0;
}

}  // namespace blinkimp
