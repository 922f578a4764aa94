// The emulated device under a host that schedules: the device's side, which runs one step per command, and the host's link to it.
//
// Called by host/emulated_process.py (bk_step_device_run, in the device's process) and by host/cpu_orchestrator.py (bk_orchestrate_emulated,
// in a thread of the host's). Test: pytest tests/host/test_cpu_orchestrator.py
#include <emu/orchestrator.h>
#include <emu/orchestrator_channel.h>
#include <emu/worker_threads.h>

#include <system_error>

namespace blinkimp {
namespace {

constexpr u64 kForeverNs = u64{1} << 62;

class EmulatedLink {
 public:
  static constexpr u64 kPollPeriodNs = 50'000'000;  // as kPulseNs of emulated_device.cpp
  static u64 step_budget_ns(const EngineParams&) { return 60'000'000'000; }  // a large model's prompt takes seconds

  EmulatedLink(StepChannel& channel, const u32* abandoned) : channel_(channel), abandoned_(abandoned) {}

  UpdateBatch& batch() {
    UpdateBatch& batch = channel_.batches[num_commanded_ & 1];
    if (!batch_is_ours_) {
      while (!wait_for_ring(channel_.completed, num_commanded_ - 1, device_clock_ns() + kPollPeriodNs) && is_whole()) {}  // E1
      batch.num_pieces = batch.num_words = 0;
      batch_is_ours_ = true;
    }
    return batch;
  }

  bool flush() { return command(kStepApply, false); }

  bool launch(const StepPlan&, bool has_tops) {
    if (!command(kStepRun, has_tops)) return false;
    runs_[num_launched_++ & 1] = num_commanded_;
    return true;
  }

  LinkState wait(u64 until_ns) {
    const bool is_done = wait_for_ring(channel_.completed, runs_[num_waited_ & 1], until_ns);
    if (!is_whole()) return kLinkLost;
    if (is_done) num_waited_ += 1;
    return is_done ? kLinkDone : kLinkBusy;
  }

  bool is_whole() const { return ld_acquire_sys(abandoned_) == 0 && ld_acquire_sys(&channel_.is_faulted.value) == 0; }

  void exit() { command(kStepExit, false); }

 private:
  bool command(StepCommandKind kind, bool has_tops) {
    batch();  // an exit brings an empty one
    if (!is_whole()) return false;
    channel_.commands[num_commanded_ & 1] = StepCommand{kind, has_tops ? 1u : 0u};
    ring(channel_.commanded, ++num_commanded_);
    batch_is_ours_ = false;
    return true;
  }

  StepChannel& channel_;
  const u32* abandoned_;      // writer: the host's Python; not 0: the device's process is dead, or nobody wants an answer
  u32 num_commanded_ = 0;
  u32 num_launched_ = 0;
  u32 num_waited_ = 0;
  u32 runs_[2] = {0, 0};      // of the launches on their way: `completed` once they are done
  bool batch_is_ours_ = true;
};

void copy_results(const EngineParams& params, u8* channel, const StepPlan& plan, bool has_tops) {
  const u64 first = (plan.step & 1) * params.max_batch;
  SampleResult* sampled = reinterpret_cast<SampleResult*>(channel + sampled_offset()) + first;
  memcpy(sampled, sampled_of_step(params, plan.step), plan.num_sample_rows * sizeof(SampleResult));
  if (!has_tops) return;
  SampleResult* tops = reinterpret_cast<SampleResult*>(channel + top_logprobs_offset(params)) + first * kMaxTopLogprobs;
  memcpy(tops, top_logprobs_of_step(params, plan.step), u64{plan.num_sample_rows} * kMaxTopLogprobs * sizeof(SampleResult));
}

}  // namespace
}  // namespace blinkimp

using namespace blinkimp;

extern "C" {

u64 bk_step_channel_bytes(const EngineParams* params) { return top_logprobs_offset(*params) + top_logprobs_bytes(*params); }
u64 bk_step_channel_sampled_offset() { return sampled_offset(); }
u64 bk_step_channel_top_logprobs_offset(const EngineParams* params) { return top_logprobs_offset(*params); }

// The device's side: returns when the host says so (0), after a fault (1), or when no thread could be made (2).
int bk_step_device_run(const EngineParams* params, u8* channel_address) try {
  StepChannel& channel = *reinterpret_cast<StepChannel*>(channel_address);
  WorkerThreads workers(*params);
  for (u32 num_done = 0;; ++num_done) {
    wait_for_ring(channel.commanded, num_done + 1, kForeverNs);
    const StepCommand command = channel.commands[num_done & 1];
    if (command.kind == kStepExit) return 0;
    const UpdateBatch& batch = channel.batches[num_done & 1];
    for (u32 i = 0; i < batch.num_pieces; ++i) apply_piece(*params, batch, i, 0, 1);
    if (command.kind == kStepRun) {
      const StepPlan& plan = *reinterpret_cast<const StepPlan*>(params->plans[0]);
      workers.start(plan);
      workers.finish();
      copy_results(*params, channel_address, plan, command.has_tops != 0);
    }
    const bool is_faulted = fault_recorded(*params);
    if (is_faulted) st_release_sys(&channel.is_faulted.value, 1);  // pairs with is_whole()
    ring(channel.completed, num_done + 1);
    if (is_faulted) return 1;
  }
} catch (const std::system_error&) {
  return 2;
}

// The host's side: the director and its loop, until COMMAND_STOP is carried out. Returns OrchestratorEnd. *abandoned: not 0 ends it at once.
int bk_orchestrate_emulated(const EngineParams* params, u8* channel, u32 launches_ahead, const u32* abandoned) {
  EmulatedLink link(*reinterpret_cast<StepChannel*>(channel), abandoned);
  const int end = Orchestrator<EmulatedLink>(*params, link, launches_ahead != 0).run();
  link.exit();
  return end;
}

}  // extern "C"
