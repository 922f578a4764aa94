// A GPU under a host that schedules: each step is three calls into the driver, and a wait for an event.
//
//   begin_step (step_kernel.cu: the batch, the grid's words) -> persistent_kernel without its director -> copies of what was sampled -> event
//
// all on one stream. The driver is opened at run time: the native library is built where there is no CUDA.
// Called by host/cpu_orchestrator.py, in a thread of the host. Test: pytest tests/host/test_cpu_orchestrator_cuda.py (a driver of the test's
// own); pytest -m gpu tests/gpu/test_cpu_orchestrator_gpu.py
#include <dlfcn.h>
#include <stdio.h>

#include <emu/orchestrator.h>

namespace blinkimp {

// What host/gpu_device.py has made; CudaLaunch of host/cpu_orchestrator.py has the same members.
struct CudaLaunch {
  u64 driver_path;        // const char*, libcuda.so.1 or a test's own
  u64 context;            // CUcontext
  u64 stream;             // CUstream: nobody else's
  u64 begin_step;         // CUfunction
  u64 persistent_kernel;  // CUfunction
  u64 device_params;      // const EngineParams*, in host memory: the params of the kernels
  u64 batches[2];         // UpdateBatch*, pinned
  u64 device_batches[2];  // the same as the device sees them
  u64 abandoned;          // const u32*, writer: Python; not 0: nobody wants an answer any more
  u32 num_threads;        // of a block of the persistent kernel
  u32 shared_memory_bytes;
  u32 launches_ahead;
  u32 reserved0;
};
ABI_SIZE(CudaLaunch, 104);

namespace {

using Result = int;  // CUresult
constexpr Result kSuccess = 0;
constexpr Result kNotReady = 600;         // CUDA_ERROR_NOT_READY
constexpr u32 kEventDisableTiming = 2;    // CU_EVENT_DISABLE_TIMING
constexpr u32 kBeginBlocks = 64;
constexpr u32 kBeginThreads = 1024;       // a word each of the longest piece

// Members are the driver's functions, by their names in cuda.h. All return CUresult.
struct CudaDriver {
  Result (*get_error_name)(Result, const char**);
  Result (*ctx_set_current)(u64);
  Result (*event_create)(u64*, u32);
  Result (*event_record)(u64, u64);
  Result (*event_query)(u64);
  Result (*event_synchronize)(u64);
  Result (*event_destroy)(u64);
  Result (*launch_kernel)(u64, u32, u32, u32, u32, u32, u32, u32, u64, void**, void**);
  Result (*launch_cooperative_kernel)(u64, u32, u32, u32, u32, u32, u32, u32, u64, void**);
  Result (*memcpy_device_to_host)(void*, u64, u64, u64);

  // Returns the name that was not found, or nullptr.
  const char* open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return path;
    const char* missing = nullptr;
    const auto find = [&](auto& function, const char* name) {
      void* address = dlsym(library, name);
      if (address == nullptr) missing = name;
      memcpy(&function, &address, sizeof(address));
    };
    find(get_error_name, "cuGetErrorName");
    find(ctx_set_current, "cuCtxSetCurrent");
    find(event_create, "cuEventCreate");
    find(event_record, "cuEventRecord");
    find(event_query, "cuEventQuery");
    find(event_synchronize, "cuEventSynchronize");
    find(event_destroy, "cuEventDestroy_v2");
    find(launch_kernel, "cuLaunchKernel");
    find(launch_cooperative_kernel, "cuLaunchCooperativeKernel");
    find(memcpy_device_to_host, "cuMemcpyDtoHAsync_v2");
    return missing;
  }
};

class CudaLink {
 public:
  static constexpr u64 kPollPeriodNs = 10'000;  // nothing of the GPU is slowed down by it: accompany_step() of director_loop.cuh polls a fifth as often
  // Later than any wait of the workers, so that the wait which really hangs is the one on record.
  static u64 step_budget_ns(const EngineParams& params) { return params.spin_budget_ns * 2; }

  // host_params: sampled and top_logprobs are pinned.
  CudaLink(const EngineParams& host_params, const CudaLaunch& launch, char* message, u64 message_bytes)
      : host_params_(host_params), launch_(launch), device_params_(*reinterpret_cast<const EngineParams*>(launch.device_params)), message_(message),
        message_bytes_(message_bytes) {
    const char* path = reinterpret_cast<const char*>(launch.driver_path);
    if (const char* missing = driver_.open(path)) {
      const char* reason = missing == path ? dlerror() : missing;
      snprintf(message_, message_bytes_, "%s: no such library or function (%s); expected the driver that this process uses already", path, reason);
      is_whole_ = false;
      return;
    }
    check(driver_.ctx_set_current(launch_.context), "cuCtxSetCurrent");
    for (u64& event : events_) check(driver_.event_create(&event, kEventDisableTiming), "cuEventCreate");
    begin_batch();
  }

  ~CudaLink() {
    for (const u64 event : events_) {
      if (event != 0) driver_.event_destroy(event);
    }
  }

  CudaLink(const CudaLink&) = delete;
  CudaLink& operator=(const CudaLink&) = delete;

  UpdateBatch& batch() {
    // An event that was never recorded is past. Two launches ago: as a rule it is, without a wait.
    if (!batch_is_ours_) {
      check(driver_.event_synchronize(events_[num_sent_ & 1]), "cuEventSynchronize");
      begin_batch();
    }
    return current_batch();
  }

  bool flush() { return begin() && finish(); }

  bool launch(const StepPlan& plan, bool has_tops) {
    if (!begin()) return false;
    EngineParams params = device_params_;
    void* arguments[] = {&params};
    if (!check(driver_.launch_cooperative_kernel(launch_.persistent_kernel, params.num_workers, 1, 1, launch_.num_threads, 1, 1, launch_.shared_memory_bytes,
                                                 launch_.stream, arguments),
               "cuLaunchCooperativeKernel"))
      return false;
    const u64 num_rows = plan.num_sample_rows;
    if (!copy_back(sampled_of_step(host_params_, plan.step), sampled_of_step(device_params_, plan.step), num_rows)) return false;
    if (has_tops && !copy_back(top_logprobs_of_step(host_params_, plan.step), top_logprobs_of_step(device_params_, plan.step), num_rows * kMaxTopLogprobs))
      return false;
    runs_[num_launched_++ & 1] = num_sent_;
    return finish();
  }

  // Asks again and again, as a host does that has nothing else to do: a thread that sleeps is woken tens of microseconds late.
  LinkState wait(u64 until_ns) {
    do {
      if (!is_whole()) return kLinkLost;
      const Result result = driver_.event_query(events_[runs_[num_waited_ & 1] & 1]);
      if (result == kSuccess) {
        num_waited_ += 1;
        return kLinkDone;
      }
      if (result != kNotReady) {
        check(result, "cuEventQuery");
        return kLinkLost;
      }
    } while (device_clock_ns() < until_ns);
    return kLinkBusy;
  }

  bool is_whole() const { return is_whole_ && ld_acquire_sys(reinterpret_cast<const u32*>(launch_.abandoned)) == 0; }

 private:
  UpdateBatch& current_batch() { return *reinterpret_cast<UpdateBatch*>(launch_.batches[num_sent_ & 1]); }

  void begin_batch() {
    current_batch().num_pieces = current_batch().num_words = 0;
    batch_is_ours_ = true;
  }

  bool begin() {
    batch();
    if (!is_whole()) return false;
    EngineParams params = device_params_;
    u64 device_batch = launch_.device_batches[num_sent_ & 1];
    void* arguments[] = {&params, &device_batch};
    return check(driver_.launch_kernel(launch_.begin_step, kBeginBlocks, 1, 1, kBeginThreads, 1, 1, 0, launch_.stream, arguments, nullptr), "cuLaunchKernel");
  }

  bool finish() {
    if (!check(driver_.event_record(events_[num_sent_ & 1], launch_.stream), "cuEventRecord")) return false;
    num_sent_ += 1;
    batch_is_ours_ = false;
    return true;
  }

  bool copy_back(SampleResult* host, const SampleResult* device, u64 num_results) {
    if (num_results == 0) return true;
    return check(driver_.memcpy_device_to_host(host, reinterpret_cast<u64>(device), num_results * sizeof(SampleResult), launch_.stream), "cuMemcpyDtoHAsync");
  }

  bool check(Result result, const char* call) {
    if (result == kSuccess) return true;
    const char* name = nullptr;
    if (driver_.get_error_name(result, &name) != kSuccess || name == nullptr) name = "an unknown error";
    if (is_whole_) snprintf(message_, message_bytes_, "%s: got %s (%d), expected CUDA_SUCCESS; see `blinkimp doctor`", call, name, result);
    is_whole_ = false;
    return false;
  }

  const EngineParams& host_params_;
  const CudaLaunch launch_;
  const EngineParams& device_params_;
  char* message_;            // [message_bytes_], of the caller: what went wrong first
  const u64 message_bytes_;
  CudaDriver driver_{};
  u64 events_[2] = {0, 0};   // CUevent, of the sends of that parity
  u32 num_sent_ = 0;         // batches, with a step or without
  u32 num_launched_ = 0;
  u32 num_waited_ = 0;
  u32 runs_[2] = {0, 0};     // of the launches on their way: which send it was
  bool batch_is_ours_ = false;
  bool is_whole_ = true;
};

}  // namespace
}  // namespace blinkimp

using namespace blinkimp;

extern "C" {

u64 bk_update_batch_bytes() { return sizeof(UpdateBatch); }

// The director and its loop, until COMMAND_STOP is carried out. Returns OrchestratorEnd; with kEndLost the reason is in message.
int bk_orchestrate_cuda(const EngineParams* host_params, const CudaLaunch* launch, char* message, u64 message_bytes) {
  CudaLink link(*host_params, *launch, message, message_bytes);
  if (!link.is_whole()) return kEndLost;
  return Orchestrator<CudaLink>(*host_params, link, launch->launches_ahead != 0).run();
}

}  // extern "C"
