// The ops of the CPU interpreter, save attention (reference_attention.cpp).
//
// A GEMM op: each thread owns a range of output features over the whole K. It walks the step's rows in blocks whose input stays
// in its L2 cache, prepares a block's input (norm gain, rounding) for itself, computes a tile of outputs, and finishes the tile in
// an epilogue. Called through reference_ops.h. Test: pytest tests/host/test_reference_ops.py
#include <math.h>
#include <string.h>

#include <emu/reference_ops.h>
#include <fault.cuh>
#include <sample_request.cuh>
#include <trace.cuh>

namespace blinkimp {
namespace {

constexpr u32 kTileFeatures = 64;
constexpr u64 kInputCacheBytes = 256 * 1024;  // of a block's input: a quarter of a usual L2

u64 align_up(u64 num_bytes) { return (num_bytes + 63) / 64 * 64; }
u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// ---- GEMM frame ----------------------------------------------------------------------------------------------------
struct RowBlock {
  u32 row_begin;      // first row, or first sampled row (LM head)
  u32 num_rows;
  const f32* input;   // [num_rows, in_features]
  const f32* scales;  // [num_rows] factor of the product: 1 / rms behind a norm, else 1
};

u32 row_of(const OpContext& context, u32 idx) {
  return context.op.kind == kOpLmHead ? plan_sampled_rows(context.params, &context.plan)[idx] : idx;
}

RowBlock prepare_rows(const OpContext& context, u32 row_begin, u32 num_rows) {
  const ModelDims& dims = context.params.dims;
  const Op& op = context.op;
  const f32* source = context.buffer(op.input);
  f32* scales = context.scratch_f32(context.layout.scales_offset);
  if (op.norm == 0) {
    for (u32 i = 0; i < num_rows; ++i) scales[i] = 1.0f;
    return RowBlock{row_begin, num_rows, source + u64{row_begin} * op.in_features, scales};
  }
  f32* input = context.scratch_f32(context.layout.input_offset);
  const VectorKernels& kernels = vector_kernels();
  for (u32 i = 0; i < num_rows; ++i) {
    const f32* hidden = source + u64{row_of(context, row_begin + i)} * op.in_features;
    const f32 mean_square = kernels.sum_of_squares(hidden, op.in_features) / static_cast<f32>(op.in_features);
    scales[i] = 1.0f / sqrtf(mean_square + dims.norm_eps);
    kernels.scale_by_gain(hidden, reinterpret_cast<const f32*>(op.norm), op.in_features, dims.round_bf16 != 0, input + u64{i} * op.in_features);
  }
  return RowBlock{row_begin, num_rows, input, scales};
}

void multiply(const OpContext& context, const RowBlock& rows, u32 first_feature, u32 num_features, f32* out, u64 out_stride) {
  const Op& op = context.op;
  const u64 row_bytes = u64{op.in_features} * (op.weight_dtype == kBF16 ? 2 : 4);
  const void* weight = reinterpret_cast<const void*>(op.weight + first_feature * row_bytes);
  vector_kernels().dot_block(DotBlock{rows.input, op.in_features, rows.num_rows, op.weight_dtype, weight, op.in_features, num_features,
                                      op.in_features, out, out_stride});
}

// body(rows, first_feature, num_features) for this thread's features, cut in pieces of at most tile_units units.
template <class Body>
void for_each_tile(const OpContext& context, u32 num_rows, u32 unit_features, u32 tile_units, Body body) {
  const Share units = share_of(context, (context.op.out_features + unit_features - 1) / unit_features);
  if (units.begin == units.end) return;
  for (u32 row = 0; row < num_rows; row += context.layout.block_rows) {
    const RowBlock rows = prepare_rows(context, row, smaller(context.layout.block_rows, num_rows - row));
    for (u32 unit = units.begin; unit < units.end; unit += tile_units) {
      const u32 first = unit * unit_features;
      const u32 end = smaller(smaller(unit + tile_units, units.end) * unit_features, context.op.out_features);
      body(rows, first, end - first);
    }
  }
}

// ---- Ops -----------------------------------------------------------------------------------------------------------
void run_embed(const OpContext& context) {
  const Op& op = context.op;
  const Share share = share_of(context, context.plan.num_rows);
  for (u32 row = share.begin; row < share.end; ++row) {
    f32* hidden = context.buffer(kBufHidden) + u64{row} * op.in_features;
    const u64 offset = u64{plan_row_token(context.params, &context.plan, row)} * op.in_features;
    if (op.weight_dtype == kBF16) {
      const u16* weight = reinterpret_cast<const u16*>(op.weight) + offset;
      for (u32 i = 0; i < op.in_features; ++i) hidden[i] = f32_of_bf16(weight[i]);
    } else {
      memcpy(hidden, reinterpret_cast<const f32*>(op.weight) + offset, op.in_features * sizeof(f32));
    }
  }
}

void write_kv(const OpContext& context, const PlanRow& row, u32 kv_head, bool is_value, const f32* head) {
  const EngineParams& params = context.params;
  const u32 head_dim = params.dims.head_dim;
  const PlanSeq& seq = plan_seqs(params, &context.plan)[row.seq_idx];
  const u32* pages = reinterpret_cast<const u32*>(params.page_tables) + u64{seq.request_idx} * params.max_pages_per_request;
  const u64 tile = kv_tile_address(params, context.op.layer, pages[row.position / kPageTokens], kv_head);
  const u64 offset = (u64{is_value ? kPageTokens : 0} + row.position % kPageTokens) * head_dim;
  if (params.dims.kv_dtype == kBF16) {
    u16* target = reinterpret_cast<u16*>(tile) + offset;
    for (u32 i = 0; i < head_dim; ++i) target[i] = bf16_bits(head[i]);
  } else {
    memcpy(reinterpret_cast<f32*>(tile) + offset, head, head_dim * sizeof(f32));
  }
}

// One head of one row: row scale, bias, q/k norm, rotary embedding, rounding; then to the query buffer or the KV page.
void finish_head(const OpContext& context, u32 row_idx, u32 head_idx, f32 scale, f32* values) {
  const ModelDims& dims = context.params.dims;
  const Op& op = context.op;
  const PlanRow& row = plan_rows(context.params, &context.plan)[row_idx];
  const u32 head_dim = dims.head_dim;
  const bool is_query = head_idx < dims.num_heads;
  const bool is_value = head_idx >= dims.num_heads + dims.num_kv_heads;
  for (u32 i = 0; i < head_dim; ++i) values[i] *= scale;
  if (op.bias != 0) {
    const f32* bias = reinterpret_cast<const f32*>(op.bias) + u64{head_idx} * head_dim;
    for (u32 i = 0; i < head_dim; ++i) values[i] += bias[i];
  }
  const u64 gain_address = is_value ? 0 : is_query ? op.q_norm : op.k_norm;
  if (gain_address != 0) {
    const f32* gain = reinterpret_cast<const f32*>(gain_address);
    const f32 mean_square = vector_kernels().sum_of_squares(values, head_dim) / static_cast<f32>(head_dim);
    const f32 inverse_rms = 1.0f / sqrtf(mean_square + dims.norm_eps);
    for (u32 i = 0; i < head_dim; ++i) values[i] = values[i] * inverse_rms * gain[i];
  }
  if (!is_value && op.rope != 0) {
    const u32 half = head_dim / 2;
    const f32* table = reinterpret_cast<const f32*>(op.rope) + u64{row.position} * head_dim;
    for (u32 i = 0; i < half; ++i) {
      const f32 low = values[i], high = values[i + half], cosine = table[2 * i], sine = table[2 * i + 1];
      values[i] = low * cosine - high * sine;
      values[i + half] = high * cosine + low * sine;
    }
  }
  if (dims.round_bf16 != 0) {
    for (u32 i = 0; i < head_dim; ++i) values[i] = round_to_bf16(values[i]);
  }
  if (is_query) {
    memcpy(context.buffer(kBufQuery) + (u64{row_idx} * dims.num_heads + head_idx) * head_dim, values, head_dim * sizeof(f32));
  } else {
    write_kv(context, row, (head_idx - dims.num_heads) % dims.num_kv_heads, is_value, values);
  }
}

void run_qkv(const OpContext& context) {
  const u32 head_dim = context.params.dims.head_dim;
  f32* tile = context.scratch_f32(context.layout.tile_offset);
  for_each_tile(context, context.plan.num_rows, head_dim, 1, [&](const RowBlock& rows, u32 first, u32 num) {
    multiply(context, rows, first, num, tile, head_dim);
    for (u32 i = 0; i < rows.num_rows; ++i) {
      finish_head(context, rows.row_begin + i, first / head_dim, rows.scales[i], tile + u64{i} * head_dim);
    }
  });
}

void run_project(const OpContext& context) {
  const u32 hidden_features = context.params.dims.hidden;
  f32* tile = context.scratch_f32(context.layout.tile_offset);
  const f32* bias = reinterpret_cast<const f32*>(context.op.bias);
  for_each_tile(context, context.plan.num_rows, 8, kTileFeatures / 8, [&](const RowBlock& rows, u32 first, u32 num) {
    multiply(context, rows, first, num, tile, kTileFeatures);
    for (u32 i = 0; i < rows.num_rows; ++i) {
      f32* hidden = context.buffer(kBufHidden) + u64{rows.row_begin + i} * hidden_features + first;
      const f32* product = tile + u64{i} * kTileFeatures;
      for (u32 f = 0; f < num; ++f) hidden[f] += bias != nullptr ? product[f] + bias[first + f] : product[f];
    }
  });
}

void run_gate_up(const OpContext& context) {
  const ModelDims& dims = context.params.dims;
  f32* tile = context.scratch_f32(context.layout.tile_offset);
  for_each_tile(context, context.plan.num_rows, 16, kTileFeatures / 16, [&](const RowBlock& rows, u32 first, u32 num) {
    multiply(context, rows, first, num, tile, kTileFeatures);
    for (u32 i = 0; i < rows.num_rows; ++i) {
      f32* out = context.buffer(kBufActivation) + u64{rows.row_begin + i} * dims.intermediate + first / 2;
      vector_kernels().gate_up(tile + u64{i} * kTileFeatures, num / 2, rows.scales[i], dims.round_bf16 != 0, out);
    }
  });
}

void run_lm_head(const OpContext& context) {
  const u32 vocab = context.params.dims.vocab;
  for_each_tile(context, context.plan.num_sample_rows, 8, kTileFeatures / 8, [&](const RowBlock& rows, u32 first, u32 num) {
    f32* logits = context.buffer(kBufLogits) + u64{rows.row_begin} * vocab + first;
    multiply(context, rows, first, num, logits, vocab);
    for (u32 i = 0; i < rows.num_rows; ++i)
      for (u32 f = 0; f < num; ++f) logits[u64{i} * vocab + f] *= rows.scales[i];
  });
}

void run_sample(const OpContext& context) {
  SampleScratch* scratch = reinterpret_cast<SampleScratch*>(context.scratch + context.layout.sample_offset);
  for (u32 idx = context.thread_idx; idx < context.plan.num_sample_rows; idx += context.num_threads) {
    const f32* logits = context.buffer(kBufLogits) + u64{idx} * context.params.dims.vocab;
    sample_request(SingleSampleGroup{}, context.params, &context.plan, idx, logits, nullptr, 0, scratch);
  }
}

bool run_op(const OpContext& context) {
  switch (context.op.kind) {
    case kOpEmbed: run_embed(context); return true;
    case kOpQkv: run_qkv(context); return true;
    case kOpAttention: run_attention(context); return true;
    case kOpProject: run_project(context); return true;
    case kOpGateUp: run_gate_up(context); return true;
    case kOpLmHead: run_lm_head(context); return true;
    case kOpSample: run_sample(context); return true;
    case kOpNull: run_null(context); return true;
    default: return false;
  }
}

}  // namespace

ScratchLayout scratch_layout(const ModelDims& dims) {
  const u32 group = dims.num_heads / dims.num_kv_heads;
  ScratchLayout layout{};
  layout.block_rows = smaller(128, larger(16, static_cast<u32>(kInputCacheBytes / (u64{dims.hidden} * sizeof(f32)))));
  layout.tile_features = larger(kTileFeatures, dims.head_dim);
  layout.attention_rows = larger(1, 64 / group);
  const u64 num_queries = u64{layout.attention_rows} * group;
  u64 offset = 0;
  const auto place = [&](u64 num_bytes) {
    const u64 begin = offset;
    offset += align_up(num_bytes);
    return begin;
  };
  layout.input_offset = place(u64{layout.block_rows} * dims.hidden * sizeof(f32));
  layout.scales_offset = place(layout.block_rows * sizeof(f32));
  layout.tile_offset = place(u64{layout.block_rows} * layout.tile_features * sizeof(f32));
  layout.queries_offset = place(num_queries * dims.head_dim * sizeof(f32));
  layout.outputs_offset = place(num_queries * dims.head_dim * sizeof(f32));
  layout.scores_offset = place(num_queries * kPageTokens * sizeof(f32));
  layout.softmax_offset = place(4 * num_queries * sizeof(f32));
  layout.sample_offset = place(sizeof(SampleScratch));
  layout.num_bytes = offset;
  return layout;
}

u64 reference_workspace_bytes(const EngineParams& params, u32 workspace_idx) {
  const ModelDims& dims = params.dims;
  const u64 rows = params.max_step_tokens;
  switch (workspace_idx) {
    case kBufHidden: return rows * dims.hidden * sizeof(f32);
    case kBufQuery:
    case kBufAttention: return rows * dims.num_heads * dims.head_dim * sizeof(f32);
    case kBufActivation: return rows * dims.intermediate * sizeof(f32);
    case kBufLogits: return u64{params.max_batch} * dims.vocab * sizeof(f32);
    case kWorkspaceScratch: return u64{params.num_workers} * scratch_layout(dims).num_bytes;
    default: return 0;
  }
}

void run_program(const EngineParams& params, const StepPlan& plan, u32 thread_idx, ThreadBarrier& barrier) {
  const Op* ops = reinterpret_cast<const Op*>(params.ops);
  const ScratchLayout layout = scratch_layout(params.dims);
  u8* scratch = reinterpret_cast<u8*>(params.workspaces[kWorkspaceScratch]) + thread_idx * layout.num_bytes;
  for (u32 op_idx = 0; op_idx < params.num_ops; ++op_idx) {
    const OpContext context{params, plan, ops[op_idx], thread_idx, barrier.num_threads(), layout, scratch};
    trace_op(params, plan.step, op_idx, thread_idx, kOpBegins);
    const bool is_known = run_op(context);
    trace_op(params, plan.step, op_idx, thread_idx, kOpIsDone);
    // Hazard: the next op reads what other threads of this op write, and overwrites what they still read.
    barrier.wait(thread_idx);
    if (!is_known) {  // all threads see the same op, so all leave here
      if (thread_idx == 0) record_fault(params, kFaultBadProgram, kSiteEmulatedOp, op_idx, ops[op_idx].kind);
      return;
    }
  }
}

}  // namespace blinkimp
