// Streams the KV pages of attention through the weight ring, ahead of the op: called by the weight producer, one thread. GPU only.
//
// A page and kv head is one 32 KB piece (head_dim 128: a stage of K, a stage of V) or 16 KB (head_dim 64: one stage of both).
// Order: the two warpgroups' narrow pages by turns, while both have some; then the wide items, whose pages both warpgroups read.
// Narrow pages do not wait for this layer's QKV op: they are prefetched as the last step left them, and the consumer puts in the one new
// key and value (patch_page() of attention_tile.cuh). Ordering such pages last would not do: with short contexts most pages are last ones. Of a last page
// only the groups of 8 tokens up to the row's own are brought: the rest keep what stood there, whose scores are masked and whose values are zeroed.
// Wide pages wait for it from the share's first new position on, or from the first page where others fill its pages in this step (prefix_is_fresh): such a
// share is wide though it may be of one row.
// I1 A page is brought once the one kPagesOnTheWay before it has landed. Copies land in any order, and a warp that skips the other warpgroup's pages
//    has not seen them: it asks for a stage, two pages past the last that it saw, by the parity of a phase, and would take the phase before the one
//    in progress for it. So what last stood in that stage has landed when a warp asks.
// Called by device/worker.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_schedule.cuh>

namespace blinkimp {

template <int kHeadDim>
constexpr u32 kPageStages = 2 * kKvTileBytes<kHeadDim> / kWeightStageBytes;

// A warpgroup's next page is the one after the next where the other's lies between: of the ring's kWeightStages / kPageStages pages, two less at most (I1). Of
// narrow pages 64 KB, which is faster (PERFORMANCE.md, tenth state).
template <int kHeadDim, bool kIsNarrow>
constexpr u32 kPagesOnTheWay = kIsNarrow ? (64 << 10) / (2 * kKvTileBytes<kHeadDim>) : kWeightStages / kPageStages<kHeadDim> - 2;
static_assert(kPagesOnTheWay<64, true> <= kPagesOnTheWay<64, false> && kPagesOnTheWay<128, true> <= kPagesOnTheWay<128, false>, "I1");

template <int kHeadDim>
BK_INLINE const u8* kv_tile(const EngineParams& params, u32 layer, u32 page_id, u32 kv_head) {
  return reinterpret_cast<const u8*>(params.kv_cache) + kv_tile_offset<kHeadDim>(params.num_pages, params.dims.num_kv_heads, layer, page_id, kv_head);
}

// Until the planning warp has written this step's schedule.
BK_INLINE void wait_schedule(const EngineParams& params, AttentionShared& attention, u32 step) {
  wait_mbarrier<true>(params, &attention.schedule_ready, step & 1, kSiteAttentionSchedule);
}

// kIsNarrow: nobody else reads the page in this step, so it is streamed. num_groups: of kKvGroupTokens, from the page's first on, and never 0: a
// first stage without bytes would be full before the second one is free. A wide page is brought whole.
template <int kHeadDim, bool kIsNarrow>
BK_INLINE void produce_page(const EngineParams& params, u32 layer, u32 page_id, u32 kv_head, u32 num_groups, u8* shared_memory, WorkerShared& shared, RingCursor& cursor) {
  constexpr u32 kStageBlocks = kWeightStageBytes / kKvBlockBytes;
  const u32 block_bytes = num_groups * kKvGroupBytes;  // of each block of dimensions
  const u8* tile = kv_tile<kHeadDim>(params, layer, page_id, kv_head);
  u64* full = nullptr;  // of the page's first stage, on which the bytes of both are counted: one wait for a page
#pragma unroll
  for (u32 i = 0; i < kPageStages<kHeadDim>; ++i) {
    wait_mbarrier<true>(params, &shared.weights_empty[cursor.stage], cursor.phase, kSiteWeightRing);
    if (i == 0) {
      wait_landed(params, shared, cursor, kPagesOnTheWay<kHeadDim, kIsNarrow> * kPageStages<kHeadDim>);
      full = &shared.weights_full[cursor.stage];
      mbarrier_arrive_expect_bytes(full, kPageStages<kHeadDim> * kStageBlocks * block_bytes);
    } else {
      mbarrier_arrive(&shared.weights_full[cursor.stage]);
    }
    u8* place = shared_memory + kRingOffset + cursor.stage * kWeightStageBytes;
    const u8* source = tile + i * kWeightStageBytes;
    if constexpr (!kIsNarrow) {
      bulk_copy_to_shared(place, source, kWeightStageBytes, full);
    } else if (block_bytes == kKvBlockBytes) {
      bulk_copy_streamed(place, source, kWeightStageBytes, full);
    } else {
      for (u32 block = 0; block < kStageBlocks; ++block) bulk_copy_streamed(place + block * kKvBlockBytes, source + block * kKvBlockBytes, block_bytes, full);
    }
    cursor.advance(kWeightStages);
  }
}

template <int kHeadDim>
BK_INLINE void produce_narrow(const EngineParams& params, const Op& op, const StepPlan* plan, AttentionShared& attention, u8* shared_memory, WorkerShared& shared, RingCursor& cursor) {
  const PlanSeq* seqs = plan_seqs(params, plan);
  const WindowSchedule& schedule = schedule_of(attention, op.window);
  // A page's id comes to shared memory while the page before is issued: a load that this thread waits for comes behind all pages that are on their way.
  const auto fetch_page_id = [&](ProducerWalk& own) {
    cp_async_4(shared_address(&own.page_id), page_table_of(params, own.walk.request_idx) + own.walk.page);
    cp_async_commit();
  };
  u32 num_live = 0;
  for (u32 i = 0; i < 2; ++i) {  // the walks stand in shared memory: both do not fit into a producer's registers
    ProducerWalk& own = attention.producer_walks[i];
    own.walk = schedule.narrow[i];
    own.num_pages = 0;
    if (normalise<false>(params, seqs, attention, op.window, own.walk)) {
      num_live++;
      own.num_pages = run_pages(own.walk);
      fetch_page_id(own);
    }
  }
  for (u32 i = 0; num_live; i ^= 1) {
    ProducerWalk& own = attention.producer_walks[i];
    if (own.num_pages == 0) continue;
    if (num_live == 2) cp_async_wait<1>();  // the last one is the other walk's
    else cp_async_wait<0>();
    const u32 page_id = *opaque(&own.page_id);  // which a copy changed
    const u32 kv_head = own.walk.kv_head;
    const u32 num_groups = min((own.walk.position - own.walk.page * kPageTokens) / kKvGroupTokens + 1, kPageTokens / kKvGroupTokens);  // up to the row's own token
    own.walk.page++;
    own.walk.num_pages--;
    if (--own.num_pages == 0) {
      if (normalise<false>(params, seqs, attention, op.window, own.walk)) own.num_pages = run_pages(own.walk);
      else num_live--;
    }
    if (own.num_pages) fetch_page_id(own);
    produce_page<kHeadDim, true>(params, op.layer, page_id, kv_head, num_groups, shared_memory, shared, cursor);
  }
}

template <int kHeadDim>
BK_INLINE void produce_wide(const EngineParams& params, const Op& op, const StepPlan* plan, AttentionShared& attention, u8* shared_memory, WorkerShared& shared, RingCursor& cursor, u32 num_barriers) {
  const PlanSeq* seqs = plan_seqs(params, plan);
  WideWalk walk{0, 0, 0};
  WideItem item;
  bool has_waited = false;
  while (next_wide_item(params, seqs, attention, walk, &item)) {
    const PlanSeq& seq = seqs[item.seq_idx];
    const u32* page_table = page_table_of(params, seq.request_idx);
    const u32 first_new_page = seq.prefix_is_fresh ? 0 : seq.position_begin / kPageTokens;
    const u32 page_begin = wide_page_begin(item, seq.position_begin, attention.group_reciprocal, op.window);
    const u32 page_end = wide_page_end(item, seq.position_begin, attention.group_reciprocal);
    u32 next_page_id = page_table[page_begin];
    for (u32 page = page_begin; page < page_end; ++page) {
      const u32 page_id = next_page_id;
      if (page + 1 < page_end) next_page_id = page_table[page + 1];
      if (!has_waited && page >= first_new_page) {
        wait_grid<true>(params, num_barriers);
        fence_proxy_async();  // the rows were written by ordinary stores of other SMs
        has_waited = true;
      }
      produce_page<kHeadDim, false>(params, op.layer, page_id, item.kv_head, kPageTokens / kKvGroupTokens, shared_memory, shared, cursor);
    }
  }
}

// num_barriers: grid barriers passed when this layer's QKV op is complete.
template <int kHeadDim>
BK_INLINE void produce_attention(const EngineParams& params, const Op& op, const StepPlan* plan, u32 step, u8* shared_memory, WorkerShared& shared, AttentionShared& attention, RingCursor& cursor, u32 num_barriers) {
  wait_schedule(params, attention, step);
  wait_grid<true>(params, num_barriers - 1);  // all earlier steps' keys and values are visible: the QKV op itself, which this does not wait for, comes after
  fence_proxy_async();
  produce_narrow<kHeadDim>(params, op, plan, attention, shared_memory, shared, cursor);
  produce_wide<kHeadDim>(params, op, plan, attention, shared_memory, shared, cursor, num_barriers);
}

}  // namespace blinkimp
