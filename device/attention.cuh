// Paged causal attention of a step on Hopper: both products by wgmma, keys and values streamed through the weight ring. GPU only.
//
//   attention_planner.cuh    who computes what, once a step                    (warp 10)
//   attention_producer.cuh   pages into the ring, ahead of the op              (warp 8)
//   attention.cuh            the two compute warpgroups: runs of pages          (here)
//   attention_merge.cuh      units that several warpgroups share
// One loop serves decode rows and prefill chunks: 64 packed rows of a kv head's group (a decode row fills 1..16 of them) x a page of keys. In
// a warpgroup's stream of wgmmas, the outputs of one page and the scores of the next stand side by side, and its softmax runs while the
// other warpgroup's are computed; in wide items named barriers keep them taking turns.
// Scratch: kAttentionScratchBytes<head_dim>, aligned to 1024 bytes, free of readers and writers at the call; the ring's cursor is
// WorkerShared.compute.cursors.weights. store.chunk(row, column, uint4) writes 8 outputs of a plan row, store.pair(row, column, u32) two;
// column = head * head_dim + dimension.
// Called by device/worker.cuh. Test: pytest -m gpu tests/gpu/test_attention.py; without a GPU: pytest tests/host/test_attention_simt.py
#pragma once
#include <attention_merge.cuh>
#include <attention_planner.cuh>
#include <attention_producer.cuh>
#include <ptx_wgmma.cuh>
#include <ptx_wgmma_attention.cuh>

namespace blinkimp {

template <int kHeadDim>
constexpr u32 kQueryTileBytes = kTileRows * kHeadDim * 2;  // [head_dim / 64][64 rows][64], swizzled as K is
template <int kHeadDim>
constexpr u32 kAttentionScratchBytes = 2 * kQueryTileBytes<kHeadDim>;

// Named barriers: 1 is all compute threads'; these are a warpgroup's own, and its turn at the tensor cores.
constexpr u32 kWarpgroupBarrier = 2;
constexpr u32 kTurnBarrier = 4;
constexpr u32 kNoSuchPage = 0xffffffffu;

BK_INLINE u32 compute_warpgroup() { return thread_idx() / kWarpgroupThreads; }
BK_INLINE bool is_elected() { return thread_idx() % kWarpgroupThreads == 0; }
BK_INLINE void warpgroup_sync() { barrier_sync(kWarpgroupBarrier + compute_warpgroup(), kWarpgroupThreads); }

// ---- Runs --------------------------------------------------------------------------------------------------------
// The pages that hold a key which some row between the two positions must not see: page >= mask_from or < mask_until.
BK_INLINE void set_mask_pages(AttentionRun& run, u32 first_position, u32 last_position, u32 window) {
  run.mask_from = (first_position + 1) / kPageTokens;
  run.mask_until = (first_visible_key(last_position, window) + kPageTokens - 1) / kPageTokens;
}

// The next run of a warpgroup, by its first thread. Out of line: loops of one thread, inlined, make the compiler take the warp for divergent from
// there on, and wgmma's descriptors then leave the uniform registers.
template <int kHeadDim>
__device__ __noinline__ void next_run(const EngineParams& params, AttentionShared& attention, u32 warpgroup) {
  const Op& op = *attention.op;
  const PlanSeq* seqs = plan_seqs(params, attention.plan);
  const u32 num_kv_heads = params.dims.num_kv_heads;
  AttentionRun& run = attention.runs[warpgroup];
  run.group = attention.group;
  run.window = op.window;
  if (normalise(seqs, attention, num_kv_heads, op.window, attention.walks[warpgroup])) {
    NarrowWalk& walk = *opaque(&attention.walks[warpgroup]);  // read anew: kept from before, its words would be more than there are registers
    const u32 unit_begin = first_page(walk.position, op.window);
    const u32 unit_end = walk.position / kPageTokens + 1;
    const u32 num_pages = run_pages(walk);
    run.kind = kRunNarrow;
    run.kv_head = walk.kv_head;
    run.row_begin = walk.row;
    run.position_begin = walk.position;
    run.packed_begin = 0;
    run.num_packed = attention.group;
    run.page_begin = walk.page;
    run.page_end = walk.page + num_pages;
    run.skip_before = run.skip_after = run.order_begin = run.order_end = 0;
    set_mask_pages(run, walk.position, walk.position, op.window);
    run.key_end = walk.position + 1;
    run.patch_page = kNoSuchPage;
    if (run.page_end == unit_end) {
      run.patch_page = unit_end - 1;
      const u32 page_id = page_table_of(params, walk.request_idx)[run.patch_page];
      run.patch_source = reinterpret_cast<u64>(kv_tile<kHeadDim>(params, op.layer, page_id, walk.kv_head));
    }
    run.first_split = walk.page / kSplitPages - unit_begin / kSplitPages;
    run.unit_idx = walk.seq_idx * num_kv_heads + walk.kv_head;
    run.item_begin = walk.item_idx - run.first_split;
    run.num_splits = splits_between(unit_begin, unit_end);
    walk.item_idx += splits_between(run.page_begin, run.page_end);
    walk.page += num_pages;
    walk.num_pages -= num_pages;
    return;
  }
  WideItem item;
  if (!next_wide_item(params, seqs, attention, attention.wide_walks[warpgroup], &item)) {
    run.kind = kRunEnd;
    return;
  }
  const PlanSeq& seq = seqs[item.seq_idx];
  run.kind = kRunWide;
  run.kv_head = item.kv_head;
  run.row_begin = seq.row_begin;
  run.position_begin = seq.position_begin;
  run.key_end = seq.position_begin + seq.num_rows;
  run.skip_before = run.skip_after = run.order_begin = 0;
  run.order_end = kNoSuchPage;
  const u32 group = attention.group;
  const u32 item_begin = wide_page_begin(item, run.position_begin, group, op.window);
  const u32 item_end = wide_page_end(item, run.position_begin, group);
#pragma unroll 1
  for (u32 i = 0; i < 2; ++i) {  // both warpgroups' pages: turns are taken where they overlap
    const u32 packed_begin = item.tile_begin + i * kTileRows;
    const u32 num_packed = packed_begin < item.tile_end ? min(kTileRows, item.tile_end - packed_begin) : 0;
    const u32 first_position = run.position_begin + packed_begin / group;
    const u32 last_position = num_packed ? run.position_begin + (packed_begin + num_packed - 1) / group : first_position;
    const u32 page_begin = num_packed ? first_page(first_position, op.window) : item_begin;
    const u32 page_end = num_packed ? last_position / kPageTokens + 1 : item_begin;
    if (page_begin > run.order_begin) run.order_begin = page_begin;
    run.order_end = min(run.order_end, page_end);
    if (i != warpgroup) continue;
    run.packed_begin = packed_begin;
    run.num_packed = num_packed;
    run.page_begin = page_begin;
    run.page_end = page_end;
    run.skip_before = page_begin - item_begin;
    run.skip_after = item_end - page_end;
    set_mask_pages(run, first_position, last_position, op.window);
  }
  if (run.order_end < run.order_begin) run.order_end = run.order_begin;
  run.patch_page = run.key_end % kPageTokens ? run.key_end / kPageTokens : kNoSuchPage;
  run.first_split = 0;
}

// Brings the run's query rows into the warpgroup's tile of the scratch; rows past them keep old bytes, whose products nobody reads.
template <int kHeadDim>
BK_INLINE void load_queries(const EngineParams& params, const AttentionRun& run, u8* tile) {
  constexpr u32 kChunks = kHeadDim / 8;
  const u32 group = run.group;
  const u16* query = reinterpret_cast<const u16*>(params.workspaces[kWsQuery]);
#pragma unroll 4
  for (u32 idx = thread_idx() % kWarpgroupThreads; idx < run.num_packed * kChunks; idx += kWarpgroupThreads) {
    const u32 packed = run.packed_begin + idx / kChunks;
    const u64 row = run.row_begin + packed / group;
    const u32 head = run.kv_head * group + packed % group;
    const uint4 chunk = *reinterpret_cast<const uint4*>(query + (row * params.dims.num_heads + head) * kHeadDim + idx % kChunks * 8);
    *reinterpret_cast<uint4*>(tile + kv_byte_offset(idx / kChunks, idx % kChunks * 8)) = chunk;
  }
  fence_proxy_async();  // written by ordinary stores, read by wgmma
}

// ---- Pages -------------------------------------------------------------------------------------------------------
template <int kHeadDim>
BK_INLINE RingCursor values_of(RingCursor keys) {
  if constexpr (kPageStages<kHeadDim> == 2) keys.advance(kWeightStages);
  return keys;
}

BK_INLINE void advance_by(RingCursor& cursor, u32 num_stages) {
  cursor.stage += num_stages;
  cursor.phase ^= cursor.stage / kWeightStages & 1u;
  cursor.stage %= kWeightStages;
}

// Past a page; `others`: pages of the other warpgroup still to come, one between each two of ours.
template <int kHeadDim>
BK_INLINE void next_page(RingCursor& keys, u32& others) {
  const u32 num_pages = others ? 2 : 1;
  if (others) others--;
#pragma unroll
  for (u32 i = 0; i < kPageStages<kHeadDim>; ++i) keys.advance(kWeightStages);
  if (num_pages == 2) {
#pragma unroll
    for (u32 i = 0; i < kPageStages<kHeadDim>; ++i) keys.advance(kWeightStages);
  }
}

// All lanes of a warp together: the vote keeps the warp provably in step, which uniform registers need (wgmma's descriptors stand in them;
// moved there for each instruction, they would cost twice the product).
BK_INLINE void wait_stage(const EngineParams& params, WorkerShared& shared, const RingCursor& cursor) {
  u64* barrier = &shared.weights_full[cursor.stage];
  if (__all_sync(0xffffffffu, mbarrier_try_wait(barrier, cursor.phase))) return;  // it mostly waits in there
  const u64 start_ns = device_clock_ns();
  while (!__all_sync(0xffffffffu, mbarrier_try_wait(barrier, cursor.phase))) {
    if (__any_sync(0xffffffffu, device_clock_ns() - start_ns > params.spin_budget_ns)) fail(params, kFaultSpinExpired, kSiteWeightRing, cursor.phase, *barrier);
  }
}

// Wide: pages that only the other warpgroup computes. The first warp alone waits: a slow one might find its stage two laps on, and wait for ever.
template <int kHeadDim>
BK_INLINE void skip_pages(const EngineParams& params, WorkerShared& shared, RingCursor& keys, u32 num_pages) {
  for (u32 i = 0; i < num_pages * kPageStages<kHeadDim>; ++i) {
    if (uniform(thread_idx() % kWarpgroupThreads < 32)) wait_stage(params, shared, keys);  // an arrival before the stage's turn would count for the turn before
    mbarrier_arrive_if(&shared.weights_empty[keys.stage], is_elected());
    keys.advance(kWeightStages);
  }
}

// The page that the context ends in, in shared memory: puts in the new key and value of a decode row (the page was fetched before they were
// written) and zeroes the values past the context: their weights are zeros, but 0 * infinity would not be.
template <int kHeadDim>
BK_INLINE void patch_page(const AttentionRun& run, u8* keys, u8* values) {
  constexpr u32 kChunks = kHeadDim / 8;
  const u32 thread = thread_idx() % kWarpgroupThreads;
  if (run.kind == kRunNarrow && thread < 2 * kChunks) {
    const u32 offset = kv_byte_offset((run.key_end - 1) % kPageTokens, thread % kChunks * 8);
    const u8* source = reinterpret_cast<const u8*>(run.patch_source) + (thread < kChunks ? 0 : kKvTileBytes<kHeadDim>);
    *reinterpret_cast<uint4*>((thread < kChunks ? keys : values) + offset) = *reinterpret_cast<const uint4*>(source + offset);
  }
  for (u32 idx = (run.key_end - 1) % kPageTokens * kChunks + kChunks + thread; idx < kPageTokens * kChunks; idx += kWarpgroupThreads) {
    *reinterpret_cast<uint4*>(values + kv_byte_offset(idx / kChunks, idx % kChunks * 8)) = uint4{0, 0, 0, 0};
  }
  fence_proxy_async();  // written by ordinary stores, read by wgmma
  warpgroup_sync();     // the rows are whole before any warp's wgmma reads them
}

// scores = 64 query rows x 64 keys
template <int kHeadDim>
BK_INLINE void issue_scores(f32 (&scores)[kScoreWords], u32 queries, u32 keys) {
  const u64 a = wgmma_descriptor(queries);
  const u64 b = wgmma_descriptor(keys);
  static_assert(kTileRows == kPageTokens, "blocks of 64 dimensions are equally far apart in both tiles");
#pragma unroll
  for (u32 step = 0; step < kHeadDim / 16; ++step) {
    const u32 offset = step / 4 * (kKvBlockBytes >> 4) + step % 4 * 2;
    wgmma_m64_k16<static_cast<int>(kPageTokens)>(scores, a + offset, b + offset, step != 0);
  }
}

// outputs (+)= 64 rows of weights x 64 values
template <int kHeadDim>
BK_INLINE void issue_outputs(f32 (&outputs)[kHeadDim / 2], const u32 (&weights)[kWeightWords], u32 values, bool accumulate) {
  const u64 b = wgmma_transposed_descriptor(values, kKvBlockBytes);
#pragma unroll
  for (u32 step = 0; step < kPageTokens / 16; ++step) {
    wgmma_values_k16<kHeadDim>(outputs, weights + step * 4, b + step * (16 * kKvBlockDims * 2 >> 4), step != 0 || accumulate);
  }
}

// Masks the block's scores for this thread's two rows; rows past the run repeat its last one.
BK_INLINE void mask_page(const AttentionRun& run, u32 page, f32 (&scores)[kScoreWords]) {
  const u32 thread = opaque(thread_idx()) % kWarpgroupThreads;
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 row = min(thread / 32u * 16u + thread % 32u / 4u + half * 8u, run.num_packed - 1);
    const u32 position = run.position_begin + (run.packed_begin + row) / run.group;
    const i32 first_key = static_cast<i32>(page * kPageTokens);
    mask_scores(scores, half, static_cast<i32>(first_visible_key(position, run.window)) - first_key, static_cast<i32>(position) + 1 - first_key);
  }
}

// 4 x 4 words of the lanes of a quad, transposed: in, words[j] is this lane's pair of columns of tile j; out, words are the four pairs of tile
// (lane mod 4): 16 bytes side by side.
BK_INLINE void gather_chunk(u32 (&words)[4]) {
  const u32 lane = thread_idx() % 4u;
  const bool odd = lane & 1u;
  const bool high = lane & 2u;
#pragma unroll
  for (u32 i = 0; i < 4; i += 2) {
    const u32 received = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
    if (odd) words[i] = received;
    else words[i + 1] = received;
  }
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    const u32 received = __shfl_xor_sync(0xffffffffu, high ? words[i] : words[i + 2], 2);
    if (high) words[i] = received;
    else words[i + 2] = received;
  }
}

template <int kHeadDim, class Store>
BK_INLINE void store_rows(const AttentionRun& run, const f32 (&totals)[kHeadDim / 2], const FoldTotal (&total)[2], const Store& store) {
  const u32 thread = thread_idx() % kWarpgroupThreads;
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 row = thread / 32u * 16u + thread % 32u / 4u + half * 8u;
    const u32 packed = run.packed_begin + row;
    const u32 out_row = run.row_begin + packed / run.group;
    const u32 column = (run.kv_head * run.group + packed % run.group) * kHeadDim + thread % 4u * 8u;
    const f32 inverse_sum = __frcp_rn(total[half].sum);
#pragma unroll
    for (u32 tile = 0; tile < kHeadDim / 8; tile += 4) {
      u32 words[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 place = (tile + i) * 4 + half * 2;
        words[i] = pack_bf16x2(finish_value(totals[place], inverse_sum), finish_value(totals[place + 1], inverse_sum));
      }
      gather_chunk(words);
      if (row < run.num_packed) store.chunk(out_row, column + tile * 8u, uint4{words[0], words[1], words[2], words[3]});
    }
  }
}

// ---- A run -------------------------------------------------------------------------------------------------------
// keys: the ring's place of the run's first page, afterwards of the one behind its last. others: see next_page().
template <int kHeadDim, class Store>
BK_INLINE void run_run(const EngineParams& params, u8* shared_memory, WorkerShared& shared, AttentionShared& attention, RingCursor& keys, u32& others, const Store& store) {
  const AttentionRun& run = attention.runs[uniform(compute_warpgroup())];
  const f32 scale = params.dims.attention_scale * 1.4426950408889634f;  // exponentials are powers of 2
  const u32 ring = shared_address(shared_memory + kRingOffset);
  constexpr u32 kValuesOffset = kPageStages<kHeadDim> == 2 ? 0 : kKvTileBytes<kHeadDim>;
  const bool has_rows = uniform(thread_idx() % kWarpgroupThreads / 32u * 16u < run.num_packed);  // of this warp: if not, its products are never read

  f32 outputs[kHeadDim / 2];
  f32 totals[kHeadDim / 2];
  f32 scores[kScoreWords];
  u32 weights[kWeightWords];
#pragma unroll
  for (u32 i = 0; i < kHeadDim / 2; ++i) outputs[i] = totals[i] = 0.0f;
#pragma unroll
  for (u32 i = 0; i < kScoreWords; ++i) scores[i] = 0.0f;
#pragma unroll
  for (u32 i = 0; i < kWeightWords; ++i) weights[i] = 0;
  FoldTotal total[2] = {{minus_infinite_score(), 0.0f}, {minus_infinite_score(), 0.0f}};
  SoftmaxState state;
  state.reset();

  const auto wait_page = [&](const RingCursor& at, u32 page) {  // for its keys; for both tiles where they must be patched
    wait_stage(params, shared, at);
    if (uniform(page == run.patch_page)) {
      const RingCursor values = values_of<kHeadDim>(at);
      wait_stage(params, shared, values);
      patch_page<kHeadDim>(run, shared_memory + kRingOffset + at.stage * kWeightStageBytes, shared_memory + kRingOffset + values.stage * kWeightStageBytes + kValuesOffset);
    }
  };
  const auto query_tile = [&]() { return shared_address(shared_memory) + kScratchOffset + uniform(compute_warpgroup()) * kQueryTileBytes<kHeadDim>; };

  const auto release_stage = [&](u32 stage) {
    mbarrier_arrive_count(&shared.weights_empty[stage], is_elected() ? (run.kind == kRunNarrow ? 2 : 1) : 0);  // the only reader of a narrow page
  };

  u32 page = uniform(run.page_begin);
  wait_page(keys, page);
  wgmma_fence();
  issue_scores<kHeadDim>(scores, query_tile(), ring + uniform(keys.stage) * kWeightStageBytes);
  wgmma_commit();
  wgmma_wait<0>();
  if (kPageStages<kHeadDim> == 2) release_stage(keys.stage);
#pragma unroll 1
  for (bool starts_split = true, is_last = false; !is_last;) {
    // Scores of this page to weights; the outputs so far are of the pages before it.
    if (has_rows) {
      if (uniform(page >= run.mask_from || page < run.mask_until)) mask_page(run, page, scores);
      f32 factors[2];
      softmax_block(scores, scale, state, weights, factors);
      if (!starts_split) rescale_outputs(outputs, factors);
    }

    // Outputs of this page and scores of the next: the tensor cores run through, while the other warpgroup computes its weights.
    is_last = uniform(page + 1 == run.page_end);
    const bool in_turn = uniform(page >= run.order_begin && page < run.order_end);
    const RingCursor values = values_of<kHeadDim>(keys);
    next_page<kHeadDim>(keys, others);
    wait_stage(params, shared, values);
    if (!is_last) wait_page(keys, page + 1);
    if (in_turn) barrier_sync(kTurnBarrier + compute_warpgroup(), 2 * kWarpgroupThreads);
    const u32 values_address = ring + uniform(values.stage) * kWeightStageBytes + kValuesOffset;
    if (is_last) {
      wgmma_fence();
      issue_outputs<kHeadDim>(outputs, weights, values_address, !starts_split);
      wgmma_commit();
      if (in_turn) barrier_arrive(kTurnBarrier + 1 - compute_warpgroup(), 2 * kWarpgroupThreads);
      wgmma_wait<0>();
    } else {
      wgmma_fence();
      issue_outputs<kHeadDim>(outputs, weights, values_address, !starts_split);
      issue_scores<kHeadDim>(scores, query_tile(), ring + uniform(keys.stage) * kWeightStageBytes);
      wgmma_commit();
      if (in_turn) barrier_arrive(kTurnBarrier + 1 - compute_warpgroup(), 2 * kWarpgroupThreads);
      wgmma_wait<0>();
    }
    release_stage(values.stage);
    if (kPageStages<kHeadDim> == 2 && !is_last) release_stage(keys.stage);

    page++;
    starts_split = page % kSplitPages == 0;
    if (starts_split || is_last) {  // the end of a split
      const f32 sums[2] = {quad_total(state.sum[0]), quad_total(state.sum[1])};
      if (uniform(run.first_split != 0)) {
        const u32 item_idx = run.item_begin + run.first_split + (page - 1) / kSplitPages - run.page_begin / kSplitPages;
        store_part<kHeadDim>(params, item_idx, outputs, state.maximum, sums);
      } else {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          const FoldFactors factors = fold_split(total[half], state.maximum[half], sums[half], scale);
#pragma unroll
          for (u32 tile = 0; tile < kHeadDim / 8; ++tile) {
#pragma unroll
            for (u32 i = tile * 4 + half * 2; i < tile * 4 + half * 2 + 2; ++i) totals[i] = fold_value(totals[i], outputs[i], factors);
          }
        }
      }
      state.reset();
    }
  }

  const u32 num_run_splits = run.kind == kRunNarrow ? splits_between(run.page_begin, run.page_end) : 0;
  if (uniform(run.kind == kRunWide || num_run_splits == run.num_splits)) {
    store_rows<kHeadDim>(run, totals, total, store);
    return;
  }
  if (uniform(run.first_split == 0)) {
    const f32 maximum[2] = {total[0].maximum, total[1].maximum};
    const f32 sums[2] = {total[0].sum, total[1].sum};
    store_part<kHeadDim>(params, run.item_begin, totals, maximum, sums);
  }
  warpgroup_sync();  // all partial results are written before the first thread releases them
  if (is_elected()) {
    u32* counter = unit_counter<kHeadDim>(params, run.unit_idx);
    const u32 added = num_run_splits + (run.first_split == 0 ? num_run_splits << kFoldedShift : 0);
    const u32 count = atom_add_acq_rel_gpu(counter, added) + added;  // pairs with itself: the last sees what the others left
    attention.messages[compute_warpgroup()] = count;
    if (count % (1u << kFoldedShift) == run.num_splits) *counter = 0;  // for the next layer, grid barriers later
  }
  warpgroup_sync();  // nobody reads the message, or partial results, before the first thread has acquired them
  const u32 count = uniform(attention.messages[compute_warpgroup()]);
  if (count % (1u << kFoldedShift) == run.num_splits) {
    merge_unit<kHeadDim>(params, run.item_begin, count >> kFoldedShift, run.num_splits, run.row_begin, run.kv_head, store);
  }
}

// All compute threads; the op's inputs are visible to them. `step`: parity of the schedule.
template <int kHeadDim, class Store>
BK_INLINE void attend(const EngineParams& params, const Op& op, const StepPlan* plan, u32 step, u8* shared_memory, WorkerShared& shared, AttentionShared& attention, const Store& store) {
  static_assert(kAttentionScratchBytes<kHeadDim> <= kScratchBytes, "the query tiles");
  static_assert(kPageStages<kHeadDim> * kWeightStageBytes == 2 * kKvTileBytes<kHeadDim>, "a page fills whole stages");
  wait_schedule(params, attention, step);
  if (is_elected()) {
    attention.walks[compute_warpgroup()] = schedule_of(attention, op.window).narrow[compute_warpgroup()];
    attention.wide_walks[compute_warpgroup()] = WideWalk{0, 0, 0};
  }
  if (is_first_thread()) {
    attention.op = &op;
    attention.plan = plan;
  }
  named_barrier_sync<1, kComputeThreads>();  // op and plan are written
  RingCursor keys{uniform(shared.compute.cursors.weights.stage), uniform(shared.compute.cursors.weights.phase)};
  const u32 warpgroup = uniform(compute_warpgroup());
  // The ring holds a page of warpgroup 0, then one of warpgroup 1, and so on while both have some.
  u32 others = uniform(schedule_of(attention, op.window).narrow[1 - warpgroup].num_pages);
  if (warpgroup == 1 && others) {
    advance_by(keys, kPageStages<kHeadDim>);
    others--;
  }
#pragma unroll 1
  for (;;) {
    warpgroup_sync();  // hazard: a slow warp still reads the run, or its query tile
    if (is_elected()) next_run<kHeadDim>(params, attention, warpgroup);
    warpgroup_sync();  // the run is written
    const AttentionRun& run = attention.runs[warpgroup];
    const u32 kind = uniform(run.kind);
    if (kind != kRunNarrow) {
      advance_by(keys, others * kPageStages<kHeadDim>);  // the other warpgroup's last pages
      others = 0;
    }
    if (kind == kRunEnd) break;
    load_queries<kHeadDim>(params, run, shared_memory + kScratchOffset + warpgroup * kQueryTileBytes<kHeadDim>);
    warpgroup_sync();  // the query tile is whole
    skip_pages<kHeadDim>(params, shared, keys, uniform(run.skip_before));
    const bool takes_turns = uniform(run.order_begin != run.order_end);
    if (takes_turns && warpgroup == 1) barrier_arrive(kTurnBarrier, 2 * kWarpgroupThreads);  // warpgroup 0 has the first turn
    if (uniform(run.num_packed)) run_run<kHeadDim>(params, shared_memory, shared, attention, keys, others, store);
    if (takes_turns && warpgroup == 0) barrier_sync(kTurnBarrier, 2 * kWarpgroupThreads);  // takes the turn that warpgroup 1 left over
    skip_pages<kHeadDim>(params, shared, keys, uniform(run.skip_after));
  }
  named_barrier_sync<1, kComputeThreads>();  // hazard: a slow warp has not read the cursor yet
  if (is_first_thread()) shared.next_cursors = ConsumerCursors{keys, shared.compute.cursors.inputs};  // taken over when the op ends
}

}  // namespace blinkimp
