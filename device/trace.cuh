// The trace's writer: the director puts events into the ring of trace_abi.h, workers the times of their ops.
//
// Called by the director's modules where something happens to a request or a step. EngineParams.trace is 0 when there is no trace; that word
// lies in constant memory, so an untraced engine pays a compare (BK_NO_TRACE leaves that out, too: tools/bench_trace.py measures it). Events go
// out with posted writes; publish_trace() says how far they reach, with the fence that completions need anyway. Test: pytest tests/host/test_trace.py
//
// Invariants (asserted by tests):
//   V1  events of one request stand in the order in which they happened; times may run back, where they were taken before: POLLED's by the look
//       that first saw the submission, those of a step at its start or end.
//   V2  below producer_pos everything is written; above it at most kMaxTraceBurst events are.
#pragma once
#include <lanes.cuh>
#include <trace_abi.h>

namespace blinkimp {

#if defined(BK_NO_TRACE)
BK_INLINE bool is_traced(const EngineParams&) { return false; }
#else
BK_INLINE bool is_traced(const EngineParams& params) { return params.trace != 0; }
#endif

struct TraceWriter {   // part of DirectorState; writer: lane 0
  u64 events;          // TraceEvent [num_events]
  u64 num_events;      // copied at init, because the header lies in host memory
  u64 producer_pos;
  u64 published_pos;
};

BK_INLINE TraceRegion& trace_region(const EngineParams& params) { return *reinterpret_cast<TraceRegion*>(params.trace); }

// Lane 0. A second launch goes on where the first one stopped.
BK_INLINE void open_trace(const EngineParams& params, TraceWriter& trace) {
  if (!is_traced(params)) return;
  const TraceHeader& header = trace_region(params).header;
  trace.events = params.trace + header.events_offset;
  trace.num_events = header.num_events;
  trace.producer_pos = trace.published_pos = ld_relaxed_sys(&trace_region(params).line.producer_pos);  // relaxed: our own, of an earlier launch
}

BK_INLINE u64 pack_argument(u32 low, u32 high) { return u64{high} << 32 | low; }

// One lane. The event at a position that this lane was given.
BK_INLINE void write_trace_event(const TraceWriter& trace, u64 pos, u64 time_ns, u32 kind, u32 queue_pair_idx, u64 step, u64 request_id, u64 argument) {
  u64* words = reinterpret_cast<u64*>(trace.events + (pos & (trace.num_events - 1)) * sizeof(TraceEvent));
  // Relaxed: publish_trace() releases them.
  st_relaxed_sys(&words[0], time_ns);
  st_relaxed_sys(&words[1], u64{kind & 0xffff} | u64{queue_pair_idx & 0xffff} << 16 | step << 32);
  st_relaxed_sys(&words[2], request_id);
  st_relaxed_sys(&words[3], argument);
}

// Lane 0.
BK_INLINE void trace_event(const EngineParams& params, TraceWriter& trace, u64 time_ns, u32 kind, u32 queue_pair_idx, u64 step, u64 request_id,
                           u64 argument) {
  if (!is_traced(params)) return;
  write_trace_event(trace, trace.producer_pos, time_ns, kind, queue_pair_idx, step, request_id, argument);
  trace.producer_pos += 1;
}

// All lanes. What was written so far is there for readers.
BK_INLINE void publish_trace(const EngineParams& params, const Lanes& lanes, TraceWriter& trace) {
  if (!is_traced(params)) return;
  lanes.sync();  // events of all lanes before lane 0's release
  if (lanes.is_first() && trace.published_pos != trace.producer_pos) {
    st_release_sys(&trace_region(params).line.producer_pos, trace.producer_pos);  // pairs with TraceReader of host/trace_reader.py
    trace.published_pos = trace.producer_pos;
  }
}

// ---- Op times ----------------------------------------------------------------------------------------------------
enum OpMoment : u32 {
  kOpBegins = 0,
  kOpIsDone = 1,  // this worker's share, before it waits for the others
};

BK_INLINE bool op_times_wanted(const EngineParams& params, u64 step) {
  return is_traced(params) && params.trace_op_times != 0 && step % params.trace_op_period == 0;
}

BK_INLINE u64 op_times_slot(const EngineParams& params, u64 step) { return step / params.trace_op_period % params.num_trace_op_slots; }

// One thread of worker `worker_idx`. Two posted writes an op, on sampled steps only.
BK_INLINE void trace_op(const EngineParams& params, u64 step, u32 op_idx, u32 worker_idx, OpMoment moment) {
  if (!op_times_wanted(params, step)) return;
  const u64 row = (op_times_slot(params, step) * params.num_ops + op_idx) * params.num_workers + worker_idx;
  // Relaxed: the director's event of this step is released after it acquired the workers' arrivals.
  st_relaxed_sys(&reinterpret_cast<u64*>(params.trace_op_times)[row * 2 + moment], device_clock_ns());
}

}  // namespace blinkimp
