// Faults: how the device says what went wrong before it stops. The first fault wins.
//
// Called by every wait with a budget, by the director's integrity check, by the interpreters for an op they do not know.
// Recording never traps. What then happens is the caller's: the director and the emulated device leave in order (fault_recorded()); a GPU
// worker, whose neighbours wait for it without end, traps once the record stands in host memory (fail() in worker_memory.cuh).
// Test: pytest tests/host/test_director_integrity.py
#pragma once
#include <ptx.cuh>

namespace blinkimp {

// Which wait or check failed. 1-99: director, 100-199: persistent kernel, 200-: emulated device.
enum FaultSite : u32 {
  kSiteDirectorInit = 1,         // params or a queue pair header that cannot be right
  kSiteDirectorOrder = 2,        // plan/commit called out of order (expected and seen: step in flight)
  kSiteSampledToken = 3,         // workers returned a token >= vocab
  kSitePageCount = 10,           // free + used + cached != total
  kSitePageTwice = 11,           // a page that is referenced twice or never
  kSitePageOwner = 12,           // page_owners disagrees with a page table or the free stack
  kSitePageNeed = 13,            // a request holds fewer pages than its KV entries need
  kSiteRequestCount = 14,        // the states of the request table do not add up
  kSiteQueueCount = 15,          // a queue pair's lists disagree with its counters
  kSiteRunningList = 16,         // the running list names a request that does not run
  kSiteCredit = 17,              // completions beyond the ring
  kSiteRequestBalance = 18,      // accepted != finished + live
  kSiteRequestLookup = 19,       // a live request that the lookup does not find
  kSitePrefixCache = 20,         // a page of the prefix cache that the lookup or the LRU ring does not know
  kSiteGridBarrier = 100,        // a grid barrier outlived its budget
  kSiteStepWait = 102,           // the director waited for the workers
  kSiteWeightRing = 103,         // a stage of the shared-memory ring outlived its budget
  kSiteUnknownOp = 104,
  kSiteInputRing = 105,          // likewise, of the activations
  kSiteScales = 107,             // likewise, of the row scales
  kSiteProducers = 106,          // the compute threads waited for their producers at a step's end
  kSiteAttentionWindows = 108,   // more window sizes among the layers than attention plans for
  kSiteAttentionSchedule = 109,  // the step's schedule of attention was not ready in time
  kSitePace = 110,               // a weight producer waited for those of the other CTAs
  kSiteEmulatedOp = 200,
};

// The first words of director_state, so that code which does not know the director can record a fault.
struct FaultLatch {
  u64 taken;  // 0, or 1 once somebody records: an exchange says who was first
  u64 step;   // written by director_plan: the step that the plan is for
};

BK_INLINE FaultLatch* fault_latch(const EngineParams& params) { return reinterpret_cast<FaultLatch*>(params.director_state); }

BK_INLINE bool fault_recorded(const EngineParams& params) {
  return ld_relaxed_sys(&fault_latch(params)->taken) != 0;  // relaxed: a hint to leave, no data is read through it
}

// Returns true to the caller whose record it became. The latch lies in device memory: PCIe has no atomics to rely on.
BK_INLINE bool record_fault(const EngineParams& params, u32 code, u32 site, u64 expected, u64 seen) {
  FaultLatch* latch = fault_latch(params);
  if (exchange_acq_rel_sys(&latch->taken, 1) != 0) return false;
  EnginePage* page = reinterpret_cast<EnginePage*>(params.engine_page);
  FaultRecord* record = &page->fault;
#if BK_GPU
  st_relaxed_sys(&record->block_idx, blockIdx.x);
  st_relaxed_sys(&record->thread_idx, threadIdx.x);
#else
  st_relaxed_sys(&record->block_idx, u32{0});
  st_relaxed_sys(&record->thread_idx, u32{0});
#endif
  st_relaxed_sys(&record->site, site);
  st_relaxed_sys(&record->expected, expected);
  st_relaxed_sys(&record->seen, seen);
  st_relaxed_sys(&record->device_ns, device_clock_ns());
  st_relaxed_sys(&record->step, ld_relaxed_sys(&latch->step));  // relaxed: any step of late is good enough in a report
  st_release_sys(&record->code, code);  // pairs with the watchdog's acquire of fault.code: a non-zero code has a whole record
  st_relaxed_sys(&page->status.state, static_cast<u32>(kEngineFaulted));  // the director keeps it from here on (publish_status)
  return true;
}

}  // namespace blinkimp
