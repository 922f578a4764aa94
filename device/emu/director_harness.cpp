// C interface of the director for tests: each call of device/DESIGN.md's table, and a look inside.
//
// Called by tests/host/director_rig.py through ctypes. Compiled a second time with -DBK_TEST_LANES and tests/host/lanes first on the
// include path, it runs every call on several lanes, each a thread: what a warp does on the GPU.
// Test: pytest tests/host -k director
#include <director.cuh>
#include <idle.cuh>

namespace blinkimp {
namespace {

#if defined(BK_TEST_LANES)
template <typename Call>
void on_lanes(Call call) {
  run_on_test_lanes(call);
}
#else
template <typename Call>
void on_lanes(Call call) {
  call(Lanes::single());
}
#endif

}  // namespace
}  // namespace blinkimp

using namespace blinkimp;

extern "C" {

u32 bk_director_num_lanes() {
  u32 num_lanes = 0;
  on_lanes([&](const Lanes& lanes) {
    if (lanes.is_first()) num_lanes = lanes.count;
  });
  return num_lanes;
}

u64 bk_director_plan_bytes(const EngineParams* params) { return plan_bytes(*params); }

u64 bk_director_prefix_cache_bytes(const EngineParams* params) { return prefix_cache_bytes(*params); }

void bk_director_init(const EngineParams* params) {
  on_lanes([&](const Lanes& lanes) { director_init(*params, lanes); });
}

void bk_director_poll(const EngineParams* params) {
  on_lanes([&](const Lanes& lanes) { director_poll(*params, lanes); });
}

u32 bk_director_plan(const EngineParams* params, StepPlan* plan) {
  u32 num_rows = 0;
  on_lanes([&](const Lanes& lanes) {
    const u32 rows = director_plan(*params, lanes, plan);
    if (lanes.is_first()) num_rows = rows;
  });
  return num_rows;
}

// 1: there is a plan for the step after the one in flight, 2: there is, but it is better started after the commit.
u32 bk_director_plan_ahead(const EngineParams* params, StepPlan* plan) {
  u32 answer = 0;
  on_lanes([&](const Lanes& lanes) {
    const bool has_plan = director_plan_ahead(*params, lanes, plan);
    if (lanes.is_first()) answer = has_plan ? 1 + director_state(*params).next_waits : 0;
  });
  return answer;
}

u32 bk_director_every_seq_was_stopped(const EngineParams* params, const StepPlan* next) {
  u32 answer = 0;
  on_lanes([&](const Lanes& lanes) {
    const bool all = every_seq_was_stopped(*params, lanes, next);
    if (lanes.is_first()) answer = all ? 1 : 0;
  });
  return answer;
}

void bk_director_note_arrival(const EngineParams* params, u64 arrived_ns) {
  on_lanes([&](const Lanes& lanes) { director_note_arrival(*params, lanes, arrived_ns); });
}

void bk_director_start_next(const EngineParams* params, u64 start_ns) {
  on_lanes([&](const Lanes& lanes) { director_start_next(*params, lanes, start_ns); });
}

void bk_director_note_start(const EngineParams* params, u64 start_ns) {
  on_lanes([&](const Lanes& lanes) { director_note_start(*params, lanes, start_ns); });
}

void bk_director_commit(const EngineParams* params, const StepPlan* plan) {
  on_lanes([&](const Lanes& lanes) { director_commit(*params, lanes, plan); });
}

void bk_director_publish(const EngineParams* params) {
  on_lanes([&](const Lanes& lanes) { director_publish(*params, lanes); });
}

// Of an idle engine; timeout_ns from now.
void bk_director_wait(const EngineParams* params, u64 timeout_ns) {
  const u64 until_ns = device_clock_ns() + timeout_ns;
  on_lanes([&](const Lanes& lanes) { director_wait(*params, lanes, until_ns); });
}

// 1: all invariants hold. 0: the engine page has the fault.
u32 bk_director_check_integrity(const EngineParams* params) {
  u32 holds = 0;
  on_lanes([&](const Lanes& lanes) {
    const bool lane_holds = director_check_integrity(*params, lanes);
    if (lanes.is_first()) holds = lane_holds ? 1 : 0;
  });
  return holds;
}

// Makes the heartbeat of a queue pair look `age_ns` older than it is, so that a test need not wait for a timeout.
void bk_director_age_heartbeat(const EngineParams* params, u32 queue_pair_idx, u64 age_ns) {
  director_state(*params).queue_pairs[queue_pair_idx].heartbeat_changed_ns -= age_ns;
}

// And a request longer on its way, so that a test need not wait for aging and deadlines.
void bk_director_age_request(const EngineParams* params, u32 request_idx, u64 age_ns) {
  request_at(*params, request_idx)->accepted_ns -= age_ns;
  director_state(*params).earliest_deadline_ns = 0;
}

// The same for the pause between two integrity checks of an idle director.
void bk_director_age_integrity(const EngineParams* params, u64 age_ns) { director_state(*params).integrity_ns -= age_ns; }

// out: [max_batch] request indices. Returns how many run.
u32 bk_director_running(const EngineParams* params, u32* out) {
  const DirectorState& state = director_state(*params);
  for (u32 i = 0; i < state.status.num_running; ++i) out[i] = state.running[i];
  return state.status.num_running;
}

// out: [2]: free pages, pages that only the prefix cache keeps
void bk_director_pages(const EngineParams* params, u64* out) {
  const PageAllocator& pages = director_state(*params).pages;
  out[0] = pages.num_free;
  out[1] = pages.num_cached;
}

// out: [11], see director_rig.RequestView
void bk_director_request(const EngineParams* params, u32 request_idx, u64* out) {
  const Request& request = *request_at(*params, request_idx);
  const u64 values[] = {request.state,     request.flags,        request.queue_pair_idx, request.request_id,
                        request.num_prompt_tokens, request.max_tokens, request.num_tokens,     request.num_computed,
                        request.num_pages, request.finish_reason, request.num_preemptions};
  for (u32 i = 0; i < sizeof(values) / sizeof(values[0]); ++i) out[i] = values[i];
}

// out: [13], see director_rig.QueuePairView
void bk_director_queue_pair(const EngineParams* params, u32 queue_pair_idx, u64* out) {
  const QueuePairState& queue_pair = director_state(*params).queue_pairs[queue_pair_idx];
  const u64 values[] = {queue_pair.epoch,
                        queue_pair.submission_consumer_pos,
                        queue_pair.arena_consumer_pos,
                        queue_pair.completion_published_pos,
                        queue_pair.completion_consumer_pos,
                        queue_pair.num_staged,
                        queue_pair.num_promised,
                        queue_pair.num_waiting,
                        queue_pair.num_running,
                        queue_pair.num_finishing,
                        completion_credit(queue_pair),
                        queue_pair.has_entry,
                        director_state(*params).num_staged};
  for (u32 i = 0; i < sizeof(values) / sizeof(values[0]); ++i) out[i] = values[i];
}

// The words that a test damages to see the integrity check find it: kind 0 num_free pages, 1 a page table's entry, 2 page_owners,
// 3 the running list, 4 num_waiting of a queue pair, 5 credit, 6 requests_accepted, 7 num_computed, 8 a request's id, 9 a stack entry.
void bk_director_damage(const EngineParams* params, u32 kind, u32 where, u32 value) {
  DirectorState& state = director_state(*params);
  switch (kind) {
    case 0: state.pages.num_free = value; break;
    case 1: request_pages(*params, where)[0] = value; break;
    case 2: page_owners(*params)[where] = value; break;
    case 3: state.running[where] = value; break;
    case 4: state.queue_pairs[where].num_waiting = value; break;
    case 5: state.queue_pairs[where].num_promised = value; break;
    case 6: state.status.requests_accepted = value; break;
    case 7: request_at(*params, where)->num_computed = value; break;
    case 8: request_at(*params, where)->request_id = value; break;
    case 9: free_page_stack(*params)[where] = value; break;
  }
}

}  // extern "C"
