// C API of the CPU interpreter: sizes, a check of the program, one step on threads of its own. For host/ and the tests.
//
// Declared to Python by blinkimp/host/reference.py. Test: pytest tests/host/test_reference_ops.py
#include <stdio.h>

#include <thread>
#include <vector>

#include <emu/reference_ops.h>
#include <step_plan.cuh>

namespace blinkimp {
namespace {

const char* null_op_error(const EngineParams& params, const Op& op) {
  if (params.num_ops != 1) return "a null program has no other op";
  if (op.weight == 0 || op.out_features < kMaxTopLogprobs) return "fewer tokens than may be asked for as alternatives";
  const u32* table = reinterpret_cast<const u32*>(op.weight);
  for (u32 i = 0; i < op.out_features; ++i)
    if (table[i] >= params.dims.vocab) return "a token beyond the vocabulary";
  return nullptr;
}

// What is wrong with an op, or nullptr.
const char* op_error(const EngineParams& params, const Op& op) {
  const ModelDims& dims = params.dims;
  const u32 query_features = dims.num_heads * dims.head_dim;
  const u32 qkv_features = query_features + 2 * dims.num_kv_heads * dims.head_dim;
  const bool has_weight = op.kind != kOpAttention && op.kind != kOpSample;
  if (op.kind < kOpEmbed || op.kind > kOpNull) return "unknown kind";
  if (op.kind == kOpNull) return null_op_error(params, op);
  if (op.kind != kOpEmbed && op.kind != kOpLmHead && op.kind != kOpSample && op.layer >= dims.num_layers) return "layer beyond num_layers";
  if (has_weight && op.weight == 0) return "no weight";
  if (has_weight && op.weight_layout != 0) return "packed weights: the CPU reads weight_layout 0 (row-major)";
  if (has_weight && op.weight_dtype != kF32 && op.weight_dtype != kBF16) return "weight_dtype is neither f32 nor bf16";
  switch (op.kind) {
    case kOpEmbed: return op.in_features == dims.hidden && op.out_features == dims.vocab ? nullptr : "shape is not [vocab, hidden]";
    case kOpQkv:
      if (op.norm == 0 || op.input != kBufHidden) return "needs a norm and the hidden state as input";
      return op.in_features == dims.hidden && op.out_features == qkv_features ? nullptr : "shape is not [q + k + v features, hidden]";
    case kOpProject:
      if (op.out_features != dims.hidden) return "out_features is not hidden";
      if (op.input == kBufAttention) return op.in_features == query_features ? nullptr : "in_features is not num_heads * head_dim";
      if (op.input == kBufActivation) return op.in_features == dims.intermediate ? nullptr : "in_features is not intermediate";
      return "input is neither attention nor activation";
    case kOpGateUp:
      if (op.norm == 0 || op.bias != 0 || op.input != kBufHidden) return "needs a norm, no bias, and the hidden state as input";
      return op.in_features == dims.hidden && op.out_features == 2 * dims.intermediate ? nullptr : "shape is not [2 * intermediate, hidden]";
    case kOpLmHead:
      if (op.norm == 0 || op.bias != 0 || op.input != kBufHidden) return "needs a norm, no bias, and the hidden state as input";
      return op.in_features == dims.hidden && op.out_features == dims.vocab ? nullptr : "shape is not [vocab, hidden]";
    default: return nullptr;
  }
}

const char* dims_error(const EngineParams& params) {
  const ModelDims& dims = params.dims;
  if (dims.num_kv_heads == 0 || dims.num_heads == 0 || dims.num_heads % dims.num_kv_heads != 0) return "num_heads is not a multiple of num_kv_heads";
  if (dims.head_dim == 0 || dims.head_dim % 2 != 0) return "head_dim is not even";
  if (dims.hidden == 0 || dims.vocab == 0 || dims.intermediate == 0) return "hidden, vocab or intermediate is 0";
  if (dims.intermediate % 8 != 0) return "intermediate is not a multiple of 8";
  if (dims.kv_dtype != kF32 && dims.kv_dtype != kBF16) return "kv_dtype is neither f32 nor bf16";
  if (params.num_workers == 0 || params.num_workers > kMaxWorkerThreads) return "num_workers is not 1 to 256";
  return nullptr;
}

void run_on_threads(const EngineParams& params, const StepPlan& plan, u32 num_runs) {
  ThreadBarrier barrier(params.num_workers);
  const auto work = [&](u32 thread_idx) {
    for (u32 run = 0; run < num_runs; ++run) run_program(params, plan, thread_idx, barrier);
  };
  std::vector<std::thread> threads;
  for (u32 thread_idx = 1; thread_idx < params.num_workers; ++thread_idx) threads.emplace_back(work, thread_idx);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int check_program(const EngineParams& params, char* message, u64 message_bytes) {
  if (const char* error = dims_error(params)) {
    snprintf(message, message_bytes, "model dims: %s", error);
    return 1;
  }
  const Op* ops = reinterpret_cast<const Op*>(params.ops);
  for (u32 op_idx = 0; op_idx < params.num_ops; ++op_idx) {
    if (const char* error = op_error(params, ops[op_idx])) {
      snprintf(message, message_bytes, "op %u (kind %u, layer %u): %s", op_idx, ops[op_idx].kind, ops[op_idx].layer, error);
      return 1;
    }
  }
  return 0;
}

}  // namespace blinkimp

using namespace blinkimp;

extern "C" u64 bk_reference_workspace_bytes(const EngineParams* params, u32 workspace_idx) {
  return reference_workspace_bytes(*params, workspace_idx);
}

// 0, or 1 with the reason in message.
extern "C" int bk_reference_check(const EngineParams* params, char* message, u64 message_bytes) {
  return check_program(*params, message, message_bytes);
}

// One step on params->num_workers threads. Returns when it is done.
extern "C" void bk_reference_run(const EngineParams* params, const StepPlan* plan) { run_on_threads(*params, *plan, 1); }

// The same step num_runs times on the same threads; returns ns per run. For measurements.
extern "C" u64 bk_reference_time(const EngineParams* params, const StepPlan* plan, u32 num_runs) {
  const u64 begin_ns = device_clock_ns();
  run_on_threads(*params, *plan, num_runs);
  return (device_clock_ns() - begin_ns) / num_runs;
}

extern "C" const char* bk_reference_kernels() { return vector_kernels().name; }

// "auto", "avx512", "avx2" or "baseline"; 0 if this machine cannot run it. Not while a program runs.
extern "C" int bk_reference_select_kernels(const char* name) { return select_vector_kernels(name) ? 1 : 0; }
