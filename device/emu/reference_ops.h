// The CPU interpreter of the model program: what a GPU worker does, on threads, in plain arithmetic.
//
// run_program() runs all ops of one step; every one of params.num_workers threads calls it with its own index and the same barrier.
// Results do not depend on the number of threads, nor on what else is in the batch, nor on how a prompt was cut into chunks.
// Workspaces: index = BufferId (hidden, query, attention, activation, logits; all f32, [max_step_tokens, features] save logits
// [max_batch, vocab]), then kWorkspaceScratch: a private area per thread. reference_workspace_bytes() sizes them, 0 = not used.
// Called by the emulated device and by reference_api.cpp. Test: pytest tests/host/test_reference_ops.py tests/host/test_families.py
#pragma once
#include <emu/thread_barrier.h>
#include <emu/vector_kernels.h>
#include <program_abi.h>

namespace blinkimp {

constexpr u32 kWorkspaceScratch = 5;

// One thread's private memory, in f32 unless said otherwise; offsets in bytes, each a multiple of 64.
struct ScratchLayout {
  u32 block_rows;        // rows of a GEMM's input that are worked on together
  u32 tile_features;     // widest piece of an output row that waits for its epilogue
  u32 attention_rows;    // rows of one request that share a pass over its keys
  u64 input_offset;      // [block_rows, hidden] normed input
  u64 scales_offset;     // [block_rows] 1 / rms
  u64 tile_offset;       // [block_rows, tile_features]
  u64 queries_offset;    // [num_queries, head_dim], num_queries = attention_rows * heads per KV head
  u64 outputs_offset;    // [num_queries, head_dim]
  u64 scores_offset;     // [num_queries, kPageTokens]
  u64 softmax_offset;    // [num_queries] maxima, sums, first_key (u32), end_key (u32), one after the other
  u64 sample_offset;     // SampleScratch
  u64 num_bytes;
};

ScratchLayout scratch_layout(const ModelDims& dims);

u64 reference_workspace_bytes(const EngineParams& params, u32 workspace_idx);

// Whether this interpreter can run params.ops with params.dims: returns 0, or writes what is wrong to `message` and returns 1.
int check_program(const EngineParams& params, char* message, u64 message_bytes);

void run_program(const EngineParams& params, const StepPlan& plan, u32 thread_idx, ThreadBarrier& barrier);

// ---- Shared by the op files ----------------------------------------------------------------------------------------
struct OpContext {
  const EngineParams& params;
  const StepPlan& plan;
  const Op& op;
  u32 thread_idx;
  u32 num_threads;
  ScratchLayout layout;
  u8* scratch;  // this thread's

  f32* buffer(u32 buffer_id) const { return reinterpret_cast<f32*>(params.workspaces[buffer_id]); }
  f32* scratch_f32(u64 offset) const { return reinterpret_cast<f32*>(scratch + offset); }
};

// This thread's share of num_units, as a half-open interval.
struct Share {
  u32 begin, end;
};
inline Share share_of(const OpContext& context, u32 num_units) {
  const u64 n = num_units;
  return Share{static_cast<u32>(n * context.thread_idx / context.num_threads),
               static_cast<u32>(n * (context.thread_idx + 1) / context.num_threads)};
}

// Where the K tile of (layer, page, kv head) begins; its V tile follows it.
inline u64 kv_tile_address(const EngineParams& params, u32 layer, u32 page_idx, u32 kv_head) {
  const u64 tile_bytes = u64{kPageTokens} * params.dims.head_dim * (params.dims.kv_dtype == kBF16 ? 2 : 4);
  const u64 tile_idx = ((u64{layer} * params.num_pages + page_idx) * params.dims.num_kv_heads + kv_head) * 2;
  return params.kv_cache + tile_idx * tile_bytes;
}

void run_attention(const OpContext& context);
void run_null(const OpContext& context);

}  // namespace blinkimp
