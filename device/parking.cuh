// Parking: an engine without work for parked_after_ns leaves the GPU; the host launches it again when somebody wants something.
//
// All state lies in device memory, so a second launch goes on: attached ingresses, prefix cache, epochs, positions, counters. No submission
// is lost between the last look and the exit: it is in the ring, and the host compares ring positions for as long as the engine is
// parked (host/parking.py). Called by device/director_loop.cuh and emu/emulated_device.cpp. Test: pytest tests/host/test_parking.py
//
// Invariants (asserted by tests):
//   Q1  a parked engine has no live request, no staged completion and no step in flight.
//   Q2  what an ingress submits while the engine is parked is taken by the next launch, once.
#pragma once
#include <director.cuh>

namespace blinkimp {

// All lanes, after a poll that found the engine quiet. True once that has been so for parked_after_ns.
BK_INLINE bool director_may_park(const EngineParams& params, const Lanes& lanes) {
  if (params.parked_after_ns == 0) return false;
  DirectorState& state = director_state(params);
  bool is_busy = false;
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) {
    const QueuePairState& queue_pair = state.queue_pairs[q];
    is_busy |= num_live(queue_pair) > 0 || queue_pair.has_entry || queue_pair.positions_changed;
  }
  is_busy = lanes.any(is_busy || state.command != kCommandRun || state.is_stopped);
  const bool is_due = lanes.any(!is_busy && state.quiet_since_ns != 0 && state.now_ns - state.quiet_since_ns > params.parked_after_ns);
  lanes.sync();  // hazard: lane 0 changes the time that the others compared
  if (lanes.is_first()) {
    if (is_busy) state.quiet_since_ns = 0;
    else if (state.quiet_since_ns == 0) state.quiet_since_ns = state.now_ns;
  }
  return is_due;
}

// All lanes. Says goodbye; the caller leaves, and with it the workers.
BK_INLINE void director_park(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  lanes.sync();  // hazard: other lanes still read what lane 0 changes
  if (lanes.is_first()) {
    state.is_parked = 1;
    state.quiet_since_ns = 0;
    trace_event(params, state.trace, device_clock_ns(), kTraceParked, 0, state.status.step, 0, 0);
  }
  director_publish(params, lanes);
}

// All lanes. At every launch: a first one finds zeroed memory, a later one what the one before left.
BK_INLINE void director_launch(const EngineParams& params, const Lanes& lanes) {
  DirectorState& state = director_state(params);
  const bool resumes = lanes.any(state.is_parked != 0);
  if (!resumes) {
    director_init(params, lanes);
    return;
  }
  const u64 now_ns = lanes.clock_ns();
  // Nobody looked at the heartbeats meanwhile.
  for (u32 q = lanes.id; q < params.num_queue_pairs; q += lanes.count) state.queue_pairs[q].heartbeat_changed_ns = now_ns;
  lanes.sync();  // hazard: all lanes have seen is_parked
  if (lanes.is_first()) {
    state.is_parked = 0;
    state.now_ns = now_ns;
    state.arrived_ns = 0;
    // Workers count steps from 0 at each launch, and plans and samples are double-buffered by parity: this one must start with an even one.
    state.status.step += state.status.step & 1;
    trace_event(params, state.trace, now_ns, kTraceResumed, 0, state.status.step, 0, 0);
  }
  lanes.sync();  // hazard: the first poll reads the state in other lanes
  director_publish(params, lanes);
}

}  // namespace blinkimp
