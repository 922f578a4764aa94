// Both ends of the queue pairs at full speed, for the sanitizers: one thread is the director, one the workers, two more are ingresses.
//
// The ingresses submit, cancel, ping, read in bursts, leave and attach again; each checks every completion it gets. Rings, arena and pages
// are small, prompts share their beginnings, so that laps, credit, preemption, hits and eviction happen all the time. Exit status 0: every
// request ended as it should and no page is lost.
// With -DBK_TEST_LANES the director runs on several threads as lanes. With -DBK_PLANT_<WHAT> one release store of this program's copy is
// weakened to relaxed, which ThreadSanitizer must report.
// Built and run by: pytest tests/host/test_sanitizers.py
#include <ptx.cuh>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <vector>

namespace blinkimp {

// The planted faults: the same store without its release. Each stands where the real one stood, in one file's one place.
#if defined(BK_PLANT_SUBMISSION_COMMIT)
inline void planted_release(u32* address, u32 value) { st_relaxed_sys(address, value); }   // the only u32 of ingress_port.cuh
inline void planted_release(u64* address, u64 value) { st_release_sys(address, value); }
#elif defined(BK_PLANT_CONSUMER_POS)
inline void planted_release(u32* address, u32 value) { st_release_sys(address, value); }
inline void planted_release(u64* address, u64 value) { st_relaxed_sys(address, value); }
#endif
#if defined(BK_PLANT_COMPLETION_COMMIT)
inline void planted_publish(u32* address, u32 value) { st_relaxed_sys(address, value); }
inline void planted_publish(u64* address, u64 value) { st_publish_sys(address, value); }
#endif

}  // namespace blinkimp

#if defined(BK_PLANT_SUBMISSION_COMMIT) || defined(BK_PLANT_CONSUMER_POS)
#define st_release_sys planted_release
#include <ingress_port.cuh>
#undef st_release_sys
#endif
#if defined(BK_PLANT_COMPLETION_COMMIT)
#define st_publish_sys planted_publish
#endif
#include <director.cuh>
#include <idle.cuh>

using namespace blinkimp;

namespace {

constexpr u32 kNumIngresses = 2;
constexpr u32 kVocab = 512;
constexpr u32 kEosId = 2;
constexpr u32 kNumSubmissions = 8;
constexpr u32 kNumCompletions = 16;
constexpr u64 kArenaBytes = 4096;
constexpr u64 kLongestWaitNs = 100000;

u32 expected_token(u64 request_id, u32 output_idx) {
  const u32 mixed = static_cast<u32>((request_id * 2654435761u + output_idx * 40503u) % 397u);
  return mixed == 0 ? kEosId : 3 + mixed;
}

#define CHECK(condition, ...)                                                    \
  do {                                                                           \
    if (!(condition)) {                                                          \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);            \
      fprintf(stderr, __VA_ARGS__);                                              \
      fprintf(stderr, "\n");                                                     \
      _exit(2);                                                                  \
    }                                                                            \
  } while (0)

// ---- The engine's memory -----------------------------------------------------------------------------------------
struct Engine {
  EngineParams params{};
  std::vector<std::unique_ptr<u64[]>> memory;

  u64 zeroed(u64 num_bytes) {
    memory.push_back(std::make_unique<u64[]>(num_bytes / 8 + 32));
    return (reinterpret_cast<u64>(memory.back().get()) + 127) / 128 * 128;
  }

  Engine() {
    params.num_queue_pairs = kNumIngresses;
    params.num_requests = 24;
    params.max_requests_per_queue_pair = 16;
    params.max_batch = 8;
    params.max_step_tokens = 64;
    params.prefill_chunk_tokens = 32;
    params.max_context = 256;
    params.max_pages_per_request = 4;
    params.num_pages = 8;
    params.ingress_timeout_ns = 60'000'000'000;
    params.idle_sleep_ns = 1000;
    params.dims.vocab = kVocab;
    params.dims.num_eos_ids = 1;
    params.dims.eos_ids[0] = kEosId;
    params.engine_page = zeroed(sizeof(EnginePage));
    params.director_state = zeroed(kDirectorStateBytes);
    params.requests = zeroed(u64{kRequestBytes} * params.num_requests);
    params.tokens = zeroed(u64{4} * params.num_requests * params.max_context);
    params.page_tables = zeroed(u64{4} * params.num_requests * params.max_pages_per_request);
    params.free_pages = zeroed(u64{4} * params.num_pages);
    params.page_owners = zeroed(u64{4} * params.num_pages);
    params.sampled = zeroed(sizeof(SampleResult) * 2 * params.max_batch);
    for (u64& plan : params.plans) plan = zeroed(plan_bytes(params));
    params.prefix_cache_enabled = 1;
    params.prefix_cache = zeroed(prefix_cache_bytes(params));
    for (u32 q = 0; q < kNumIngresses; ++q) params.queue_pairs[q] = make_queue_pair(q);
  }

  u64 make_queue_pair(u32 queue_pair_idx) {
    QueuePairHeader header{};
    header.magic = kQueuePairMagic;
    header.abi_version = kAbiVersion;
    header.header_bytes = sizeof(QueuePair);
    header.submission_entry_bytes = sizeof(SubmissionEntry);
    header.num_submissions = kNumSubmissions;
    header.completion_entry_bytes = sizeof(CompletionEntry);
    header.num_completions = kNumCompletions;
    header.arena_bytes = kArenaBytes;
    header.submissions_offset = sizeof(QueuePair);
    header.completions_offset = header.submissions_offset + kNumSubmissions * sizeof(SubmissionEntry);
    header.arena_offset = header.completions_offset + kNumCompletions * sizeof(CompletionEntry);
    header.region_bytes = header.arena_offset + kArenaBytes;
    header.queue_pair_idx = queue_pair_idx;
    const u64 region = zeroed(header.region_bytes);
    memcpy(reinterpret_cast<void*>(region), &header, sizeof header);
    return region;
  }
};

// ---- The workers' thread -----------------------------------------------------------------------------------------
// Samples what a plan asks for, while the director commits the step before, plans the next one and polls.
class Workers {
 public:
  explicit Workers(const EngineParams& params) : params_(params), thread_([this] { run(); }) {}

  void start(u64 step) { st_release_sys(&num_started_, step + 1); }  // the plan is written: pairs with run()

  void wait(u64 step) const {
    while (ld_acquire_sys(&num_done_) != step + 1) std::this_thread::yield();  // pairs with run()
  }

  void leave() {
    st_release_sys(&num_started_, kLeave);
    thread_.join();
  }

 private:
  static constexpr u64 kLeave = ~u64{0};

  void run() {
    for (u64 step = 0;; ++step) {
      u64 num_started;
      while ((num_started = ld_acquire_sys(&num_started_)) == step) std::this_thread::yield();
      if (num_started == kLeave) return;
      const StepPlan* plan = plan_of_step(params_, step);
      for (u32 row = 0; row < plan->num_rows; ++row) {
        const u32 token = plan_row_token(params_, plan, row);
        CHECK(token < kVocab, "step %llu row %u: token %u", step, row, token);
      }
      for (u32 i = 0; i < plan->num_seqs; ++i) {
        const PlanSeq& seq = plan_seqs(params_, plan)[i];
        const PlanRow& row = plan_rows(params_, plan)[seq.row_begin];
        const u64 request_id = request_at(params_, seq.request_idx)->request_id;
        // K1: the input of a decode row is what the request sampled last.
        if (seq.num_rows == 1 && row.token & kTokenPending) {
          const u32 expected = expected_token(request_id, seq.output_idx - 1);
          CHECK(plan_row_token(params_, plan, seq.row_begin) == expected, "step %llu seq %u", step, i);
        }
        if (seq.sample_row == kNoRow) continue;
        SampleResult& sample = sampled_of_step(params_, plan->step)[seq.sample_row];
        sample.token = expected_token(request_id, seq.output_idx);
        sample.logprob = -1.0f;
      }
      st_release_sys(&num_done_, step + 1);
    }
  }

  const EngineParams& params_;
  u64 num_started_ = 0;  // writer: the director's thread
  u64 num_done_ = 0;     // writer: run()
  std::thread thread_;
};

// ---- The director's thread ---------------------------------------------------------------------------------------
template <typename Call>
void on_lanes(Call call) {
#if defined(BK_TEST_LANES)
  run_on_test_lanes(call);
#else
  call(Lanes::single());
#endif
}

void check_integrity(const EngineParams& params) {
  bool holds = true;
  on_lanes([&](const Lanes& lanes) {
    const bool lane_holds = director_check_integrity(params, lanes);
    if (lanes.is_first()) holds = lane_holds;
  });
  const FaultRecord& fault = engine_page(params).fault;
  CHECK(holds && fault.code == kFaultNone, "fault site %u expected %llu seen %llu", fault.site, fault.expected, fault.seen);
}

// The loop of device/director_loop.cuh; some steps are planned after the commit, as if the workers had been too fast.
u64 direct(const EngineParams& params) {
  Workers workers(params);
  u64 num_ahead = 0;
  for (u64 step = 0;;) {
    if (step % 64 == 0) check_integrity(params);
    u32 num_rows = 0;
    StepPlan* plan = plan_of_step(params, step);
    on_lanes([&](const Lanes& lanes) {
      director_poll(params, lanes);
      const u32 rows = director_plan(params, lanes, plan);
      if (rows == 0) director_publish(params, lanes);
      if (lanes.is_first()) num_rows = rows;
    });
    if (plan->flags & kPlanExit) break;
    if (num_rows == 0) {
      const u64 until_ns = device_clock_ns() + kLongestWaitNs;
      on_lanes([&](const Lanes& lanes) {
        if (director_is_quiet(params)) director_wait(params, lanes, until_ns);
        else director_idle(params, lanes);
      });
      continue;
    }
    workers.start(step);
    for (bool goes_on = true; goes_on; ++step) {
      StepPlan* next = plan_of_step(params, step + 1);
      bool starts = false;
      on_lanes([&](const Lanes& lanes) {
        director_publish(params, lanes);
        if (step % 7 != 0) director_plan_ahead(params, lanes, next);
        director_poll(params, lanes);
        const bool has_plan = step % 7 != 0 && director_plan_ahead(params, lanes, next);
        if (lanes.is_first()) starts = has_plan && !director_state(params).next_waits;
      });
      workers.wait(step);
      on_lanes([&](const Lanes& lanes) {
        const bool all_stopped = starts && every_seq_was_stopped(params, lanes, next);
        lanes.sync();  // `starts` is read by every lane
        if (lanes.is_first() && all_stopped) starts = false;
      });
      goes_on = starts;
      if (goes_on) {
        workers.start(step + 1);
        num_ahead += 1;
      }
      on_lanes([&](const Lanes& lanes) {
        if (goes_on) director_start_next(params, lanes, 0);
        director_commit(params, lanes, plan_of_step(params, step));
      });
    }
  }
  workers.leave();
  check_integrity(params);
  return num_ahead;
}

// ---- An ingress's thread -----------------------------------------------------------------------------------------
struct LiveRequest {
  u64 request_id;
  u32 max_tokens;
  u32 num_tokens;
  bool acknowledged;
  bool cancel_asked;
};

class Ingress {
 public:
  Ingress(u64 region, u32 idx) : port_(IngressPort::open(reinterpret_cast<u8*>(region))), idx_(idx), random_(idx * 7919 + 1) {}

  void run(u32 num_requests) {
    attach();
    while (num_ended_ < num_requests) {
      IngressPort::heartbeat(port_.queue_pair, port_.owner_pid, port_.epoch);
      if (draw() % 4 != 0) submit();
      if (!live_.empty() && draw() % 16 == 0) cancel();
      if (draw() % 16 == 0) port_.try_operation(kSubmissionPing, 1, draw());
      if (draw() % 3 != 0) read(draw() % 24);
      if (num_ended_ >= next_leave_) {
        next_leave_ = num_ended_ + 20 + draw() % 40;
        live_.clear();  // the director drops them
        if (draw() % 2 == 0) port_.detach();
        attach();
      }
      if (draw() % 8 == 0) std::this_thread::yield();
    }
    port_.detach();
  }

 private:
  u32 draw() {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<u32>(random_ >> 33);
  }

  void attach() {
    CHECK(port_.try_attach(1000 + idx_, 0, 1'000'000'000) == kPortOk, "ingress %u cannot attach", idx_);
    while (port_.attach_answered() != kPortOk) std::this_thread::yield();
  }

  void submit() {
    u32 prompt[120];
    const u32 num_prompt = 1 + draw() % 120;
    const u32 kin = draw() % 4 == 0 ? next_id_ % kVocab : draw() % 2;  // most prompts begin as one of two others did
    for (u32 i = 0; i < num_prompt; ++i) prompt[i] = (kin + i) % kVocab;
    const u32 stop_id = 3 + draw() % 400;
    LiveRequest request{next_id_, 1 + draw() % 60, 0, false, false};
    RequestOrder order{};
    order.stop_ids = &stop_id;
    order.prompt_ids = prompt;
    order.request_id = request.request_id;
    order.num_stop_ids = 1;
    order.num_prompt_tokens = num_prompt;
    order.max_tokens = request.max_tokens;
    order.priority = static_cast<i32>(draw() % 3);
    order.sampling.top_p = 1.0f;
    if (port_.try_submit(order) != kPortOk) return;
    live_.push_back(request);
    next_id_ += 1;
  }

  void cancel() {
    LiveRequest& request = live_[draw() % live_.size()];
    if (port_.try_operation(kSubmissionCancel, request.request_id, 0) == kPortOk) request.cancel_asked = true;
  }

  void read(u32 max_entries) {
    CompletionEntry entries[24];
    const u32 num_read = port_.poll(entries, max_entries);
    for (u32 i = 0; i < num_read; ++i) take(entries[i]);
  }

  void take(const CompletionEntry& entry) {
    const u32 kind = entry.commit >> kCommitKindShift & 0xff;
    if (kind == kCompletionPong) return;
    for (u32 k = 0; k < live_.size(); ++k) {
      LiveRequest& request = live_[k];
      if (request.request_id != entry.request_id) continue;
      if (kind == kCompletionAck) {
        CHECK(!request.acknowledged, "second ACK of %llu", entry.request_id);
        request.acknowledged = true;
      } else if (kind == kCompletionToken) {
        CHECK(request.acknowledged && entry.index == request.num_tokens, "token %u after %u", entry.index, request.num_tokens);
        CHECK(entry.token == expected_token(entry.request_id, entry.index), "token %u of %llu", entry.index, entry.request_id);
        CHECK(entry.logprob == -1.0f && entry.device_ns != 0, "torn entry of %llu", entry.request_id);
        request.num_tokens += 1;
      } else {
        const u32 reason = entry.commit >> kCommitReasonShift & 0xff;
        CHECK(kind == kCompletionFinish && entry.index == request.num_tokens, "kind %u index %u", kind, entry.index);
        CHECK(reason != kFinishCancelled || request.cancel_asked, "%llu was never cancelled", entry.request_id);
        CHECK(reason != kFinishLength || request.num_tokens == request.max_tokens, "short %llu", entry.request_id);
        live_.erase(live_.begin() + k);
        num_ended_ += 1;
      }
      return;
    }
    CHECK(false, "completion of a request that is not live: kind %u id %llu", kind, entry.request_id);
  }

  IngressPort port_;
  u32 idx_;
  u64 random_;
  u64 next_id_ = 1;
  u32 num_ended_ = 0;
  u32 next_leave_ = 30;
  std::vector<LiveRequest> live_;
};

}  // namespace

int main(int argc, char** argv) {
  const u32 num_requests = argc > 1 ? static_cast<u32>(atoi(argv[1])) : 400;
  Engine engine;
  const EngineParams& params = engine.params;
  on_lanes([&](const Lanes& lanes) { director_init(params, lanes); });
  std::vector<std::thread> ingresses;
  for (u32 q = 0; q < kNumIngresses; ++q) {
    ingresses.emplace_back([&params, q, num_requests] { Ingress(params.queue_pairs[q], q).run(num_requests); });
  }
  u64 num_ahead = 0;
  std::thread director([&params, &num_ahead] { num_ahead = direct(params); });
  for (std::thread& ingress : ingresses) ingress.join();
  st_relaxed_sys(&engine_page(params).control.command, static_cast<u32>(kCommandStop));
  director.join();
  const StatusLines& status = engine_page(params).status;
  CHECK(status.num_pages_free + status.num_pages_cached == params.num_pages && status.num_free_requests == params.num_requests,
        "%u pages are free and %u cached, %u requests are free", status.num_pages_free, status.num_pages_cached, status.num_free_requests);
  printf("accepted %llu preemptions %llu stalls %llu cached tokens %llu steps %llu, %llu of them started before the commit\n",
         status.requests_accepted, status.preemptions, status.credit_stalls, status.prefix_hit_tokens, status.step, num_ahead);
  CHECK(status.prefix_hit_tokens > 0, "nothing was found in the prefix cache");
  CHECK(num_ahead > 0, "none of %llu steps was started ahead", status.step);  // how many depends on who runs when
  return status.preemptions > 0 && status.credit_stalls > 0 ? 0 : 3;
}
