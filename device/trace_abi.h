// The trace of one engine: rings of events in shared memory of their own, written by the device and by each ingress, read by anyone who maps them.
//
// Region: TraceRegion, events at header.events_offset, op times at header.op_times_offset. Each ingress has a region of the same form, in the
// host's time, without op times. The ring is a flight recorder: the writer never
// waits and overwrites the oldest; a reader that is too slow knows how many events it lost, by producer_pos (host/trace_reader.py).
// Data only; tools/gen_abi.py mirrors this file. The writer is device/trace.cuh. Test: pytest tests/compile/test_ring_abi.py
#pragma once
#include <ring_abi.h>

namespace blinkimp {

constexpr u64 kTraceMagic = 0x31305254'4b4e4c42;  // "BLNKTR01"
constexpr u32 kTraceVersion = 1;
constexpr u32 kMaxTraceBurst = 8192;        // events written, at most, before producer_pos says so: a reader keeps that far from the writer
constexpr u32 kLeastTraceEvents = 65536;    // smallest ring

enum TraceKind : u32 {  // argument; step and request_id are valid where they make sense
  kTraceStepStart = 1,   // the plan was published: rows | sequences << 32 | sampled rows << 48
  kTraceStepEnd = 2,     // the last worker's arrival was seen
  kTraceCommit = 3,      // the director has committed the step: requests that ended | tokens << 32
  kTracePolled = 4,      // a submission was taken: its client_ns; request_id as it says. The time: when its commit word was first seen
  kTraceQueued = 5,      // accepted: prompt tokens | max_tokens << 32
  kTraceAdmitted = 6,    // entered the batch: tokens found in the prefix cache | pages << 32
  kTraceChunk = 7,       // prompt rows were computed: first position | rows << 32
  kTraceToken = 8,       // sampled: output position | token << 32
  kTraceStalled = 9,     // left out of the step for lack of completion credit
  kTracePreempted = 10,  // lost its pages: tokens to compute again
  kTraceFinished = 11,   // FinishReason | output tokens << 32
  kTraceOpTimes = 12,    // op times of the step stand in slot `argument`
  kTraceParked = 13,     // the kernel left for lack of work
  kTraceResumed = 14,    // and was launched again
  // Of an ingress, in the ring of its queue pair, by the host's clock (nic_shim/ingress_trace.py). request_id as on the submission ring.
  kTraceReceived = 64,       // the client's request was there: prompt tokens | max_tokens << 32
  kTraceClaimed = 65,        // it is about to be written to the submission ring: 1 = again, after an engine was lost
  kTraceCommitted = 66,      // it stands there
  kTraceFirstDrained = 67,   // its first token was read from the completion ring
  kTraceStreamed = 68,       // and handed to the client's connection
  kTraceFinishDrained = 69,  // its end was read: 1 = an error, 0 = FINISH
  kTraceEnded = 70,          // all of it was handed to the client's connection: output tokens
  kTraceCancelAsked = 71,    // the client cancelled it, or has gone
  kTraceDrained = 72,        // a look at the completion ring that found something: requests with news | unfinished requests << 32
  // Sampled by `blinkimp trace record`, by the host's clock (blinkimp/trace/recorder.py).
  kTraceRings = 96,          // entries that the director has not taken yet | completions that the ingress has not read yet << 32
  kTraceBatch = 97,          // running requests | waiting ones << 32
  kTracePages = 98,          // KV pages in use | unreferenced ones of the prefix cache << 32
};

struct TraceEvent {
  u64 time_ns;      // device clock
  u16 kind;         // TraceKind
  u16 queue_pair_idx;
  u32 step;         // low half of the step's number
  u64 request_id;
  u64 argument;
};
ABI_SIZE(TraceEvent, 32);
ABI_AT(TraceEvent, request_id, 16);

struct TraceHeader {  // written by the host before the launch, then constant
  u64 magic;
  u32 version;
  u32 num_queue_pairs;
  u64 engine_id;
  u64 num_events;        // of the ring, a power of two
  u64 events_offset;     // TraceEvent [num_events]
  u64 region_bytes;
  // Op times, of every op_period-th step: u64 [num_op_slots][num_ops][num_workers][2], when a worker began an op and was done with it.
  u32 op_period;         // 0 = none
  u32 num_op_slots;      // sampled step k is in slot k % num_op_slots
  u32 num_ops;
  u32 num_workers;
  u64 op_times_offset;
  u64 info_offset;       // JSON: the engine's configuration, the model, names of ops; 0 = none (an ingress's)
  u64 info_bytes;
  u64 reserved[5];
};
ABI_SIZE(TraceHeader, 128);

struct TraceLine {  // writer: the director; reader: anyone
  u64 producer_pos;      // events below it are written; of them the last num_events are there
  u64 reserved[15];
};
ABI_SIZE(TraceLine, 128);

struct TraceRegion {
  TraceHeader header;
  TraceLine line;
  u64 reserved[32];
};
ABI_SIZE(TraceRegion, 512);
ABI_AT(TraceRegion, line, 128);

}  // namespace blinkimp
