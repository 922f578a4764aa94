// The director's side of the queue pairs: attach and leave, look for submissions, credit, publish completions.
//
// Called by director.cuh; the other end is ingress_port.cuh. RING.md shows each step with a figure.
// Test: pytest tests/host/test_ring_director.py tests/host/test_sanitizers.py
//
// Every read of a queue pair is a PCIe round trip of about a microsecond, so one lane looks after one queue pair, asks for all its words
// before it waits for the first, and an entry that was read once is kept (has_entry) until it is taken.
//
// Invariants (asserted by tests, the last two by director_check_integrity):
//   D1  director.epoch answers the highest epoch the ingress asked for, unless that is nonsense (ring_abi.h); it is odd only while the
//       ingress's heartbeat moves.
//   D2  an entry is taken only after its commit word was read with acquire order, once, and in the order of positions.
//   D3  submission and arena positions are stored after the entry and body below them were copied.
//   D4  a completion's commit word is written after the rest of it, and only over an entry that the ingress has read (C1).
//   D5  an attach starts from completions that are all read, submissions that are all taken, and no live request.
#pragma once
#include <request_life.cuh>

namespace blinkimp {

BK_INLINE SubmissionEntry* submission_at(const QueuePairState& queue_pair, u64 pos) {
  return reinterpret_cast<SubmissionEntry*>(queue_pair.submissions) + (pos & (queue_pair.num_submissions - 1));
}

BK_INLINE CompletionEntry* completion_at(const QueuePairState& queue_pair, u64 pos) {
  return reinterpret_cast<CompletionEntry*>(queue_pair.completions) + (pos & (queue_pair.num_completions - 1));
}

// ---- Open --------------------------------------------------------------------------------------------------------
// One lane per queue pair. False: the header cannot be right. A region that an earlier launch used goes on from its positions.
BK_INLINE bool open_queue_pair(const EngineParams& params, QueuePairState& queue_pair, u32 queue_pair_idx) {
  queue_pair.region = params.queue_pairs[queue_pair_idx];
  QueuePair& region = queue_pair_region(queue_pair);
  const QueuePairHeader& header = region.header;
  if (check_queue_pair_header(header, header.region_bytes).field != kHeaderOk) return false;
  queue_pair.submissions = queue_pair.region + header.submissions_offset;
  queue_pair.completions = queue_pair.region + header.completions_offset;
  queue_pair.arena = queue_pair.region + header.arena_offset;
  queue_pair.arena_bytes = header.arena_bytes;
  queue_pair.num_submissions = header.num_submissions;
  queue_pair.num_completions = header.num_completions;
  // Relaxed: these words are our own, from an earlier launch; the launch of this one ordered them.
  queue_pair.submission_consumer_pos = ld_relaxed_sys(&region.director.submission_consumer_pos);
  queue_pair.arena_consumer_pos = ld_relaxed_sys(&region.director.arena_consumer_pos);
  u64 published_pos = ld_relaxed_sys(&region.director.completion_producer_pos);
  // The last launch may have stopped between commit words and their count. Relaxed: only parity is looked at, nothing behind it.
  for (u32 i = 0; i < queue_pair.num_completions; ++i) {
    const u32 parity = ld_relaxed_sys(&completion_at(queue_pair, published_pos)->commit) & kCommitParityMask;
    if (parity != commit_parity(published_pos, queue_pair.num_completions)) break;
    published_pos += 1;
  }
  queue_pair.completion_published_pos = published_pos;
  queue_pair.completion_consumer_pos = published_pos;
  queue_pair.consumer_is_sane = 1;
  // Requests of the earlier launch are gone, so its ingress must attach again: leave an odd epoch behind.
  const u64 answered = ld_relaxed_sys(&region.director.epoch);
  queue_pair.epoch = (answered & 1) ? answered + 1 : answered;
  if (queue_pair.epoch != answered) st_release_sys(&region.director.epoch, queue_pair.epoch);  // pairs with state() of ingress_port.cuh
  queue_pair.finishing_first_idx = queue_pair.finishing_last_idx = kNoRequest;
  return true;
}

// ---- Look --------------------------------------------------------------------------------------------------------
// Copies the next submission if it is committed (D2). One lane per queue pair.
BK_INLINE bool fetch_entry(QueuePairState& queue_pair, u32 commit_word) {
  const u64 pos = queue_pair.submission_consumer_pos;
  if ((commit_word & kCommitParityMask) != commit_parity(pos, queue_pair.num_submissions)) return false;
  if (queue_pair.seen_ns == 0) queue_pair.seen_ns = device_clock_ns();
  // Through registers: copied word by word into the state, each load would wait for the store before it, which might alias.
  const SubmissionEntry* entry = submission_at(queue_pair, pos);
  SubmissionEntry copy;
  copy.commit = commit_word;
  copy.epoch = entry->epoch;
  copy.request_id = entry->request_id;
  copy.arena_pos = entry->arena_pos;
  copy.body_bytes = entry->body_bytes;
  copy.num_prompt_tokens = entry->num_prompt_tokens;
  copy.max_tokens = entry->max_tokens;
  copy.priority = entry->priority;
  copy.client_ns = entry->client_ns;
  copy.timeout_ns = entry->timeout_ns;
  copy.cache_salt = entry->cache_salt;
  queue_pair.entry = copy;
  queue_pair.has_entry = 1;
  return true;
}

// The commit word of the next submission. Acquire pairs with commit() of ingress_port.cuh.
BK_INLINE u32 read_commit_word(const QueuePairState& queue_pair) {
  return ld_acquire_sys(&submission_at(queue_pair, queue_pair.submission_consumer_pos)->commit);
}

// Credit: takes over the ingress's position if it can be right. Beyond what was published it is nonsense, and worth no credit.
BK_INLINE void update_consumer(QueuePairState& queue_pair, const IngressLine& ingress, u64 seen_pos) {
  queue_pair.consumer_is_sane = seen_pos <= queue_pair.completion_published_pos;
  // Lower than before: what the line still holds from before an attach. It is no news.
  if (!queue_pair.consumer_is_sane || seen_pos <= queue_pair.completion_consumer_pos) return;
  // Acquire pairs with poll() of ingress_port.cuh: its copies stand before the entries are free (D4). Read again, because the
  // first look was relaxed so that it need not be waited for when it brings no news.
  const u64 consumer_pos = ld_acquire_sys(&ingress.completion_consumer_pos);
  queue_pair.consumer_is_sane = consumer_pos <= queue_pair.completion_published_pos;
  if (queue_pair.consumer_is_sane && consumer_pos > queue_pair.completion_consumer_pos) queue_pair.completion_consumer_pos = consumer_pos;
}

// One lane per queue pair: all words of one poll. Returns true if an entry is ready to be taken; queue_pair.event says what else.
BK_INLINE bool look_at_queue_pair(const EngineParams& params, QueuePairState& queue_pair, u64 now_ns) {
  const IngressLine& ingress = queue_pair_region(queue_pair).ingress;
  const bool attached = is_attached(queue_pair);
  const bool wants_entry = attached && !queue_pair.has_entry;
  const SubmissionEntry* next = submission_at(queue_pair, queue_pair.submission_consumer_pos);  // where: known before the first word is asked for
  // Relaxed: each is looked at for itself; what hangs on one of them is read again with acquire order where it is acted upon.
  const u64 epoch = ld_relaxed_sys(&ingress.epoch);
  const u64 heartbeat = ld_relaxed_sys(&ingress.heartbeat_ns);
  const u64 consumer_pos = ld_relaxed_sys(&ingress.completion_consumer_pos);
  const u32 commit_word = wants_entry ? ld_acquire_sys(&next->commit) : 0;  // pairs with commit() of ingress_port.cuh
  queue_pair.event = kEventNone;
  if (epoch - queue_pair.epoch - 1 < kMostEpochsAhead) {  // D1; lower (it wraps) is what a dropped ingress left behind
    queue_pair.asked_epoch = epoch;
    queue_pair.event = (epoch & 1) ? kEventAttach : kEventDetach;
    return false;
  }
  if (!attached) return false;
  if (heartbeat != queue_pair.heartbeat) {
    queue_pair.heartbeat = heartbeat;
    queue_pair.heartbeat_changed_ns = now_ns;
  } else if (now_ns - queue_pair.heartbeat_changed_ns > params.ingress_timeout_ns) {
    queue_pair.event = kEventStale;
    return false;
  }
  update_consumer(queue_pair, ingress, consumer_pos);
  return queue_pair.has_entry || fetch_entry(queue_pair, commit_word);
}

// ---- Attach, leave -----------------------------------------------------------------------------------------------
// All lanes. Passes over what an earlier epoch committed: everything up to the first entry without this lap's parity.
BK_INLINE u64 skip_committed(const Lanes& lanes, const QueuePairState& queue_pair, u64 pos) {
  for (u32 num_seen = 0; num_seen < queue_pair.num_submissions; num_seen += lanes.count) {
    const u64 looked_at = pos + num_seen + lanes.id;
    // Relaxed: the entries are given up, not read; the new ingress overwrites them after it acquired director.epoch.
    const u32 parity = ld_relaxed_sys(&submission_at(queue_pair, looked_at)->commit) & kCommitParityMask;
    const bool empty = parity != commit_parity(looked_at, queue_pair.num_submissions);
    const u32 empty_mask = lanes.sum(empty ? 1u << lanes.id : 0);
    if (empty_mask == 0) continue;
    u32 num_committed = 0;
    while (!(empty_mask >> num_committed & 1)) num_committed += 1;
    return pos + num_seen + num_committed;
  }
  return pos + queue_pair.num_submissions;
}

// All lanes. The queue pair's event: D5 on an attach, D1 always.
BK_INLINE void handle_event(const EngineParams& params, const Lanes& lanes, DirectorState& state, u32 queue_pair_idx) {
  QueuePairState& queue_pair = state.queue_pairs[queue_pair_idx];
  QueuePair& region = queue_pair_region(queue_pair);
  const u32 event = queue_pair.event;
  u64 submission_pos = queue_pair.submission_consumer_pos;
  if (event == kEventAttach) submission_pos = skip_committed(lanes, queue_pair, submission_pos);
  lanes.sync();  // hazard: lane 0 changes the positions that the others still read above
  if (lanes.is_first()) {
    drop_requests(params, state, queue_pair_idx);
    queue_pair.has_entry = 0;
    queue_pair.seen_ns = 0;
    queue_pair.positions_changed = 0;
    if (event == kEventStale) {
      queue_pair.epoch += 1;
      state.status.ingress_drops += 1;
    } else {
      queue_pair.epoch = queue_pair.asked_epoch;
    }
    if (event == kEventAttach) {
      // Acquire pairs with try_attach() of ingress_port.cuh: the heartbeat was fresh before the epoch was asked for.
      ld_acquire_sys(&region.ingress.epoch);
      queue_pair.heartbeat = ld_relaxed_sys(&region.ingress.heartbeat_ns);
      queue_pair.heartbeat_changed_ns = state.now_ns;
      queue_pair.submission_consumer_pos = submission_pos;
      queue_pair.arena_consumer_pos = align_arena(queue_pair.arena_consumer_pos);
      queue_pair.completion_consumer_pos = queue_pair.completion_published_pos;
      queue_pair.consumer_is_sane = 1;
      st_relaxed_sys(&region.director.submission_consumer_pos, queue_pair.submission_consumer_pos);
      st_relaxed_sys(&region.director.arena_consumer_pos, queue_pair.arena_consumer_pos);
      st_relaxed_sys(&region.director.completion_producer_pos, queue_pair.completion_published_pos);
    }
    // Release pairs with attach_answered() of ingress_port.cuh: the positions above stand before the answer.
    st_release_sys(&region.director.epoch, queue_pair.epoch);
  }
  lanes.sync();  // hazard: the next round looks at the queue pair in another lane
}

// ---- Give entries and arena bytes back ---------------------------------------------------------------------------
// One lane per queue pair, after a sync behind the copies (D3).
BK_INLINE void store_positions(QueuePairState& queue_pair) {
  if (!queue_pair.positions_changed) return;
  DirectorLine& line = queue_pair_region(queue_pair).director;
  // Fence and stores pair with the two acquires in try_claim() of ingress_port.cuh: entry and body are copied before they are overwritten.
  fence_publish_sys();
  st_publish_sys(&line.arena_consumer_pos, queue_pair.arena_consumer_pos);
  st_publish_sys(&line.submission_consumer_pos, queue_pair.submission_consumer_pos);
  queue_pair.positions_changed = 0;
}

// ---- Publish -----------------------------------------------------------------------------------------------------
// All lanes: staged completions -> rings. One fence for all of them.
BK_INLINE void publish_completions(const EngineParams& params, const Lanes& lanes, DirectorState& state) {
  const u32 num_staged = state.num_staged;
  if (num_staged == 0) return;
  // Positions: each queue pair's entries keep their order.
  u32 writing_mask = 0;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    if (state.queue_pairs[q].num_staged > 0) writing_mask |= 1u << q;
  }
  writing_mask = lanes.sum(writing_mask);
  for (u32 q = 0; writing_mask >> q != 0; ++q) {
    if (!(writing_mask >> q & 1)) continue;
    u32 position = static_cast<u32>(state.queue_pairs[q].completion_published_pos);
    for (u32 begin = 0; begin < num_staged; begin += lanes.count) {
      const u32 i = begin + lanes.id;
      const bool is_of_q = i < num_staged && state.staged[i].queue_pair_idx == q;
      const u32 num_entries = is_of_q ? 1 + staged_tops(state.staged[i]) : 0;
      const u32 rank = lanes.exclusive_sum(num_entries);
      if (is_of_q) state.staged[i].position = position + rank;
      position += lanes.sum(num_entries);
    }
    if (q == 31) break;  // a shift by 32 is undefined
  }
  // Entries, all but their commit words.
  for (u32 i = lanes.id; i < num_staged; i += lanes.count) {
    const StagedCompletion& staged = state.staged[i];
    if (staged.queue_pair_idx == kNoQueuePair) continue;
    CompletionEntry* entry = completion_at(state.queue_pairs[staged.queue_pair_idx], staged.position);
    entry->token = staged.entry.token;
    entry->request_id = staged.entry.request_id;
    entry->index = staged.entry.index;
    entry->logprob = staged.entry.logprob;
    entry->device_ns = staged.entry.device_ns;
    const u32 commit = staged.entry.commit;
    const SampleResult* top = top_logprobs_of_step(params, commit >> kStagedTopStepShift & 1) + u64{commit >> kStagedTopRowShift} * kMaxTopLogprobs;
    for (u32 k = 0; k < staged_tops(staged); ++k) {
      CompletionEntry* alternative = completion_at(state.queue_pairs[staged.queue_pair_idx], staged.position + 1 + k);
      alternative->token = top[k].token;
      alternative->request_id = staged.entry.request_id;
      alternative->index = k;
      alternative->logprob = top[k].logprob;
      alternative->device_ns = staged.entry.device_ns;
    }
  }
  // Commit words: fence and stores pair with the acquire in poll() of ingress_port.cuh (D4).
  fence_publish_sys();
  for (u32 i = lanes.id; i < num_staged; i += lanes.count) {
    const StagedCompletion& staged = state.staged[i];
    if (staged.queue_pair_idx == kNoQueuePair) continue;
    const QueuePairState& queue_pair = state.queue_pairs[staged.queue_pair_idx];
    const u32 num_tops = staged_tops(staged);
    const u32 commit = num_tops != 0 ? kCompletionToken << kCommitKindShift : staged.entry.commit;
    for (u32 k = 0; k <= num_tops; ++k) {
      const u32 parity = commit_parity(staged.position + k, queue_pair.num_completions);
      const u32 word = k == 0 ? commit : kCompletionTop << kCommitKindShift;
      st_publish_sys(&completion_at(queue_pair, staged.position + k)->commit, word | parity);
    }
  }
  lanes.sync();  // hazard: num_staged and the positions change below while other lanes still use them
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    QueuePairState& queue_pair = state.queue_pairs[q];
    if (queue_pair.num_staged == 0) continue;
    queue_pair.completion_published_pos += queue_pair.num_staged;
    queue_pair.num_staged = 0;
    // Relaxed: readers go by commit words; the resume position of an attach is stored by handle_event().
    st_relaxed_sys(&queue_pair_region(queue_pair).director.completion_producer_pos, queue_pair.completion_published_pos);
  }
  if (lanes.is_first()) state.num_staged = 0;
  lanes.sync();  // hazard: a caller stages again from position 0
}

}  // namespace blinkimp
