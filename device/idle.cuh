// Idle: a director with nothing to do looks for the next submission and for nothing else, because how soon it sees one is what an idle engine
// is asked for. A poll is a round trip over PCIe and some fifteen dependent reads of L2: on average a submission would wait for half of that.
//
// Called by device/director_loop.cuh between polls; an emulated device sleeps instead (emu/idle_backoff.h). Test: pytest tests/host/test_idle.py
//
//   lane q:   look at the commit word of the next submission -> not there -> look again ...      no other read, and no sleep
//
// A submission is seen half a round trip to one and a half after its commit: 1.4 us (0.7 to 2.1). Cost: one read of 32 bytes per attached queue pair
// and round trip, 25 MB/s of PCIe's 50 GB/s. Two looks on their way at a time would be seen 0.35 us sooner; written so, the assembler of NVRTC 13.0 gave
// both loads one scoreboard and waited for both.
//
// Invariants (asserted by tests):
//   Z1  a look is a hint, of which nothing but its moment is kept (seen_ns): the poll that follows reads the word again, with acquire order.
//   Z2  whoever needs more than commit words (a first attach, credit for an entry that was left or for a FINISH) is not waited for: then this is a
//       pause, and the polls go on. An attach beside queue pairs in use waits for the next poll, at until_ns.
#pragma once
#include <director_port.cuh>

namespace blinkimp {

// All lanes, one a queue pair, when director_is_quiet(). Returns at the sight of a submission, else at until_ns (of Lanes::clock_ns()).
BK_NOINLINE void director_wait(const EngineParams& params, const Lanes& lanes, u64 until_ns) {
  DirectorState& state = director_state(params);
  bool is_looking = false;
  bool must_poll = state.status.num_finishing > 0 || lanes.count < params.num_queue_pairs;
  u32 awaited_parity = 0;
  const u32* word = &state.is_stopped;  // lanes without a queue pair look at a word of ours: one instruction loads for all
  if (lanes.id < params.num_queue_pairs) {
    const QueuePairState& queue_pair = state.queue_pairs[lanes.id];
    is_looking = is_attached(queue_pair);
    must_poll |= queue_pair.has_entry != 0;
    awaited_parity = commit_parity(queue_pair.submission_consumer_pos, queue_pair.num_submissions);
    if (is_looking) word = &submission_at(queue_pair, queue_pair.submission_consumer_pos)->commit;
  }
  if (lanes.any(must_poll) || !lanes.any(is_looking)) return sleep_ns(params.idle_sleep_ns);

  for (;;) {
    const u32 seen = ld_relaxed_sys(word);  // relaxed: Z1
    const bool is_there = is_looking && (seen & kCommitParityMask) == awaited_parity;
    if (lanes.any(is_there)) {
      if (is_there) state.queue_pairs[lanes.id].seen_ns = device_clock_ns();
      lanes.sync();  // hazard: lane 0 takes over in the next call
      return;
    }
    if (lanes.clock_ns() >= until_ns) return;
  }
}

}  // namespace blinkimp
