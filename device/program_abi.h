// The model program and the engine's memory: what host/ builds and the two interpreters (GPU workers, CPU reference) read.
//
// Device memory only; nothing here is shared with an ingress (that is ring_abi.h). Data only: no logic, no pointers: addresses
// are u64, of device memory on the GPU and of the process on the emulated device. tools/gen_abi.py mirrors this file too.
// Test: pytest tests/compile/test_ring_abi.py
#pragma once
#include <ring_abi.h>

namespace blinkimp {

constexpr u32 kPageTokens = 64;       // tokens in a KV page
constexpr u32 kMaxStepTokens = 8192;  // upper bound of EngineParams.max_step_tokens
constexpr u32 kNoRow = 0xffffffff;
constexpr u32 kTokenPending = 0x80000000;  // in PlanRow.token: the step before samples it; the low bits are its sample_row there

enum DType : u32 {
  kF32 = 0,
  kBF16 = 1,
};

// ---- The program -------------------------------------------------------------------------------------------------
// One step runs the ops in order over the rows (tokens) of the step's plan. Per row, with h the hidden state (fp32 in both
// interpreters), n(h) = RMSNorm(h) * norm:
enum OpKind : u32 {
  kOpEmbed = 1,      // h = weight[token]
  kOpQkv = 2,        // q, k, v = split(n(h) @ weight^T + bias); per-head q_norm, k_norm (RMSNorm over head_dim) where not 0;
                     // rotary embedding of q and k (rotate-half, table rope); k, v -> KV page of (layer, position)
  kOpAttention = 3,  // a = causal attention of q over the pages of the row's request; window > 0: keys in (pos - window, pos]
  kOpProject = 4,    // h += a @ weight^T + bias             (input = kBufAttention: O; kBufActivation: down)
  kOpGateUp = 5,     // act = silu(n(h) @ gate^T) * (n(h) @ up^T); weight rows interleave in groups of 8: 8 gate, 8 up, ...
  kOpLmHead = 6,     // logits = n(h) @ weight^T, for the rows to sample only
  kOpSample = 7,     // token and logprob of each logits row, under the request's SamplingParams
  kOpNull = 8,       // instead of a model, emulated device only: tokens from a table, and the step takes step_ns (emu/null_op.cpp)
};

enum BufferId : u32 {  // the activations an op reads (Op.input); layouts belong to the interpreter
  kBufHidden = 0,      // [rows, hidden] f32
  kBufQuery = 1,       // [rows, num_heads, head_dim]
  kBufAttention = 2,   // [rows, num_heads * head_dim]
  kBufActivation = 3,  // [rows, intermediate]
  kBufLogits = 4,      // [sampled rows, vocab] f32
};

// One op. Weights are [out_features, in_features], row-major (weight_layout 0) or packed in tiles (weight_layout 1: device/gemm.cuh).
struct Op {
  u32 kind;           // OpKind
  u32 layer;
  u32 weight_dtype;   // DType
  u32 weight_layout;
  u32 in_features;
  u32 out_features;   // QKV: (num_heads + 2 * num_kv_heads) * head_dim, rows q then k then v. GATE_UP: 2 * intermediate
  u32 input;          // BufferId
  u32 window;         // ATTENTION: sliding window in tokens, 0 = none
  u64 weight;         // EMBED: [vocab, hidden] row-major always. NULL: u32 [out_features] token ids
  u64 bias;           // [out_features] f32, or 0
  u64 norm;           // [hidden] f32: gain of the RMSNorm before this op, or 0
  u64 q_norm;         // [head_dim] f32, or 0
  u64 k_norm;         // [head_dim] f32, or 0
  u64 rope;           // [max_context, head_dim / 2] pairs of f32 (cos, sin), attention factor included
  u64 next_norm;      // [hidden] f32: gain of the RMSNorm that reads this op's output (EMBED, PROJECT)
  u32 tile_rows;      // packed layout: weight rows per tile, a multiple of 8
  u32 num_tiles;      // packed layout: ceil(out_features / tile_rows); rows past out_features are zero
  u64 step_ns;        // NULL: from one step's end to the next; 0 = as fast as it goes
  u64 reserved[3];
};
ABI_SIZE(Op, 128);
ABI_AT(Op, weight, 32);
ABI_AT(Op, tile_rows, 88);

struct ModelDims {
  u32 num_layers;
  u32 hidden;
  u32 num_heads;
  u32 num_kv_heads;
  u32 head_dim;
  u32 intermediate;
  u32 vocab;
  u32 kv_dtype;         // DType of KV pages
  u32 round_bf16;       // CPU reference: 1 rounds GEMM inputs, q, k, v, attention output and activations to bf16, as the GPU does
  f32 norm_eps;
  f32 attention_scale;  // 1 / sqrt(head_dim)
  u32 num_eos_ids;
  u32 eos_ids[kMaxEosIds];  // [num_eos_ids] token ids
};
ABI_SIZE(ModelDims, 80);

// ---- The plan of one step: director -> workers -------------------------------------------------------------------
// Rows are ragged and packed: decode rows and prefill chunks one after the other, no padding.
struct PlanSeq {       // one request's share of the step
  u32 request_idx;
  u32 row_begin;       // its rows are [row_begin, row_begin + num_rows)
  u32 num_rows;        // 1 for decode
  u32 position_begin;  // position of its first row = KV entries already in its pages
  u32 sample_row;      // index among the sampled rows, or kNoRow (a chunk that is not the prompt's last)
  u32 output_idx;      // output position of the token to sample (Philox counter)
  u32 prefix_is_fresh; // 1: pages before position_begin may be filled in this very step, by the rows of other sequences
  u32 reserved0;
};
ABI_SIZE(PlanSeq, 32);

struct PlanRow {
  u32 token;       // or kTokenPending | sample_row: read it with plan_row_token() of step_plan.cuh
  u32 position;
  u32 seq_idx;     // into PlanSeq
  u32 sample_row;  // or kNoRow
};
ABI_SIZE(PlanRow, 16);

enum PlanFlags : u32 {
  kPlanExit = 1,  // workers leave
};

struct StepPlan {  // header; the arrays stand behind it: PlanSeq[max_batch], PlanRow[max_step_tokens], u32 sampled_rows[max_batch]
  u64 step;
  u32 num_rows;
  u32 num_seqs;
  u32 num_sample_rows;
  u32 flags;
  u32 max_kv_tokens;  // longest context of the step
  u32 reserved0;
  u64 reserved[4];
};
ABI_SIZE(StepPlan, 64);

struct SampleResult {  // [2][max_batch], by step & 1 and sample_row; workers -> director, and the next step's workers
  u32 token;
  f32 logprob;
};
ABI_SIZE(SampleResult, 8);

// ---- The engine --------------------------------------------------------------------------------------------------
constexpr u32 kRequestBytes = 512;              // one entry of the request table (device/request_table.cuh)
constexpr u32 kDirectorStateBytes = 96 * 1024;  // director state (device/director.cuh)
constexpr u32 kGridWordsBytes = 4096;           // barrier and hand-off words of the persistent kernel, zeroed before its launch
constexpr u32 kGridWordPlan = 0;                // of those, 128 bytes apart: steps published by the director (writer: director; readers: workers)
constexpr u32 kGridWordArrivals = 32;           // arrivals at grid barriers (writers: workers; readers: workers, director)
constexpr u32 kGridWordPaces = 64;              // paces of the weight producers (device/gemm_pace.cuh)
constexpr u32 kNumWorkspaces = 16;
constexpr u32 kMaxStepCosts = 68;

struct EngineParams {  // written by the host before launch, then constant
  u32 num_queue_pairs;
  u32 num_requests;                  // entries of the request table
  u32 max_requests_per_queue_pair;
  u32 max_batch;                     // requests in one step
  u32 max_step_tokens;               // rows in one step
  u32 prefill_chunk_tokens;          // rows of one request in one step
  u32 max_context;                   // tokens of one request, prompt + output
  u32 max_pages_per_request;         // ceil(max_context / kPageTokens)
  u32 num_pages;
  u32 num_ops;
  u32 num_workers;                   // GPU: worker CTAs. CPU: threads
  u32 idle_sleep_ns;                 // between polls of a director with nothing to run (not of one that looks: idle.cuh)
  u64 ingress_timeout_ns;            // a heartbeat older than this drops the ingress
  u64 spin_budget_ns;                // of each wait inside a step
  u64 engine_page;                   // EnginePage
  u64 queue_pairs[kMaxQueuePairs];   // QueuePair regions, as the device sees them
  u64 director_state;                // kDirectorStateBytes, zeroed
  u64 requests;                      // kRequestBytes * num_requests, zeroed
  u64 tokens;                        // u32 [num_requests, max_context]
  u64 page_tables;                   // u32 [num_requests, max_pages_per_request]
  u64 free_pages;                    // u32 [num_pages], a stack
  u64 page_owners;                   // u32 [num_pages]: request_idx + 1, or kPageShared | tables (P3 of page_allocator.cuh); 0 = free
  u64 plans[2];                      // StepPlan and its arrays; step n uses plans[n & 1]
  u64 sampled;                       // SampleResult [2][max_batch]; step n uses [n & 1]
  u64 ops;                           // Op [num_ops]
  u64 kv_cache;                      // [num_layers, num_pages, num_kv_heads, 2 (K, V), kPageTokens, head_dim] of kv_dtype
  u64 workspaces[kNumWorkspaces];    // layouts belong to the interpreter
  u64 grid_words;                    // kGridWordsBytes, zeroed
  ModelDims dims;
  u64 logit_biases;                  // LogitBias [num_requests, kMaxLogitBias], 0 = requests with a bias are rejected
  u64 token_counts;                  // penalties' counts, [max_batch, vocab]; layout in device/penalties.cuh
  u64 constraints;                   // [num_queue_pairs, num_constraint_slots, constraint_slot_bytes]; layout in ring_abi.h. device/constraint.cuh
  u64 constraint_slot_bytes;         // a multiple of 64
  u32 num_constraint_slots;          // of each queue pair
  u32 prefix_cache_enabled;          // 0, 1
  u64 prefix_cache;                  // device/prefix_cache.cuh, zeroed
  u64 top_logprobs;                  // SampleResult [2][max_batch, kMaxTopLogprobs], by step & 1 and sample_row; then SampleSplit of sample_op.cuh
  u64 trace;                         // device/trace.cuh, or 0: tracing is off
  u64 parked_after_ns;               // the kernel leaves after this long without work; 0 = never
  u64 trace_op_times;                // u64 [num_trace_op_slots, num_ops, num_workers, 2] of the trace (trace_abi.h), or 0
  u32 trace_op_period;               // of the steps whose op times are kept
  u32 num_trace_op_slots;
  u32 cost_rows;                     // rows that an entry of step_costs stands for; 0: there is none (device/step_cost.cuh)
  u32 reserved0;
  u16 step_costs[kMaxStepCosts];     // time of a step of at most i * cost_rows rows, [0] of half of cost_rows, in any unit
  u64 reserved[4];
};
ABI_AT(EngineParams, ingress_timeout_ns, 48);
ABI_AT(EngineParams, queue_pairs, 72);
ABI_AT(EngineParams, kv_cache, 408);
ABI_SIZE(EngineParams, 896);

}  // namespace blinkimp
