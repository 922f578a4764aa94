// The ingress side of one queue pair: attach, claim and commit submissions, poll completions. The other end is director_port.cuh.
//
// Plain words and copies, no system calls, no waiting: each call does its work or says why it cannot (PortStatus). Called by
// device/emu/ingress_port.cpp (the C interface of nic_shim/queue_pair.py) and by the stress test of both ends.
// Test: pytest tests/host/test_ingress_port.py
//
// Invariants
// I1  One thread calls everything but heartbeat(); heartbeat() may run on a second thread and writes heartbeat_ns alone.
// I2  producer_pos - director.submission_consumer_pos <= num_submissions: an entry that was not taken is never overwritten.
// I3  arena_producer_pos - director.arena_consumer_pos <= arena_bytes: a body that was not copied is never overwritten. A body is
//     at most half of the arena, so that skipping to the arena's start can never leave an empty arena without room.
// I4  Of an entry the commit word is written last; of a read completion the position is released last.
// I5  Nothing is written to the rings unless the director answered this epoch and this port still owns the queue pair.
// I6  Epochs only grow; odd while attached, even after detach().
#pragma once
#include <ptx.cuh>

namespace blinkimp {

enum PortStatus : u32 {
  kPortOk = 0,
  kPortPending = 1,    // the director has not answered the attach yet
  kPortBusy = 2,       // another live ingress owns the queue pair
  kPortRingFull = 3,   // no submission entry is free: try again after the director took some
  kPortArenaFull = 4,  // no room for the body: try again after the director copied some
  kPortTooLarge = 5,   // the body can never fit (I3), or counts do not fit their words
  kPortDetached = 6,   // not attached, or the director dropped this ingress: attach again
  kPortStolen = 7,     // another ingress took the queue pair over
  kPortCorrupt = 8,    // the director's positions break I2 or I3
};

enum HeaderField : u32 {  // what check_queue_pair_header() found wrong
  kHeaderOk = 0,
  kHeaderMagic = 1,
  kHeaderAbiVersion = 2,
  kHeaderHeaderBytes = 3,
  kHeaderRegionBytes = 4,
  kHeaderSubmissionEntryBytes = 5,
  kHeaderCompletionEntryBytes = 6,
  kHeaderNumSubmissions = 7,  // not a power of two >= 2
  kHeaderNumCompletions = 8,  // not a power of two >= 2
  kHeaderArenaBytes = 9,      // not a power of two >= 4 * kArenaAlignBytes
  kHeaderSubmissionsOffset = 10,
  kHeaderCompletionsOffset = 11,
  kHeaderArenaOffset = 12,
};

// A dead process's queue pair is taken over only once its heartbeat is this old too: the process id may be of another pid namespace.
constexpr u64 kDeadOwnerGraceNs = 200'000'000;

struct HeaderCheck {
  u32 field;     // HeaderField
  u64 got;
  u64 expected;  // of a range: the nearest value that would do
};

BK_INLINE bool is_power_of_two(u64 value) { return value != 0 && (value & (value - 1)) == 0; }

BK_INLINE u64 align_arena(u64 num_bytes) { return (num_bytes + kArenaAlignBytes - 1) / kArenaAlignBytes * kArenaAlignBytes; }

// Lap parity of the entry at `pos`: 1 in even laps, so that zeroed memory is empty.
// num_entries is a power of two, so the lap's lowest bit is that bit of the position (no division: the GPU has none in hardware).
BK_INLINE u32 commit_parity(u64 pos, u32 num_entries) { return (pos & num_entries) == 0 ? 1 : 0; }

// Every word that the port relies on; the region is `region_bytes` long as the caller mapped it.
BK_INLINE HeaderCheck check_queue_pair_header(const QueuePairHeader& header, u64 region_bytes) {
  const u64 submissions_bytes = static_cast<u64>(header.num_submissions) * sizeof(SubmissionEntry);
  const u64 completions_bytes = static_cast<u64>(header.num_completions) * sizeof(CompletionEntry);
  if (header.magic != kQueuePairMagic) return {kHeaderMagic, header.magic, kQueuePairMagic};
  if (header.abi_version != kAbiVersion) return {kHeaderAbiVersion, header.abi_version, kAbiVersion};
  if (header.header_bytes != sizeof(QueuePair)) return {kHeaderHeaderBytes, header.header_bytes, sizeof(QueuePair)};
  if (header.region_bytes > region_bytes) return {kHeaderRegionBytes, region_bytes, header.region_bytes};
  if (header.submission_entry_bytes != sizeof(SubmissionEntry))
    return {kHeaderSubmissionEntryBytes, header.submission_entry_bytes, sizeof(SubmissionEntry)};
  if (header.completion_entry_bytes != sizeof(CompletionEntry))
    return {kHeaderCompletionEntryBytes, header.completion_entry_bytes, sizeof(CompletionEntry)};
  if (header.num_submissions < 2 || !is_power_of_two(header.num_submissions)) return {kHeaderNumSubmissions, header.num_submissions, 2};
  if (header.num_completions < 2 || !is_power_of_two(header.num_completions)) return {kHeaderNumCompletions, header.num_completions, 2};
  if (header.arena_bytes < 4 * kArenaAlignBytes || !is_power_of_two(header.arena_bytes) || header.arena_bytes > header.region_bytes)
    return {kHeaderArenaBytes, header.arena_bytes, 4 * kArenaAlignBytes};
  // Order in the region: header, submissions, completions, arena. Subtractions cannot wrap: each bound was checked before.
  if (header.submissions_offset < sizeof(QueuePair) || header.submissions_offset % sizeof(SubmissionEntry) != 0 ||
      header.submissions_offset > header.region_bytes || header.region_bytes - header.submissions_offset < submissions_bytes)
    return {kHeaderSubmissionsOffset, header.submissions_offset, sizeof(QueuePair)};
  const u64 submissions_end = header.submissions_offset + submissions_bytes;
  if (header.completions_offset < submissions_end || header.completions_offset % sizeof(CompletionEntry) != 0 ||
      header.completions_offset > header.region_bytes || header.region_bytes - header.completions_offset < completions_bytes)
    return {kHeaderCompletionsOffset, header.completions_offset, submissions_end};
  const u64 completions_end = header.completions_offset + completions_bytes;
  if (header.arena_offset < completions_end || header.arena_offset % kArenaAlignBytes != 0 ||
      header.arena_offset > header.region_bytes || header.region_bytes - header.arena_offset < header.arena_bytes)
    return {kHeaderArenaOffset, header.arena_offset, completions_end};
  return {kHeaderOk, 0, 0};
}

// A claimed submission: private until commit(); dropping it is the abort, for nothing has been published.
struct SubmissionClaim {
  SubmissionEntry* entry;  // in the ring, ours until commit()
  u8* body;                // in the arena, body_bytes long; null for an operation without a body
  u64 arena_pos;           // monotonic position of `body`
  u32 body_bytes;
};

// A request as try_submit() takes it; nic_shim/queue_pair.py packs the same words. Pointers are the caller's, read during the call only.
struct RequestOrder {
  const u32* stop_ids;          // [num_stop_ids]
  const LogitBias* logit_bias;  // [num_logit_bias]
  const u32* prompt_ids;        // [num_prompt_tokens]
  u64 request_id;
  u64 timeout_ns;
  u64 cache_salt;
  u32 num_stop_ids;
  u32 num_logit_bias;
  u32 num_prompt_tokens;
  u32 max_tokens;
  u32 num_prior_outputs;
  u32 flags;                    // RequestBodyFlags
  u32 constraint;               // slot + 1, or 0
  u32 constraint_state;
  i32 priority;
  u32 reserved0;
  SamplingParams sampling;      // num_logit_bias is taken from above
};
ABI_SIZE(RequestOrder, 152);

// A piece is copied by the director in one poll: this many bytes over PCIe keep it away from the next step for 15 us or so.
constexpr u64 kConstraintPieceBytes = 32 * 1024;

struct IngressPort {
  QueuePair* queue_pair;          // start of the region, the engine's memory
  SubmissionEntry* submissions;   // [num_submissions]
  CompletionEntry* completions;   // [num_completions]
  u8* arena;                      // [arena_bytes]
  u32 num_submissions;
  u32 num_completions;
  u64 arena_bytes;
  u64 owner_pid;                  // what this port wrote to ingress.owner_pid, 0 = nothing
  u64 epoch;                      // the epoch this port asked for, odd while attached or attaching
  u32 attached;                   // the director answered `epoch`
  u64 producer_pos;               // next submission
  u64 arena_producer_pos;         // next body
  u64 consumer_pos;               // next completion

  // ---- Open and attach -------------------------------------------------------------------------------------------
  // The header must have passed check_queue_pair_header().
  BK_INLINE static IngressPort open(u8* region) {
    QueuePair* queue_pair = reinterpret_cast<QueuePair*>(region);
    const QueuePairHeader& header = queue_pair->header;
    IngressPort port{};
    port.queue_pair = queue_pair;
    port.submissions = reinterpret_cast<SubmissionEntry*>(region + header.submissions_offset);
    port.completions = reinterpret_cast<CompletionEntry*>(region + header.completions_offset);
    port.arena = region + header.arena_offset;
    port.num_submissions = header.num_submissions;
    port.num_completions = header.num_completions;
    port.arena_bytes = header.arena_bytes;
    return port;
  }

  // Becomes the owner and asks the director for a new epoch; kPortOk means asked: go on with attach_answered().
  // dead_pid: an owner that the caller knows to be dead, or 0. Also the way to attach again after a drop.
  BK_INLINE u32 try_attach(u64 pid, u64 dead_pid, u64 heartbeat_timeout_ns) {
    IngressLine& mine = queue_pair->ingress;
    // Acquire pairs with cas_acq_rel_sys in detach() and here: the former owner's epoch is seen.
    const u64 owner = ld_acquire_sys(&mine.owner_pid);
    const bool still_mine = epoch != 0 && owner == owner_pid && owner == pid && ld_relaxed_sys(&mine.epoch) == epoch;
    if (!still_mine) {
      // Relaxed: the heartbeat orders nothing, only its age counts. One from far in the future is nonsense, and as good as an old one.
      const u64 heartbeat = ld_relaxed_sys(&mine.heartbeat_ns);
      const u64 now_ns = device_clock_ns();
      const u64 age_ns = now_ns > heartbeat ? now_ns - heartbeat : heartbeat - now_ns;
      const u64 patience_ns = owner == dead_pid && kDeadOwnerGraceNs < heartbeat_timeout_ns ? kDeadOwnerGraceNs : heartbeat_timeout_ns;
      if (owner != 0 && age_ns <= patience_ns) return kPortBusy;
      // The heartbeat first, where the place is another's: a rival that looks after our CAS must not find the old, stale one.
      st_relaxed_sys(&mine.heartbeat_ns, now_ns);
      if (cas_acq_rel_sys(&mine.owner_pid, owner, pid) != owner) return kPortBusy;
    }
    owner_pid = pid;
    attached = 0;
    // Relaxed: owner_pid orders the former owner's epoch; the director's is only needed to be passed over (I6).
    const u64 asked = ld_relaxed_sys(&mine.epoch);
    const u64 answered = ld_relaxed_sys(&queue_pair->director.epoch);
    epoch = ((asked - answered < kMostEpochsAhead ? asked : answered) + 1) | 1;  // lower wraps; nonsense is passed over
    st_relaxed_sys(&mine.heartbeat_ns, device_clock_ns());
    // Release pairs with the director's acquire of ingress.epoch: the heartbeat is fresh when the director starts to watch it.
    st_release_sys(&mine.epoch, epoch);
    return kPortOk;
  }

  // Whether the director answered; on kPortOk the port is attached and goes on from the director's positions.
  BK_INLINE u32 attach_answered() {
    if (!owns()) return kPortStolen;
    const DirectorLine& theirs = queue_pair->director;
    // Acquire pairs with the director's release of director.epoch: the positions stand before the answer.
    if (ld_acquire_sys(&theirs.epoch) != epoch) return kPortPending;
    if (attached) return kPortOk;
    producer_pos = ld_relaxed_sys(&theirs.submission_consumer_pos);
    arena_producer_pos = align_arena(ld_relaxed_sys(&theirs.arena_consumer_pos));
    consumer_pos = ld_relaxed_sys(&theirs.completion_producer_pos);
    st_relaxed_sys(&queue_pair->ingress.submission_producer_pos, producer_pos);  // relaxed: for observers only
    // Release as in poll(); what lies below was written for an earlier epoch and is given up.
    st_release_sys(&queue_pair->ingress.completion_consumer_pos, consumer_pos);
    attached = 1;
    return kPortOk;
  }

  // Gives the queue pair back. The director cancels what is unfinished when it sees the even epoch.
  BK_INLINE void detach() {
    if (owner_pid != 0 && owns()) {
      // Release pairs with the director's acquire of ingress.epoch: what was committed is in place before we leave.
      if (epoch & 1) st_release_sys(&queue_pair->ingress.epoch, epoch + 1);
      // Release half pairs with the acquire of owner_pid in try_attach(): the next owner sees the even epoch.
      cas_acq_rel_sys(&queue_pair->ingress.owner_pid, owner_pid, 0);
    }
    owner_pid = 0;
    attached = 0;
    epoch = 0;
  }

  // ---- Who holds the queue pair ----------------------------------------------------------------------------------
  BK_INLINE bool owns() const {
    // Relaxed: both words are written by owners only; a takeover that is not visible yet is found at the next call, and the
    // director drops entries of an old epoch.
    return owner_pid != 0 && ld_relaxed_sys(&queue_pair->ingress.owner_pid) == owner_pid &&
           ld_relaxed_sys(&queue_pair->ingress.epoch) == epoch;
  }

  // kPortOk while attached; kPortDetached after a drop by the director; kPortStolen after a takeover (I5).
  BK_INLINE u32 state() const {
    if (!attached) return kPortDetached;
    if (!owns()) return kPortStolen;
    // Relaxed: only the value counts; a drop seen late is harmless, the director ignores the old epoch.
    return ld_relaxed_sys(&queue_pair->director.epoch) == epoch ? kPortOk : kPortDetached;
  }

  // Says "alive"; at least every 100 ms. pid and epoch are parameters because the caller may be a second thread (I1).
  BK_INLINE static bool heartbeat(QueuePair* queue_pair, u64 pid, u64 epoch) {
    IngressLine& mine = queue_pair->ingress;
    // Relaxed: see owns(). A stopped process that wakes up after a takeover must not keep its successor alive.
    if (pid == 0 || ld_relaxed_sys(&mine.owner_pid) != pid || ld_relaxed_sys(&mine.epoch) != epoch) return false;
    st_relaxed_sys(&mine.heartbeat_ns, device_clock_ns());  // relaxed: the director watches the value change, nothing hangs on it
    return true;
  }

  // ---- Submissions -----------------------------------------------------------------------------------------------
  // body_bytes: of the whole body, or 0 for an operation without a body.
  BK_INLINE u32 try_claim(u64 body_bytes, SubmissionClaim* claim) {
    const u32 port_state = state();
    if (port_state != kPortOk) return port_state;
    const DirectorLine& theirs = queue_pair->director;
    // Acquire pairs with the director's release of submission_consumer_pos: it has read the entry that we are to overwrite.
    const u64 num_taken_ahead = producer_pos - ld_acquire_sys(&theirs.submission_consumer_pos);
    if (num_taken_ahead > num_submissions) return kPortCorrupt;
    if (num_taken_ahead == num_submissions) return kPortRingFull;
    claim->entry = &submissions[producer_pos & (num_submissions - 1)];
    claim->body = nullptr;
    claim->arena_pos = arena_producer_pos;
    claim->body_bytes = static_cast<u32>(body_bytes);
    if (body_bytes == 0) return kPortOk;
    const u64 claim_bytes = align_arena(body_bytes);
    if (claim_bytes > arena_bytes / 2) return kPortTooLarge;  // I3
    u64 offset = arena_producer_pos & (arena_bytes - 1);
    if (offset + claim_bytes > arena_bytes) {  // a body never wraps: go on at the arena's start
      claim->arena_pos += arena_bytes - offset;
      offset = 0;
    }
    // Acquire pairs with the director's release of arena_consumer_pos: it has copied the bytes that we are to overwrite.
    const u64 arena_consumer_pos = ld_acquire_sys(&theirs.arena_consumer_pos);
    if (arena_producer_pos - arena_consumer_pos > arena_bytes) return kPortCorrupt;
    if (claim->arena_pos + claim_bytes - arena_consumer_pos > arena_bytes) return kPortArenaFull;
    claim->body = arena + offset;
    return kPortOk;
  }

  // Publishes a claim whose body is filled in. `words`: the entry's words, save those that the claim and this port know.
  BK_INLINE void commit(const SubmissionClaim& claim, u32 op, const SubmissionEntry& words) {
    SubmissionEntry* entry = claim.entry;
    entry->epoch = static_cast<u32>(epoch);
    entry->request_id = words.request_id;
    entry->arena_pos = claim.body != nullptr ? claim.arena_pos : 0;
    entry->body_bytes = claim.body_bytes;
    entry->num_prompt_tokens = words.num_prompt_tokens;
    entry->max_tokens = words.max_tokens;
    entry->priority = words.priority;
    entry->client_ns = words.client_ns;
    entry->timeout_ns = words.timeout_ns;
    entry->cache_salt = words.cache_salt;
    // Release pairs with the director's acquire of the commit word (poll in director_port.cuh): entry and body stand before it (I4).
    st_release_sys(&entry->commit, commit_parity(producer_pos, num_submissions) | (op << kCommitKindShift));
    if (claim.body != nullptr) arena_producer_pos = claim.arena_pos + align_arena(claim.body_bytes);
    producer_pos += 1;
    st_relaxed_sys(&queue_pair->ingress.submission_producer_pos, producer_pos);  // relaxed: for observers only
  }

  // A whole request.
  BK_INLINE u32 try_submit(const RequestOrder& order) {
    const u64 num_ids = static_cast<u64>(order.num_stop_ids) + order.num_prompt_tokens;
    const u64 body_bytes = sizeof(RequestBody) + num_ids * sizeof(u32) + static_cast<u64>(order.num_logit_bias) * sizeof(LogitBias);
    SubmissionClaim claim;
    const u32 status = try_claim(body_bytes, &claim);
    if (status != kPortOk) return status;
    RequestBody* body = reinterpret_cast<RequestBody*>(claim.body);
    *body = RequestBody{};
    body->sampling = order.sampling;
    body->sampling.num_logit_bias = order.num_logit_bias;
    body->num_stop_ids = order.num_stop_ids;
    body->num_prior_outputs = order.num_prior_outputs;
    body->flags = order.flags;
    body->constraint = order.constraint;
    body->constraint_state = order.constraint_state;
    u32* stop_ids = reinterpret_cast<u32*>(body + 1);
    for (u32 i = 0; i < order.num_stop_ids; ++i) stop_ids[i] = order.stop_ids[i];
    LogitBias* logit_bias = reinterpret_cast<LogitBias*>(stop_ids + order.num_stop_ids);
    for (u32 i = 0; i < order.num_logit_bias; ++i) logit_bias[i] = order.logit_bias[i];
    u32* prompt_ids = reinterpret_cast<u32*>(logit_bias + order.num_logit_bias);
    for (u32 i = 0; i < order.num_prompt_tokens; ++i) prompt_ids[i] = order.prompt_ids[i];
    SubmissionEntry words{};
    words.request_id = order.request_id;
    words.num_prompt_tokens = order.num_prompt_tokens;
    words.max_tokens = order.max_tokens;
    words.priority = order.priority;
    words.timeout_ns = order.timeout_ns;
    words.cache_salt = order.cache_salt;
    commit(claim, kSubmissionRequest, words);
    return kPortOk;
  }

  // Pieces of a constraint automaton from *offset on, as many as there is room for; *offset moves on. kPortOk: the whole is committed.
  // table: u8 [table_bytes], the caller's, with the same bytes in each call.
  BK_INLINE u32 try_load_constraint(u32 slot, const u8* table, u64 table_bytes, u64* offset) {
    const u64 most_bytes = arena_bytes / 4 < kConstraintPieceBytes ? arena_bytes / 4 : kConstraintPieceBytes;
    while (*offset < table_bytes) {
      const u64 piece_bytes = table_bytes - *offset < most_bytes ? table_bytes - *offset : most_bytes;
      SubmissionClaim claim;
      const u32 status = try_claim(piece_bytes, &claim);
      if (status != kPortOk) return status;
      for (u64 i = 0; i < piece_bytes; ++i) claim.body[i] = table[*offset + i];
      SubmissionEntry words{};
      words.request_id = slot;
      words.client_ns = *offset;
      commit(claim, kSubmissionConstraint, words);
      *offset += piece_bytes;
    }
    return kPortOk;
  }

  // CANCEL or PING.
  BK_INLINE u32 try_operation(u32 op, u64 request_id, u64 client_ns) {
    SubmissionClaim claim;
    const u32 status = try_claim(0, &claim);
    if (status != kPortOk) return status;
    SubmissionEntry words{};
    words.request_id = request_id;
    words.client_ns = client_ns;
    commit(claim, op, words);
    return kPortOk;
  }

  // ---- Completions -----------------------------------------------------------------------------------------------
  BK_INLINE bool has_completion() const {
    // Acquire pairs with the director's release of the commit word, as in poll().
    const u32 commit_word = ld_acquire_sys(&completions[consumer_pos & (num_completions - 1)].commit);
    return attached && (commit_word & kCommitParityMask) == commit_parity(consumer_pos, num_completions);
  }

  // Copies up to max_entries completions to `out` and gives their entries back. After a drop what was published before is
  // still there to be read; after a takeover nothing is (I5).
  BK_INLINE u32 poll(CompletionEntry* out, u32 max_entries) {
    if (!attached || !owns()) return 0;
    u32 num_read = 0;
    while (num_read < max_entries) {
      const CompletionEntry& entry = completions[consumer_pos & (num_completions - 1)];
      // Acquire pairs with the director's release of the commit word (publish in director_port.cuh): the entry stands before it.
      const u32 commit_word = ld_acquire_sys(&entry.commit);
      if ((commit_word & kCommitParityMask) != commit_parity(consumer_pos, num_completions)) break;
      CompletionEntry& copy = out[num_read];
      copy.commit = commit_word;
      copy.token = entry.token;
      copy.request_id = entry.request_id;
      copy.index = entry.index;
      copy.logprob = entry.logprob;
      copy.device_ns = entry.device_ns;
      consumer_pos += 1;
      num_read += 1;
    }
    // Release pairs with the director's acquire of completion_consumer_pos: the copies stand before the entries are free (I4).
    if (num_read > 0) st_release_sys(&queue_pair->ingress.completion_consumer_pos, consumer_pos);
    return num_read;
  }
};

}  // namespace blinkimp
