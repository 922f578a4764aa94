// As much of libcuda.so as emu/orchestrator_cuda.cpp calls, on the CPU: one stream, a thread that works off what is queued, late on purpose.
//
// begin_step does what step_kernel.cu does; the persistent kernel is the CPU interpreter. Whatever would go wrong on a GPU is counted as a
// violation: a launch of another shape, a step that is not preceded by its begin_step, memory that is given back or written too early
// shows as wrong tokens. Built and driven by tests/host/cuda_driver_support.py.
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include <fault.cuh>
#include <step_update.cuh>

using namespace blinkimp;

namespace {

constexpr int kSuccess = 0, kNotReady = 600, kInvalidContext = 201, kLaunchFailed = 719;
constexpr u64 kContext = 0x11, kStream = 0x22, kBeginStep = 0x33, kPersistentKernel = 0x44;
constexpr u32 kPlansOfLaunch = 2;

using RunStep = void (*)(const EngineParams*, const StepPlan*);

struct Script {            // what the test wants
  RunStep run_step;        // bk_reference_run
  u32 fails_at_step;       // 1: the first; 0: never
  u32 records_fault;       // the failing step leaves a fault record, as a worker does before its trap
  u32 hangs_at_step;
  u32 step_delay_us;
};

Script script;
std::atomic<u32> num_steps, num_begins, num_violations;
std::atomic<int> sticky_error;
thread_local u64 current_context;

void violation(const char* what) {
  fprintf(stderr, "fake_cuda: %s\n", what);
  num_violations += 1;
}

struct Event {
  u64 num_queued = 0;  // tasks before its last record; 0: never recorded
};

class Stream {
 public:
  Stream() : thread_([this] { work(); }) {}
  ~Stream() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      leaves_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void queue(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
      num_queued_ += 1;
    }
    changed_.notify_all();
  }

  void record(Event& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    event.num_queued = num_queued_;
  }

  int query(const Event& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (sticky_error != 0) return sticky_error;
    return num_done_ >= event.num_queued ? kSuccess : kNotReady;
  }

  int synchronize(const Event& event) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return sticky_error != 0 || num_done_ >= event.num_queued || leaves_; });
    return sticky_error;
  }

  void fail(int error) {
    std::lock_guard<std::mutex> lock(mutex_);
    sticky_error = error;
  }

  // On the stream's thread: for as long as the stream lives.
  void hang() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return leaves_; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return leaves_ || !tasks_.empty(); });
      if (leaves_) return;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (sticky_error == 0) task();
      lock.lock();
      num_done_ += 1;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;  // not begun
  u64 num_queued_ = 0;
  u64 num_done_ = 0;
  bool leaves_ = false;
  std::thread thread_;  // last: it uses all of the above
};

Stream* stream;

int ready(u64 stream_handle) {
  if (current_context != kContext) {
    violation("a call without the context");
    return kInvalidContext;
  }
  if (stream_handle != kStream) violation("a call on another stream");
  return sticky_error;
}

u32* grid_word(const EngineParams& params, u32 word_idx) { return reinterpret_cast<u32*>(params.grid_words) + word_idx; }

void begin_step(const EngineParams& params, const UpdateBatch* batch) {
  if (batch->num_pieces > kMaxPieces || batch->num_words > kBatchWords) violation("a batch that is too long");
  for (u32 i = 0; i < batch->num_pieces; ++i) apply_piece(params, *batch, i, 0, 1);
  *grid_word(params, kGridWordPlan) = kPlansOfLaunch;
  *grid_word(params, kGridWordArrivals) = *grid_word(params, kGridWordPaces) = 0;
  num_begins += 1;
}

void run_step(const EngineParams& params) {
  const u32 step = ++num_steps;
  if (*grid_word(params, kGridWordPlan) != kPlansOfLaunch || *grid_word(params, kGridWordArrivals) != 0) violation("a step that did not begin");
  if (reinterpret_cast<const StepPlan*>(params.plans[1])->flags != kPlanExit) violation("no exit behind the step");
  *grid_word(params, kGridWordArrivals) = 0xdead;  // barriers were counted
  if (step == script.hangs_at_step) return stream->hang();
  if (step == script.fails_at_step) {
    if (script.records_fault != 0) record_fault(params, kFaultSpinExpired, kSiteGridBarrier, 7, 6);
    return stream->fail(kLaunchFailed);
  }
  sleep_ns(script.step_delay_us * 1000);
  script.run_step(&params, reinterpret_cast<const StepPlan*>(params.plans[0]));
}

}  // namespace

extern "C" {

void fake_cuda_open(const Script* wanted) {
  script = *wanted;
  num_steps = num_begins = num_violations = 0;
  sticky_error = 0;
  stream = new Stream;
}

void fake_cuda_close() {
  delete stream;
  stream = nullptr;
}

u32 fake_cuda_num_steps() { return num_steps; }
u32 fake_cuda_num_begins() { return num_begins; }
u32 fake_cuda_num_violations() { return num_violations; }

int cuGetErrorName(int error, const char** name) {
  *name = error == kLaunchFailed ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_UNKNOWN";
  return kSuccess;
}

int cuCtxSetCurrent(u64 context) {
  current_context = context;
  return context == kContext ? kSuccess : kInvalidContext;
}

int cuEventCreate(u64* event, u32) {
  *event = reinterpret_cast<u64>(new Event);
  return kSuccess;
}

int cuEventDestroy_v2(u64 event) {
  delete reinterpret_cast<Event*>(event);
  return kSuccess;
}

int cuEventRecord(u64 event, u64 stream_handle) {
  if (const int error = ready(stream_handle)) return error;
  stream->record(*reinterpret_cast<Event*>(event));
  return kSuccess;
}

int cuEventQuery(u64 event) { return stream->query(*reinterpret_cast<Event*>(event)); }
int cuEventSynchronize(u64 event) { return stream->synchronize(*reinterpret_cast<Event*>(event)); }

int cuLaunchKernel(u64 function, u32 blocks_x, u32 blocks_y, u32 blocks_z, u32 threads_x, u32 threads_y, u32 threads_z, u32, u64 stream_handle,
                   void** arguments, void**) {
  if (const int error = ready(stream_handle)) return error;
  if (function != kBeginStep || blocks_x == 0 || threads_x == 0 || blocks_y * blocks_z * threads_y * threads_z != 1) violation("not begin_step");
  const EngineParams params = *static_cast<const EngineParams*>(arguments[0]);
  const UpdateBatch* batch = *static_cast<UpdateBatch**>(arguments[1]);
  stream->queue([params, batch] { begin_step(params, batch); });
  return kSuccess;
}

int cuLaunchCooperativeKernel(u64 function, u32 blocks_x, u32 blocks_y, u32 blocks_z, u32 threads_x, u32 threads_y, u32 threads_z, u32 shared_bytes,
                              u64 stream_handle, void** arguments) {
  if (const int error = ready(stream_handle)) return error;
  const EngineParams params = *static_cast<const EngineParams*>(arguments[0]);
  if (function != kPersistentKernel || blocks_x != params.num_workers || threads_x != 384 || shared_bytes != BK_SHARED_MEMORY_BYTES ||
      blocks_y * blocks_z * threads_y * threads_z != 1)
    violation("not the persistent kernel without its director");
  stream->queue([params] { run_step(params); });
  return kSuccess;
}

int cuMemcpyDtoHAsync_v2(void* host, u64 device, u64 num_bytes, u64 stream_handle) {
  if (const int error = ready(stream_handle)) return error;
  stream->queue([=] { memcpy(host, reinterpret_cast<const void*>(device), num_bytes); });
  return kSuccess;
}

}  // extern "C"
