// The shared memory of blinkimp: queue pairs, engine page. The only definition of it.
//
// Who reads this file: NVRTC (the director on the GPU), g++ (the emulated device and the ingress side), and
// tools/gen_abi.py, which writes blinkimp/ring_abi.py from it. Data only: no logic, no includes, no pointers, no bit-fields.
// Test: pytest tests/compile/test_ring_abi.py
#pragma once

namespace blinkimp {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using f32 = float;

#define ABI_SIZE(T, num_bytes) static_assert(sizeof(T) == (num_bytes), #T " must be " #num_bytes " bytes")
#if defined(__CUDACC_RTC__)  // NVRTC has no offsetof before 13.5
#define ABI_OFFSET_OF(T, member) (unsigned long long)__INTADDR__(&(((T*)0)->member))
#else
#define ABI_OFFSET_OF(T, member) __builtin_offsetof(T, member)
#endif
#define ABI_AT(T, member, offset) static_assert(ABI_OFFSET_OF(T, member) == (offset), #T "." #member " must be at " #offset)

// ---- Limits and versions -----------------------------------------------------------------------------------------
constexpr u64 kQueuePairMagic = 0x31305051'4b4e4c42;   // "BLNKQP01"
constexpr u64 kEnginePageMagic = 0x31304745'4b4e4c42;  // "BLNKEG01"
constexpr u32 kAbiVersion = 2;
constexpr u32 kMaxQueuePairs = 32;         // one lane of the director's warp polls one queue pair
constexpr u32 kMaxStopIds = 16;            // per request, beside the model's own EOS ids
constexpr u32 kMaxEosIds = 8;              // of the model
constexpr u32 kMaxTopLogprobs = 20;        // alternatives reported with each token
constexpr u32 kMaxLogitBias = 512;         // biased ids of one request
constexpr u32 kArenaAlignBytes = 64;       // every request body starts at a multiple of this
constexpr u32 kNoRequest = 0xffffffff;     // "no request" in index words
constexpr u32 kMostEpochsAhead = 1u << 30;  // of an attach, see IngressLine

// ---- Commit words ------------------------------------------------------------------------------------------------
// The first word of every ring entry, written last, with release order.
//   bit 0      lap parity: 1 in even laps, 0 in odd laps (lap = position / number of entries), so zeroed memory is empty
//   bits 8-15  operation (submission) or kind (completion)
//   bits 16-23 reason (completions FINISH and REJECT), else 0
constexpr u32 kCommitParityMask = 0x1;
constexpr u32 kCommitKindShift = 8;
constexpr u32 kCommitReasonShift = 16;

enum SubmissionOp : u32 {
  kSubmissionRequest = 1,  // a request; its body is in the arena
  kSubmissionCancel = 2,  // stop request_id at the next commit
  kSubmissionPing = 3,    // answered by a PONG that carries client_ns back
  kSubmissionConstraint = 4,  // a piece of a constraint automaton, in the arena, for one of the queue pair's slots
};

enum CompletionKind : u32 {
  kCompletionAck = 1,     // accepted: the body was copied, its arena bytes are free again
  kCompletionToken = 2,   // one sampled token
  kCompletionFinish = 3,  // the last entry of an accepted request
  kCompletionReject = 4,  // the last entry of a request that was not accepted
  kCompletionPong = 5,
  kCompletionTop = 6,     // one alternative of the TOKEN before it; num_top_logprobs of them follow each TOKEN, likeliest first
  kCompletionStart = 7,   // the request entered the batch for the first time: from here its prompt is computed.
                          // Left out where the ring is nearly full
};

enum FinishReason : u32 {
  kFinishEos = 1,        // sampled one of the model's EOS ids (it was emitted as TOKEN)
  kFinishStopId = 2,     // sampled one of the request's stop ids (it was emitted as TOKEN)
  kFinishLength = 3,     // max_tokens reached
  kFinishCancelled = 4,  // CANCEL, or its ingress died
  kFinishDraining = 5,   // the engine stops before it could finish
  kFinishTimeout = 6,    // its deadline passed
  kFinishConstraint = 7, // its constraint allows no token any more: the automaton was built wrongly
};

enum RejectReason : u32 {
  kRejectMalformed = 1,      // unknown operation, reserved bits set, body outside the arena, counts that disagree
  kRejectPromptEmpty = 2,
  kRejectTooLong = 3,        // prompt + max_tokens > max_context, or more pages than exist
  kRejectBadSampling = 4,    // a sampling parameter is outside its range
  kRejectBadToken = 5,       // a prompt or stop token id >= vocab_size
  kRejectDraining = 6,
  kRejectDuplicate = 7,      // request_id is live already on this queue pair
  kRejectBadConstraint = 8,  // no such slot, or the automaton in it is not well-formed
};

// ---- Ring entries ------------------------------------------------------------------------------------------------
// Submission: written by the ingress, read by the director. Reserved words are zero, else the entry is rejected.
struct SubmissionEntry {
  u32 commit;
  u32 epoch;              // low half of the ingress's attach epoch; an entry of another epoch is dropped
  u64 request_id;         // chosen by the ingress, unique among its live requests
  u64 arena_pos;          // monotonic byte position of the RequestBody in the arena (SUBMIT)
  u32 body_bytes;         // RequestBody + stop ids + prompt ids (SUBMIT)
  u32 num_prompt_tokens;  // (SUBMIT)
  u32 max_tokens;         // output tokens at most, >= 1 (SUBMIT)
  i32 priority;           // lower runs first; equal ones first come, first served (SUBMIT)
  u64 client_ns;          // the ingress's clock; comes back in PONG
  u64 timeout_ns;         // from acceptance to FINISH at most, then kFinishTimeout; 0 = none (SUBMIT)
  u64 cache_salt;         // prefix cache: pages are shared among requests of equal salt only (SUBMIT)
};
// CONSTRAINT uses request_id as the slot, client_ns as the piece's byte offset in it, arena_pos and body_bytes for the piece, and zero for the
// rest. Pieces of a slot come in order; offset 0 starts a new automaton. The ring is first in, first out: a request submitted after the
// last piece finds the whole. The ingress does not overwrite a slot that a live request of its names. It is never answered: a piece that
// cannot be right empties its slot, and requests that name a slot without a whole automaton are rejected (kRejectBadConstraint).
ABI_SIZE(SubmissionEntry, 64);
ABI_AT(SubmissionEntry, request_id, 8);
ABI_AT(SubmissionEntry, arena_pos, 16);
ABI_AT(SubmissionEntry, client_ns, 40);
ABI_AT(SubmissionEntry, cache_salt, 56);

// Sampling parameters of one request. temperature 0 is greedy. Penalties, bias, min_tokens and the constraint act on the logits before
// greedy and sampled decoding alike; logprobs are those of the logits before any of them.
struct SamplingParams {
  f32 temperature;         // >= 0
  f32 top_p;               // (0, 1]; 1 is off
  f32 min_p;               // [0, 1]; 0 is off
  u32 top_k;               // 0 is off
  u64 seed;                // Philox key; the counter is the output position
  u32 ignore_eos;          // 1: the model's EOS ids do not stop the request
  u32 min_tokens;          // EOS and stop ids cannot be sampled before this output position; 0 is off
  f32 repetition_penalty;  // >= 0; 0 and 1 are off. Over prompt and output
  f32 presence_penalty;    // [-2, 2]; 0 is off. Over the output
  f32 frequency_penalty;   // [-2, 2]; 0 is off. Over the output
  u32 num_top_logprobs;    // <= kMaxTopLogprobs
  u32 num_logit_bias;      // <= kMaxLogitBias
  u32 reserved0;
  u64 reserved1;
};
ABI_SIZE(SamplingParams, 64);
ABI_AT(SamplingParams, seed, 16);
ABI_AT(SamplingParams, repetition_penalty, 32);

struct LogitBias {
  u32 token;
  f32 bias;  // finite; added to the token's logit
};
ABI_SIZE(LogitBias, 8);

enum RequestBodyFlags : u32 {
  kRequestNoPrefixCache = 1,  // neither takes pages from the prefix cache nor leaves any there
};

// Request body, in the arena. Followed by u32 stop_ids[num_stop_ids], LogitBias logit_bias[sampling.num_logit_bias], u32
// prompt_ids[num_prompt_tokens]. A body never wraps: it lies in one piece, aligned to kArenaAlignBytes.
struct RequestBody {
  SamplingParams sampling;
  u32 num_stop_ids;        // <= kMaxStopIds
  u32 num_prior_outputs;   // the prompt's last ids that are outputs of an earlier life of this request: output positions go on from here
  u32 flags;               // RequestBodyFlags
  u32 constraint;          // slot + 1, or 0
  u32 constraint_state;    // of the automaton, before the first output of this life
  u32 reserved0;
  u64 reserved1;
  u64 reserved2;
  u64 reserved3;
  u64 reserved4;
  u64 reserved5;
};
ABI_SIZE(RequestBody, 128);
ABI_AT(RequestBody, num_stop_ids, 64);

// A constraint: a finite automaton over tokens, in a slot of device memory. Tokens that no state tells apart share a class.
// Followed by u16 class_of_token[vocab_size], padded to 4 bytes, then u16 next_state[num_states][num_classes].
struct ConstraintHeader {
  u32 total_bytes;   // of header and tables
  u32 vocab_size;    // equals the model's
  u32 num_states;    // <= 0xffff
  u32 num_classes;
};
ABI_SIZE(ConstraintHeader, 16);
constexpr u32 kNoState = 0xffff;  // next_state of a token that is not allowed

// Completion: written by the director, read by the ingress.
struct CompletionEntry {
  u32 commit;
  u32 token;        // TOKEN, TOP: id.  FINISH: num_prompt_tokens.  REJECT: the limit that was broken, or 0
  u64 request_id;   // PONG: the ping's request_id
  u32 index;        // TOKEN: output position, from num_prior_outputs.  FINISH: num_output_tokens of this life.  TOP: rank from 0.
                    // START: prompt tokens from the prefix cache
  f32 logprob;      // TOKEN, TOP: natural log of the token's probability under the model's logits.  FINISH: prompt tokens from the prefix cache
  u64 device_ns;    // the device's clock when the director committed it.  PONG: client_ns of the ping
};
ABI_SIZE(CompletionEntry, 32);
ABI_AT(CompletionEntry, request_id, 8);
ABI_AT(CompletionEntry, device_ns, 24);

// ---- Queue pair region -------------------------------------------------------------------------------------------
// One POSIX shared memory object per queue pair: header, then words, submissions, completions, arena at the header's offsets.
// Positions are u64 and monotonic; an entry's index is position & (number - 1). All counts are powers of two.
// Each 128-byte line has one writer.
struct QueuePairHeader {   // written by the engine before the region becomes visible, then constant
  u64 magic;
  u32 abi_version;
  u32 header_bytes;            // sizeof(QueuePair)
  u64 region_bytes;
  u32 submission_entry_bytes;
  u32 num_submissions;
  u32 completion_entry_bytes;
  u32 num_completions;
  u64 arena_bytes;
  u64 submissions_offset;
  u64 completions_offset;
  u64 arena_offset;
  u64 engine_id;               // random; differs for each start of an engine
  u32 queue_pair_idx;
  u32 max_context;             // tokens, prompt + output
  u32 vocab_size;
  u32 num_constraint_slots;    // of this queue pair
  u64 constraint_slot_bytes;
  u32 max_requests;            // accepted and unfinished ones of this queue pair at most; a submission beyond waits in the ring. 0 = not said
  u32 reserved1;
  u64 reserved2;
  u64 reserved3;
};
ABI_SIZE(QueuePairHeader, 128);
ABI_AT(QueuePairHeader, arena_bytes, 40);
ABI_AT(QueuePairHeader, engine_id, 72);

// Attach epochs: odd = an ingress is attached, even = none. The ingress asks by storing ingress.epoch, the director answers
// by storing the same value to director.epoch together with the positions from which to go on. An epoch that is more than kMostEpochsAhead
// ahead of the answered one is nonsense that a broken ingress wrote: both sides pass over it, or the queue pair could never be used again.
struct IngressLine {             // writer: the ingress that owns the queue pair; reader: the director
  u64 owner_pid;                 // 0 = free; taken by compare-and-swap
  u64 epoch;
  u64 heartbeat_ns;              // changes at least every 100 ms while the ingress lives
  u64 completion_consumer_pos;   // completions below it were read: this is the director's credit
  u64 submission_producer_pos;   // for observers only; the director trusts commit words
  u64 reserved[11];
};
ABI_SIZE(IngressLine, 128);

struct DirectorLine {            // writer: the director; reader: the ingress
  u64 epoch;                     // last answered; differs from the ingress's own: it was dropped and must attach again
  u64 submission_consumer_pos;   // submissions below it were taken: the ingress's credit
  u64 arena_consumer_pos;        // arena bytes below it are free again
  u64 completion_producer_pos;   // for observers, and the resume position after an attach
  u64 reserved[12];
};
ABI_SIZE(DirectorLine, 128);

struct QueuePair {
  QueuePairHeader header;
  IngressLine ingress;
  DirectorLine director;
  u64 reserved[16];
};
ABI_SIZE(QueuePair, 512);
ABI_AT(QueuePair, ingress, 128);
ABI_AT(QueuePair, director, 256);

// ---- Engine page -------------------------------------------------------------------------------------------------
enum EngineState : u32 {
  kEngineStarting = 0,
  kEngineRunning = 1,
  kEngineDraining = 2,  // no new requests
  kEngineStopped = 3,
  kEngineFaulted = 4,   // fault is valid
  kEngineParked = 5,    // idle: the device has left, and comes back when the host sees that it is wanted. No heartbeat
};

enum EngineCommand : u32 {
  kCommandRun = 0,
  kCommandDrain = 1,  // reject new requests; run the others to their end
  kCommandStop = 2,   // finish the step, cancel what is left (kFinishDraining), exit
};

enum FaultCode : u32 {
  kFaultNone = 0,
  kFaultSpinExpired = 1,  // a wait outlived its budget
  kFaultIntegrity = 2,    // check_integrity() failed
  kFaultBadProgram = 3,   // an op that the interpreter does not know
};

struct FaultRecord {  // written before the kernel stops; the first fault wins
  u32 code;
  u32 site;           // which wait or check: the constants kSite* in device/fault.cuh
  u32 block_idx;
  u32 thread_idx;
  u64 expected;
  u64 seen;
  u64 device_ns;
  u64 step;
  u64 reserved[2];
};
ABI_SIZE(FaultRecord, 64);

struct EngineHeader {  // written by the host before launch
  u64 magic;
  u32 abi_version;
  u32 num_queue_pairs;
  u64 engine_id;
  u64 host_pid;
  u64 num_restarts;     // engines of this name that faulted before, under the same supervisor
  u64 reserved[11];
};
ABI_SIZE(EngineHeader, 128);

struct ControlLine {  // writer: the host; reader: the director
  u32 command;                // EngineCommand
  u32 tuning_generation;      // written last when the words below changed; the director then reads them. 0 in a word = as launched
  u32 max_running;            // requests in the batch, <= max_batch
  u32 step_tokens;            // rows of a step, <= max_step_tokens
  u32 prefill_chunk_tokens;   // rows of one request in a step
  u32 aging_ms;               // waiting this long is worth one priority level; 0xffffffff = never
  u64 reserved[13];
};
ABI_SIZE(ControlLine, 128);

struct StatusLines {  // writer: the director; reader: anyone
  u64 heartbeat;            // counts director loops
  u64 device_ns;
  u64 step;                 // model steps done
  u32 state;                // EngineState
  u32 num_queue_pairs_attached;
  u32 num_running;
  u32 num_waiting;
  u32 num_finishing;        // finished, waiting for completion credit
  u32 num_free_requests;
  u32 num_pages;
  u32 num_pages_free;
  u32 num_pages_used;
  u32 num_pages_cached;     // unreferenced pages of the prefix cache
  u64 requests_accepted;
  u64 requests_rejected;
  u64 finished_eos;
  u64 finished_stop_id;
  u64 finished_length;
  u64 finished_cancelled;
  u64 finished_draining;
  u64 preemptions;
  u64 credit_stalls;        // times a request was left out of a step for lack of credit
  u64 prompt_tokens;        // computed, recomputation included
  u64 output_tokens;
  u64 ingress_drops;        // queue pairs dropped for a stale heartbeat
  u64 integrity_checks;     // passed
  u64 step_ns_last;         // device time of the last model step
  u64 gap_ns_last;          // from the last worker's arrival to the publication of the next plan, while there was work
  u64 finished_timeout;
  u64 finished_constraint;
  u64 prefix_query_tokens;  // prompt tokens looked up in the prefix cache
  u64 prefix_hit_tokens;    // of them found
  u64 tuning_generation;    // last obeyed
  u64 reserved[4];
};
ABI_SIZE(StatusLines, 256);

struct StepCounts {         // writer: the director; reader: anyone. They only grow
  u64 by_rows[15];          // steps of 1 row, of 2, of 3 or 4, of 5 to 8, and so on: entry i of at most 2^i
  u64 num_rows;             // of all steps
};
ABI_SIZE(StepCounts, 128);

struct EnginePage {
  EngineHeader header;
  ControlLine control;
  StatusLines status;
  FaultRecord fault;
  u64 reserved0[8];
  StepCounts step_counts;
  u64 reserved[32];
};
ABI_SIZE(EnginePage, 1024);
ABI_AT(EnginePage, control, 128);
ABI_AT(EnginePage, status, 256);
ABI_AT(EnginePage, fault, 512);
ABI_AT(EnginePage, step_counts, 640);

}  // namespace blinkimp
