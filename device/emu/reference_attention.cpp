// Attention of the CPU interpreter: causal, paged, grouped heads, sliding window; one source for prefill and decode.
//
// A task is (a few rows of one request, one KV head). It walks the request's pages in rising order with a running softmax, so what
// is added to an output, and in which order, follows from the row's position alone: not from the chunk or the batch it came in.
// Called by reference_ops.cpp. Test: pytest tests/host/test_reference_ops.py
#include <string.h>

#include <emu/reference_ops.h>
#include <step_plan.cuh>

namespace blinkimp {
namespace {

struct AttentionTask {
  const PlanSeq& seq;
  u32 first_row;  // of the step
  u32 num_rows;
  u32 kv_head;
};

struct TaskScratch {  // this thread's; the members of AttendPage
  f32* queries;    // [num_queries, head_dim]
  f32* outputs;    // [num_queries, head_dim]
  f32* scores;     // [num_queries, kPageTokens]
  f32* maxima;     // [num_queries]
  f32* sums;       // [num_queries]
  u32* first_key;  // [num_queries]
  u32* end_key;    // [num_queries]
};

TaskScratch task_scratch(const OpContext& context) {
  const u64 num_queries = u64{context.layout.attention_rows} * (context.params.dims.num_heads / context.params.dims.num_kv_heads);
  f32* softmax = context.scratch_f32(context.layout.softmax_offset);
  return TaskScratch{context.scratch_f32(context.layout.queries_offset),
                     context.scratch_f32(context.layout.outputs_offset),
                     context.scratch_f32(context.layout.scores_offset),
                     softmax,
                     softmax + num_queries,
                     reinterpret_cast<u32*>(softmax + 2 * num_queries),
                     reinterpret_cast<u32*>(softmax + 3 * num_queries)};
}

// First key position that a row at `position` sees.
u32 window_begin(const Op& op, u32 position) { return op.window != 0 && position >= op.window ? position - op.window + 1 : 0; }

void run_task(const OpContext& context, const AttentionTask& task) {
  const EngineParams& params = context.params;
  const ModelDims& dims = params.dims;
  const u32 head_dim = dims.head_dim, group = dims.num_heads / dims.num_kv_heads;
  const u32 num_queries = task.num_rows * group;
  const u64 row_features = u64{dims.num_heads} * head_dim;
  const u64 head_offset = u64{task.kv_head} * group * head_dim;
  const TaskScratch scratch = task_scratch(context);

  // The group's heads lie side by side in a row: one copy per row.
  for (u32 i = 0; i < task.num_rows; ++i) {
    memcpy(scratch.queries + u64{i} * group * head_dim, context.buffer(kBufQuery) + (task.first_row + i) * row_features + head_offset,
           u64{group} * head_dim * sizeof(f32));
  }
  memset(scratch.outputs, 0, u64{num_queries} * head_dim * sizeof(f32));
  for (u32 query = 0; query < num_queries; ++query) {
    scratch.maxima[query] = -__builtin_huge_valf();
    scratch.sums[query] = 0.0f;
  }

  const u32 first_position = task.seq.position_begin + (task.first_row - task.seq.row_begin);
  const u32 last_position = first_position + task.num_rows - 1;
  const u32* pages = reinterpret_cast<const u32*>(params.page_tables) + u64{task.seq.request_idx} * params.max_pages_per_request;
  const u64 tile_bytes = u64{kPageTokens} * head_dim * (dims.kv_dtype == kBF16 ? 2 : 4);
  for (u32 page = window_begin(context.op, first_position) / kPageTokens; page <= last_position / kPageTokens; ++page) {
    const u32 page_begin = page * kPageTokens;
    for (u32 query = 0; query < num_queries; ++query) {
      const u32 position = first_position + query / group;
      const u32 begin = window_begin(context.op, position);
      const u32 end = position + 1;
      scratch.first_key[query] = begin > page_begin ? begin - page_begin : 0;
      scratch.end_key[query] = end <= page_begin ? 0 : end - page_begin < kPageTokens ? end - page_begin : kPageTokens;
    }
    const u64 keys = kv_tile_address(params, context.op.layer, pages[page], task.kv_head);
    vector_kernels().attend_page(AttendPage{scratch.queries, reinterpret_cast<const void*>(keys),
                                            reinterpret_cast<const void*>(keys + tile_bytes), scratch.first_key, scratch.end_key,
                                            num_queries, head_dim, dims.kv_dtype, dims.attention_scale, scratch.scores, scratch.maxima,
                                            scratch.sums, scratch.outputs});
  }

  for (u32 query = 0; query < num_queries; ++query) {
    f32* out = context.buffer(kBufAttention) + (task.first_row + query / group) * row_features + head_offset + u64{query % group} * head_dim;
    const f32* output = scratch.outputs + u64{query} * head_dim;
    const f32 inverse_sum = 1.0f / scratch.sums[query];  // every row sees at least itself
    for (u32 i = 0; i < head_dim; ++i) out[i] = dims.round_bf16 != 0 ? round_to_bf16(output[i] * inverse_sum) : output[i] * inverse_sum;
  }
}

}  // namespace

void run_attention(const OpContext& context) {
  const PlanSeq* seqs = plan_seqs(context.params, &context.plan);
  const u32 num_kv_heads = context.params.dims.num_kv_heads;
  u32 task_idx = 0;  // tasks go round the threads: the late, long rows of a prompt spread over all of them
  for (u32 seq_idx = 0; seq_idx < context.plan.num_seqs; ++seq_idx) {
    const PlanSeq& seq = seqs[seq_idx];
    for (u32 row = 0; row < seq.num_rows; row += context.layout.attention_rows) {
      const u32 left = seq.num_rows - row;
      const u32 num_rows = left < context.layout.attention_rows ? left : context.layout.attention_rows;
      for (u32 kv_head = 0; kv_head < num_kv_heads; ++kv_head, ++task_idx) {
        if (task_idx % context.num_threads == context.thread_idx) run_task(context, AttentionTask{seq, seq.row_begin + row, num_rows, kv_head});
      }
    }
  }
}

}  // namespace blinkimp
